"""What a client may hold: places, a connection, time, memory. And who may ask at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from dsi_actors.errors import ConfigError
from dsi_actors.launching import choice
from dsi_actors.launching.launcher import LaunchedWorker, WorkerSpec
from dsi_actors.serving.errors import ApiError
from dsi_actors.serving.limits import BodyMemory
from dsi_actors.serving.service import ServiceConfig
from serving.test_leaving_clients import HOUR_MS
from support.fork_server import ForkingLauncher
from support.patience import slowness
from support.service import MODEL, Served, completion, post, served

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def strict(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """Little of everything, but time enough for a client that sends at once."""
    config = {
        "client_timeout_s": round(0.5 * slowness(), 1),
        "keep_alive_s": 1,
        "max_connections": 4,
        "max_bodies_bytes": 50_000,
    }
    async with served(
        tmp_path_factory.mktemp("words"), sp=1, max_generations=3, target_ms=HOUR_MS, drafter=None, calibrate=False,
        request_timeout_s=7200, config=config,
    ) as found:  # fmt: skip
        yield found
    assert not found.service.requests


async def test_choices_get_all_their_places_or_none(strict: Served) -> None:
    client = await strict.connect()
    await client.send(completion(n=2))
    await strict.until(lambda: strict.orchestrator.running == 2)
    full = await strict.ask(completion(n=2))
    assert (full.status, full.error["code"], full.headers["retry-after"]) == (429, "queue_full", "1")
    assert strict.orchestrator.running == 2, "no choice of the other request was begun"
    never = await strict.ask(completion(n=4))
    assert (never.status, never.error["param"]) == (400, "n")
    assert "at most 3 generations" in never.error["message"]
    client.leave()
    await strict.quiet()


async def test_half_a_head_is_not_awaited_for_ever(strict: Served) -> None:
    client = await strict.connect()
    await client.send(completion()[:30])
    reply = await client.reply()
    assert reply.status == 408
    assert f"{strict.service.config.client_timeout_s:g} s" in reply.error["message"]
    assert await client.closed()


async def test_a_head_may_not_come_byte_by_byte_for_ever(strict: Served) -> None:
    client = await strict.connect()

    async def drip() -> None:
        for byte in completion()[:40]:
            await client.send(bytes([byte]))
            await asyncio.sleep(0.1)

    dripping = asyncio.create_task(drip())
    assert (await client.reply()).status == 408
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)


async def test_a_connection_without_a_request_is_closed(strict: Served) -> None:
    assert await (await strict.connect()).closed()


async def test_half_a_body_is_not_awaited_for_ever(strict: Served) -> None:
    client = await strict.connect()
    await client.send(completion()[:-5])
    reply = await client.reply()
    assert reply.status == 408
    assert "the body did not come in time" in reply.error["message"]
    assert await client.closed()
    await strict.quiet()


async def test_the_rest_of_a_body_that_was_refused_is_not_awaited_for_ever(strict: Served) -> None:
    client = await strict.connect()
    await client.send(post("/v1/completions", b"x" * 1000, Content_Type="text/plain")[:-5])
    assert (await client.reply()).status == 415
    assert await client.closed()


async def test_an_answered_connection_serves_again_and_is_closed_when_idle(strict: Served) -> None:
    client = await strict.connect()
    for _ in range(2):
        await client.send(post("/v1/completions", b"{}"))
        assert (await client.reply()).status == 400
    assert await client.closed()


async def test_a_client_that_takes_nothing_is_dropped(tmp_path: Path) -> None:
    """It asks for pages, whose bytes fill every buffer on the way, and reads none of them."""
    async with served(tmp_path, sp=1, config={"client_timeout_s": 0.5}) as service:
        client = await service.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(b"GET /dashboard HTTP/1.1\r\nHost: x\r\n\r\n" * 1500)
        await service.until(lambda: len(service.server.server_state.connections) == 1)
        await service.until(lambda: not service.server.server_state.connections)
        assert service.server.server_state.total_requests < 1500, "it was not served to the end"


async def test_connections_are_counted(strict: Served) -> None:
    held = [await strict.connect() for _ in range(4)]
    more = await strict.connect()
    await more.send(completion())
    reply = await more.reply()
    assert (reply.status, reply.error["code"], reply.headers["connection"]) == (503, "unavailable", "close")
    assert reply.headers["retry-after"] == "1"
    for client in held:
        client.leave()
    await strict.until(lambda: not strict.server.server_state.connections)
    held = [await strict.connect() for _ in range(5)]
    beyond = await strict.connect()
    assert await beyond.closed()
    for client in held:
        client.leave()
    await strict.until(lambda: not strict.server.server_state.connections)


async def test_bodies_are_counted_all_together(strict: Served) -> None:
    first = await strict.connect()
    await first.send(completion("w5 " * 15_000)[:-1])
    await strict.until(lambda: strict.service.memory.held_bytes > 40_000)
    reply = await strict.ask(completion("w5 " * 5_000))
    assert (reply.status, reply.error["code"]) == (503, "unavailable")
    first.leave()
    await strict.quiet()
    assert strict.service.memory.held_bytes == 0


async def test_memory_is_given_back_whatever_happens() -> None:
    memory = BodyMemory(100)
    with memory.hold() as held, memory.hold() as others:
        held(60)
        others(30)
        with pytest.raises(ApiError):
            held(20)
    assert memory.held_bytes == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    config = {"api_keys": ("sk-1", "sk-é"), "allowed_origins": ("https://chat.example.org",)}
    async with served(tmp_path_factory.mktemp("words"), sp=1, config=config) as found:
        yield found


@pytest.mark.parametrize("key", [None, "Bearer wrong", "sk-1", "Basic sk-1", "Bearer", "Bearer sk-1 x", "Bearer sk-"])
async def test_without_a_key_nothing_is_read_or_told(keyed: Served, key: str | None) -> None:
    headers = {"Authorization": key} if key else {}
    client = await keyed.connect()
    await client.send(post("/v1/completions", b'{"model": "nonsense', Content_Length="1000000", **headers))
    reply = await client.reply()
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert "JSON" not in reply.error["message"]


@pytest.mark.parametrize("key", ["Bearer sk-1", "bearer sk-1", "BEARER  sk-1 ", "Bearer sk-é"])
async def test_a_key_counts_however_the_scheme_is_written(keyed: Served, key: str) -> None:
    client = await keyed.connect()
    request = post(
        "/v1/completions", json.dumps({"model": MODEL, "prompt": "w5", "max_tokens": 2}).encode(), Authorization=key
    )
    await client.send(request)
    assert (await client.reply()).status == 200


async def test_what_shows_texts_wants_a_key_and_nothing_else(keyed: Served) -> None:
    wants = {
        "/v1/models": 401,
        "/dashboard/events": 401,
        "/dashboard": 200,
        "/health": 200,
        "/ready": 200,
        "/metrics": 200,
    }
    for path, status in wants.items():
        assert (await keyed.ask(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).status == status


async def test_a_web_page_of_an_origin_that_is_allowed_may_ask(keyed: Served) -> None:
    preflight = (
        "OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nOrigin: {}\r\nAccess-Control-Request-Method: POST\r\n"
        "Access-Control-Request-Headers: authorization,content-type,x-stainless-os\r\n\r\n"
    )
    allowed = await keyed.ask(preflight.format("https://chat.example.org").encode())
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    other = await keyed.ask(preflight.format("https://evil.example.org").encode())
    assert "access-control-allow-origin" not in other.headers
    refused = await keyed.ask(post("/v1/completions", b"", Origin="https://chat.example.org"))
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example.org", "the page may read the error"


@pytest.mark.parametrize("wrong", [{"model": ""}, {"model": "\udcff"}, {"max_connections": 0}, {"client_timeout_s": 0}])
async def test_a_configuration_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ServiceConfig(**{"model": "m", **wrong})  # type: ignore[arg-type]


async def test_ready_is_lost_and_comes_back_with_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_start = asyncio.Event()
    may_start.set()

    class HeldLauncher(ForkingLauncher):
        async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
            await may_start.wait()
            return await super().start(spec, incarnation)

    monkeypatch.setattr(choice, "LocalLauncher", HeldLauncher)

    async def ready(service: Served) -> int:
        return (await service.ask(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")).status

    async with served(tmp_path, sp=1, drafter=None) as service:
        assert await ready(service) == 200
        [worker] = service.orchestrator.process_ids
        may_start.clear()
        psutil.Process(worker).kill()
        await service.until(lambda: not service.orchestrator.max_length)
        assert await ready(service) == 503
        asking = asyncio.create_task(service.ask(completion(max_tokens=2)))
        await service.until(lambda: service.service.places.taken == 1)
        may_start.set()
        await service.until(lambda: bool(service.orchestrator.max_length))
        assert await ready(service) == 200
        assert (await asking).status == 200, "a request waits for its first target server"
