"""Whoever looks on, and whatever fails there, no generation is harmed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from dsi_actors.core.actions import Finish
from dsi_actors.serving import watch
from support.service import Served, completion, lone_text, served

pytestmark = pytest.mark.asyncio(loop_scope="module")

VIEW = b"GET /dashboard/events HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(tmp_path_factory.mktemp("words")) as found:
        yield found


async def is_served(service: Served) -> None:
    reply = await service.ask(completion("w4", max_tokens=12, seed=1))
    expected = lone_text(service.tokenizer, service.tokenizer.encode("w4"), 12)
    assert (reply.json["choices"][0]["text"], reply.json["choices"][0]["finish_reason"]) == expected


async def test_a_viewer_that_reads_sees_each_commit(service: Served) -> None:
    client = await service.connect()
    await client.send(VIEW)
    await client.reply(until=lambda reply: b'"workers"' in reply.body)
    await is_served(service)
    await client.reply_until(b'"is": "end"')
    client.leave()
    await service.until(lambda: not service.service.watch._viewers)


async def test_nothing_on_the_way_keeps_events_back(service: Served) -> None:
    client = await service.connect()
    await client.send(VIEW)
    seen = await client.reply(until=lambda reply: b"\n\n" in reply.body)
    asked = await service.ask(completion("w4", max_tokens=2, stream=True))
    for reply in (seen, asked):
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
    client.leave()


async def test_one_viewer_too_many_is_refused_with_a_status(service: Served) -> None:
    await service.until(lambda: not service.service.watch._viewers)
    viewers = [await service.connect() for _ in range(watch._MOST_VIEWERS)]
    for viewer in viewers:
        await viewer.send(VIEW)
        await viewer.reply(until=lambda reply: b'"workers"' in reply.body)
    refused = await service.ask(VIEW)
    assert refused.status == 429
    assert "look at the dashboard already: try again later" in refused.error["message"]
    for viewer in viewers:
        viewer.leave()
    await service.until(lambda: not service.service.watch._viewers)


async def test_a_text_that_cannot_be_shown_is_missing_there_alone(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def add(self, token_id: int) -> str:
            raise ValueError("invalid prefix")

        def flush(self) -> str:
            return ""

    client = await service.connect()
    await client.send(VIEW)
    await client.reply(until=lambda reply: b'"workers"' in reply.body)
    monkeypatch.setattr(service.service.watch, "_tokenizer", type("T", (), {"stream": lambda self: Broken()})())
    await is_served(service)
    await client.reply_until(b'"is": "end"')
    client.leave()


async def test_a_viewer_that_does_not_read_is_ended(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_FLUSH_S", 0.0)
    behind = service.service.watch.events()
    await anext(behind)
    other = service.service.watch.events()
    await anext(other)
    events = 0
    async for _ in other:  # each is made once, for both
        events += 1
        if len(service.service.watch._viewers) == 1:
            break
    assert events >= watch._MOST_EVENTS_BEHIND
    assert len([event async for event in behind]) == watch._MOST_EVENTS_BEHIND - 1
    await other.aclose()  # type: ignore[attr-defined]
    assert not service.service.watch._viewers


async def test_who_observes_takes_nothing_from_the_dashboard(service: Served) -> None:
    client = await service.connect()
    await client.send(VIEW)
    await client.reply(until=lambda reply: b'"workers"' in reply.body)
    told: list[Any] = []
    with service.orchestrator.observe(lambda generation, item: told.append(item)):
        await is_served(service)
        await client.reply_until(b'"is": "end"')
    assert any(isinstance(item, Finish) for item in told)
    client.leave()


async def test_metrics_that_fail_are_not_missed(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_tokens", "_first", "_between", "_generations", "_requests", "_prompt_tokens"):
        monkeypatch.setattr(service.service.metrics, name, None)
    await is_served(service)
    await service.quiet()
