"""What an engine is: a synchronous object that turns a batch of tasks into tokens, one forward at a time.

The loop (loop.py) gives an engine the tokens of each generation and takes the answers. An engine knows nothing of messages,
sockets or text. During a forward it asks at every layer, or every millisecond, whether the work is still wanted.

The engines of this package are in engines/. Other packages can bring more: docs/extending.md. tests/workers/test_engines.py
holds the tests that every engine must pass.
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
    """The engine cannot be built as asked. The message is one sentence that names what is wrong and what to do."""


class RequestError(Exception):
    """The request asks for something that no worker could give. The engine itself is fine and serves on."""


class Interrupted(Exception):
    """Nobody wants the running work any more. The session is valid as it is: nothing needs repair."""


class Interrupt(Protocol):
    """Tells an engine, during its work, whether the work is still wanted."""

    def check(self) -> None:
        """Raise Interrupted if the running work is not wanted any more. Takes microseconds."""

    def wait_until(self, deadline_s: float) -> None:
        """Sleep until time.perf_counter() reaches `deadline_s`. Raise Interrupted as soon as the work is not wanted."""


class Never:
    """An Interrupt that never interrupts, for work that is always wanted, such as warm-up."""

    def check(self) -> None:
        pass

    def wait_until(self, deadline_s: float) -> None:
        time.sleep(max(0.0, deadline_s - time.perf_counter()))


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the orchestrator must know about a loaded engine. The worker sends it in the message Ready."""

    vocabulary: str  # dsi_protocol.vocabulary_hash; "" if the engine works with any vocabulary
    vocabulary_size: int  # token ids are below this; 0 if the engine works with any vocabulary
    max_length: int  # most positions of a generation, prompt included
    window: int  # positions of one verification forward; 0 for a drafter that does not say
    latency_us: int  # a verification of one position, or one drafted token; measured after warm-up, 0 if not measured
    window_latency_us: int = 0  # a verification of a full window; of a drafter, a step with `rows` rows
    slots: int = 1  # generations that the engine serves side by side
    batch_latency_us: int = 0  # a forward for all slots: a full window each, or one drafted token each
    fingerprint: int = 0  # of a target: a checksum that differs where the bits of the logits differ; 0 if not known
    rows: int = 1  # positions of a tree that a target verifies, or rows of a drafter's step; 1: chains only
    devices: int = 1  # devices that compute a forward together
    scores: bool = False  # of a target: it tells the log probabilities of a given text (Task.score)


@dataclass(slots=True)
class Answer:
    """The model's own tokens. `logprobs` has a log probability for each token of a verification if the session asks for them."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    #: For each of `logprobs`, the most probable tokens at its position and their log probabilities (`top_logprobs` of SPEC.md).
    top_tokens: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)
    #: Of a draft with `alternatives`: a second choice for each of `tokens`. None: there is no second choice.
    alternatives: list[int | None] = field(default_factory=list)
    #: Of a draft: a token for each branch of the task. None: the branch is not continued in this step.
    continued: list[int | None] = field(default_factory=list)

    def first(self, count: int) -> Answer:
        """The first `count` tokens of a verification's answer, with what is told of them."""
        told = len(self.top_tokens) // max(1, len(self.tokens)) * count
        return Answer(self.tokens[:count], self.logprobs[:count], self.top_tokens[:told], self.top_logprobs[:told])


@dataclass(slots=True)
class Task:
    """A verification or a draft for one generation. A step works on a batch of tasks."""

    session: Session
    #: The answer begins with the token at this position (at least 1).
    start: int
    #: Of a draft: the most tokens wanted; `start` is then len(session.tokens). None: this is a verification.
    count: int | None = None
    #: Verify: what is checked beside session.tokens. Draft: what is continued by a token each.
    branches: Sequence[Branch] = ()
    #: Draft: whether second choices are wanted.
    alternatives: bool = False
    #: Draft: so many tokens are told together. A step may draft up to so many at once.
    block: int = 1
    #: Nothing is chosen: what is wanted is how probable session.tokens are, from `start` on.
    score: bool = False
    answer: Answer = field(default_factory=Answer)
    #: The answer is complete.
    done: bool = False


class Engine(ABC):
    """A loaded model, or a substitute for one. All calls come from one thread."""

    info: EngineInfo
    #: Calls of the model since the start. The loop reports how many each request took.
    forwards: int = 0

    @abstractmethod
    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        """Do one forward that advances every task.

        `tasks` are 1 to `info.slots` tasks of different sessions. A step adds tokens to `task.answer` and sets `task.done` when
        the answer is complete. A task that is not done comes again in a later step, as after a piece of a long prompt.

        The answer to a verification is the model's own tokens from `start` on, given session.tokens. It ends with the first
        token that differs from session.tokens, or, if none differs, with the token that follows session.tokens. With
        `task.branches` the answer goes on along whichever branch has the model's token. For a target
        every token must be a function of the tokens before it, the sampling parameters and the seed alone: neither the other
        tasks nor earlier steps may change it.

        The answer to a task with `score` has no tokens. Its log probabilities are those of the tokens of the session from `start`
        on: of one or more, at most MAX_TOLD. For the others comes another task. It is for engines with `info.scores`.

        The answer to a draft is 0 to `count` tokens that may follow session.tokens. No token means that the engine has no idea.

        Raises Interrupted if no task of the batch is wanted any more; a new task for the same session must then get the
        answer that a fresh session would get. Raises RequestError.
        """

    def promote(self, session: Session, branch: Branch) -> None:
        """A branch that was drafted beside session.tokens takes the place of their end."""
        session.write(branch.fork, branch.tokens)

    def reads_alone(self, task: Task) -> bool:
        """Return whether the next step for this task reads a piece of a long text. Such a step is not shared with others."""
        return False

    def verify(self, session: Session, start: int, interrupt: Interrupt) -> Answer:
        """Do one verification from beginning to end, without a batch."""
        return self._alone(Task(session, start), interrupt)

    def draft(self, session: Session, count: int, interrupt: Interrupt) -> list[int]:
        """Return the next drafts, at most `count`: one token of a model, or all that the engine guesses at once."""
        return self._alone(Task(session, len(session.tokens), count), interrupt).tokens

    def _alone(self, task: Task, interrupt: Interrupt) -> Answer:
        while not task.done:
            self.step([task], interrupt)
        return task.answer

    def forget(self, session: Session) -> None:  # noqa: B027  an engine may hold nothing
        """Free what is held for this session: its generation is closed."""

    def close(self) -> None:  # noqa: B027  most engines are in this process only
        """End what computes beside this process: the worker ends. No other call comes afterwards."""
