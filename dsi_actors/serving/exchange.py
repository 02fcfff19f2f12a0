"""One request and its answer: the body read within limits, the client watched, errors told in whatever way is left."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from fastapi import Request
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from dsi_actors.logs import get_logger
from dsi_actors.serving.bodies import Bodies, Event
from dsi_actors.serving.completions import Completion
from dsi_actors.serving.errors import ApiError, ClientGone, from_any

log = get_logger("serving")

#: Neither a cache nor nginx keeps back what streams.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
#: A body may take the time limit, and a second more for each of so many bytes.
_SLOWEST_BYTES_PER_S = 8192


class Exchange:
    """Reads a request, runs the work for it as long as somebody wants the answer, and sends that.

    The work ends early when the client closes its connection, and when the service calls `stop`.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, error_body: Callable[[ApiError], dict[str, Any]]
    ) -> None:
        """`error_body`: how an error is told at this endpoint."""
        self.request = Request(scope, receive)
        self._error_body = error_body
        #: In the answer's header X-Request-Id, in its body and in each line of the log about it.
        self.id = secrets.token_hex(12)
        #: The service has taken the request: it is to be finished when the service ends.
        self.accepted = False
        #: How the exchange ended: done, client_gone or error_STATUS; error_stream if that was too late for a status; cut_off if
        #: the service ended and the client took nothing of the answer.
        self.outcome = "cut_off"
        #: The generations, once they have begun.
        self.completion: Completion | None = None
        self._error: ApiError | None = None
        self._receive = receive
        self._send = send
        #: Of the stream, once it has begun.
        self._bodies: Bodies | None = None
        #: All of the answer has been handed to the server.
        self._finished = False
        self._work: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopped_by: ApiError | ClientGone | None = None

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`, which sends the answer. What it raises is told to the client, unless the client is gone."""
        self._work = asyncio.create_task(work)
        try:
            await asyncio.wait({self._work})
            if self._work.cancelled() and self._stopped_by is not None:
                raise self._stopped_by
            self._work.result()
            self.outcome = "done"
        except ClientGone:
            self.outcome = "client_gone"
        except Exception as error:
            await self._fail(error)
        finally:
            self._work.cancel()
            if self._watching is not None:
                self._watching.cancel()

    def stop(self, why: ApiError | ClientGone) -> None:
        """End the work now. Only the first reason counts."""
        if self._stopped_by is None and self._work is not None and not self._work.done():
            self._stopped_by = why
            self._work.cancel()

    def log_end(self) -> None:
        """One line for each request, whatever became of it."""
        fields: dict[str, Any] = {"id": self.id, "outcome": self.outcome}
        if self._error is not None:
            fields |= {"status": self._error.status, "code": self._error.code, "reason": str(self._error)}
        if self.completion is None:
            log.info("not answered", **fields)
            return
        choices = self.completion.choices
        log.info(
            "answered", **fields, tokens=sum(choice.tokens for choice in choices),
            finish_reasons=[choice.finish_reason for choice in choices],
            took_ms=round((time.perf_counter() - self.completion.begun_s) * 1e3),
        )  # fmt: skip

    # The request

    async def read_body(self, *, most_bytes: int, too_long: str, within_s: float, held: Callable[[int], None]) -> bytes:
        """The whole body. `held` is told of each piece. From here on the client is watched.

        Raises ApiError for a body that is no JSON by its headers, is longer than `most_bytes` (`too_long` says why that
        is the limit), or comes too slowly.
        """
        headers = self.request.headers
        media_type, _, parameters = headers.get("content-type", "").partition(";")
        charset = parameters.partition("charset=")[2].strip(' "').lower()
        if media_type.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
            raise ApiError(415, "send JSON in UTF-8, with the header Content-Type: application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body is compressed: send it as it is, without Content-Encoding")
        declared = headers.get("content-length", "0")
        if len(declared) > 18 or int(declared) > most_bytes:  # the server has seen that these are digits
            raise self._too_long(f"{declared} bytes", too_long)
        pieces: list[bytes] = []
        size = 0
        begun_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(within_s) as limit:
                more = True
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    size += len(piece)
                    if size > most_bytes:
                        raise self._too_long(f"more than {most_bytes} bytes", too_long)
                    held(len(piece))
                    pieces.append(piece)
                    limit.reschedule(begun_s + within_s + size / _SLOWEST_BYTES_PER_S)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come in time: {size} bytes in {within_s:g} s", headers={"Connection": "close"}
            ) from None
        self._watching = asyncio.create_task(self._watch())
        return b"".join(pieces)

    @staticmethod
    def _too_long(size: str, why: str) -> ApiError:
        return ApiError(413, f"the body has {size}: {why}", code="context_length_exceeded")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._finished:  # the server says so after a whole answer, too
            self.stop(ClientGone())

    # The answer

    async def send_whole(self, body: bytes) -> None:
        await self._send_all(200, body, {})

    async def open_stream(self, bodies: Bodies) -> None:
        await self._send_head(200, {"Content-Type": "text/event-stream; charset=utf-8", **STREAM_HEADERS})
        self._bodies = bodies

    async def send_events(self, events: Iterable[Event]) -> None:
        """Server-sent events."""
        data = b"".join(
            format_sse_event(data_str=json.dumps(body, ensure_ascii=False), event=name) for name, body in events
        )
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def send_comment(self) -> None:
        """Nothing is new: what clients ignore, and what keeps proxies from closing the connection."""
        await self._send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

    async def end_stream(self) -> None:
        assert self._bodies is not None
        self._finished = True
        line = self._bodies.last_line
        end = b"" if line is None else format_sse_event(data_str=line)
        await self._send({"type": "http.response.body", "body": end, "more_body": False})

    async def _fail(self, error: Exception) -> None:
        self._error = told = from_any(error)
        if told.status == 500:
            log.error("a request failed", id=self.id, exc_info=error)
        self.outcome = f"error_{told.status}"
        if self._finished:
            return
        if self._bodies is not None:
            self.outcome = "error_stream"
            await self.send_events([self._bodies.error(told)])
            await self.end_stream()
        else:
            body = json.dumps(self._error_body(told), ensure_ascii=False, separators=(",", ":"))
            await self._send_all(told.status, body.encode(), told.headers)

    async def _send_all(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._finished = True
        await self._send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        raw.append((b"x-request-id", self.id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
