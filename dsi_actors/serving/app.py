"""The HTTP side: OpenAI's routes on FastAPI. `create_app` needs a running orchestrator; `dsi-actors serve` gives it one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsi_actors.errors import DsiError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.serving.doors import DOORS, Door
from dsi_actors.serving.errors import ApiError, from_any, unavailable
from dsi_actors.serving.exchange import STREAM_HEADERS, Exchange
from dsi_actors.serving.service import Service, ServiceConfig
from dsi_actors.tokenizer import Tokenizer

_DASHBOARD = Path(__file__).parent / "dashboard.html"


def create_app(orchestrator: Orchestrator, tokenizer: Tokenizer, config: ServiceConfig) -> FastAPI:
    """The application. The orchestrator must run for as long as it does."""
    service = Service(orchestrator, tokenizer, config)
    app = FastAPI(title="DSI actors", openapi_url=None)
    app.router.redirect_slashes = False
    app.state.service = service
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"], expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip

    read = partial(app.api_route, methods=["GET", "HEAD"])

    @app.exception_handler(ApiError)
    @app.exception_handler(DsiError)
    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        told = from_any(error)
        service.metrics.request(f"error_{told.status}")
        return Response(told.encoded(), told.status, told.headers, "application/json")

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        told = ApiError(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers
        )
        return await on_error(request, told)

    @read("/health")
    async def health() -> dict[str, str]:
        service.check_alive()
        return {"status": "alive"}

    @read("/ready")
    async def ready() -> JSONResponse:
        targets, drafters = service.ready_workers("target"), service.ready_workers("drafter")
        body = {"targets": targets, "drafters": drafters, "ending": service.ending}
        return JSONResponse(body, 200 if targets and not service.ending else 503)

    @read("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @read("/dashboard")
    async def dashboard() -> FileResponse:
        return FileResponse(_DASHBOARD, media_type="text/html")

    @app.get("/dashboard/events")
    async def dashboard_events(request: Request) -> EventSourceResponse:
        service.check_key(request)
        if service.ending:
            raise unavailable("the service ends", close=True)
        events = service.watch.events()
        # Begun here, not by FastAPI, which would send the head before what is wrong with the request could have a status.
        return EventSourceResponse(_resumed(await anext(events), events), headers=STREAM_HEADERS)

    def described(name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": service.created, "owned_by": "dsi-actors", "root": config.model,
            "max_model_len": service.max_length or None,
        }  # fmt: skip

    @read("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.check_key(request)
        return {"object": "list", "data": [described(name) for name in service.model_names]}

    @read("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        service.check_key(request)
        if name not in service.model_names:
            raise service.no_model(name)
        return described(name)

    app.router.routes += [Route(path, _endpoint(service, door), methods=["POST"]) for path, door in DOORS.items()]
    return app


def _endpoint(service: Service, door: Door) -> ASGIApp:
    """Below FastAPI's own handling of requests, which would read and check a body before it looks at the key."""

    class Endpoint:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await service.answer(Exchange(scope, receive, send, door.error_body), door)

    return Endpoint()


async def _resumed(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event
