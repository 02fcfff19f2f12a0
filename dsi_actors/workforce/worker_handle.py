"""A worker process as the orchestrator sees it: typed requests, each with one answer, and everything it still owes.

An answer comes by a callback, not by a future: an awaiting task for each request would cost three turns of the event loop.

A request without a reply is sent again, later and later: it or its reply may be lost with a connection. The worker does
nothing twice, and gives its terminal reply again (SPEC.md section 5.15).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import UnionType
from typing import TypeAlias, TypeVar

from dsi_actors.config import Sampling
from dsi_actors.logs import get_logger
from dsi_actors.transport.doorkeeper import TokenBucket
from dsi_protocol import (
    Cancel,
    Cancelled,
    CloseGeneration,
    Draft,
    Drafted,
    Failed,
    FromOrchestrator,
    Hello,
    OpenGeneration,
    ProtocolError,
    Ready,
    Reply,
    Request,
    Score,
    Scored,
    Verified,
    Verify,
)

log = get_logger("worker_handle")

#: How often a worker may say that it does not know a generation that was opened there.
_MOST_REOPENINGS = 3
#: A worker may be faulty so often before it is not used any more, by anyone.
_MOST_FAULTS = 3
_CLOCK_SLACK_US = 1000
#: A step may take so many times as long as the longest one so far.
_STEPS_PATIENCE = 4.0
#: A drafter that lost its own guesses makes them again: as many as it may be ahead.
_DRAFTED_SLACK = 8192
#: A network that doubles messages, and requests that are sent again, have replies come again: at most so many, at once and
#: per second.
_REPEATED_BURST, _REPEATED_PER_S = 1000.0, 200.0
#: Whether a reply comes again is known of so many of the last ones.
_REMEMBERED_REPLIES = 1024
#: Replies to what was never asked: a working worker gives none.
_UNASKED_BURST, _UNASKED_PER_S = 8.0, 0.1

#: Workers of other hosts are named with their host.
_HERE = socket.gethostname()

AnyTimed = TypeVar("AnyTimed", Drafted, Verified)

#: Called once with the terminal reply, or with None if the worker is lost before it gives one. Before that, with each Verified
#: after which the server goes on by itself (`more`), and with each Scored that is not the last.
OnReply: TypeAlias = Callable[[Reply | None], None]


@dataclass(slots=True)
class _Flight:
    """A request without its terminal reply."""

    request: Request
    on_reply: OnReply
    on_drafted: Callable[[Drafted], None] | None
    #: When it was asked, or last answered in part.
    since_s: float
    #: After so long without a word it is sent again.
    patience_s: float
    #: When it was cancelled. It still owes its terminal reply.
    cancelled_s: float | None = None
    reopenings: int = 0
    #: Tokens that came for a Draft or a Score.
    told: int = 0
    #: Answers to a Verify so far, and one past the last position of the last one.
    answers: int = 0
    answered_to: int = 0


class WorkerHandle:
    """One worker process: who it is, what it can do, which attempts it has. Once it is gone every request ends with None."""

    def __init__(
        self,
        number: int,
        identity: bytes,
        hello: Hello,
        role: str,
        send: Callable[[FromOrchestrator], None],
        *,
        patience_s: float = 1.0,
        on_useless: Callable[[str], None] = lambda reason: None,
        kind: str = "",
        occupies_device: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience_s`: after so long without a reply a request is sent again. `on_useless` is told the reason when
        the worker has been faulty too often. `clock` gives the time in seconds."""
        self.number = number
        self.identity = identity
        self.hello = hello
        self.role = role
        #: Of a drafter: what the configuration calls it.
        self.kind = kind
        #: The GPUs that it computes on, of whichever host. Prompt lookup needs none.
        self.gpus = frozenset(
            f"{hello.host} {device}"
            for device in hello.device.split(",")
            if occupies_device and device.startswith("cuda")
        )
        self.ready: Ready | None = None
        #: What it does before it loads, such as fetching its model; empty for one that had nothing to do.
        self.preparing = ""
        self.lost = False
        #: It takes no more work and goes by itself.
        self.leaving = False
        #: It cannot serve beside the others, and another of its kind could not either.
        self.incompatible = False
        #: Replies to nothing that was asked, and replies that came again.
        self.unasked_replies = 0
        self.repeated_replies = 0
        #: What no working worker would do.
        self.faults = 0
        self._send = send
        self._patience_s = patience_s
        self._on_useless = on_useless
        self._clock = clock
        self._unasked = TokenBucket(_UNASKED_BURST, _UNASKED_PER_S, clock())
        self._repeated = TokenBucket(_REPEATED_BURST, _REPEATED_PER_S, clock())
        self._answered: dict[tuple[int, int], None] = {}  # in the order of the answers
        self._opened: dict[int, OpenGeneration] = {}
        self._in_flight: dict[tuple[int, int], _Flight] = {}
        #: By generation: requests of this attempt or an earlier one are cancelled, also those still to come.
        self._cuts: dict[int, int] = {}
        #: The longest time between two signs of life of a request: what one step of its loop may take.
        self._longest_step_s = 0.0

    def __str__(self) -> str:
        where = self.hello.device if self.hello.host == _HERE else f"{self.hello.host} {self.hello.device}"
        return f"{self.role} {self.number} ({where}, pid {self.hello.process})"

    @property
    def slots(self) -> int:
        """Generations that it serves side by side."""
        return max(1, self.ready.slots) if self.ready is not None else 1

    @property
    def sharers(self) -> int:
        """Generations that are open on it."""
        return len(self._opened)

    def verify(self, request: Verify, on_reply: OnReply) -> None:
        self._ask(request, on_reply, None)

    def score(self, request: Score, on_reply: OnReply) -> None:
        self._ask(request, on_reply, None)

    def draft(self, request: Draft, on_reply: OnReply, on_drafted: Callable[[Drafted], None]) -> None:
        """Every Drafted with tokens, the last one included, goes to `on_drafted` as it comes."""
        self._ask(request, on_reply, on_drafted)

    def cancel(self, generation: int, attempt: int) -> None:
        """This attempt and earlier ones are not wanted. Nothing waits for it, nothing is correct because of it."""
        self._cuts[generation] = max(attempt, self._cuts.get(generation, 0))
        self._mark_cancelled(generation, attempt)
        self._tell(Cancel(generation, attempt))

    def open(self, generation: int, prompt_length: int, correlation: str, sampling: Sampling) -> None:
        opened = OpenGeneration(generation, prompt_length, correlation, sampling.parameters)
        self._opened[generation] = opened
        self._tell(opened)

    def close(self, generation: int) -> None:
        """The worker may forget the generation. What it still does for it is cancelled."""
        self._cuts.pop(generation, None)
        self._opened.pop(generation, None)
        self._mark_cancelled(generation, None)
        self._tell(CloseGeneration(generation))

    def ask_again(self, now_s: float) -> None:
        """Send again what has had no reply for long."""
        for (generation, attempt), flight in list(self._in_flight.items()):
            if flight.since_s + flight.patience_s <= now_s:
                flight.patience_s *= 2
                self._tell(flight.request)
                if flight.cancelled_s is not None:
                    self._tell(Cancel(generation, attempt))

    def forgive(self, late_s: float, now_s: float) -> None:
        """This process itself stood still for so long: nobody shall be blamed for that time."""
        for flight in self._in_flight.values():
            flight.since_s = min(now_s, flight.since_s + late_s)
            if flight.cancelled_s is not None:
                flight.cancelled_s = min(now_s, flight.cancelled_s + late_s)

    def fault(self, reason: str) -> None:
        """It did what no working worker would do."""
        self.faults += 1
        log.warning("a fault of a worker", worker=str(self), reason=reason[:300], so_far=self.faults)
        if self.faults == _MOST_FAULTS:
            self._on_useless(f"it was faulty {self.faults} times, the last time: {reason[:300]}")

    def cancel_overdue(self, before_s: float) -> None:
        """Cancel every request that has had no reply since `before_s`, by the handle's clock."""
        for (generation, attempt), flight in list(self._in_flight.items()):
            if flight.cancelled_s is None and flight.since_s < before_s:
                log.warning("a request takes too long: cancelled", worker=str(self), attempt=attempt)
                self.cancel(generation, attempt)

    def may_take_s(self, patience_s: float, longest_s: float) -> float:
        """How long a request that was cancelled may go without its terminal reply before the worker is taken for dead.

        A worker must look for cancels between two steps only, and a step of a slow drafter takes seconds. So it gets
        `patience_s`, or several times its longest step; before its first reply, which tells how long that is, `longest_s`."""
        if self._answered or self._longest_step_s or self.role == "target":
            return min(longest_s, max(patience_s, _STEPS_PATIENCE * self._longest_step_s))
        return longest_s

    def owes_since(self, before_s: float) -> bool:
        """Whether a request that was cancelled before `before_s` has no terminal reply yet."""
        return any(
            flight.cancelled_s is not None and flight.cancelled_s < before_s for flight in self._in_flight.values()
        )

    def _ask(self, request: Request, on_reply: OnReply, on_drafted: Callable[[Drafted], None] | None) -> None:
        key = (request.generation, request.attempt)
        assert key not in self._in_flight, "attempts are never revived"
        if self.lost:
            on_reply(None)
            return
        now_s = self._clock()
        if isinstance(request, Draft) and request.rows > 1 and request.start == request.base + len(request.tokens):
            self._mark_cancelled(request.generation, request.attempt - 1, Draft)  # by this request itself
        if isinstance(request, Verify):  # and so is what the server does by itself
            self._mark_cancelled(request.generation, request.attempt - 1, Verify)
        cancelled = request.attempt <= self._cuts.get(request.generation, 0)
        self._in_flight[key] = _Flight(
            request, on_reply, on_drafted, now_s, self._patience_s, now_s if cancelled else None
        )
        try:
            self._tell(request)
        except ProtocolError:  # it cannot be said: a bug of ours, which must not be tried again
            self._in_flight.pop(key, None)
            raise

    def _mark_cancelled(
        self, generation: int, attempt: int | None, kind: type[Draft | Verify] | UnionType = Draft | Verify | Score
    ) -> None:
        """The cut: attempts of this generation up to `attempt` (None: all)."""
        now_s = self._clock()
        for (number, asked), flight in self._in_flight.items():
            meant = number == generation and (attempt is None or asked <= attempt) and isinstance(flight.request, kind)
            if meant and flight.cancelled_s is None:
                flight.cancelled_s = now_s
                flight.patience_s = now_s - flight.since_s + self._patience_s  # the cancel may be lost, too

    def _tell(self, message: FromOrchestrator) -> None:
        if not self.lost:
            self._send(message)

    def on_reply(self, reply: Reply) -> None:
        """What the worker answered. A reply to nothing that is in flight is counted and dropped."""
        key = (reply.generation, reply.attempt)
        flight = self._in_flight.get(key)
        now_s = self._clock()
        if flight is None:
            self._on_unasked(reply, now_s)
            return
        if isinstance(reply, Drafted | Verified | Scored):
            steps = max(1, len(reply.tokens)) if isinstance(reply, Drafted) else 1
            self._longest_step_s = max(self._longest_step_s, (now_s - flight.since_s) / steps)
        if isinstance(reply, Drafted):
            if self._drafts_too_much(flight, reply):
                return
            reply = _with_possible_time(reply, now_s - flight.since_s)
            flight.since_s, flight.patience_s = now_s, self._patience_s
            if flight.on_drafted is not None and reply.tokens:
                flight.on_drafted(reply)
            if not reply.done:
                return
        elif isinstance(reply, Verified):
            if flight.answers and reply.start < flight.answered_to:
                self._on_repeated(now_s)
                return
            reply = _with_possible_time(reply, now_s - flight.since_s)
            if reply.more:
                if self._goes_on(flight, reply, now_s):
                    flight.on_reply(reply)
                    return
                reply = Failed(*key, "protocol", "it goes on further than it may")
        elif isinstance(reply, Scored):
            if self._scores_too_much(flight, reply):
                return
            if not reply.done:
                flight.since_s, flight.patience_s = now_s, self._patience_s
                flight.on_reply(reply)
                return
        elif isinstance(reply, Cancelled) and flight.cancelled_s is None:
            reply = Failed(*key, "protocol", "it answered Cancelled to what nobody cancelled")
        elif isinstance(reply, Failed) and reply.code == "unknown_generation":
            if flight.cancelled_s is not None:
                reply = Cancelled(*key, 0, 0)
            elif self._open_again(flight):
                return
        if self._in_flight.pop(key, None) is None:
            return  # on_drafted lost the worker, and with it this flight was answered
        self._answered[key] = None
        if len(self._answered) > _REMEMBERED_REPLIES:
            del self._answered[next(iter(self._answered))]
        flight.on_reply(reply)

    def _drafts_too_much(self, flight: _Flight, block: Drafted) -> bool:
        """Blocks without end, or beyond what was asked for. Some may come twice."""
        request = flight.request
        if isinstance(request, Draft):
            flight.told += max(1, len(block.tokens))
            # In a tree drafts are numbered, and each step may have as many as its rows, and an alternative.
            beyond = not block.parents and request.rows == 1
            beyond = beyond and block.start + len(block.tokens) > request.start + request.count
            if not beyond and flight.told <= 4 * request.count * (request.rows + 1) + _DRAFTED_SLACK:
                return False
        self.fault(f"it drafted up to {block.start + len(block.tokens)}, {flight.told} tokens so far, for {request}")
        return True

    def _scores_too_much(self, flight: _Flight, block: Scored) -> bool:
        """Blocks without end. Some may come twice."""
        flight.told += max(1, len(block.logprobs))
        if isinstance(flight.request, Score) and flight.told <= 4 * len(flight.request.tokens) + _DRAFTED_SLACK:
            return False
        self.fault(f"it told {flight.told} log probabilities so far, for {type(flight.request).__name__}")
        return True

    def _goes_on(self, flight: _Flight, reply: Verified, now_s: float) -> bool:
        """After this answer the server goes on by itself. False if it may not."""
        flight.answers += 1
        flight.answered_to = reply.start + len(reply.tokens)
        if flight.cancelled_s is None:  # else its terminal reply is owed since then
            flight.since_s, flight.patience_s = now_s, self._patience_s
        return isinstance(flight.request, Verify) and flight.answers <= flight.request.ahead

    def _open_again(self, flight: _Flight) -> bool:
        """The generation was opened, but that message was lost, or the worker had to forget it."""
        opened = self._opened.get(flight.request.generation)
        if opened is None or flight.reopenings >= _MOST_REOPENINGS:
            return False
        flight.reopenings += 1
        self._tell(opened)
        self._tell(flight.request)
        return True

    def _on_unasked(self, reply: Reply, now_s: float) -> None:
        if (reply.generation, reply.attempt) in self._answered:
            self._on_repeated(now_s)
            return
        self.unasked_replies += 1
        log.debug("unasked reply", worker=str(self), reply=type(reply).__name__)
        if not self._unasked.take(now_s):
            self._on_useless(f"it sends what nobody asked for: {self.unasked_replies} replies so far")

    def _on_repeated(self, now_s: float) -> None:
        self.repeated_replies += 1
        if not self._repeated.take(now_s):
            self._on_useless(f"it repeats itself: {self.repeated_replies} replies came again so far")

    def on_lost(self) -> None:
        """The process is gone, and all that it owes with it."""
        self.lost = True
        flights, self._in_flight = self._in_flight, {}
        for flight in flights.values():
            flight.on_reply(None)


def _with_possible_time(reply: AnyTimed, most_s: float) -> AnyTimed:
    """A worker cannot have worked for longer than it had the request: what it says steers the policy."""
    most_us = int(max(0.0, most_s) * 1e6) + _CLOCK_SLACK_US
    return reply if reply.busy_us <= most_us else replace(reply, busy_us=most_us)
