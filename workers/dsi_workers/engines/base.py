"""What an engine is: small, synchronous, token ids only. One file per engine beside this one; one contract test for all.

An engine never talks: the loop (loop.py) gives it a session and takes tokens. It looks up from its work at every layer
or every millisecond to ask whether that work is still wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

from dsi_workers.session import Session


class EngineError(Exception):
    """The engine cannot be built as asked: one sentence that names what is wrong and what to do."""


class Interrupted(Exception):
    """The work in hand is not wanted any more. The session is as good as before the call: nothing needs repair."""


class Interrupt(Protocol):
    """How an engine learns, in the middle of its work, that this work is not wanted."""

    def check(self) -> None:
        """Raise Interrupted if the work in hand is not wanted. Costs microseconds."""

    def wait_until(self, deadline_s: float) -> None:
        """Sleep until time.perf_counter() reaches `deadline_s`; raise Interrupted as soon as the work is not wanted."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the orchestrator must know about a loaded engine (the message Ready)."""

    vocabulary: str  # vocabulary_hash, "" if any vocabulary will do
    vocabulary_size: int
    max_length: int  # positions of a generation
    window: int  # positions in one verification forward
    latency_us: int  # measured after warm-up: a verification of one position, or one drafted token
    window_latency_us: int = 0  # a verification of a full window


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's own tokens, and their log probabilities if the session wants them."""

    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)


class Engine(ABC):
    """A loaded model, or what stands for one. Calls come from one thread."""

    info: EngineInfo
    #: Forwards of the model since the start. The loop reports differences.
    forwards: int = 0

    @abstractmethod
    def verify(self, session: Session, start: int, interrupt: Interrupt) -> Answer:
        """Verify: the model's own tokens from position `start` (>= 1) on, given session.tokens.

        Up to and including the first that differs from session.tokens, or one beyond them if none does. Raises
        Interrupted; then a later call for the same session still gives what a fresh session would give.
        """

    def draft(self, session: Session, count: int, interrupt: Interrupt) -> list[int]:
        """One step of drafting: between 0 and `count` (>= 1) tokens that may follow session.tokens; [] is 'no idea'.

        By default one token of the model's own. Raises Interrupted as `verify` does.
        """
        return self.verify(session, len(session.tokens), interrupt).tokens

    def forget(self, session: Session) -> None:  # noqa: B027  an engine may hold nothing
        """The session is closed: give back what is held for it."""
