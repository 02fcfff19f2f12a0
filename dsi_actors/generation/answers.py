"""What a worker's answer means to the generation that asked: an event for its core, or a reason to send the worker away.

All that can be checked of an answer is checked here: nothing that was not asked for gets further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.config import Sampling
from dsi_actors.core.events import (
    DraftEnded,
    DraftsArrived,
    VerificationAbandoned,
    VerificationFinished,
)
from dsi_actors.core.tree import main_path_end
from dsi_actors.generation.account import Account
from dsi_actors.planning.tuner import Tuner
from dsi_actors.results import TopLogprobs
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import Cancelled, Draft, Drafted, Failed, NeedPrefix, Reply, Verified, Verify


@dataclass(frozen=True, slots=True)
class Answered:
    """A verification finished, and this is what came with it."""

    event: VerificationFinished
    logprobs: tuple[float, ...]
    #: For each token, if asked for.
    top_logprobs: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The worker is gone."""

    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class Misbehaved:
    """The worker failed, or said something that no working one would say. It is not used here any more."""

    worker: WorkerHandle
    reason: str
    #: Whether it is the worker's own fault. It is not that a text is too long for it.
    fault: bool = True


#: Codes of Failed that say what is wrong with a request, not with the worker.
_OF_THE_REQUEST = ("limit", "request")

Meaning: TypeAlias = Answered | VerificationAbandoned | DraftsArrived | DraftEnded | Withdrawn | Misbehaved


class Answers:
    """Of one generation. What answers tell about costs and latencies goes to `account` and `tuner`."""

    def __init__(self, account: Account, tuner: Tuner, *, vocabulary_size: int, sampling: Sampling) -> None:
        self._account = account
        self._tuner = tuner
        self._vocabulary_size = vocabulary_size
        self._logprobs = sampling.logprobs
        #: Told for each token of an answer.
        self._tops = min(sampling.top_logprobs, vocabulary_size)

    def to_verify(self, request: Verify, worker: WorkerHandle, reply: Reply | None, waited_ms: float) -> Meaning:
        """`waited_ms`: since it was asked, or since the answer before."""
        match reply:
            case Verified(
                _, attempt, start, tokens, logprobs, forwards, busy_us, more, top_tokens, top_logprobs, cached
            ):
                end = request.base + len(request.tokens)
                most = end - request.start + 1
                if request.start < start <= end + request.ahead:
                    most = 1  # the server went on by itself
                elif start != request.start:
                    most = 0
                misfit = not 1 <= len(tokens) <= most or max(tokens) >= self._vocabulary_size
                wanted = len(tokens) if self._logprobs else 0
                misfit = misfit or not len(top_tokens) == len(top_logprobs) == len(tokens) * self._tops
                if misfit or len(logprobs) != wanted or max(top_tokens, default=0) >= self._vocabulary_size:
                    asked = f"asked for up to {end - request.start + 1} from {request.start}"
                    return Misbehaved(worker, f"{len(tokens)} tokens from {start}, {asked}")
                self._account.verified(attempt, forwards, busy_us, cached)
                main_end, branches = main_path_end(request.base, request.tokens, request.parents)
                positions = main_end - min(request.base, start - 1)
                if start > request.start:  # the server went on by itself
                    positions, branches = 1, 0
                self._tuner.verified(
                    positions, busy_us / 1e3,
                    branches=branches, sharers=max(1, worker.sharers), waited_ms=waited_ms,
                )  # fmt: skip
                tops = top_logprobs_of(top_tokens, top_logprobs, self._tops)
                return Answered(VerificationFinished(attempt, worker.number, start, tokens, more), logprobs, tops)
            case Cancelled(_, attempt, forwards, busy_us):
                self._account.cancelled(forwards, busy_us)
                return VerificationAbandoned(attempt, worker.number)
            case NeedPrefix(_, attempt, held) if held < request.base:
                return VerificationAbandoned(attempt, worker.number, held)
            case None:
                return Withdrawn(worker)
        return _refused(worker, reply)

    def drafted(
        self,
        request: Draft,
        worker: WorkerHandle,
        block: Drafted,
        waited_ms: float,
        *,
        in_use: bool,
        verified_ms: float,
    ) -> Meaning:
        """A block of drafts, the last one or not. `waited_ms`: since it was asked, or the block before. `in_use`: the drafter
        is the one that is planned with: it was not exchanged for another one meanwhile, and leads if there are several.
        `verified_ms`: how much of that time something was verified."""
        steps = _steps(block)
        self._account.drafting(block.busy_us, len(block.tokens))
        if (
            in_use and len(request.tokens) <= 1 and block.busy_us
        ):  # else it read more than it drafted, or knew it before
            took_ms = waited_ms if worker.sharers > 1 else block.busy_us / 1e3
            self._tuner.drafted(steps, took_ms, beside=min(1.0, verified_ms / waited_ms) if waited_ms > 0 else 1.0)
        if block.parents and len(block.parents) != len(block.tokens):
            return Misbehaved(worker, f"{len(block.tokens)} drafts with {len(block.parents)} parents")
        if max(block.tokens) >= self._vocabulary_size:
            return Misbehaved(worker, f"token {max(block.tokens)} is outside the target's vocabulary")
        return DraftsArrived(request.attempt, block.start, block.tokens, block.parents, worker.number)

    def to_draft(self, request: Draft, worker: WorkerHandle, reply: Reply | None, *, cancelled: bool) -> Meaning:
        """The terminal reply to a draft request. `cancelled`: we did that."""
        match reply:
            case Drafted():  # whether it is complete the core sees, which knows where the main path ends
                return DraftEnded(request.attempt, complete=True, drafter=worker.number)
            case Cancelled(_, attempt, _, busy_us) if cancelled:
                self._account.drafting(busy_us)
                return DraftEnded(attempt, complete=False, drafter=worker.number)
            case Cancelled():  # because it took too long (WorkerHandle.cancel_overdue): do not wait for it again here
                return Misbehaved(worker, "it did not answer in time", fault=False)
            case NeedPrefix(_, attempt, held) if held < request.base:
                return DraftEnded(attempt, complete=False, held=held, drafter=worker.number)
            case None:
                return Withdrawn(worker)
        return _refused(worker, reply)


def top_logprobs_of(tokens: Sequence[int], logprobs: Sequence[float], each: int) -> tuple[TopLogprobs, ...]:
    """What a reply tells of the most probable tokens, by position: `each` of them."""
    pairs = tuple(zip(tokens, logprobs, strict=True))
    return tuple(pairs[begin : begin + each] for begin in range(0, len(pairs), each or 1))


def _refused(worker: WorkerHandle, reply: Reply) -> Misbehaved:
    if isinstance(reply, Failed):
        return Misbehaved(worker, reply.message, fault=reply.code not in _OF_THE_REQUEST)
    return Misbehaved(worker, f"it answered {type(reply).__name__}, which fits nothing")


def _steps(block: Drafted) -> int:
    """Steps of the drafter that a block took: each extends the main path by one token."""
    if not block.parents:
        return len(block.tokens)
    # The main path's tokens are first children, and each follows the one before it; branches may grow as often.
    end, steps = block.parents[0], 0
    for number, parent in enumerate(block.parents, block.start):
        if parent == end:
            end, steps = number, steps + 1
    return max(1, steps)
