"""Where sockets and temporary files go when the usual place does not do."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

import dsi_actors
from dsi_actors.errors import ConfigError
from dsi_actors.host.temporary import socket_directory, temporary_directory
from support.timed import PROMPT, plain_decoding, text_of, timed_config

NAME = "orchestrator.sock"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """tempfile finds its place once."""
    monkeypatch.setattr(tempfile, "tempdir", None)


def long_directory(parent: Path) -> Path:
    made = parent / ("long" * 30)
    made.mkdir()
    return made


async def test_a_long_path_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(long_directory(tmp_path)))
    async with dsi_actors.Orchestrator(timed_config(sp=1)) as orchestrator:
        directory = Path(orchestrator.endpoint.removeprefix("ipc://")).parent
        assert directory.stat().st_mode & 0o777 == 0o700, "nobody else may enter"
        text = await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=5)))
    assert text == plain_decoding(PROMPT, 5)
    assert not directory.exists()


def test_the_directory_of_what_runs_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(long_directory(tmp_path)))
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        with socket_directory(NAME) as made:
            assert Path(made).parent == Path(runtime)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "run")  # whatever that is relative to
        with socket_directory(NAME) as made:
            assert Path(made).parent == Path("/tmp")


def test_a_name_that_is_no_text_is_no_place_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = os.path.join("/tmp", os.fsdecode(b"dsi-test-\xff"))
    Path(strange).mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", strange)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    try:
        with socket_directory(NAME) as made:
            assert Path(made).parent == Path("/tmp")
        with temporary_directory() as made:
            assert Path(made).parent == Path(strange)
    finally:
        Path(strange).rmdir()


def test_no_usable_directory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp', '/usr/tmp', '/']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    for make in (temporary_directory, lambda: socket_directory(NAME)):
        with pytest.raises(ConfigError, match=r"no directory for temporary files can be written: .* set TMPDIR"):
            make()


def test_no_short_directory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(long_directory(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"there is no place for a socket: .* set TMPDIR to a directory with a short path"
    ):
        socket_directory("x" * 200)
