"""A worker process as the orchestrator sees it: typed requests that can be awaited, and everything it still owes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from dsi_actors.errors import WorkerLost
from dsi_actors.logs import get_logger
from dsi_protocol import (
    Cancel,
    CloseGeneration,
    Draft,
    Drafted,
    FromOrchestrator,
    Hello,
    OpenGeneration,
    Ready,
    Reply,
    Verify,
)

log = get_logger("worker_handle")


@dataclass(frozen=True, slots=True)
class _Flight:
    """A request without its terminal reply."""

    terminal: asyncio.Future[Reply]
    on_drafted: Callable[[Drafted], None] | None = None


class WorkerHandle:
    """One worker process: who it is, what it can do, which attempts it has. Requests raise WorkerLost once it is gone."""

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

    def __str__(self) -> str:
        return f"{self.role} {self.number} ({self.hello.device}, pid {self.hello.process})"

    async def verify(self, request: Verify) -> Reply:
        """The terminal reply to `request`. Cancelling the awaiting task cancels the request, one way, at once."""
        return await self._ask(request, None)

    async def draft(self, request: Draft, on_drafted: Callable[[Drafted], None]) -> Reply:
        """As `verify`; every Drafted with tokens, the last one included, goes to `on_drafted` as it comes."""
        return await self._ask(request, on_drafted)

    def cancel(self, generation: int, attempt: int) -> None:
        """This attempt and earlier ones are not wanted. Nothing waits for it, nothing is correct because of it."""
        self._tell(Cancel(generation, attempt))

    def open(self, generation: int, prompt_length: int, correlation: str) -> None:
        self._tell(OpenGeneration(generation, prompt_length, correlation))

    def close(self, generation: int) -> None:
        self._tell(CloseGeneration(generation))

    async def _ask(self, request: Draft | Verify, on_drafted: Callable[[Drafted], None] | None) -> Reply:
        key = (request.generation, request.attempt)
        assert key not in self._in_flight, "attempts are never revived"
        terminal: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = _Flight(terminal, on_drafted)
        self._tell(request)
        if self.lost:
            raise WorkerLost(str(self))
        try:
            return await terminal
        except asyncio.CancelledError:
            self.cancel(*key)
            raise

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
            if flight.on_drafted is not None and reply.tokens and not flight.terminal.done():
                flight.on_drafted(reply)
            if not reply.done:
                return
        del self._in_flight[key]
        if not flight.terminal.done():
            flight.terminal.set_result(reply)

    def on_lost(self) -> None:
        """The process is gone: everything it owes fails with WorkerLost."""
        self.lost = True
        flights, self._in_flight = self._in_flight, {}
        for flight in flights.values():
            if not flight.terminal.done():
                flight.terminal.set_exception(WorkerLost(str(self)))
