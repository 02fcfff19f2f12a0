"""`dsi-actors status` follows a service without holding up the event loop that it runs in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from dsi_actors.cli import status
from dsi_actors.errors import ConfigError
from support.connections import listening
from support.patience import patience

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def service(*pieces: bytes, hold: bool = False) -> AsyncIterator[str]:
    """A service in this event loop that sends these pieces, each by itself. `hold`: and then says nothing, without an end."""
    over = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if hold:
            await over.wait()

    async with listening(answer) as address:
        try:
            yield f"http://{address}"
        finally:
            over.set()


async def states(url: str) -> list[Any]:
    async with patience(), aclosing(status.follow(url, None)) as found:
        return [state async for state in found]


@pytest.mark.parametrize(
    "told",
    [
        [b'data: {"a": 1}\n\n', b'data: {"a": 2}\n\n'],
        [b'data: {"a"', b": 1}\n", b'\ndata: {"a": 2}\n\n'],
        [b': a proxy keeps the connection alive\n\ndata: {"a":\ndata: 1}\r\n\r\n', b'id: 7\ndata:{"a": 2}\n\n'],
    ],
    ids=["whole", "in pieces", "as a proxy may write it"],
)
async def test_whatever_is_an_event_stream_is_understood(told: list[bytes]) -> None:
    async with service(HEAD, *told) as url:
        assert await states(url) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("pieces", [(), (HEAD, b'data: {"a": 1}\n\n')], ids=["at once", "after a while"])
async def test_a_service_that_says_nothing_is_not_waited_for_for_ever(
    pieces: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_TIMEOUT_S", 0.05)
    async with service(*pieces, hold=True) as url:
        with pytest.raises(ConfigError, match=r"no service at .* \(it says nothing for 0.05 s\)"):
            await states(url)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "answered 401 Unauthorized: give --key"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404 Not Found: it is no service of"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
            "is no service of dsi-actors serve: give the address of one",
        ),
        (HEAD + b"data: hello\n\n", "no service at"),
        (HEAD.replace(b"Connection: close", b"Content-Length: 999") + b"data: {}\n\n", "no service at"),
    ],
    ids=["no key", "another service", "no stream", "no JSON", "cut off"],
)
async def test_what_is_no_service_of_ours_is_said(answer: bytes, problem: str) -> None:
    async with service(answer) as url:
        with pytest.raises(ConfigError, match=problem):
            await states(url)


async def test_a_key_goes_where_it_belongs() -> None:
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(HEAD + b'data: {"a": 1}\n\n')

    async with listening(answer) as address, patience():
        assert [state async for state in status.follow(f"http://{address}/", "sk-1")] == [{"a": 1}]
    assert heard[0].startswith(b"GET /dashboard/events HTTP/1.1\r\n")
    assert b"\r\nauthorization: bearer sk-1\r\n" in heard[0].lower()
