"""From moments to lanes: who worked on what from when to when, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dsi_actors.core.tree import main_path_end
from dsi_actors.tracing.drafts import Came, Drafts, Guess
from dsi_actors.tracing.record import Moment, Recording

Fate = Literal["useful", "wasted", "cancelled", "running"]


@dataclass(slots=True)
class Span:
    """Work on main-path positions [start, end) in [from_ms, to_ms), and on some tokens of branches beside them."""

    from_ms: float
    to_ms: float
    start: int
    end: int
    fate: Fate
    words: str
    #: Tokens on branches.
    branches: int = 0
    #: Whether an alternative among them was the target's token.
    hit: bool = False


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens [start, start + len(accepted)) settled; each had been drafted, or was the target's own. `alternatives`: positions
    where an alternative had it, not the drafter's first choice."""

    at_ms: float
    start: int
    accepted: Sequence[bool]
    alternatives: Sequence[int] = ()


@dataclass(slots=True)
class Picture:
    """One generation. `lanes`: by the worker's name, drafters first."""

    lanes: dict[str, list[Span]] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    rejections_ms: list[float] = field(default_factory=list)
    from_ms: float = 0.0
    to_ms: float = 0.0
    texts: Sequence[str] = ()
    drafts: Drafts = field(default_factory=Drafts)

    @property
    def came(self) -> list[Came]:
        """How each settled token came."""
        return [
            (Came.ALTERNATIVE if place in commit.alternatives else Came.ACCEPTED) if flag else Came.OWN
            for commit in self.commits
            for place, flag in enumerate(commit.accepted, commit.start)
        ]

    @property
    def accepted(self) -> list[bool]:
        return [flag for commit in self.commits for flag in commit.accepted]


def draw(recording: Recording, generation: int | None = None) -> Picture:
    """The picture of one generation: the first recorded one, if it is not said which."""
    number = recording.moments[0].generation if generation is None else generation
    moments = [moment for moment in recording.moments if moment.generation == number]
    painter = _Painter(recording)
    for moment in moments:
        painter.take(moment)
    return painter.picture(moments, recording.texts)


class _Painter:
    def __init__(self, recording: Recording) -> None:
        self._names = recording.workers
        drafters = {number: name for number, name in recording.workers.items() if name.startswith("drafter")}
        self._drafters = drafters or {0: "drafter"}
        self._picture = Picture(lanes={name: [] for name in self._drafters.values()})
        self._verifying: dict[int, tuple[str, Span]] = {}
        #: What was answered last.
        self._answered: Span | None = None
        self._drafts = self._picture.drafts
        #: The drafts of each block.
        self._blocks: list[tuple[Span, list[Guess]]] = []
        self._drafting: dict[int, float] = {}  # attempt -> since when the next block is made
        self._drafted_ms: dict[str, float] = {}  # lane -> when the last block of drafts came

    def take(self, moment: Moment) -> None:
        at_ms, fields = moment.at_ms, moment.fields
        match moment.name:
            case "StartVerify":
                end, branches = main_path_end(fields["base"], fields["tokens"], fields["parents"])
                words = f"verifies {end - fields['start']} drafts from {fields['start']}{_and_branches(branches)}"
                lane = self._names.get(fields["server"], f"target {fields['server']}")
                span = Span(at_ms, at_ms, fields["start"], end, "running", words, branches)
                self._picture.lanes.setdefault(lane, []).append(span)
                self._verifying[fields["attempt"]] = (lane, span)
            case "VerifyGoesOn":
                lane, start = self._names.get(fields["server"], f"target {fields['server']}"), fields["start"]
                span = Span(at_ms, at_ms, start, start, "running", f"goes on by itself from {start}")
                self._picture.lanes.setdefault(lane, []).append(span)
                self._verifying[fields["attempt"]] = (lane, span)
            case "VerificationFinished":
                answered = self._end_verification(fields["attempt"], at_ms, "wasted")
                if answered is not None:
                    answered.words += f", says {len(fields['tokens'])} tokens"
                self._answered = answered
            case "VerificationAbandoned":
                self._end_verification(fields["attempt"], at_ms, "cancelled")
            case "CancelVerify":
                if fields["attempt"] in self._verifying:
                    self._verifying[fields["attempt"]][1].words += ", cancelled"
            case "StartDraft":
                self._drafts.requested(
                    fields["attempt"], fields["base"], fields["tokens"], fields["start"], fields["drafter"]
                )
                self._drafting[fields["attempt"]] = at_ms
            case "CancelDrafts":
                self._drafts.cancelled(fields["attempt"], fields["drafter"])
            case "DraftsArrived":
                self._take_drafts(at_ms, fields)
            case "EmitTokens":
                alternatives = fields["alternatives"]
                if self._answered is not None:
                    self._answered.fate = "useful"
                    self._answered.hit = bool(alternatives)
                    self._answered = None
                accepted = tuple(fields["accepted"])
                self._picture.commits.append(Commit(at_ms, fields["start"], accepted, tuple(alternatives)))
                if self._drafts.committed(fields["start"], fields["tokens"], accepted, alternatives)[1]:
                    self._picture.rejections_ms.append(at_ms)

    def _take_drafts(self, at_ms: float, fields: Mapping[str, Any]) -> None:
        # A request that waits behind another one is not worked on yet.
        lane = self._drafters.get(fields["drafter"], next(iter(self._drafters.values())))
        since_ms = max(self._drafting.get(fields["attempt"], at_ms), self._drafted_ms.get(lane, 0.0))
        self._drafted_ms[lane] = self._drafting[fields["attempt"]] = at_ms
        guesses = self._drafts.arrived(
            fields["attempt"], fields["start"], fields["tokens"], fields["parents"], fields["drafter"]
        )
        if guesses == []:
            return  # it was made on a branch, and told then
        span = Span(since_ms, at_ms, self._drafts.front, self._drafts.front, "running", "drafts that came too late")
        if guesses:
            main = [guess.position for guess in guesses if guess.main]
            positions = main or [guess.position for guess in guesses]
            span.start, span.end, span.branches = min(positions), max(positions) + 1, len(guesses) - len(main)
            span.words = f"drafts {len(main)} from {span.start}{_and_branches(span.branches)}"
        self._picture.lanes.setdefault(lane, []).append(span)
        self._blocks.append((span, guesses or []))

    def _end_verification(self, attempt: int, at_ms: float, fate: Fate) -> Span | None:
        found = self._verifying.pop(attempt, None)
        if found is None:
            return None
        span = found[1]
        span.to_ms, span.fate = at_ms, fate
        return span

    def picture(self, moments: Sequence[Moment], texts: Sequence[str]) -> Picture:
        picture = self._picture
        picture.from_ms, picture.to_ms = moments[0].at_ms, moments[-1].at_ms
        for _, span in self._verifying.values():
            span.to_ms, span.fate = picture.to_ms, "cancelled"
        self._judge_drafts()
        picture.texts = texts
        return picture

    def _judge_drafts(self) -> None:
        """A block of drafts was useful as far as the text has its tokens, and they came before they were settled."""
        for span, guesses in self._blocks:
            kept = [guess for guess in guesses if guess.came in (Came.ACCEPTED, Came.ALTERNATIVE)]
            span.fate = "useful" if kept else "wasted"
            span.hit = any(guess.came is Came.ALTERNATIVE for guess in kept)
            span.words += f", {len(kept)} accepted" if guesses else ""


def _and_branches(tokens: int) -> str:
    return f", and {tokens} on branches" if tokens else ""
