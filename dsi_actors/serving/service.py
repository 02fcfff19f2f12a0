"""What is done for a request: who may ask, what is asked, the generations for it, and the end of the service."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Hashable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial

from fastapi import Request

from dsi_actors.config import Sampling
from dsi_actors.errors import ConfigError, NoTargetError, OrchestratorClosed
from dsi_actors.logs import get_logger
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.serving.bodies import Bodies
from dsi_actors.serving.completions import Completion, Job, seed_or_any
from dsi_actors.serving.errors import ApiError, context_length_exceeded, unavailable
from dsi_actors.serving.exchange import Exchange
from dsi_actors.serving.limits import BodyMemory, FairThreads, Places
from dsi_actors.serving.metrics import Metrics
from dsi_actors.serving.schemas import AnyRequest, ChatRequest, CompletionRequest, parse
from dsi_actors.serving.structured import structure_of
from dsi_actors.serving.watch import Watch
from dsi_actors.tokenization.sampling_defaults import DEFAULT_NAMES
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
#: OpenAI's, where neither a request nor the model's generation_config.json names one.
_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """What a service is beside its orchestrator. Raises ConfigError."""

    #: The name under which clients ask for the model.
    model: str
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
    #: How long a connection may stay without a request after an answer.
    keep_alive_s: int = 5
    #: Connections at the same time. Requests on more of them get 503, and a quarter more are closed at once.
    max_connections: int = 512
    #: Web pages of these origins, such as https://chat.example.org, may ask. "*" allows all pages.
    allowed_origins: Sequence[str] = ()
    #: Fields of a request that this service does not know are ignored. Otherwise they get 400.
    allow_unknown_fields: bool = False

    def __post_init__(self) -> None:
        if not self.model.isprintable() or not self.model:
            raise ConfigError("the model's name must be printable text that is not empty: give another one")
        if min(self.default_max_tokens, self.max_body_bytes, self.max_bodies_bytes, self.max_connections) < 1:
            raise ConfigError(
                "default_max_tokens, max_body_bytes, max_bodies_bytes and max_connections must be positive"
            )
        if self.client_timeout_s <= 0 or self.keep_alive_s < 0:
            raise ConfigError("client_timeout_s must be positive, keep_alive_s not negative")


class Service:
    """Answers requests with an orchestrator, until `end`."""

    def __init__(self, orchestrator: Orchestrator, tokenizer: Tokenizer, config: ServiceConfig) -> None:
        self.orchestrator = orchestrator
        self.config = config
        self.created = int(time.time())
        self.watch = Watch(orchestrator, tokenizer)
        self.metrics = Metrics(config.model, workers=self.ready_workers, waiting=self._waiting)
        #: No request is taken any more.
        self.ending = False
        self._tokenizer = tokenizer
        #: The bytes of text that a token may stand for. Known from the start: the vocabulary is large.
        self._token_bytes = tokenizer.max_token_bytes
        self._keys = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in config.api_keys]
        self.places = Places(orchestrator.config.max_generations)
        self.memory = BodyMemory(config.max_bodies_bytes)
        self._threads = FairThreads()
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
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        # Every key is compared, so that the time tells nothing about any of them.
        right = sum([hmac.compare_digest(digest, key) for key in self._keys])
        if self._keys and not (right and scheme.lower() == "bearer"):
            raise ApiError(
                401, "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    # A request

    async def answer(self, exchange: Exchange, kind: type[AnyRequest]) -> None:
        """From the first look at the request's head to the last byte of the answer, or to the client's leaving."""
        self.requests.add(exchange)
        try:
            await exchange.run(self._serve(exchange, kind))
        finally:
            self.requests.discard(exchange)
            self._one_is_over.set()
            self.metrics.request(exchange.outcome)
            exchange.log_end()

    async def _serve(self, exchange: Exchange, kind: type[AnyRequest]) -> None:
        request = exchange.request
        self.check_key(request)
        if self.ending:
            raise self._no_more()
        client = request.headers.get("authorization") if self._keys else request.client and request.client.host
        with ExitStack() as places:
            with self.memory.hold() as held:
                most_bytes, why = self._most_bytes()
                body = await exchange.read_body(
                    most_bytes=most_bytes, too_long=why, within_s=self.config.client_timeout_s, held=held
                )
                parsing = partial(
                    parse, body, kind, max_length=self._max_length or MAX_TOKENS_PER_MESSAGE,
                    allow_unknown_fields=self.config.allow_unknown_fields,
                )  # fmt: skip
                asked = await self._threads.run(client, len(body), parsing)
                if asked.model != self.config.model:
                    raise ApiError(
                        404, f"there is no model {asked.model!r} here: it is {self.config.model!r}", param="model",
                        code="model_not_found",
                    )  # fmt: skip
                places.enter_context(self.places.take(asked.n))
                exchange.accepted = True
                job = await self._prepare(asked, client, len(body), exchange.id)
            await self._generate(exchange, asked, job)

    @property
    def _max_length(self) -> int:
        """Positions, prompt and answer together, that a generation may have; 0 while no target server is there."""
        return min(self.orchestrator.max_length, MAX_TOKENS_PER_MESSAGE)

    def _most_bytes(self) -> tuple[int, str]:
        """The longest body that can hold a prompt of the target's length, and a sentence that says so."""
        length, most = self._max_length, self.config.max_body_bytes
        fits = _JSON_BYTES_PER_BYTE * length * self._token_bytes + _OTHER_JSON_BYTES
        if length > 0 and fits < most:
            return (
                fits,
                f"This model's maximum context length is {length} tokens, and no prompt of more than {fits} bytes fits",
            )
        return most, f"this service reads at most {most} bytes"

    async def _prepare(self, asked: AnyRequest, client: Hashable, size_bytes: int, correlation: str) -> Job:
        """Raises ApiError and ConfigError."""
        if isinstance(asked, ChatRequest) and asked.callable_tools:
            raise ApiError(400, "tools: is not supported: leave it out", param="tools")
        structure = None
        if asked.names_structure:
            structure = await self._threads.run(client, size_bytes, partial(structure_of, asked))
        while not (max_length := self._max_length):
            patience_s = self.orchestrator.config.ready_timeout_s
            if not await self.orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=patience_s):
                raise NoTargetError(f"no target server came within {patience_s:g} s")
        prompt_ids = await self._threads.run(client, size_bytes, partial(self._encode, asked, max_length))
        bad_words = [ids for word in asked.bad_words for ids in self._tokenizer.spellings(word)]
        room = max(1, max_length - len(prompt_ids))
        max_tokens = asked.most_tokens or min(self.config.default_max_tokens, room)
        if len(prompt_ids) + max_tokens > max_length:
            raise context_length_exceeded(len(prompt_ids), max_tokens, max_length, chat=isinstance(asked, ChatRequest))
        given = {name: value for name in DEFAULT_NAMES if (value := getattr(asked, name)) is not None}
        sampling = Sampling(
            **{"temperature": _TEMPERATURE, **self._tokenizer.sampling_defaults, **given},
            presence_penalty=asked.presence_penalty, frequency_penalty=asked.frequency_penalty,
            logit_bias=asked.logit_bias, bad_words=bad_words, structure=structure,
            max_tokens=max_tokens, min_tokens=asked.min_tokens,
            stop_token_ids=(*asked.stop_token_ids, *(() if asked.ignore_eos else self._tokenizer.stop_token_ids)),
            seed=seed_or_any(asked.seed), logprobs=asked.wants_logprobs,
        )  # fmt: skip
        options = asked.dsi
        return Job(
            prompt_ids, sampling, asked.stop, asked.n, options.algorithm, options.sp, options.lookahead,
            None if options.rows == "auto" else options.rows, correlation,
            continues=isinstance(asked, CompletionRequest),
        )  # fmt: skip

    def _encode(self, asked: AnyRequest, max_length: int) -> list[int]:
        """In a thread. A text that cannot fit, whatever its tokens, is refused before it is tokenized."""
        if isinstance(asked, CompletionRequest) and not isinstance(asked.prompt, str):
            return list(asked.prompt)
        texts = [asked.prompt] if isinstance(asked, CompletionRequest) else [m.content for m in asked.messages]
        size, most = sum(len(text.encode()) for text in texts), max_length * self._token_bytes
        if size > most:
            raise ApiError(
                400, f"This model's maximum context length is {max_length} tokens. However, your prompt has {size} bytes, and no "
                f"text of more than {most} bytes fits. Please shorten it.", code="context_length_exceeded",
            )  # fmt: skip
        if isinstance(asked, CompletionRequest):
            return self._tokenizer.encode(asked.prompt)
        return self._tokenizer.encode_chat([message.as_dict() for message in asked.messages])

    async def _generate(self, exchange: Exchange, asked: AnyRequest, job: Job) -> None:
        bodies = Bodies(self.config.model, isinstance(asked, ChatRequest), asked.wants_logprobs, exchange.id)
        completion = Completion(self.orchestrator, self._tokenizer, self.metrics, job)
        exchange.completion = completion
        log.info(
            "request", id=exchange.id, prompt_tokens=len(job.prompt_ids), max_tokens=job.sampling.max_tokens,
            n=job.choices,
        )  # fmt: skip
        self.metrics.prompt(len(job.prompt_ids))
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            await _stream(exchange, bodies, completion, usage=usage)
        else:
            async with aclosing(completion.updates()) as updates:
                async for _ in updates:
                    pass
            await exchange.send_whole(await self._rendered(bodies, completion))

    async def _rendered(self, bodies: Bodies, completion: Completion) -> bytes:
        tokens = sum(choice.tokens for choice in completion.choices)
        if tokens < _MANY_TOKENS:
            return _json(bodies, completion)
        return await self._threads.run(bodies.id, tokens * _BYTES_PER_TOKEN, partial(_json, bodies, completion))

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


async def _stream(exchange: Exchange, bodies: Bodies, completion: Completion, *, usage: bool) -> None:
    """Server-sent events. The first update comes before the status line: what is wrong with the request has a status."""
    async with aclosing(completion.updates()) as updates:
        update = await anext(updates, None)
        await exchange.open_stream()
        if bodies.chat:
            for choice in completion.choices:
                await exchange.send_event(bodies.first_chunk(choice))
        while update is not None:
            if update.piece is None:
                await exchange.send_event(bodies.last_chunk(update.choice))
            else:
                await exchange.send_event(bodies.chunk(update.choice, update.piece.text, update.piece.tokens))
            update = await anext(updates, None)
    if usage:
        await exchange.send_event(bodies.usage_chunk(completion))
    await exchange.end_stream()


def _json(bodies: Bodies, completion: Completion) -> bytes:
    """By the encoder in Python, which other threads can interrupt, where the one in C holds them all up."""
    encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
    return "".join(encoder.iterencode(bodies.whole(completion))).encode()
