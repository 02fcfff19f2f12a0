"""The worker under examination: what it says is kept in order, and each check takes from it what it waits for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from dsi_actors.transport.gateway import Gateway, PeerGone
from dsi_protocol import (
    CloseGeneration,
    Draft,
    Drafted,
    FromOrchestrator,
    Heartbeat,
    Hello,
    Message,
    OpenGeneration,
    Preparing,
    Ready,
    Reply,
    Verify,
    Welcome,
    prefix_checksum,
)

M = TypeVar("M")
_ANSWER_S = 10.0


class Nonconformance(Exception):
    """What the worker did that the standard does not allow, or did not do that it demands."""


class Peer:
    """One worker on one socket. Heartbeats are answered and noted; all else waits to be taken."""

    def __init__(self, endpoint: str, patience: float = 1.0) -> None:
        """`patience` multiplies what the worker has for an answer: for a machine on which everything takes longer."""
        self._patience = patience
        self._gateway = Gateway(endpoint, self._on_message)
        self.endpoint = self._gateway.endpoint
        self.identity: bytes | None = None
        self.hello: Hello | None = None
        self.ready: Ready | None = None
        self.heartbeats: list[Heartbeat] = []
        self.welcomed_s = 0.0
        self._said: deque[Message] = deque()
        #: When it last said that it prepares its model: it is waited for from then on.
        self._prepared_s = 0.0
        self._news = asyncio.Event()
        self._generations = itertools.count(1)
        self._open: list[int] = []
        self._attempts = itertools.count(1)

    def close(self) -> None:
        self._gateway.close()

    @property
    def malformed_frames(self) -> int:
        return self._gateway.malformed_frames

    # What it says

    def _on_message(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self.heartbeats.append(message)
            with contextlib.suppress(PeerGone):
                self._gateway.send(identity, message)
        elif isinstance(message, Hello) and self.identity is None:
            self.identity, self.hello = identity, message
        if identity == self.identity and isinstance(message, Preparing):
            self._prepared_s = time.monotonic()
        elif identity == self.identity and not isinstance(message, Heartbeat):
            self._said.append(message)
        self._news.set()

    async def take(self, kind: type[M], *, within_s: float = _ANSWER_S, what: str = "") -> M:
        """The next message, which must be of this kind. Hellos that come again are passed over."""
        message = await self._next(within_s * self._patience, what or kind.__name__)
        if not isinstance(message, kind):
            raise Nonconformance(f"{kind.__name__} was due{f' ({what})' if what else ''}, it said {_words(message)}")
        return message

    async def _next(self, within_s: float, what: str) -> Message:
        deadline_s = time.monotonic() + within_s
        while True:
            while self._said:
                message = self._said.popleft()
                if not isinstance(message, Hello) or (self.ready is None and what == "Hello"):
                    return message
            left_s = max(deadline_s, self._prepared_s + within_s) - time.monotonic()
            if left_s <= 0:
                raise Nonconformance(f"no {what} within {within_s:g} s")
            self._news.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def silence(self, for_s: float, what: str) -> None:
        """It must say nothing for so long."""
        try:
            message = await self._next(for_s, what)
        except Nonconformance:
            return
        raise Nonconformance(f"{what}: it said {_words(message)}")

    async def until(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        deadline_s = time.monotonic() + within_s * self._patience
        while not condition():
            if time.monotonic() > deadline_s:
                raise Nonconformance(what)
            await asyncio.sleep(0.01)

    # What it is told

    def tell(self, message: FromOrchestrator) -> None:
        self._send(lambda identity: self._gateway.send(identity, message))

    def tell_frame(self, frame: bytes) -> None:
        self._send(lambda identity: self._gateway.send_frame(identity, frame))

    def _send(self, send: Callable[[bytes], None]) -> None:
        assert self.identity is not None
        try:
            send(self.identity)
        except PeerGone:
            raise Nonconformance("it has closed its connection") from None

    def has_left(self) -> bool:
        """Whether its connection is gone. Asks by a Heartbeat that answers none of its own, which a worker must ignore."""
        assert self.identity is not None
        try:
            self._gateway.send(self.identity, Heartbeat(0, 0))
        except PeerGone:
            return True
        return False

    def welcome(self, role: str, engine: str, model: str, *, heartbeat_ms: int, silence_ms: int) -> None:
        self.welcomed_s = self.welcomed_s or time.monotonic()
        self.tell(Welcome(1, role, engine, model, {}, heartbeat_ms, silence_ms))

    def open(self, prompt_length: int, *, temperature: float = 0.0, seed: int = 0, logprobs: bool = False) -> int:
        """A new generation's number."""
        generation = next(self._generations)
        self._open.append(generation)
        self.tell(
            OpenGeneration(generation, prompt_length, "conformance", temperature, 0, 1.0, 0.0, 1.0, seed, logprobs)
        )
        return generation

    def close_generations(self) -> None:
        """What a check has opened is of no use to the next one."""
        for generation in self._open:
            self.tell(CloseGeneration(generation))
        self._open.clear()

    def attempt(self) -> int:
        return next(self._attempts)

    def draft(
        self, generation: int, tokens: tuple[int, ...], count: int, block: int, *, held: tuple[int, ...] = (),
        start: int | None = None,
    ) -> Draft:  # fmt: skip
        """A draft request, not sent yet: the worker holds `held`, `tokens` follow."""
        end = len(held) + len(tokens) if start is None else start
        return Draft(generation, self.attempt(), len(held), prefix_checksum(held), tokens, end, count, block)

    def verify(self, generation: int, tokens: tuple[int, ...], start: int, *, held: tuple[int, ...] = ()) -> Verify:
        return Verify(generation, self.attempt(), len(held), prefix_checksum(held), tokens, start)

    async def reply(self, kind: type[M], request: Draft | Verify) -> M:
        """The next message, which must be of this kind and answer this request."""
        reply = await self.take(kind, what=f"in answer to {type(request).__name__} {request.attempt}")
        assert isinstance(reply, Reply)
        if (reply.generation, reply.attempt) != (request.generation, request.attempt):
            raise Nonconformance(f"{_words(reply)} answers another request than attempt {request.attempt}")
        return reply

    async def terminal(self, request: Draft | Verify) -> Reply:
        """The terminal reply to this request. Blocks of drafts before it are passed over."""
        while True:
            reply = await self._next(_ANSWER_S * self._patience, f"reply to {type(request).__name__} {request.attempt}")
            if not isinstance(reply, Reply):
                raise Nonconformance(f"a reply to attempt {request.attempt} was due, it said {_words(reply)}")
            if (reply.generation, reply.attempt) != (request.generation, request.attempt):
                raise Nonconformance(f"{_words(reply)} answers another request than attempt {request.attempt}")
            if not isinstance(reply, Drafted) or reply.done:
                return reply

    async def drafted(self, request: Draft) -> tuple[int, ...]:
        """All blocks of a draft, checked against the request."""
        guesses: tuple[int, ...] = ()
        while True:
            block = await self.reply(Drafted, request)
            first = request.start + len(guesses)
            if block.tokens and block.start != first:
                raise Nonconformance(f"a block of a draft begins at {block.start}, {first} was due")
            if len(block.tokens) < request.block and not block.done:
                raise Nonconformance(f"a block of {len(block.tokens)} where blocks of {request.block} were asked for")
            guesses += block.tokens
            if len(guesses) > request.count:
                raise Nonconformance(f"{len(guesses)} tokens were drafted where {request.count} were asked for")
            if block.done:
                return guesses


def _words(message: Message) -> str:
    return str(message)[:200]
