"""From moments to lanes: who worked on what from when to when, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dsi_actors.tracing.record import Moment, Recording

Fate = Literal["useful", "wasted", "cancelled", "running"]


@dataclass(slots=True)
class Span:
    """Work on positions [start, end) in [from_ms, to_ms)."""

    from_ms: float
    to_ms: float
    start: int
    end: int
    fate: Fate
    words: str


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens [start, start + len(accepted)) settled; each had been drafted, or was the target's own."""

    at_ms: float
    start: int
    accepted: Sequence[bool]


@dataclass(slots=True)
class Picture:
    """One generation. `lanes`: by the worker's name, the drafter first."""

    lanes: dict[str, list[Span]] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    rejections_ms: list[float] = field(default_factory=list)
    from_ms: float = 0.0
    to_ms: float = 0.0
    texts: Sequence[str] = ()

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
        self._drafter = next((name for name in recording.workers.values() if name.startswith("drafter")), "drafter")
        self._picture = Picture(lanes={self._drafter: []})
        self._verifying: dict[int, tuple[str, Span]] = {}
        #: What was answered last.
        self._answered: Span | None = None
        #: One past the last position that was guessed since the last correction.
        self._guessed = 0
        self._drafting: dict[int, float] = {}  # attempt -> since when the next block is made
        self._drafted_ms = 0.0  # when the last block of drafts came

    def take(self, moment: Moment) -> None:
        at_ms, fields = moment.at_ms, moment.fields
        match moment.name:
            case "StartVerify":
                end = fields["base"] + len(fields["tokens"])
                words = f"verifies {end - fields['start']} drafts from {fields['start']}"
                lane = self._names.get(fields["server"], f"target {fields['server']}")
                span = Span(at_ms, at_ms, fields["start"], end, "running", words)
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
                self._drafting[fields["attempt"]] = at_ms
            case "DraftsArrived":
                # A request that waits behind another one is not worked on yet.
                since_ms = max(self._drafting.get(fields["attempt"], at_ms), self._drafted_ms)
                self._drafted_ms = at_ms
                self._guessed = end = fields["start"] + len(fields["tokens"])
                words = f"drafts {len(fields['tokens'])} from {fields['start']}"
                self._picture.lanes[self._drafter].append(Span(since_ms, at_ms, fields["start"], end, "running", words))
                self._drafting[fields["attempt"]] = at_ms
            case "EmitTokens":
                if self._answered is not None:
                    self._answered.fate = "useful"
                self._picture.commits.append(Commit(at_ms, fields["start"], tuple(fields["accepted"])))
                if not fields["accepted"][-1] and self._guessed >= fields["start"] + len(fields["tokens"]):
                    self._picture.rejections_ms.append(at_ms)
                    self._guessed = 0

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
        self._judge_drafts(picture)
        picture.texts = texts
        return picture

    def _judge_drafts(self, picture: Picture) -> None:
        """A block of drafts was useful as far as its tokens were accepted after it came."""
        accepted = {
            commit.start + offset: commit.at_ms
            for commit in picture.commits
            for offset, flag in enumerate(commit.accepted)
            if flag
        }
        last: dict[int, Span] = {}  # position -> the last block that guessed it
        for span in picture.lanes[self._drafter]:
            for position in range(span.start, span.end):
                last[position] = span
        for span in picture.lanes[self._drafter]:
            kept = [
                position
                for position in range(span.start, span.end)
                if position in accepted and last[position] is span and span.to_ms <= accepted[position]
            ]
            span.fate = "useful" if kept else "wasted"
            span.words += f", {len(kept)} accepted"
