"""The application of app.py on its sockets (address.py)."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI


def make_server(app: FastAPI, *, log_level: str, drain_s: float) -> uvicorn.Server:
    """Await its `serve(sockets)`. A signal, or `should_exit`, ends it; requests that run have `drain_s` then."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level=log_level, access_log=False, log_config=None, lifespan="off",
            timeout_graceful_shutdown=round(drain_s),
        )
    )  # fmt: skip
    app.state.watch.ending = lambda: server.should_exit
    return server
