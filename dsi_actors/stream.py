"""From a generation to its reader: a channel that both hold, and the async iterator that the user sees.

The generation holds the channel, not the stream: a reader who drops the stream, by leaving the loop or by being
cancelled, is gone at once, and its end cancels the generation.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeAlias

from dsi_actors.errors import OrchestratorClosed
from dsi_actors.results import CommittedTokens, GenerationReport

#: Ends a generation whose reader wants no more. Returns at once.
Cancel: TypeAlias = Callable[[], None]


class Channel:
    """What a generation has to say to its reader. Bounded by max_tokens."""

    def __init__(self) -> None:
        #: The reader wants no more.
        self.closed = False
        self.ended = False
        self.error: Exception | None = None
        self.concluded = False
        self.report: GenerationReport | None = None
        self._chunks: deque[CommittedTokens] = deque()
        self._waiters: list[asyncio.Future[None]] = []

    def put(self, tokens: CommittedTokens) -> None:
        self._chunks.append(tokens)
        self._wake()

    def end(self, error: Exception | None) -> None:
        """No more tokens come. Only the first end counts."""
        if not self.ended:
            self.ended, self.error = True, error
            self._wake()

    def conclude(self, report: GenerationReport | None) -> None:
        """All work of the generation is over; this is what it cost."""
        self.concluded, self.report = True, report
        self._wake()

    def take(self) -> CommittedTokens | None:
        return self._chunks.popleft() if self._chunks else None

    async def changed(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class GenerationStream:
    """Async iterator over `CommittedTokens`. Work starts with the first iteration and ends with the last reference."""

    def __init__(self, channel: Channel, start: Callable[[], Awaitable[Cancel | None]]) -> None:
        """`start` starts the generation and returns what cancels it; None if the reader was gone before."""
        self._channel = channel
        self._loop: asyncio.AbstractEventLoop | None = None
        self._start: Callable[[], Awaitable[Cancel | None]] | None = start
        self._cancel: Cancel | None = None

    def __aiter__(self) -> GenerationStream:
        return self

    async def __anext__(self) -> CommittedTokens:
        if self._start is not None:
            start, self._start = self._start, None
            self._loop = asyncio.get_running_loop()
            self._cancel = await start()
        channel = self._channel
        try:
            while (tokens := channel.take()) is None:
                if channel.ended or self._cancel is None:
                    if channel.error is not None:
                        raise channel.error
                    raise StopAsyncIteration
                await channel.changed()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return tokens

    def cancel(self) -> None:
        """Nobody wants the rest: cancel all work of this generation. Returns at once."""
        self._start = None
        self._channel.closed = True
        if self._cancel is not None:
            self._cancel()

    async def aclose(self) -> None:
        """Cancel, and wait until no work is left."""
        self.cancel()
        if self._cancel is not None:
            while not self._channel.concluded:
                await self._channel.changed()

    async def report(self) -> GenerationReport:
        """What the generation cost: known once its last piece of work has ended, shortly after the last token."""
        if self._cancel is None:
            raise OrchestratorClosed("the generation did not run")
        while not self._channel.concluded:
            await self._channel.changed()
        if self._channel.report is None:
            raise OrchestratorClosed("the orchestrator was closed before the generation ended")
        return self._channel.report

    async def __aenter__(self) -> GenerationStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The garbage collector may run in any thread, and after the loop was closed.
        cancel, loop = self._cancel, self._loop
        if cancel is not None and loop is not None and not self._channel.ended and not loop.is_closed():
            loop.call_soon_threadsafe(cancel)
