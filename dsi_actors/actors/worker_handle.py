"""A worker process as the orchestrator sees it: typed requests, each with one answer, and everything it still owes.

An answer comes by a callback, not by a future: an awaiting task for each request would cost three turns of the event
loop and half of the orchestrator's time (docs/limit.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.config import Sampling
from dsi_actors.logs import get_logger
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
    Ready,
    Reply,
    Verify,
)

log = get_logger("worker_handle")


#: Called once with the terminal reply, or with None if the worker is lost before it gives one.
OnReply: TypeAlias = Callable[[Reply | None], None]


@dataclass(slots=True)
class _Flight:
    """A request without its terminal reply."""

    on_reply: OnReply
    on_drafted: Callable[[Drafted], None] | None
    #: When it was asked, or last answered in part.
    since_s: float
    #: When it was cancelled. It still owes its terminal reply.
    cancelled_s: float | None = None


class WorkerHandle:
    """One worker process: who it is, what it can do, which attempts it has. Once it is gone every request ends with None."""

    def __init__(
        self, number: int, identity: bytes, hello: Hello, role: str, send: Callable[[FromOrchestrator], None]
    ) -> None:
        self.number = number
        self.identity = identity
        self.hello = hello
        self.role = role
        self.ready: Ready | None = None
        self.lost = False
        #: Replies to nothing that was asked. A few come with restarts; many are a fault of the worker.
        self.unasked_replies = 0
        self._send = send
        self._in_flight: dict[tuple[int, int], _Flight] = {}
        #: By generation: requests of this attempt or an earlier one are cancelled, also those still to come.
        self._cuts: dict[int, int] = {}

    def __str__(self) -> str:
        return f"{self.role} {self.number} ({self.hello.device}, pid {self.hello.process})"

    def verify(self, request: Verify, on_reply: OnReply) -> None:
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
        self._tell(
            OpenGeneration(
                generation, prompt_length, correlation, sampling.temperature, sampling.top_k or 0, sampling.top_p,
                sampling.min_p, sampling.repetition_penalty, sampling.seed, sampling.logprobs,
            )
        )  # fmt: skip

    def close(self, generation: int) -> None:
        """The worker may forget the generation. What it still does for it is cancelled."""
        self._cuts.pop(generation, None)
        self._mark_cancelled(generation, None)
        self._tell(CloseGeneration(generation))

    def cancel_overdue(self, before_s: float) -> None:
        """Cancel every request that has had no reply since `before_s` (time.monotonic)."""
        for (generation, attempt), flight in list(self._in_flight.items()):
            if flight.cancelled_s is None and flight.since_s < before_s:
                log.warning("a request takes too long: cancelled", worker=str(self), attempt=attempt)
                self.cancel(generation, attempt)

    def owes_since(self, before_s: float) -> bool:
        """Whether a request that was cancelled before `before_s` has no terminal reply yet."""
        return any(
            flight.cancelled_s is not None and flight.cancelled_s < before_s for flight in self._in_flight.values()
        )

    def _ask(self, request: Draft | Verify, on_reply: OnReply, on_drafted: Callable[[Drafted], None] | None) -> None:
        key = (request.generation, request.attempt)
        assert key not in self._in_flight, "attempts are never revived"
        if self.lost:
            on_reply(None)
            return
        now_s = time.monotonic()
        cancelled = request.attempt <= self._cuts.get(request.generation, 0)
        self._in_flight[key] = _Flight(on_reply, on_drafted, now_s, now_s if cancelled else None)
        self._tell(request)

    def _mark_cancelled(self, generation: int, attempt: int | None) -> None:
        """The cut: attempts of this generation up to `attempt` (None: all)."""
        now_s = time.monotonic()
        for (number, asked), flight in self._in_flight.items():
            if number == generation and (attempt is None or asked <= attempt) and flight.cancelled_s is None:
                flight.cancelled_s = now_s

    def _tell(self, message: FromOrchestrator) -> None:
        if not self.lost:
            self._send(message)

    def on_reply(self, reply: Reply) -> None:
        """What the worker answered. A reply to nothing that is in flight is counted and dropped."""
        key = (reply.generation, reply.attempt)
        flight = self._in_flight.get(key)
        if flight is None:
            self.unasked_replies += 1
            log.debug("unasked reply", worker=str(self), reply=type(reply).__name__)
            return
        if isinstance(reply, Drafted):
            flight.since_s = time.monotonic()
            if flight.on_drafted is not None and reply.tokens:
                flight.on_drafted(reply)
            if not reply.done:
                return
        elif isinstance(reply, Cancelled) and flight.cancelled_s is None:
            reply = Failed(*key, "protocol", "it answered Cancelled to what nobody cancelled")
        self._in_flight.pop(key, None)  # on_drafted may have lost the worker
        flight.on_reply(reply)

    def on_lost(self) -> None:
        """The process is gone, and all that it owes with it."""
        self.lost = True
        flights, self._in_flight = self._in_flight, {}
        for flight in flights.values():
            flight.on_reply(None)
