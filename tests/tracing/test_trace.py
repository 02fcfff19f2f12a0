"""From a recording to a picture: every span has an owner, a time and a fate; and bad files are named."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from dsi_actors.core import GenerationCore, Policy
from dsi_actors.core.actions import Action, CancelDrafts, EmitTokens, StartDraft, StartVerify
from dsi_actors.core.events import DraftsArrived, Event, VerificationFinished
from dsi_actors.errors import ConfigError
from dsi_actors.planning.search import with_rows
from dsi_actors.simulation.discrete_events import DiscreteEventDriver
from dsi_actors.simulation.scripts import AcceptanceScript, constant, independent
from dsi_actors.tracing.branches import drafts_by_position
from dsi_actors.tracing.chrome import chrome_trace
from dsi_actors.tracing.drafts import Came
from dsi_actors.tracing.lanes import draw
from dsi_actors.tracing.page import html_page
from dsi_actors.tracing.record import Moment, Recorder, Recording, open_recording, read_recording
from support.command import dsi_actors_command

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


def record(path: Path, policy: Policy, *, alternatives: float = 0.0) -> GenerationCore:
    """A simulated DSI generation of 40 tokens, recorded: no clock, so every number is the same on every machine."""
    core = ObservedCore([5, 6, 7], policy=policy, max_tokens=TOKENS)
    script = AcceptanceScript(independent(0.7, seed=9), independent(alternatives, seed=9, draw=1))
    driver = DiscreteEventDriver(core, script, target_ms=constant(8.0), drafter_ms=constant(2.0), servers=2)
    with path.open("w") as file:
        workers = {0: "target 0 (cpu:0)", 1: "target 1 (cpu:0)", 2: "drafter 2 (cpu:0)"}
        core.recorder = Recorder(file, workers, clock=lambda: driver.now_ms / 1e3)
        driver.run()
        core.recorder.end(f"<{token}> " for token in core.output)
    return core


def moment(at_ms: float, item: Event | Action) -> Moment:
    """As it is read from a file."""
    return Moment(at_ms, 1, type(item).__name__, json.loads(json.dumps(asdict(item))))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "recorded"
    record(path, Policy.distributed(2, sp=2))
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
        moment(0.0, StartDraft(1, 0, (1, 2, 3), 3, 2, 2)),
        moment(1.0, DraftsArrived(1, 3, (5, 6))),
        moment(1.0, StartVerify(2, 1, 0, (1, 2, 3, 5, 6), 3)),
        moment(2.0, VerificationFinished(2, 1, 3, (5, 9))),
        moment(2.0, EmitTokens(3, (5, 9), (True, False))),
        moment(3.0, EmitTokens(5, (7,), (False,))),  # nothing was guessed here
    ]
    picture = draw(Recording({1: "target 1"}, moments, []))
    assert picture.rejections_ms == [2.0]
    assert picture.came == [Came.ACCEPTED, Came.OWN, Came.OWN]


def test_branches_are_seen_as_they_were_drafted_taken_and_dropped() -> None:
    """Behind position 2 the drafter guesses 5 6, and beside them the alternatives 7 (then 8 behind it) and 9."""
    moments = [
        moment(0.0, StartDraft(1, 0, (1, 2, 3), 3, 4, 2, rows=2)),
        moment(1.0, DraftsArrived(1, 3, (5, 7, 6, 8, 9), (2, 2, 3, 4, 3))),
        moment(1.0, StartVerify(2, 1, 0, (1, 2, 3, 5, 6, 7, 8, 9), 3, (0, 1, 2, 3, 4, 3, 6, 4))),
        moment(2.0, VerificationFinished(2, 1, 3, (7, 4))),
        # What was drafted behind the alternative stays; the target's second token was not drafted.
        moment(2.0, StartDraft(3, 3, (7, 4), 5, 4, 2, rows=2, committed=5)),
        moment(2.0, EmitTokens(3, (7, 4), (True, False), (3,))),
        moment(2.5, DraftsArrived(1, 8, (6,), (5,))),  # of a request that is over: its numbers mean nothing any more
        moment(3.0, DraftsArrived(3, 5, (1,))),
        moment(4.0, EmitTokens(5, (1,), (True,))),
    ]
    picture = draw(Recording({1: "target 1"}, moments, ["a", "b", "c"]))
    assert picture.came == [Came.ALTERNATIVE, Came.OWN, Came.ACCEPTED]
    assert picture.rejections_ms == [2.0], "8 had been drafted behind the alternative, and was wrong"
    [verification] = picture.lanes["target 1"]
    assert (verification.start, verification.end, verification.branches, verification.hit) == (3, 5, 3, True)
    block, late, after = picture.lanes["drafter"]
    assert (block.start, block.end, block.branches, block.hit, block.fate) == (3, 5, 3, True, "useful")
    assert (late.branches, late.hit, late.fate) == (0, False, "wasted")
    assert (after.start, after.end, after.branches, after.fate) == (5, 6, 0, "useful")
    page = html_page(picture, "a tree")
    for words in ("an alternative was right", "with branches", "that was not needed", "1 of them as an alternative"):
        assert words in page
    squares = [
        words.removesuffix("</title>") for words in re.findall(r"<title>(\d+: [^<]*)", drafts_by_position(picture))
    ]
    assert [words for words in squares if "token" in words] == [
        "3: &#x27;a&#x27; (token 7), an alternative of the drafter",
        "4: &#x27;b&#x27; (token 4), the target&#x27;s own",
        "5: &#x27;c&#x27; (token 1), the drafter&#x27;s first choice",
        "3: token 5, first choice of the drafter", "4: token 6, drafted behind it",
        "4: token 9, alternative",
        "4: token 8, first choice of the drafter",
    ]  # fmt: skip
    commits = [event["args"] for event in chrome_trace(picture)["traceEvents"] if event["name"] == "commit"]
    assert [commit["alternatives"] for commit in commits] == [1, 0]


def test_a_branch_that_the_drafter_goes_on_from_is_not_drafted_twice() -> None:
    """The alternative 7 is right. What the drafter made behind it was told already, and is told again under new numbers."""
    moments = [
        moment(0.0, StartDraft(1, 0, (1, 2, 3), 3, 4, 2, rows=2)),
        moment(1.0, DraftsArrived(1, 3, (5, 7, 6, 8), (2, 2, 3, 4))),
        moment(2.0, VerificationFinished(2, 1, 3, (7,))),
        moment(2.0, StartDraft(3, 3, (7,), 4, 4, 2, rows=2, committed=4)),
        moment(2.0, EmitTokens(3, (7,), (True,), (3,))),
        moment(2.1, DraftsArrived(3, 4, (8,))),
        moment(3.0, DraftsArrived(3, 5, (9,))),
        moment(4.0, EmitTokens(4, (8, 9, 4), (True, True, False))),
    ]
    picture = draw(Recording({}, moments, []))
    assert picture.came == [Came.ALTERNATIVE, Came.ACCEPTED, Came.ACCEPTED, Came.OWN]
    assert [(span.start, span.end, span.fate) for span in picture.lanes["drafter"]] == [
        (3, 5, "useful"),
        (5, 6, "useful"),
    ]
    assert picture.rejections_ms == []


def test_a_page_of_chains_says_nothing_of_branches(recorded: Path) -> None:
    page = html_page(draw(read_recording(recorded)), "chains")
    assert "alternative" not in page
    assert "branch" not in page


def test_a_recorded_tree_is_drawn_as_the_core_saw_it(tmp_path: Path) -> None:
    path = tmp_path / "recorded"
    core = record(path, with_rows(Policy.distributed(2, sp=2), 3), alternatives=0.5)
    picture = draw(read_recording(path))
    assert len(picture.came) == TOKENS
    assert picture.came.count(Came.ALTERNATIVE) == core.counters.alternatives > 2
    assert len(picture.rejections_ms) == core.counters.rejections > 2
    assert sum(span.hit for name, lane in picture.lanes.items() for span in lane if "target" in name) > 2
    assert any(span.branches and not span.hit for lane in picture.lanes.values() for span in lane)


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
    return dsi_actors_command("trace", *arguments)


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


def test_several_drafters_have_a_lane_each() -> None:
    """Drafter 2 leads and guesses 5 6, drafter 3 guesses 7 8: 7 is right, and drafter 2 is asked again."""
    moments = [
        moment(0.0, StartDraft(1, 0, (1, 2, 3), 3, 4, 2, committed=3, drafter=2)),
        moment(0.0, StartDraft(2, 0, (1, 2, 3), 3, 4, 2, committed=3, drafter=3)),
        moment(1.0, DraftsArrived(2, 3, (7, 8), drafter=3)),
        moment(2.0, DraftsArrived(1, 3, (5, 6), drafter=2)),
        moment(2.0, StartVerify(3, 1, 0, (1, 2, 3, 5, 6, 7, 8), 3, (0, 1, 2, 3, 4, 3, 6))),
        moment(3.0, VerificationFinished(3, 1, 3, (7, 8, 9))),
        moment(3.0, CancelDrafts(1, 2)),
        moment(3.0, StartDraft(4, 3, (7, 8, 9), 6, 4, 2, committed=6, drafter=2)),
        moment(3.0, EmitTokens(3, (7, 8, 9), (True, True, False), (3,))),
        moment(3.5, DraftsArrived(1, 5, (4,), drafter=2)),  # of a request that was cancelled
        moment(4.0, DraftsArrived(4, 6, (1,), drafter=2)),
        moment(4.0, EmitTokens(6, (1,), (True,))),
    ]
    picture = draw(Recording({1: "target 1", 2: "drafter 2", 3: "drafter 3"}, moments, []))
    assert picture.came == [Came.ALTERNATIVE, Came.ACCEPTED, Came.OWN, Came.ACCEPTED]
    assert list(picture.lanes) == ["drafter 2", "drafter 3", "target 1"]
    assert [(span.start, span.end, span.fate) for span in picture.lanes["drafter 2"]] == [
        (3, 5, "wasted"), (6, 6, "wasted"), (6, 7, "useful"),
    ]  # fmt: skip
    [beside] = picture.lanes["drafter 3"]
    assert (beside.start, beside.end, beside.fate, beside.hit) == (3, 5, "useful", True)
    assert "drafter 3" in html_page(picture, "two drafters")
    assert {event["args"]["name"] for event in chrome_trace(picture)["traceEvents"] if event["name"] == "thread_name"} == {
        "drafter 2", "drafter 3", "target 1",
    }  # fmt: skip
