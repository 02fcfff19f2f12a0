"""The HTTP side: OpenAI's routes on FastAPI. `create_app` needs a running orchestrator; `dsi-actors serve` gives it one."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dsi_actors.config import Sampling
from dsi_actors.errors import DsiError
from dsi_actors.logs import get_logger
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.serving.bodies import Bodies
from dsi_actors.serving.completions import Completion, Job, seed_or_any
from dsi_actors.serving.errors import ApiError, from_ours, from_validation
from dsi_actors.serving.metrics import Metrics
from dsi_actors.serving.schemas import ChatRequest, CompletionRequest
from dsi_actors.serving.watch import Watch
from dsi_actors.tokenizer import Tokenizer

log = get_logger("serving")

_LOOK_FOR_CLIENT_S = 0.1
_MOST_BODY_BYTES = 16 << 20
_DASHBOARD = Path(__file__).parent / "dashboard.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """What a service is beside its orchestrator."""

    #: The name under which clients ask for the model.
    model: str
    #: Who may ask. Empty: anybody.
    api_keys: Sequence[str] = ()
    #: What a client gets that does not say how much it wants.
    default_max_tokens: int = 1024


class Service:
    """What the routes share."""

    def __init__(self, orchestrator: Orchestrator, tokenizer: Tokenizer, config: ServiceConfig) -> None:
        self.orchestrator = orchestrator
        self.tokenizer = tokenizer
        self.config = config
        self.created = int(time.time())
        self.watch = Watch(orchestrator, tokenizer)
        self.metrics = Metrics(config.model, workers=self.ready_workers, waiting=lambda: orchestrator.waiting)

    def ready_workers(self, role: str) -> int:
        return sum(worker.role == role for worker in self.orchestrator.workers)

    def answered(self, completion: Completion, request_id: str, outcome: str) -> None:
        """The request is over, one way or another."""
        self.metrics.request(outcome, len(completion.job.prompt_ids))
        log.info(
            "answered", id=request_id, outcome=outcome, tokens=sum(choice.tokens for choice in completion.choices),
            finish_reasons=[choice.finish_reason for choice in completion.choices],
            took_ms=round((time.perf_counter() - completion.begun_s) * 1e3),
        )  # fmt: skip

    def check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        keys = self.config.api_keys
        if keys and not any(hmac.compare_digest(given, key.encode()) for key in keys):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def job_of(self, request: ChatRequest | CompletionRequest, correlation: str) -> Job:
        """Raises ApiError and ConfigError."""
        if request.model != self.config.model:
            raise ApiError(
                404, f"there is no model {request.model!r} here: it is {self.config.model!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        prompt_ids = self._prompt_of(request)
        room = max(1, self.orchestrator.max_length - len(prompt_ids))
        sampling = Sampling(
            max_tokens=request.most_tokens or min(self.config.default_max_tokens, room),
            temperature=request.temperature, top_p=request.top_p, top_k=request.top_k, min_p=request.min_p,
            repetition_penalty=request.repetition_penalty, seed=seed_or_any(request.seed),
            stop_token_ids=() if request.ignore_eos else self.tokenizer.stop_token_ids,
            logprobs=request.wants_logprobs,
        )  # fmt: skip
        options = request.dsi
        return Job(
            prompt_ids,
            sampling,
            request.stops,
            request.n,
            options.algorithm,
            options.sp,
            options.lookahead,
            correlation,
            continues=not isinstance(request, ChatRequest),
        )

    def _prompt_of(self, request: ChatRequest | CompletionRequest) -> list[int]:
        if isinstance(request, ChatRequest):
            return self.tokenizer.encode_chat([message.as_dict() for message in request.messages])
        prompt: Any = request.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            [prompt] = prompt
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def create_app(orchestrator: Orchestrator, tokenizer: Tokenizer, config: ServiceConfig) -> FastAPI:
    """The application. The orchestrator must run for as long as it does."""
    app = FastAPI(title="DSI actors", docs_url=None, redoc_url=None, max_body_size=_MOST_BODY_BYTES)
    service = Service(orchestrator, tokenizer, config)
    app.state.watch = service.watch

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        service.metrics.request(f"error_{error.status}")
        return error.response()

    @app.exception_handler(DsiError)
    async def on_our_error(request: Request, error: DsiError) -> JSONResponse:
        return await on_api_error(request, from_ours(error))

    @app.exception_handler(RequestValidationError)
    async def on_bad_request(request: Request, error: RequestValidationError) -> JSONResponse:
        return await on_api_error(request, from_validation(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return await on_api_error(request, ApiError(error.status_code, f"{request.url.path}: {error.detail}"))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        targets, drafters = service.ready_workers("target"), service.ready_workers("drafter")
        return JSONResponse({"targets": targets, "drafters": drafters}, 200 if targets else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get("/dashboard")
    async def dashboard() -> FileResponse:
        return FileResponse(_DASHBOARD, media_type="text/html")

    @app.get("/dashboard/events")
    async def dashboard_events(request: Request) -> StreamingResponse:
        service.check_key(request)
        events = service.watch.events()
        return StreamingResponse(_resumed(await anext(events), events), media_type="text/event-stream")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.check_key(request)
        model = {"id": config.model, "object": "model", "created": service.created, "owned_by": "dsi-actors"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await _answer(service, request, body)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await _answer(service, request, body)

    return app


async def _answer(service: Service, request: Request, body: ChatRequest | CompletionRequest) -> Response:
    service.check_key(request)
    bodies = Bodies(service.config.model, isinstance(body, ChatRequest), body.wants_logprobs)
    job = service.job_of(body, bodies.id)
    log.info(
        "request", id=bodies.id, prompt_tokens=len(job.prompt_ids), max_tokens=job.sampling.max_tokens, n=job.choices
    )
    completion = Completion(service.orchestrator, service.tokenizer, service.metrics, job)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        updates = completion.updates()
        # The first update comes before the status line: what is wrong with the request has a status of its own.
        first = await anext(updates)
        return StreamingResponse(
            _events(service, bodies, completion, first, updates, usage), media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Request-Id": bodies.id},
        )  # fmt: skip
    if not await _run_while_connected(request, completion):
        service.answered(completion, bodies.id, "client_gone")
        return Response(status_code=499)
    service.answered(completion, bodies.id, "done")
    return JSONResponse(bodies.whole(completion), headers={"X-Request-Id": bodies.id})


async def _run_while_connected(request: Request, completion: Completion) -> bool:
    """False if the client went away: then all work for it was cancelled."""

    async def run() -> None:
        async for _ in completion.updates():
            pass

    running = asyncio.create_task(run())
    try:
        while not running.done():
            await asyncio.wait({running}, timeout=_LOOK_FOR_CLIENT_S)
            if not running.done() and await request.is_disconnected():
                return False
        await running
        return True
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _events(
    service: Service, bodies: Bodies, completion: Completion, first: Any, updates: AsyncIterator[Any], usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. The server cancels this when the client goes away."""
    outcome = "client_gone"
    try:
        if bodies.chat:
            for choice in completion.choices:
                yield _event(bodies.first_chunk(choice))
        update = first
        while update is not None:
            if update.piece is None:
                yield _event(bodies.last_chunk(update.choice))
            else:
                yield _event(bodies.chunk(update.choice, update.piece.text, update.piece.tokens))
            update = await anext(updates, None)
        if usage:
            yield _event(bodies.usage_chunk(completion))
        yield "data: [DONE]\n\n"
        outcome = "done"
    except DsiError as error:  # too late for a status
        outcome = "error_stream"
        yield _event(from_ours(error).body)
    finally:
        service.answered(completion, bodies.id, outcome)
        await updates.aclose()  # type: ignore[attr-defined]  # an async generator


async def _resumed(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
