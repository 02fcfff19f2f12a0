"""How probable a given text is: one target server tells it in blocks, and another one goes on if the first is lost.

Nothing is drafted and nothing chosen, so there is no core: each log probability is a function of the target and the text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.actor import Actor
from dsi_actors.config import Sampling
from dsi_actors.errors import ConfigError, NoTargetError
from dsi_actors.generation.answers import top_logprobs_of
from dsi_actors.logs import get_logger
from dsi_actors.results import CommittedTokens, GenerationReport
from dsi_actors.workforce.scheduler import GivenBack, Released, Requested, Scheduler
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import MAX_TOLD, Failed, Reply, Score, Scored

log = get_logger("scoring")

#: A server that leaves out more is not asked again.
_MOST_LOST_BLOCKS = 3


@dataclass(frozen=True, slots=True)
class _Granted:
    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class _TakenAway:
    """The server is gone, or another's now."""

    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class _Answered:
    """A reply to the request `attempt`. None: the server is gone."""

    worker: WorkerHandle
    attempt: int
    reply: Reply | None


@dataclass(frozen=True, slots=True)
class _Waited:
    """The `waits`-th wait for a target server is over."""

    waits: int


_Message: TypeAlias = _Granted | _TakenAway | _Answered | _Waited


class Scoring(Actor[_Message]):
    """Tells the tokens of a text from its second one on, with their log probabilities, to `on_tokens`; `on_end` hears the end.

    Both must return at once. It has a number of its own among the generations, and takes a place like one.
    """

    #: It decodes nothing.
    report: GenerationReport | None = None

    def __init__(
        self,
        number: int,
        tokens: Sequence[int],
        scheduler: Scheduler,
        *,
        top_logprobs: int,
        vocabulary_size: int,
        correlation: str,
        first_target_wait_s: float,
        target_wait_s: float,
        on_tokens: Callable[[CommittedTokens], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        super().__init__(f"scoring {number}")
        self.number = number
        self._tokens = tuple(tokens)
        self._scheduler = scheduler
        self._sampling = Sampling(logprobs=True, top_logprobs=top_logprobs)
        self._tops = min(top_logprobs, vocabulary_size)
        self._vocabulary_size = vocabulary_size
        self._correlation = correlation
        self._first_target_wait_s = first_target_wait_s
        self._target_wait_s = target_wait_s
        self._on_tokens = on_tokens
        self._on_end = on_end
        #: The server that was asked, and the request.
        self._worker: WorkerHandle | None = None
        self._attempt = 0
        #: Servers that failed. One may be granted again before the scheduler knows that.
        self._sent_away: set[int] = set()
        #: The position of the next token to tell.
        self._due = 1
        #: Blocks that were lost since the last one that came in its turn.
        self._lost_blocks = 0
        self._waits = 0
        self._last_failure = ""
        self._log = log.bind(correlation=correlation)

    def on_start(self) -> None:
        """Ask for a target server."""
        self._scheduler.tell(Requested(self, 1, wants_drafter=False))
        self._wait(self._first_target_wait_s)

    def cancel(self) -> None:
        """The reader wants no more. Returns at once."""
        self.stop()

    # As a client of the scheduler

    def grant(self, worker: WorkerHandle) -> None:
        self.tell(_Granted(worker), control=True)

    def withdraw(self, worker: WorkerHandle) -> None:
        self.tell(_TakenAway(worker), control=True)

    def reclaim(self, worker: WorkerHandle) -> None:
        self.tell(_TakenAway(worker), control=True)

    # Messages

    def receive(self, message: _Message) -> None:
        match message:
            case _Granted(worker) if worker.number not in self._sent_away:
                self._worker = worker
                worker.open(self.number, len(self._tokens), self._correlation, self._sampling)
                self._ask(worker)
            case _TakenAway(worker) if worker is self._worker:
                self._lose(worker)
            case _Answered(worker, attempt, reply) if worker is self._worker and attempt == self._attempt:
                self._on_reply(worker, reply)
            case _Waited(waits) if waits == self._waits and self._worker is None:
                self._on_waited()

    def _ask(self, worker: WorkerHandle) -> None:
        """Ask for what is not told yet. The whole text goes along: this is seldom asked twice."""
        self._attempt += 1
        attempt = self._attempt
        request = Score(self.number, attempt, 0, 0, self._tokens, self._due)
        worker.score(request, lambda reply: self.deliver(_Answered(worker, attempt, reply)))

    def _on_reply(self, worker: WorkerHandle, reply: Reply | None) -> None:
        match reply:
            case Scored():
                self._on_block(worker, reply)
            case None:
                self._lose(worker)
            case Failed(_, _, "request", problem):
                self._finish(ConfigError(f"this target cannot tell how probable a text is: {problem}"))
            case Failed(_, _, code, problem):
                self._send_away(worker, problem, fault=code != "limit")
            case _:
                self._send_away(worker, f"it answered {type(reply).__name__} to Score", fault=False)

    def _on_block(self, worker: WorkerHandle, block: Scored) -> None:
        count = len(block.logprobs)
        end = block.start + count
        if block.start < self._due and not block.done:
            return  # it came twice
        if block.start != self._due:  # a block was lost
            self._lost_blocks += 1
            if self._lost_blocks > _MOST_LOST_BLOCKS:
                self._send_away(worker, f"it leaves out what follows position {self._due}", fault=False)
                return
            worker.cancel(self.number, self._attempt)
            self._ask(worker)
            return
        tops = count * self._tops
        if (
            not 1 <= count <= MAX_TOLD
            or end > len(self._tokens)
            or block.done != (end == len(self._tokens))
            or not len(block.top_tokens) == len(block.top_logprobs) == tops
            or max(block.top_tokens, default=0) >= self._vocabulary_size
        ):
            self._send_away(worker, f"{count} log probabilities from {block.start}, done is {block.done}", fault=True)
            return
        top_logprobs = top_logprobs_of(block.top_tokens, block.top_logprobs, self._tops)
        tokens = self._tokens[block.start : end]
        self._on_tokens(CommittedTokens(tokens, (False,) * count, block.logprobs, (), top_logprobs))
        self._due, self._lost_blocks = end, 0
        if block.done:
            self._finish(None)

    # Servers

    def _send_away(self, worker: WorkerHandle, reason: str, *, fault: bool) -> None:
        self._last_failure = f"{worker} failed ({reason[:300]})"
        self._log.error("a worker failed this scoring", worker=str(worker), reason=reason[:500])
        if fault:
            worker.fault(reason)
        self._sent_away.add(worker.number)
        self._scheduler.tell(GivenBack(self, worker))
        self._lose(worker)

    def _lose(self, worker: WorkerHandle) -> None:
        """Another server goes on behind what is told."""
        self._worker = None
        worker.close(self.number)
        self._wait(self._target_wait_s)

    def _wait(self, patience_s: float) -> None:
        self._waits += 1
        self.spawn(_later(patience_s, _Waited(self._waits)))

    def _on_waited(self) -> None:
        if self._scheduler.has_target_for(self):
            self._wait(self._target_wait_s)  # others use it now: we are in line
            return
        self._finish(
            NoTargetError(
                f"no target server, {self._due} tokens of the text are told: "
                + (self._last_failure or "start another worker with this orchestrator's address")
            )
        )

    def _finish(self, error: Exception | None) -> None:
        self._on_end(error)
        self.stop()

    def on_stop(self) -> None:
        if self._worker is not None:
            self._worker.close(self.number)
        self._scheduler.tell(Released(self))


async def _later(delay_s: float, message: _Message) -> _Message:
    await asyncio.sleep(delay_s)
    return message
