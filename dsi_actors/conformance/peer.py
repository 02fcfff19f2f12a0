"""The worker under examination: its messages are kept in order, and each check takes the ones that it waits for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

from dsi_actors.conformance.differences import Nonconformance, NotApplicable, items, require, require_kind
from dsi_actors.transport.gateway import Gateway, PeerGone
from dsi_protocol import (
    MAX_TOLD,
    PROTOCOL_VERSION,
    CloseGeneration,
    Draft,
    Drafted,
    Failed,
    FromOrchestrator,
    Heartbeat,
    Hello,
    Message,
    OpenGeneration,
    OptionValue,
    Preparing,
    Ready,
    Reply,
    Request,
    SamplingParameters,
    Score,
    Scored,
    Verified,
    Verify,
    Welcome,
    prefix_checksum,
)

M = TypeVar("M", bound=Message)

#: A text that repeats itself, so that a drafter that looks for repetitions has guesses.
PROMPT = (1, 2, 3, 4, 1, 2, 3, 4, 1, 2)
#: How often the worker under examination sends a heartbeat, and the time after which it may give up the connection.
HEARTBEAT_MS, SILENCE_MS = 100, 5000
_ANSWER_S = 10.0


class Peer:
    """One worker on one socket. Its heartbeats are answered and noted; its other messages wait until a check takes them."""

    def __init__(self, endpoint: str, patience: float = 1.0, options: Mapping[str, OptionValue] | None = None) -> None:
        """Listens on `endpoint`. `patience` multiplies every time limit, for a slow or busy machine. `options` are settings of
        the worker's engine, for Welcome."""
        self._options = dict(options or {})
        self._patience = patience
        self._gateway = Gateway(endpoint, self._on_message)
        self.endpoint = self._gateway.endpoint
        self.identity: bytes | None = None
        self.hello: Hello | None = None
        self.ready: Ready | None = None
        self.heartbeats: list[Heartbeat] = []
        #: When the first Welcome was sent, by time.monotonic().
        self.welcomed_s = 0.0
        self._said: deque[Message] = deque()
        #: When the last Preparing came: the time limit for the next message counts from then on.
        self._prepared_s = 0.0
        self._news = asyncio.Event()
        self._generations = itertools.count(1)
        self._open: list[int] = []
        self._attempts = itertools.count(1)

    def close(self) -> None:
        """Close the socket."""
        self._gateway.close()

    @property
    def drafts(self) -> bool:
        """Whether this worker is examined as a drafter. One that leaves its role to the orchestrator is."""
        return self.hello is not None and self.hello.role != "target"

    # Messages of the worker

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

    async def take(self, kind: type[M], why: str = "", *, within_s: float = _ANSWER_S) -> M:
        """The next message, which must be of this kind. Repeated Hellos are passed over.

        `why` says what the message is for. Raises Nonconformance.
        """
        message = await self._next(within_s * self._patience, kind.__name__)
        require_kind(message, kind, why or f"{kind.__name__} was expected")
        assert isinstance(message, kind)
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

    async def silence(self, for_s: float, why: str) -> None:
        """The worker must send nothing but heartbeats for `for_s` seconds."""
        try:
            message = await self._next(for_s, "message")
        except Nonconformance:
            return
        raise Nonconformance(f"{why}: it sent {str(message)[:200]}")

    async def until(self, condition: Callable[[], bool], within_s: float, otherwise: str) -> None:
        """Wait until `condition` is true. Raises Nonconformance with the sentence `otherwise` if it is not within the time."""
        deadline_s = time.monotonic() + within_s * self._patience
        while not condition():
            if time.monotonic() > deadline_s:
                raise Nonconformance(otherwise)
            await asyncio.sleep(0.01)

    # Messages to the worker

    def tell(self, message: FromOrchestrator) -> None:
        """Send a message."""
        self._send(lambda identity: self._gateway.send(identity, message))

    def tell_frame(self, frame: bytes) -> None:
        """Send bytes as they are, whether they are a message or not."""
        self._send(lambda identity: self._gateway.send_frame(identity, frame))

    def is_connected(self) -> bool:
        """Whether the worker's connection is open. Sends a heartbeat to find out."""
        assert self.identity is not None
        assert self.hello is not None
        try:
            self._gateway.send(self.identity, Heartbeat(self.hello.incarnation, 0))
        except PeerGone:
            return False
        return True

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

    def welcome(self, *, engine: str | None = None) -> None:
        """Send Welcome. The worker is told to be what its Hello says, unless `engine` names another engine."""
        assert self.hello is not None
        role = "drafter" if self.drafts else "target"
        own = self.hello.engine if self.hello.engine != "auto" else "timed"
        self.welcomed_s = self.welcomed_s or time.monotonic()
        self.tell(
            Welcome(
                PROTOCOL_VERSION,
                role,
                own if engine is None else engine,
                self.hello.model,
                self._options,
                HEARTBEAT_MS,
                SILENCE_MS,
            )
        )

    def open(self, *, temperature: float = 0.0, seed: int = 0, logprobs: bool = False, top_logprobs: int = 0) -> int:
        """Open a new generation and return its number. Its prompt is PROMPT."""
        generation = next(self._generations)
        self._open.append(generation)
        sampling = SamplingParameters(temperature, seed=seed, logprobs=logprobs, top_logprobs=top_logprobs)
        self.tell(OpenGeneration(generation, len(PROMPT), "conformance", sampling))
        return generation

    def close_generations(self) -> None:
        """Close every generation that a check has opened."""
        for generation in self._open:
            self.tell(CloseGeneration(generation))
        self._open.clear()

    def draft(
        self, generation: int, tokens: tuple[int, ...], count: int, block: int, *, held: tuple[int, ...] = (),
        start: int | None = None, rows: int = 1, committed: int = 0,
    ) -> Draft:  # fmt: skip
        """A Draft request, not sent yet: the worker holds `held`, `tokens` follow. Without `start` it starts behind them."""
        at = len(held) + len(tokens) if start is None else start
        checksum = prefix_checksum(held)
        return Draft(generation, next(self._attempts), len(held), checksum, tokens, at, count, block, rows, committed)

    def verify(
        self, generation: int, tokens: tuple[int, ...], start: int, *, held: tuple[int, ...] = (),
        parents: tuple[int, ...] = (), ahead: int = 0,
    ) -> Verify:  # fmt: skip
        """A Verify request, not sent yet: the worker holds `held`, `tokens` follow, as a tree if there are `parents`."""
        return Verify(generation, next(self._attempts), len(held), prefix_checksum(held), tokens, start, parents, ahead)

    def score(self, generation: int, tokens: tuple[int, ...], start: int) -> Score:
        """A Score request, not sent yet."""
        return Score(generation, next(self._attempts), 0, 0, tokens, start)

    async def scored(self, request: Score) -> list[Scored]:
        """All blocks for a Score request, which must follow one another from its start to its end. Raises NotApplicable."""
        blocks: list[Scored] = []
        due, end = request.start, request.base + len(request.tokens)
        while not blocks or not blocks[-1].done:
            reply = await self._next(_ANSWER_S * self._patience, f"reply to Score {request.attempt}")
            self._require_answer(reply, request)
            if isinstance(reply, Failed) and reply.code == "request" and not blocks:
                raise NotApplicable("it does not tell the log probabilities of a given text")
            require_kind(reply, Scored, f"Scored was expected as the answer to Score {request.attempt}")
            assert isinstance(reply, Scored)
            require(reply, "a block begins where the one before ended", start=due, logprobs=items(1, MAX_TOLD))
            due += len(reply.logprobs)
            require(reply, f"the last block ends at {end}, and this one at {due}", done=due == end)
            blocks.append(reply)
        return blocks

    def request(
        self, generation: int | None = None, *, held: tuple[int, ...] = (), tokens: tuple[int, ...] | None = None,
        count: int = 3,
    ) -> Draft | Verify:  # fmt: skip
        """The simplest request that this worker serves, not sent yet. It opens a generation unless one is given."""
        number = self.open() if generation is None else generation
        new = tokens if tokens is not None else (PROMPT if not held else (3,))
        if self.drafts:
            return self.draft(number, new, count, 1, held=held)
        return self.verify(number, new, len(held) + len(new), held=held)

    # Replies

    async def reply(self, kind: type[M], request: Request) -> M:
        """The next message, which must be of this kind and answer this request. Raises Nonconformance."""
        asked = f"the answer to {type(request).__name__} {request.attempt}"
        reply = await self.take(kind, f"{kind.__name__} was expected as {asked}")
        self._require_answer(reply, request)
        return reply

    async def terminal(self, request: Request) -> Reply:
        """The terminal reply to this request. What comes before it is passed over. Raises Nonconformance."""
        asked = f"{type(request).__name__} {request.attempt}"
        while True:
            reply = await self._next(_ANSWER_S * self._patience, f"reply to {asked}")
            if not isinstance(reply, Reply):
                raise Nonconformance(f"a reply to {asked} was expected, it sent {str(reply)[:200]}")
            self._require_answer(reply, request)
            more = isinstance(reply, Drafted | Scored) and not reply.done
            more = more or (isinstance(reply, Verified) and reply.more)
            if not more:
                return reply

    def _require_answer(self, reply: Message, request: Request) -> None:
        require(
            reply, f"a reply names the request that it answers, here {type(request).__name__} {request.attempt}",
            generation=request.generation, attempt=request.attempt,
        )  # fmt: skip

    async def drafted(self, request: Draft, *, first: int | None = None) -> tuple[int, ...]:
        """All guesses for a draft request. Their blocks must follow one another from `first` (else from its start) on."""
        due, end = request.start if first is None else first, request.start + request.count
        guesses: tuple[int, ...] = ()
        while True:
            block = await self.reply(Drafted, request)
            require(block, "each block of guesses begins where the one before ended", start=due + len(guesses))
            guesses += block.tokens
            what = f"{len(block.tokens)} tokens up to position {due + len(guesses)}"
            if not block.done and len(block.tokens) < request.block:
                raise Nonconformance(
                    f"a block has at least {request.block} tokens unless it is the last one, not {what}"
                )
            if due + len(guesses) > end:
                raise Nonconformance(f"guesses end at position {end} at the latest, not with {what}")
            if block.done:
                return guesses
