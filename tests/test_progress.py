"""What is shown while models are fetched and workers start."""

from __future__ import annotations

import pytest

from dsi_actors.console.progress import ShownProgress
from dsi_actors.progress import ProgressLines


def test_lines_are_few() -> None:
    lines: list[str] = []
    report = ProgressLines(lines.append)
    report("asking the hub for org/name", None, "")
    for percent in range(101):
        report("fetching org/name", percent / 100, f"{percent} of 100 MB")
    report("waiting for workers", None, "target 1 is ready")
    report("waiting for workers", None, "target 1 is ready")
    report("waiting for workers", None, "target 2 is ready")
    assert lines[:3] == [
        "asking the hub for org/name",
        "fetching org/name 0% (0 of 100 MB)",
        "fetching org/name 10% (10 of 100 MB)",
    ]
    assert lines[-3:] == [
        "fetching org/name 100% (100 of 100 MB)", "waiting for workers (target 1 is ready)",
        "waiting for workers (target 2 is ready)",
    ]  # fmt: skip
    assert len(lines) == 1 + 11 + 2


@pytest.mark.parametrize("terminal", [False, True])
def test_all_of_it_goes_to_standard_error_and_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    with ShownProgress() as progress:
        progress("fetching [org/name]", 0.5, "5 of 10 MB")
        progress("fetching [org/name]", 0.9, "9 of 10 MB")
        progress("starting workers", None, "")
        progress.close()
        progress("target 1 is ready", None, "")
    progress("target 1 died", None, "")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "target 1" not in shown.err
    if terminal:
        assert "starting workers" in shown.err
    else:
        assert shown.err.splitlines() == [
            "fetching [org/name] 50% (5 of 10 MB)", "fetching [org/name] 90% (9 of 10 MB)", "starting workers"
        ]  # fmt: skip
