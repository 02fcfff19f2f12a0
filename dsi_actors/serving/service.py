"""What is done for a request: who may ask, what is asked, the generations for it, and the end of the service."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request

from dsi_actors.errors import ConfigError, OrchestratorClosed
from dsi_actors.logs import get_logger
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.serving.bodies import Bodies
from dsi_actors.serving.completions import Completion, Job
from dsi_actors.serving.doors import Door
from dsi_actors.serving.errors import ApiError, unavailable
from dsi_actors.serving.exchange import Exchange
from dsi_actors.serving.limits import BodyMemory, FairThreads, Places
from dsi_actors.serving.metrics import Metrics
from dsi_actors.serving.preparing import Preparation
from dsi_actors.serving.schemas import AnyRequest, parse
from dsi_actors.serving.watch import Watch
from dsi_actors.tokenizer import Tokenizer
from dsi_protocol import MAX_TOKENS_PER_MESSAGE

log = get_logger("serving")

#: JSON may write each byte of a text in six characters (\\u0041), and holds other fields, too.
_JSON_BYTES_PER_BYTE, _OTHER_JSON_BYTES = 6, 1 << 16
#: An answer of more tokens becomes JSON in a thread.
_MANY_TOKENS = 500
_BYTES_PER_TOKEN = 64
#: Once requests are cut off, how long their clients have to take the last event.
_FAREWELL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """What a service is beside its orchestrator. Raises ConfigError."""

    #: The name under which clients ask for the model.
    model: str
    #: Other names for it.
    aliases: Sequence[str] = ()
    #: Who may ask. Empty: anybody.
    api_keys: Sequence[str] = ()
    #: What a client gets that does not say how much it wants.
    default_max_tokens: int = 1024
    #: The longest body that is read, however long prompts may be.
    max_body_bytes: int = 16 << 20
    #: Bodies of all requests together, while they are read and prepared. More get 503.
    max_bodies_bytes: int = 128 << 20
    #: How long a client may take for the head of a request and for its body (which gets a second more for each 8 KiB), and not
    #: take anything of an answer.
    client_timeout_s: float = 30.0
    #: A stream in which nothing is new for so long gets a comment, and its head if it has none yet.
    silence_s: float = 10.0
    #: How long a connection may stay without a request after an answer.
    keep_alive_s: int = 5
    #: Connections at the same time. Requests on more of them get 503, and a quarter more are closed at once.
    max_connections: int = 512
    #: Web pages of these origins, such as https://chat.example.org, may ask. "*" allows all pages.
    allowed_origins: Sequence[str] = ()
    #: Fields of a request that this service does not know are ignored. Otherwise they get 400.
    allow_unknown_fields: bool = False

    def __post_init__(self) -> None:
        if not all(name and name.isprintable() for name in (self.model, *self.aliases)):
            raise ConfigError("the model's names must be printable text that is not empty: give other ones")
        if min(self.default_max_tokens, self.max_body_bytes, self.max_bodies_bytes, self.max_connections) < 1:
            raise ConfigError(
                "default_max_tokens, max_body_bytes, max_bodies_bytes and max_connections must be positive"
            )
        if min(self.client_timeout_s, self.silence_s) <= 0 or self.keep_alive_s < 0:
            raise ConfigError("client_timeout_s and silence_s must be positive, keep_alive_s not negative")


class Service:
    """Answers requests with an orchestrator, until `end`."""

    def __init__(self, orchestrator: Orchestrator, tokenizer: Tokenizer, config: ServiceConfig) -> None:
        self.orchestrator = orchestrator
        self.config = config
        self.model_names = list(dict.fromkeys((config.model, *config.aliases)))
        self.created = int(time.time())
        self.watch = Watch(orchestrator, tokenizer)
        self.metrics = Metrics(config.model, workers=self.ready_workers, waiting=self._waiting)
        #: No request is taken any more.
        self.ending = False
        self._tokenizer = tokenizer
        self._keys = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in config.api_keys]
        self.places = Places(orchestrator.config.max_generations)
        self.memory = BodyMemory(config.max_bodies_bytes)
        self._threads = FairThreads()
        self._preparation = Preparation(
            orchestrator, tokenizer, self._threads, default_max_tokens=config.default_max_tokens,
            allow_unknown_fields=config.allow_unknown_fields,
        )  # fmt: skip
        #: Those without their whole answer.
        self.requests: set[Exchange] = set()
        self._one_is_over = asyncio.Event()
        self._patience: asyncio.Timeout | None = None

    # What others look at

    def check_alive(self) -> None:
        """Raises OrchestratorClosed if the orchestrator has ended: then only a new process can help."""
        _ = self.orchestrator.workers

    def ready_workers(self, role: str) -> int:
        try:
            return sum(worker.role == role for worker in self.orchestrator.workers)
        except OrchestratorClosed:
            return 0

    def _waiting(self) -> int:
        try:
            return self.orchestrator.waiting
        except OrchestratorClosed:
            return 0

    def check_key(self, request: Request) -> None:
        """Raises ApiError for a client that may not ask."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not given and (key := request.headers.get("x-api-key")):  # as Anthropic's clients send it
            scheme, given = "bearer", key
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        # Every key is compared, so that the time tells nothing about any of them.
        right = sum([hmac.compare_digest(digest, key) for key in self._keys])
        if self._keys and not (right and scheme.lower() == "bearer"):
            raise ApiError(
                401, "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    # A request

    async def answer(self, exchange: Exchange, door: Door) -> None:
        """From the first look at the request's head to the last byte of the answer, or to the client's leaving."""
        self.requests.add(exchange)
        try:
            await exchange.run(self._serve(exchange, door))
        finally:
            self.requests.discard(exchange)
            self._one_is_over.set()
            self.metrics.request(exchange.outcome)
            exchange.log_end()

    async def _serve(self, exchange: Exchange, door: Door) -> None:
        request = exchange.request
        self.check_key(request)
        if self.ending:
            raise self._no_more()
        key = request.headers.get("authorization") or request.headers.get("x-api-key")
        client = key if self._keys else request.client and request.client.host
        with ExitStack() as places:
            with self.memory.hold() as held:
                most_bytes, why = self._most_bytes(door)
                body = await exchange.read_body(
                    most_bytes=most_bytes, too_long=why, within_s=self.config.client_timeout_s, held=held
                )
                sent, asked = await self._threads.run(client, len(body), partial(self._parsed, body, door))
                if asked.model not in self.model_names:
                    raise self.no_model(asked.model)
                places.enter_context(self.places.take(asked.places if door.bodies else 0))
                exchange.accepted = True
                job = await self._preparation.job(asked, client, len(body), exchange.id)
            if door.bodies is None:
                await exchange.send_whole(json.dumps({"input_tokens": sum(map(len, job.prompts))}).encode())
            else:
                await self._generate(exchange, door.bodies(sent, exchange.id), job, stream=asked.stream)

    def _parsed(self, body: bytes, door: Door) -> tuple[Any, AnyRequest]:
        """What was sent, and the same as a request of an older endpoint. Raises ApiError and ValidationError."""
        sent = parse(
            body, door.kind, max_length=self.max_length or MAX_TOKENS_PER_MESSAGE,
            allow_unknown_fields=self.config.allow_unknown_fields,
        )  # fmt: skip
        return sent, door.as_request(sent)

    def no_model(self, name: str) -> ApiError:
        here = " or ".join(map(repr, self.model_names))
        return ApiError(404, f"there is no model {name!r} here: it is {here}", param="model", code="model_not_found")

    @property
    def max_length(self) -> int:
        """Positions, prompt and answer together, that a generation may have; 0 while no target server is there."""
        return self._preparation.max_length

    def _most_bytes(self, door: Door) -> tuple[int, str]:
        """The longest body that can hold a prompt of the target's length, and a sentence that says so."""
        length, most = self.max_length, self.config.max_body_bytes
        fits = _JSON_BYTES_PER_BYTE * length * self._preparation.token_bytes + _OTHER_JSON_BYTES
        if length > 0 and fits < most and not door.takes_batches:
            return (
                fits,
                f"This model's maximum context length is {length} tokens, and no prompt of more than {fits} bytes fits",
            )
        return most, f"this service reads at most {most} bytes"

    async def _generate(self, exchange: Exchange, bodies: Bodies, job: Job, *, stream: bool) -> None:
        completion = Completion(self.orchestrator, self._tokenizer, self.metrics, job)
        exchange.completion = completion
        prompt_tokens = sum(map(len, job.prompts))
        log.info(
            "request", id=exchange.id, prompt_tokens=prompt_tokens, max_tokens=job.sampling.max_tokens,
            n=len(completion.choices),
        )  # fmt: skip
        self.metrics.prompt(prompt_tokens)
        if stream:
            await _stream(exchange, bodies, completion, self.config.silence_s)
        else:
            async with aclosing(completion.updates()) as updates:
                async for _ in updates:
                    pass
            await exchange.send_whole(await self._rendered(exchange.id, bodies, completion))

    async def _rendered(self, number: str, bodies: Bodies, completion: Completion) -> bytes:
        tokens = sum(choice.shown_tokens for choice in completion.choices)
        if tokens < _MANY_TOKENS:
            return _json(bodies, completion)
        return await self._threads.run(number, tokens * _BYTES_PER_TOKEN, partial(_json, bodies, completion))

    # The end

    async def end(self, within_s: float) -> int:
        """Take no more requests, finish those that were taken, and cut off what is left after `within_s`. How many those were.

        A stream that is cut off ends with an error event; other requests get 503."""
        self.ending = True
        self.watch.end()
        for exchange in self._open(accepted=False):
            exchange.stop(self._no_more())
        await self._all_over(within_s)
        cut = self._open(accepted=True)
        for exchange in cut:
            exchange.stop(unavailable("the service ended before the answer was complete", close=True))
        await self._all_over(_FAREWELL_S)
        self._threads.close()
        return len(cut)

    def _open(self, *, accepted: bool) -> list[Exchange]:
        return [exchange for exchange in self.requests if exchange.accepted == accepted]

    def hurry(self) -> None:
        """Cut `end` short."""
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())

    async def _all_over(self, within_s: float) -> None:
        """Wait for the requests that were taken."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s) as self._patience:
                while self._open(accepted=True):
                    self._one_is_over.clear()
                    await self._one_is_over.wait()
        self._patience = None

    @staticmethod
    def _no_more() -> ApiError:
        return unavailable("the service ends and takes no more requests", close=True)


async def _stream(exchange: Exchange, bodies: Bodies, completion: Completion, silence_s: float) -> None:
    """Server-sent events. Something new comes before the status line, so that what is wrong with the request has a status; but
    what waits for it on the way, such as a proxy, waits no longer than `silence_s`."""
    async with aclosing(completion.updates(silence_s)) as updates:
        begun = False
        async for update in updates:
            if not begun:
                begun = True
                await exchange.open_stream(bodies)
                await exchange.send_events(bodies.begin(completion))
            if update is None:
                await exchange.send_comment()
            else:
                await exchange.send_events(bodies.update(update))
    await exchange.send_events(bodies.end(completion))
    await exchange.end_stream()


def _json(bodies: Bodies, completion: Completion) -> bytes:
    """By the encoder in Python, which other threads can interrupt, where the one in C holds them all up."""
    encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
    return "".join(encoder.iterencode(bodies.whole(completion))).encode()
