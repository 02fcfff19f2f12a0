"""A worker that speaks the protocol and does with each request what a test says: lie, forget, or answer."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import zmq
import zmq.asyncio

from dsi_protocol import (
    Cancel,
    Cancelled,
    Draft,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    ProtocolError,
    Ready,
    Request,
    Score,
    Verify,
    Welcome,
    decode,
    encode,
)

#: Gives the replies to a request, of whichever kind it is asked.
Answer = Callable[[Any], Iterable[FromWorker]]
VOCABULARY = "timed-1000"


def silent(request: Request) -> Iterable[FromWorker]:
    return ()


class FakeWorker:
    def __init__(self, role: str, answer: Answer, *, vocabulary: str = VOCABULARY, fingerprint: int = 0) -> None:
        self.role = role
        self.answer = answer
        self.vocabulary = vocabulary
        self.fingerprint = fingerprint
        self.heard: list[Message] = []
        self.obeys_cancel = True
        #: Until it is answered.
        self.repeats_hello = False
        self._open: dict[tuple[int, int], None] = {}

    def dismissed(self) -> str:
        """The reason for which it was told to go; empty as long as it was not."""
        return next((message.reason for message in self.heard if isinstance(message, Goodbye)), "")

    async def run(self, endpoint: str) -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            incarnation = secrets.randbits(64)
            hello = Hello(1, incarnation, self.role, "auto", "", "cpu:0", "fake", os.getpid())
            await socket.send(encode(hello))
            beating = asyncio.create_task(self._beat(socket, hello))
            try:
                while True:
                    try:
                        message = decode(await socket.recv())
                    except ProtocolError:
                        continue
                    self.heard.append(message)
                    if isinstance(message, Draft):
                        async for reply in self.react_slowly(message):
                            await socket.send(encode(reply))
                    for reply in self._react(message):
                        await socket.send(encode(reply))
            finally:
                beating.cancel()

    async def _beat(self, socket: zmq.asyncio.Socket, hello: Hello) -> None:
        for sequence in itertools.count(1):
            await socket.send(encode(Heartbeat(hello.incarnation, sequence)))
            if self.repeats_hello and not any(isinstance(message, Welcome) for message in self.heard):
                await socket.send(encode(hello))
            await asyncio.sleep(0.05)

    async def react_slowly(self, message: Draft) -> AsyncIterator[FromWorker]:
        """For a worker that takes its time. Its heart beats meanwhile."""
        return
        yield  # an async generator

    def _react(self, message: Message) -> Iterable[FromWorker]:
        match message:
            case Welcome():
                size = 1000 if self.vocabulary else 0
                return (Ready(self.vocabulary, size, 1 << 16, 8, 1000, 1000, 4, 0, 0, self.fingerprint),)
            case Draft() | Verify() | Score():
                replies = tuple(self.answer(message))
                if not replies:
                    self._open[message.generation, message.attempt] = None
                return replies
            case Cancel(generation, attempt) if self.obeys_cancel:
                ended = [key for key in self._open if key[0] == generation and key[1] <= attempt]
                for key in ended:
                    del self._open[key]
                return [Cancelled(*key, 0, 0) for key in ended]
        return ()


@asynccontextmanager
async def running(endpoint: str, *workers: FakeWorker) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(worker.run(endpoint)) for worker in workers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
