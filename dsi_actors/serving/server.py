"""The application of app.py on its sockets (address.py), until it is told to end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import uvicorn
from fastapi import FastAPI

from dsi_actors.logs import get_logger
from dsi_actors.serving.connection import Connection
from dsi_actors.serving.service import Service

log = get_logger("serving")

#: For clients that do not take the end of an answer.
_CLOSING_S = 1


class Server(uvicorn.Server):
    """Await its `serve(sockets)`. `drain` ends it, or `should_exit` at once. Signals are left to whoever runs it."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signals again that it got, before we could end workers."""
        yield

    async def drain(self) -> None:
        """Finish the requests that were taken, for up to `drain_s`, and refuse others meanwhile; then end."""
        try:
            cut = await self._service.end(self._drain_s)
            if cut:
                log.warning("requests were cut off at the end", requests=cut)
        finally:
            self.should_exit = True

    def hurry(self) -> None:
        """End at once, also while `drain` waits."""
        self._service.hurry()


def make_server(app: FastAPI, *, drain_s: float) -> Server:
    """A server for an application of `create_app`."""
    service: Service = app.state.service
    config = uvicorn.Config(
        app, access_log=False, log_config=None, lifespan="off", ws="none",
        http=partial(Connection, service.config),  # type: ignore[arg-type]
        timeout_keep_alive=service.config.keep_alive_s, timeout_graceful_shutdown=_CLOSING_S,
    )  # fmt: skip
    return Server(config, service, drain_s)
