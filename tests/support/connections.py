"""Servers of raw connections in a test's own loop, that leave no connection to the garbage collector."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def leave(writer: asyncio.StreamWriter) -> None:
    """Close a connection, whatever its other end does, and wait until it is closed."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def listening(answer: Answer) -> AsyncIterator[str]:
    """Serve connections with `answer`. Yields the address as HOST:PORT. At the end each connection is cut, each answer over."""
    answers: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}

    async def answer_and_leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers[asyncio.current_task()] = writer
        try:
            with suppress(ConnectionError):
                await answer(reader, writer)
        finally:
            await leave(writer)

    async with await asyncio.start_server(answer_and_leave, "127.0.0.1", 0) as server:
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for writer in answers.values():
                writer.transport.abort()
            await asyncio.gather(*(task for task in answers if task is not None))


@dataclass(slots=True)
class Relay:
    """Carries what two ends say to each other, and records what the connecting end says."""

    there: str
    """The address that the relay connects to, as HOST:PORT, once for each connection that it accepts."""
    heard: list[bytearray] = field(default_factory=list)
    """What the connecting end has said, one per connection."""
    interrupted: bool = False
    """Whether new connections are cut at once."""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    """Both ends of each connection that was made since the last cut."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.interrupted:
            writer.transport.abort()
            return
        host, port = self.there.rsplit(":", 1)
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        self.writers += writer, there_writer
        self.heard.append(bytearray())
        await asyncio.gather(
            _carry(reader, there_writer, self.heard[-1].extend), _carry(there_reader, writer, lambda words: None)
        )

    def cut(self) -> None:
        """Break every connection that there is."""
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, hear: Callable[[bytes], None]) -> None:
    try:
        with suppress(ConnectionError):
            while words := await source.read(4096):
                hear(words)
                sink.write(words)
    finally:
        await leave(sink)
