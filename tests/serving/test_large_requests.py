"""A large request costs its own client time, and nobody else: the event loop goes on, and so do other clients' requests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsi_actors.serving import schemas
from dsi_actors.serving.bodies import Bodies
from dsi_actors.serving.completions import Completion
from serving.test_leaving_clients import HeldTokenizer
from support.patience import slowness
from support.service import MODEL, Served, completion, post, served, words

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = ("sk-1", "sk-2")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory = tmp_path_factory.mktemp("words")
    async with served(directory, tokenizer=HeldTokenizer(words(directory)), sp=1, config={"api_keys": KEYS}) as found:
        yield found


def asked(prompt: str, key: str) -> bytes:
    body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 3}).encode()
    return post("/v1/completions", body, Authorization=f"Bearer {key}")


async def test_parsing_and_tokenizing_leave_the_event_loop(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = service.tokenizer
    assert isinstance(tokenizer, HeldTokenizer)
    threads = set()

    def parse(text: str, *, most_values: int) -> object:
        threads.add(threading.get_ident())
        return json.loads(text)

    monkeypatch.setattr(schemas, "loads", parse)
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "w5"}], "max_tokens": 1}).encode()
    chat = post("/v1/chat/completions", body, Authorization="Bearer sk-1")
    for request in (asked("w1", "sk-1"), asked("w2 " * 100_000, "sk-1"), chat):
        assert (await service.ask(request)).status == 200
    assert threading.get_ident() not in threads | tokenizer.threads


async def test_a_large_chat_ends_no_worker(tmp_path: Path) -> None:
    """Megabytes in one message, and workers that take an orchestrator for gone after a second of silence."""
    async with served(tmp_path, sp=1, silence_ms=round(1000 * slowness())) as service:
        before = [worker.number for worker in service.orchestrator.workers]
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.001)
                turns += 1

        counting = asyncio.create_task(count())
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "w5 " * 1_000_000}]}).encode()
        reply = await service.ask(post("/v1/chat/completions", body))
        counting.cancel()
        assert reply.status == 400
        assert reply.error["code"] == "context_length_exceeded"
        assert turns > 50, "the event loop went on meanwhile"
        assert [worker.number for worker in service.orchestrator.workers] == before
        assert (await service.ask(completion(max_tokens=2))).status == 200


async def test_a_client_of_many_large_requests_has_one_thread(service: Served) -> None:
    tokenizer = service.tokenizer
    assert isinstance(tokenizer, HeldTokenizer)
    tokenizer.let_go.clear()
    large = "held " + "w7 " * 20_000
    clients = [await service.connect() for _ in range(6)]
    for client in clients:
        await client.send(asked(large, "sk-1"))
    await service.until(lambda: service.service.places.taken == 6)
    await service.until(lambda: tokenizer.arrived.acquire(blocking=False))
    other_large = asyncio.create_task(service.ask(asked(large.removeprefix("held "), "sk-2")))
    short = await asyncio.gather(*(service.ask(asked("w5", key)) for key in KEYS))
    assert [reply.status for reply in [*short, await other_large]] == [200, 200, 200]
    assert not tokenizer.arrived.acquire(blocking=False), "the next one of the first client waits for its turn"
    for client in clients[3:]:
        client.leave()
    await service.until(lambda: service.service.places.taken == 3)
    tokenizer.let_go.set()
    assert [(await client.reply()).status for client in clients[:3]] == [200, 200, 200]
    await service.quiet()


async def test_what_cannot_fit_is_refused_by_its_size(tmp_path: Path) -> None:
    async with served(tmp_path, sp=1, config={"max_body_bytes": 100_000}) as service:
        client = await service.connect()
        await client.send(completion("w5 " * 100_000)[:1000])  # the rest is not even waited for
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (413, "context_length_exceeded")
        assert "this service reads at most 100000 bytes" in reply.error["message"]
        client.leave()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        endless = await service.connect()
        await endless.send(head + b"%x\r\n" % 200_000 + b" " * 150_000)
        assert (await endless.reply()).status == 413
        await service.quiet()


async def test_a_text_over_the_limit_in_bytes_is_not_tokenized(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = service.tokenizer
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail("it was tokenized"))
    monkeypatch.setattr(service.service._preparation, "token_bytes", 16)  # whole words have no such bound
    reply = await service.ask(asked("w" * (9 << 20), "sk-1"))
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


async def test_a_body_of_single_bytes_is_parsed_in_turns(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of one byte takes as long as a chunk of many: a client may not hold up the loop by how it cuts its body."""
    sizes = []
    parse = H11Protocol.data_received

    def counted(connection: H11Protocol, data: bytes) -> None:
        sizes.append(len(data))
        parse(connection, data)

    monkeypatch.setattr(H11Protocol, "data_received", counted)
    body = json.dumps({"model": MODEL, "prompt": "w5 " * 10_000, "max_tokens": 1}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer sk-1\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    client = await service.connect()
    await client.send(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert (await client.reply()).status == 200
    assert max(sizes) <= 2048, "in one turn of the event loop"


async def test_a_long_answer_becomes_json_in_a_thread(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    whole = Bodies.whole

    def counted(bodies: Bodies, completion: Completion) -> dict[str, Any]:
        threads.append(threading.get_ident())
        return whole(bodies, completion)

    monkeypatch.setattr(Bodies, "whole", counted)
    body = json.dumps({"model": MODEL, "prompt": "w5", "max_tokens": 600, "ignore_eos": True, "logprobs": 0}).encode()
    reply = await service.ask(post("/v1/completions", body, Authorization="Bearer sk-1"))
    assert len(reply.json["choices"][0]["logprobs"]["tokens"]) == 600
    assert threads != [threading.get_ident()]
