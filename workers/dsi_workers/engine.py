"""What an engine is: small, synchronous, token ids only. One file per engine beside this one; one contract test for all.

An engine never talks: the loop (loop.py) gives it a session and takes tokens. It looks up from its work at every layer
or every millisecond to ask whether that work is still wanted.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dsi_workers.session import Session
from dsi_workers.tree import Branch


class EngineError(Exception):
    """The engine cannot be built as asked: one sentence that names what is wrong and what to do."""


class RequestError(Exception):
    """A request cannot be served because of what it asks, and no other worker could: the engine is as good as before."""


class Interrupted(Exception):
    """The work in hand is not wanted any more. The session is as good as before the call: nothing needs repair."""


class Interrupt(Protocol):
    """How an engine learns, in the middle of its work, that this work is not wanted."""

    def check(self) -> None:
        """Raise Interrupted if the work in hand is not wanted. Costs microseconds."""

    def wait_until(self, deadline_s: float) -> None:
        """Sleep until time.perf_counter() reaches `deadline_s`; raise Interrupted as soon as the work is not wanted."""


class Never:
    """An Interrupt for work that is always wanted, such as warm-up."""

    def check(self) -> None:
        pass

    def wait_until(self, deadline_s: float) -> None:
        time.sleep(max(0.0, deadline_s - time.perf_counter()))


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the orchestrator must know about a loaded engine (the message Ready)."""

    vocabulary: str  # vocabulary_hash, "" if any vocabulary will do
    vocabulary_size: int
    max_length: int  # positions of a generation
    window: int  # positions in one verification forward
    latency_us: int  # measured after warm-up: a verification of one position, or one drafted token
    window_latency_us: int = 0  # a verification of a full window
    slots: int = 1  # generations that are served side by side
    batch_latency_us: int = 0  # a forward for all slots, a full window each (a drafter: one token each)
    fingerprint: int = 0  # of a target: of the bits of its logits
    rows: int = 1  # positions of a tree that it verifies, or rows of a drafting step; 1: chains only


@dataclass(slots=True)
class Answer:
    """The model's own tokens, and their log probabilities if the session wants them."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    #: Of a draft with `rows`: a second choice for each of `tokens`, and a token for each branch of the task.
    alternatives: list[int] = field(default_factory=list)
    continued: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Task:
    """What one generation wants to know: a row of the batch that a step works on."""

    session: Session
    #: The model's own tokens from this position (>= 1) on are wanted.
    start: int
    #: Draft: at most so many tokens that may follow session.tokens (then `start` is their number). None: verify.
    count: int | None = None
    #: Verify: what is checked beside session.tokens. Draft: what is continued by a token each.
    branches: Sequence[Branch] = ()
    #: Draft: whether second choices are wanted.
    alternatives: bool = False
    answer: Answer = field(default_factory=Answer)
    done: bool = False


class Engine(ABC):
    """A loaded model, or what stands for one. Calls come from one thread."""

    info: EngineInfo
    #: Forwards of the model since the start. The loop reports differences.
    forwards: int = 0

    @abstractmethod
    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        """One forward for all `tasks` (1 to `info.slots`, of different sessions), each of which gets on by it.

        A task that is complete becomes `done`. The answer of a verification has the model's own tokens from `start` on,
        given session.tokens: up to and including the first that differs from them, or one beyond them if none does. With
        `branches` it goes on along whichever branch has the model's token. That
        of a draft has between 0 and `count` tokens; none means 'no idea'. What else is in the batch changes no answer.

        Raises Interrupted; then a new task for the same session still gets what a fresh session would get. Raises RequestError.
        """

    def promote(self, session: Session, branch: Branch) -> None:
        """A branch that was drafted beside session.tokens takes the place of their end."""
        session.write(branch.fork, branch.tokens)

    def reads_alone(self, task: Task) -> bool:
        """Whether the next step for this task is a piece of a long text, for which nothing can be added to the batch."""
        return False

    def verify(self, session: Session, start: int, interrupt: Interrupt) -> Answer:
        """One verification by itself, from beginning to end."""
        return self._alone(Task(session, start), interrupt)

    def draft(self, session: Session, count: int, interrupt: Interrupt) -> list[int]:
        """One draft by itself: what comes at once, so one token of a model."""
        return self._alone(Task(session, len(session.tokens), count), interrupt).tokens

    def _alone(self, task: Task, interrupt: Interrupt) -> Answer:
        while not task.done:
            self.step([task], interrupt)
        return task.answer

    def forget(self, session: Session) -> None:  # noqa: B027  an engine may hold nothing
        """The session is closed: give back what is held for it."""
