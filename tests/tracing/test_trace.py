"""From a recording to a picture: every span has an owner, a time and a fate; and bad files are named."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsi_actors.core import GenerationCore, Policy
from dsi_actors.core.actions import Action
from dsi_actors.core.events import Event
from dsi_actors.errors import ConfigError
from dsi_actors.simulation.discrete_events import DiscreteEventDriver
from dsi_actors.simulation.scripts import AcceptanceScript, constant, independent
from dsi_actors.tracing.chrome import chrome_trace
from dsi_actors.tracing.lanes import draw
from dsi_actors.tracing.page import html_page
from dsi_actors.tracing.record import Moment, Recorder, Recording, open_recording, read_recording

TOKENS = 40


class ObservedCore(GenerationCore):
    """Tells a recorder what the orchestrator would tell."""

    recorder: Recorder

    def handle(self, event: Event) -> list[Action]:
        self.recorder(1, event)
        actions = super().handle(event)
        for action in actions:
            self.recorder(1, action)
        return actions


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generation in virtual time: who is cancelled and when does not depend on the machine."""
    path = tmp_path_factory.mktemp("trace") / "recorded"
    core = ObservedCore([5, 6, 7], policy=Policy.distributed(2, sp=2), max_tokens=TOKENS)
    driver = DiscreteEventDriver(
        core, AcceptanceScript(independent(0.7, seed=9)), target_ms=constant(8.0), drafter_ms=constant(2.0), servers=2
    )
    with path.open("w") as file:
        workers = {0: "target 0 (cpu:0)", 1: "target 1 (cpu:0)", 2: "drafter 2 (cpu:0)"}
        core.recorder = Recorder(file, workers, clock=lambda: driver.now_ms / 1e3)
        driver.run()
        core.recorder.end(f"<{token}> " for token in core.output)
    return path


def test_every_piece_of_work_has_an_owner_a_time_and_a_fate(recorded: Path) -> None:
    picture = draw(read_recording(recorded))
    assert [name.split()[0] for name in picture.lanes] == ["drafter", "target", "target"]
    for name, spans in picture.lanes.items():
        assert spans, name
        for before, after in itertools.pairwise(spans):
            assert before.to_ms <= after.from_ms + 1e-6, "one thing at a time"
        assert all(picture.from_ms <= span.from_ms <= span.to_ms <= picture.to_ms for span in spans)
        assert "running" not in {span.fate for span in spans}
    fates = {span.fate for spans in picture.lanes.values() for span in spans}
    assert {"useful", "cancelled"} <= fates
    assert len(picture.accepted) == len(picture.texts) == TOKENS
    assert 0 < sum(picture.accepted) < TOKENS
    positions = [commit.start for commit in picture.commits]
    assert positions == sorted(set(positions))
    assert 0 < len(picture.rejections_ms) <= picture.accepted.count(False)


def test_a_wrong_guess_is_seen_where_no_draft_was_under_way() -> None:
    """SI drafts a block and waits: at the rejection there is nothing to cancel."""
    moments = [
        Moment(0.0, 1, "StartDraft", {"attempt": 1}),
        Moment(1.0, 1, "DraftsArrived", {"attempt": 1, "start": 3, "tokens": [5, 6]}),
        Moment(1.0, 1, "StartVerify", {"attempt": 2, "server": 1, "base": 0, "tokens": [1, 2, 3, 5, 6], "start": 3}),
        Moment(2.0, 1, "VerificationFinished", {"attempt": 2, "server": 1, "start": 3, "tokens": [5, 9]}),
        Moment(2.0, 1, "EmitTokens", {"start": 3, "tokens": [5, 9], "accepted": [True, False]}),
        Moment(3.0, 1, "EmitTokens", {"start": 5, "tokens": [7], "accepted": [False]}),  # nothing was guessed here
    ]
    assert draw(Recording({1: "target 1"}, moments, [])).rejections_ms == [2.0]


def test_the_page_needs_nothing_else_and_hides_nothing(recorded: Path) -> None:
    page = html_page(draw(read_recording(recorded)), "a <title>")
    assert "a &lt;title&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "nothing is loaded from anywhere"
    assert "<script" not in page
    assert "&lt;0&gt;" in page


def test_the_chrome_trace_has_a_lane_for_each_worker(recorded: Path) -> None:
    events = chrome_trace(draw(read_recording(recorded)))["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert [name.split()[0] for name in names] == ["drafter", "target", "target"]
    pieces = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in pieces} == {event["tid"] for event in events if event["name"] == "thread_name"}
    assert all(event["dur"] >= 1 for event in pieces)


def trace(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsi_actors.cli.main", "trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_writes_what_it_says(recorded: Path, tmp_path: Path) -> None:
    done = trace(recorded, "--html", tmp_path / "page.html", "--chrome", tmp_path / "chrome.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "page.html"), str(tmp_path / "chrome.json")]
    assert json.loads((tmp_path / "chrome.json").read_text())["displayTimeUnit"] == "ms"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read"),
        ("", "is no recording: make one with dsi-actors generate"),
        ("nonsense", "is no recording"),
        ("[1]", "is no recording"),
        ('{"recording": 99, "workers": {}}', "was recorded by another version (99)"),
        ('{"recording": 1, "workers": {}}', "nothing happened in"),
        ('{"recording": 1, "workers": {}}\n{"at_ms": 1}', "is no recording"),
    ],
)
def test_what_is_no_recording_is_named(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    done = trace(path)
    assert done.returncode == 1
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_advice_costs_nobody_a_file(tmp_path: Path) -> None:
    """Who gives trace a wrong file is not told to record over it; and --record itself takes the place of recordings only."""
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert "--record NEW-FILE" in trace(notes).stderr
    with pytest.raises(ConfigError, match=r"notes.txt exists and is no recording: give the name of a new file"):
        open_recording(notes)
    assert notes.read_text() == "mine"
    for content in ("", '{"recording": 1, "workers": {}}\n'):
        notes.write_text(content)
        open_recording(notes).close()
        assert notes.read_text() == ""
    open_recording("/dev/null").close()
    with pytest.raises(ConfigError, match="cannot write --record /no/such/place: No such file"):
        open_recording("/no/such/place")


def test_a_picture_does_not_take_the_place_of_its_recording(recorded: Path, tmp_path: Path) -> None:
    before = recorded.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(recorded)
    wrong: list[tuple[list[str | Path], str]] = [
        (["--html", recorded], "--html {} is the recording itself"),
        (["--chrome", link], "--chrome {} is the recording itself"),
        (["--html", tmp_path / "x", "--chrome", tmp_path / "x"], "are the same file {}"),
    ]
    for arguments, problem in wrong:
        done = trace(recorded, *arguments)
        assert done.returncode == 1
        assert problem.format(arguments[-1]) in done.stderr
    assert recorded.read_bytes() == before


def test_a_generation_that_is_not_there_is_named(recorded: Path) -> None:
    assert "there is no generation 77 in" in trace(recorded, "--generation", "77").stderr
