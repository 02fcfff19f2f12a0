"""Test support: a service on timed workers in this process, and clients on raw sockets that may leave at any moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h11
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from dsi_actors.orchestrator import Orchestrator
from dsi_actors.results import CommittedTokens
from dsi_actors.serving.address import HttpAddress
from dsi_actors.serving.app import create_app
from dsi_actors.serving.server import Server, make_server
from dsi_actors.serving.service import Service, ServiceConfig
from dsi_actors.text import TextAssembler
from dsi_actors.tokenizer import Tokenizer
from support.patience import patience
from support.timed import plain_decoding, timed_config

MODEL = "timed"
#: Three in a hundred tokens end a text.
STOP_TOKENS = list(range(0, 1000, 33))


def words(directory: Path) -> Path:
    """A tokenizer for what the timed engine says: a thousand words of several scripts."""
    scripts = ("w{}", "é{}", "日本{}", "🙂{}")
    vocabulary = {scripts[number % len(scripts)].format(number): number for number in range(1000)}
    tokenizer = LibraryTokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP_TOKENS}), encoding="utf-8")
    return directory


def lone_text(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], most: int, *, stops: Sequence[str] = (), ignore_eos: bool = False,
    chat: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """The text and finish reason that plain decoding gives, one token after another, without a service."""
    assembler = TextAssembler(tokenizer, stops, after=() if chat else prompt_ids)
    shown = ""
    for token in plain_decoding(prompt_ids, most):
        shown += assembler.add(CommittedTokens([token], [False])).text
        if assembler.stopped or (token in tokenizer.stop_token_ids and not ignore_eos):
            return shown + assembler.rest().text, "stop"
    return shown + assembler.rest().text, "length"


@dataclass
class Reply:
    """An answer, or what came of it."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    #: The answer came to its end, as HTTP has it.
    complete: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """In OpenAI's shape, or in Anthropic's."""
        found: dict[str, Any] = self.json["error"]
        assert set(found) == ({"message", "type"} if "type" in self.json else {"message", "type", "param", "code"})
        assert isinstance(found["message"], str)
        assert found["message"]
        return found

    @property
    def events(self) -> list[Any]:
        """The server-sent events of a stream: objects, and the text [DONE]."""
        lines = [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Client:
    """A connection to the service, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        #: What came after the end of the last answer.
        self._left = b""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, until: Callable[[Reply], bool] = lambda reply: False, method: str = "POST") -> Reply:
        """Read an answer to its end, or until this much of it is there, or until the service closes the connection."""
        reply = Reply()
        async with patience():
            parser = h11.Connection(h11.CLIENT)
            parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
            parser.send(h11.EndOfMessage())
            if self._left:
                parser.receive_data(self._left)
                self._left = b""
            while not (reply.complete or until(reply)):
                try:
                    event = parser.next_event()
                except h11.RemoteProtocolError:  # the connection was closed in the middle
                    return reply
                if event is h11.NEED_DATA:
                    try:
                        parser.receive_data(await self._reader.read(1 << 16))
                    except ConnectionError:
                        return reply
                elif isinstance(event, h11.Response):
                    reply.status = event.status_code
                    reply.headers = {name.decode(): value.decode() for name, value in event.headers}
                elif isinstance(event, h11.Data):
                    reply.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    reply.complete = True
                    self._left = parser.trailing_data[0]
                elif isinstance(event, h11.ConnectionClosed):
                    return reply
        return reply

    async def reply_of_stream(self) -> list[Any]:
        """The events of the rest of a stream, whose beginning was read: it is cut into one chunk for each event."""
        rest = b""
        async with patience():
            while not rest.endswith(b"0\r\n\r\n"):
                piece = await self._reader.read(1 << 16)
                assert piece, "the stream ended in the middle"
                rest += piece
        lines = [line.removeprefix(b"data: ") for line in rest.split(b"\n") if line.startswith(b"data: ")]
        return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]

    async def reply_until(self, words: bytes) -> None:
        """Read on until these bytes come."""
        async with patience():
            await self._reader.readuntil(words)

    async def closed(self) -> bool:
        """Wait until the service closes the connection."""
        async with patience():
            try:
                while await self._reader.read(1 << 16):
                    pass
            except ConnectionError:
                pass
        return True

    def leave(self) -> None:
        self.writer.transport.abort()


def post(path: str, body: bytes, **headers: str) -> bytes:
    """The bytes of a request."""
    fields = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def completion(prompt: str | list[int] = "w4 w8", **fields: Any) -> bytes:
    """The bytes of a request for a text completion."""
    return post("/v1/completions", json.dumps({"model": MODEL, "prompt": prompt, **fields}).encode())


@dataclass
class Served:
    """A service that runs in this process."""

    orchestrator: Orchestrator
    service: Service
    server: Server
    tokenizer: Tokenizer
    #: All of them leave at the end.
    clients: list[Client] = field(default_factory=list)

    @property
    def port(self) -> int:
        port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return port

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        return client

    async def ask(self, request: bytes) -> Reply:
        client = await self.connect()
        try:
            await client.send(request)
            return await client.reply(method="HEAD" if request.startswith(b"HEAD") else "POST")
        finally:
            client.leave()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the event loop will do."""
        async with patience():
            while not condition():  # noqa: ASYNC110  there is no event for everything
                await asyncio.sleep(0.001)

    async def quiet(self) -> None:
        """Wait until nothing is left of any request."""
        await self.until(lambda: not (self.orchestrator.running or self.service.requests or self.service.places.taken))


@asynccontextmanager
async def served(
    directory: Path, *, tokenizer: Tokenizer | None = None, drain_s: float = 600.0,
    config: dict[str, Any] | None = None, slots: int = 64, **workers: Any,
) -> AsyncIterator[Served]:  # fmt: skip
    """A service on timed workers. `config`: fields of ServiceConfig; `slots`: of target servers; `workers`: of timed_config."""
    tokenizer = Tokenizer(words(directory)) if tokenizer is None else tokenizer
    settings = timed_config(**workers)
    settings = replace(settings, target_options={**settings.target_options, "slots": slots})
    async with Orchestrator(settings) as orchestrator:
        app = create_app(orchestrator, tokenizer, ServiceConfig(model=MODEL, **(config or {})))
        address = HttpAddress("127.0.0.1", 0)
        address.listen()
        server = make_server(app, drain_s=drain_s)
        serving = asyncio.create_task(server.serve(address.sockets))
        try:
            async with patience():
                while not server.started:
                    assert not serving.done(), serving.exception()
                    await asyncio.sleep(0.001)
            found = Served(orchestrator, app.state.service, server, tokenizer)
            try:
                yield found
            finally:
                for client in found.clients:
                    client.leave()
        finally:
            server.should_exit = True
            await serving
