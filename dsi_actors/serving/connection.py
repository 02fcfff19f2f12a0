"""A client's connection, below the application: what uvicorn's HTTP protocol leaves without a limit or answers in plain text.

Time limits for a request's head, for the rest of a body that was refused, and for a client that takes nothing; a limit on
connections; errors in OpenAI's shape; and no turn of the event loop that is longer because of how a body is cut into chunks.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsi_actors.serving.errors import ApiError, unavailable
from dsi_actors.serving.service import ServiceConfig

#: Parsed in one turn of the event loop. A chunk may be one byte and takes as long as a long one.
_BYTES_PER_TURN, _CHUNKED_BYTES_PER_TURN = 1 << 16, 1 << 11
#: Requests that a client sends ahead of the answers, before it is not read any more.
_MOST_BYTES_AHEAD = 1 << 16
#: A client whose machine vanished is noticed after a minute or so.
_TCP_PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class Connection(H11Protocol):
    def __init__(self, limits: ServiceConfig, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._unparsed = b""
        #: What the client has to send now, and until when.
        self._awaited = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        most = self._limits.max_connections
        if len(self.connections) > most + most // 4:
            transport.abort()
            return
        if len(self.connections) > most:
            self.app = _too_many_connections
        _probe(transport.get_extra_info("socket"))
        self._mind_time()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        self._unparsed = b""
        super().connection_lost(exc)

    # What comes in

    def data_received(self, data: bytes) -> None:
        waits = bool(self._unparsed)
        self._unparsed += data
        if not waits:
            self._parse()
        elif isinstance(self.flow, _Flow):
            self.flow.hold()

    def _parse(self) -> None:
        """The next piece of what has come. The rest follows in further turns of the event loop."""
        if self.transport.is_closing():
            return
        long_pieces = self.conn.their_state is h11.SEND_BODY and not self._is_chunked()
        size = _BYTES_PER_TURN if long_pieces else _CHUNKED_BYTES_PER_TURN
        piece, self._unparsed = self._unparsed[:size], self._unparsed[size:]
        assert isinstance(self.flow, _Flow)
        if self._unparsed:
            self.flow.hold()
            self.loop.call_soon(self._parse)
        else:
            self.flow.release()
        super().data_received(piece)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= _MOST_BYTES_AHEAD:
            self.flow.resume_reading()  # uvicorn has paused it, and whether the client leaves would not be noticed
        self._mind_time()

    def _is_chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._mind_time()

    def _mind_time(self) -> None:
        """Set the clock for what the client has to send now. The application minds the time of a body that it reads."""
        awaited = ""
        if self.conn.their_state is h11.IDLE:
            awaited = "head"
        elif self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            awaited = "rest"
        if awaited == self._awaited:
            return
        self._awaited = awaited
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if awaited:
            self._deadline = self.loop.call_later(self._limits.client_timeout_s, self._on_late)

    def _on_late(self) -> None:
        if self._awaited == "head" and self.conn.trailing_data[0]:
            self._refuse(
                ApiError(408, f"the head of a request did not come within {self._limits.client_timeout_s:g} s")
            )
        self.transport.close()

    # What goes out

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.client_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, unless something is being answered: then its application hears that the client is gone."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                return
        body = error.encoded()
        headers = [
            ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close"),
        ]  # fmt: skip
        with contextlib.suppress(h11.LocalProtocolError):
            head = self.conn.send(h11.Response(status_code=error.status, headers=headers)) or b""
            self.transport.write(head + (self.conn.send(h11.Data(data=body)) or b""))
            self.conn.send(h11.EndOfMessage())

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: what a client asks for beside its request is not worth two lines in the log."""


class _Flow(FlowControl):
    """Reading pauses for the application, as uvicorn wants it, and also while much is left to parse."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._held = False

    def hold(self) -> None:
        self._held = True
        self._transport.pause_reading()

    def release(self) -> None:
        if self._held:
            self._held = False
            if not self.read_paused:
                self._transport.resume_reading()

    def resume_reading(self) -> None:
        if self._held:
            self.read_paused = False
        else:
            super().resume_reading()


def _probe(connection: socket.socket) -> None:
    """Have TCP find out whether the other machine is still there."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_PROBES.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    error = unavailable("too many connections: try again later", close=True)
    headers = {"Content-Type": "application/json", **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": error.encoded()})
