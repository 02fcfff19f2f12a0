"""What clients expect beside the text: models by name, batches of prompts, HEAD, streams that are silent for long."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from serving.test_leaving_clients import HOUR_MS
from support.service import MODEL, Served, completion, post, served

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    config = {"aliases": ["org/other"]}
    async with served(tmp_path_factory.mktemp("words"), sp=1, max_generations=8, config=config) as found:
        yield found


async def get(service: Served, path: str, method: str = "GET") -> Any:
    client = await service.connect()
    await client.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return await client.reply(method=method)


async def test_models_by_name(service: Served) -> None:
    listed = (await get(service, "/v1/models")).json["data"]
    assert [model["id"] for model in listed] == [MODEL, "org/other"]
    assert {model["max_model_len"] for model in listed} == {service.service.max_length}
    for model in listed:
        assert (await get(service, f"/v1/models/{model['id']}")).json == model
    gone = await get(service, "/v1/models/third")
    assert (gone.status, gone.error["code"]) == (404, "model_not_found")
    answer = await service.ask(completion(model="org/other"))
    assert (answer.status, answer.json["model"]) == (200, "org/other")


async def test_each_prompt_of_a_batch_is_answered_as_if_alone(service: Served) -> None:
    prompts: list[Any] = ["w4 w8", "w1", "w5 w6 w7"]
    alone = [(await service.ask(completion(prompt, n=2, seed=3))).json for prompt in prompts]
    together = (await service.ask(completion(prompts, n=2, seed=3))).json
    assert [choice["text"] for choice in together["choices"]] == [
        choice["text"] for answer in alone for choice in answer["choices"]
    ]
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    assert together["usage"]["prompt_tokens"] == sum(answer["usage"]["prompt_tokens"] for answer in alone) == 6
    ids = (await service.ask(completion([[4, 8], [1]], n=1, seed=3))).json  # type: ignore[list-item]
    assert len(ids["choices"]) == 2
    texts = dict.fromkeys(range(6), "")
    for event in (await service.ask(completion(prompts, n=2, seed=3, stream=True))).events[:-1]:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice["text"] for choice in together["choices"]]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/dashboard", "/v1/models", f"/v1/models/{MODEL}"])
async def test_head_is_get_without_a_body(service: Served, path: str) -> None:
    reply = await get(service, path, "HEAD")
    assert (reply.status, reply.body, reply.complete) == (200, b"", True)
    refused = await get(service, path, "DELETE")
    assert refused.status == 405
    assert {word.strip() for word in refused.headers["allow"].split(",")} == {"GET", "HEAD"}


async def test_a_silent_stream_begins_and_says_that_it_lives(tmp_path: Path) -> None:
    async with served(
        tmp_path, sp=1, target_ms=HOUR_MS, drafter=None, calibrate=False, request_timeout_s=7200,
        config={"silence_s": 0.01},
    ) as service:  # fmt: skip
        client = await service.connect()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "w4"}], "stream": True}
        await client.send(post("/v1/chat/completions", json.dumps(body).encode()))
        reply = await client.reply(lambda reply: reply.body.count(b": waiting\n\n") >= 3)
        assert reply.status == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        client.leave()
        await service.quiet()
