"""Whatever a client sends, it is told what is wrong in OpenAI's shape; null is the same as nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dsi_protocol import MAX_TOKENS_PER_MESSAGE
from support.service import MODEL, Served, completion, post, served

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "w4"}]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(tmp_path_factory.mktemp("words"), sp=1, max_generations=4) as found:
        yield found


pytestmark = pytest.mark.asyncio(loop_scope="module")


def chat(**fields: Any) -> bytes:
    return json.dumps({**CHAT, **fields}).encode()


def raw(field: str) -> bytes:
    """A request with one more field, written as it is."""
    return b'{"model": "timed", "messages": [{"role": "user", "content": "w4"}], ' + field.encode() + b"}"


BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "Expecting value"),
    "no JSON": (b"{nonsense", "Expecting property name"),
    "more than JSON": (chat() + b"{}", "Extra data"),
    "a list": (b"[]", "must be a JSON object"),
    "a number": (b"1", "must be a JSON object"),
    "no UTF-8": (b'{"model": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"model": "timed"}'.encode("utf-16"), "not UTF-8"),
    "half a pair in the model": (b'{"model": "\\ud800"}', "UTF-16 pair"),
    "half a pair in the content": (chat(messages=[{"role": "user", "content": "\udcff"}]), "UTF-16 pair"),
    "half a pair in a key": (raw('"\\udfff": 1'), "UTF-16 pair"),
    "half a pair in a stop": (chat(stop="a\ud83d"), "UTF-16 pair"),
    "half a pair deep inside": (chat(metadata={"a": [{"b": "\ud83d"}]}), "UTF-16 pair"),
    "a field that nobody knows": (chat(temprature=1), "there is no field 'temprature' here"),
    "such a field in a message": (chat(messages=[{"role": "user", "content": "", "x": 1}]), "messages[0]: there is no field 'x'"),
    "such a field in an option": (chat(stream_options={"usage": True}), "stream_options: there is no field 'usage'"),
    "a field that is not supported": (chat(prediction={"type": "content"}), "prediction: is not supported"),
    "deep lists": (raw('"x": ' + "[" * 100_000), "nested deeper"),
    "deep objects": (raw('"x": ' + '{"a":' * 100_000), "nested deeper"),
    "deep and closed": (raw('"x": ' + "[" * 1000 + "]" * 1000), "nested deeper"),
    "many values": (raw('"x": [' + "0," * 400_000 + "0]"), "more than"),
    "a huge seed": (raw('"seed": 1' + "0" * 400), "more than 40 digits"),
    "a seed beyond 64 bits": (chat(seed=1 << 64), "seed: "),
    "a seed that overflows int conversion": (raw('"seed": ' + "9" * 5000), "more than 40 digits"),
    "NaN": (raw('"temperature": NaN'), "NaN is no JSON number"),
    "infinity": (raw('"temperature": Infinity'), "Infinity is no JSON number"),
    "minus infinity": (raw('"min_p": -Infinity'), "no JSON number"),
    "a float that overflows": (raw('"temperature": 1e999'), "too large"),
    "the same key twice": (raw('"n": 1, "n": 2'), "'n' occurs twice"),
    "true for a number": (chat(n=True), "n: "),
    "true for a float": (chat(temperature=True), "temperature: "),
    "a text for a number": (chat(max_tokens="5"), "max_tokens: "),
    "a number for a text": (chat(model=5), "model: "),
    "1 for true": (chat(stream=1), "stream: "),
    "a fraction of tokens": (chat(max_tokens=1.5), "max_tokens: "),
    "no messages": (b'{"model": "timed"}', "messages: "),
    "empty messages": (chat(messages=[]), "messages: "),
    "null messages": (chat(messages=None), "messages: "),
    "a null message": (chat(messages=[None]), "messages[0]: must be an object"),
    "no content": (chat(messages=[{"role": "assistant"}]), "messages[0]: content is missing"),
    "null content": (chat(messages=[{"role": "assistant", "content": None}]), "messages[0]: content is missing"),
    "a call without a function": (
        chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}]), "messages[0].tool_calls[0].function: is missing",
    ),
    "a call by a user": (
        chat(messages=[{"role": "user", "tool_calls": [{"function": {"name": "f"}}]}]), "tool_calls stand in a message of the",
    ),
    "the older way of calls": (
        chat(messages=[{"role": "assistant", "content": "", "function_call": {"name": "f"}}]), "function_call: is not supported",
    ),
    "another role": (chat(messages=[{"role": "critic", "content": "a"}]), "messages[0].role: must be 'system', "),
    "a picture": (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "content"),
    "the address of a picture": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "type: must be 'text'",
    ),
    "a null part": (chat(messages=[{"role": "user", "content": [None]}]), "content"),
    "too many messages": (chat(messages=[{"role": "user", "content": ""}] * 5000), "messages: "),
    "a null stop": (chat(stop=[None]), "stop: "),
    "a long stop": (chat(stop="a" * 501), "stop: "),
    "lookahead": (chat(dsi={"lookahead": True}), "dsi.lookahead: "),
    "no object for dsi": (chat(dsi=[]), "dsi: "),
    "more choices than there are places": (chat(n=5), "n and prompt ask for 5 generations, but this service takes at most 4"),
    "a temperature of many digits": (raw('"temperature": 1' + "0" * 39), "temperature must lie in"),
    "top_k of many digits": (chat(top_k=10**39), "top_k must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_wrong_is_told(service: Served, name: str) -> None:
    body, words = BROKEN[name]
    reply = await service.ask(post("/v1/chat/completions", body))
    assert reply.status == 400
    assert words in reply.error["message"]
    assert len(reply.error["message"]) < 1100
    assert len(reply.headers["x-request-id"]) == 24


async def test_a_name_that_is_not_known_is_quoted_in_part(service: Served) -> None:
    reply = await service.ask(post("/v1/completions", json.dumps({"model": "é" * 50_000, "prompt": "w4"}).encode()))
    assert reply.status == 404
    assert reply.error["code"] == "model_not_found"
    assert len(reply.body) < 3000


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "the prompt is empty"), ([[]], "the prompt is empty"), ([5, 2000], "token 2000 is outside"), ([-1], "-1 is none"),
        ([True], "prompt: "), ([1.5], "prompt: "), ({}, "prompt: "),
        (None, "prompt: "), ([1, "w4"], "prompt: "), ("", "the prompt is empty"),
        ([[1], "w4"], "prompt: "), (["w4", [1]], "prompt: "), (["w4"] * 5, "for 5 generations"), ([[1], []], "prompt is empty"),
        ([10**30], "is none"), ([0] * 300_000, "maximum context length"),
    ],
)  # fmt: skip
async def test_prompts_that_are_none(service: Served, prompt: Any, words: str) -> None:
    reply = await service.ask(post("/v1/completions", json.dumps({"model": MODEL, "prompt": prompt}).encode()))
    assert reply.status == 400
    assert words in reply.error["message"]


async def test_null_is_the_same_as_nothing(service: Served) -> None:
    nulls: dict[str, Any] = dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "stream", "stream_options", "top_k", "min_p", "repetition_penalty",
         "ignore_eos", "dsi", "presence_penalty", "frequency_penalty", "logit_bias", "response_format", "tools", "functions",
         "max_tokens", "logprobs", "echo", "suffix", "best_of", "seed", "user", "parallel_tool_calls",
         "a_field_that_nobody_knows"),
    )  # fmt: skip
    plain = await service.ask(completion("w4 w8"))
    for fields in (
        nulls,
        {"dsi": dict.fromkeys(("algorithm", "sp", "lookahead"))},
        {"response_format": {"type": None}},
        {"response_format": {"type": "text", "json_schema": {"schema": None, "strict": None}}},
    ):
        reply = await service.ask(completion("w4 w8", **fields))
        assert reply.status == 200
        assert reply.json["choices"][0]["text"] == plain.json["choices"][0]["text"]
        assert reply.json["usage"] == plain.json["usage"]
    parts = [{"type": "text", "text": "w", "cache_control": None}, {"type": "text", "text": "4"}]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": None, "refusal": None}
    texts = set()
    for messages in ([message], CHAT["messages"]):
        body = chat(messages=messages, max_tokens=5, max_completion_tokens=None, top_logprobs=None)
        texts.add((await service.ask(post("/v1/chat/completions", body))).json["choices"][0]["message"]["content"])
    assert len(texts) == 1
    streamed = await service.ask(completion("w4", stream=True, stream_options={"include_usage": None}))
    assert streamed.events[-1] == "[DONE]"
    assert "usage" not in streamed.events[-2]


async def test_any_text_is_taken(service: Served) -> None:
    for text in ("\0", "\U0010ffff", "e\u0301", "\u202e", "\ufeff", "\r\n\t", "\u2028", "﷽", "🙂"):
        reply = await service.ask(completion(f"w4 {text}", max_tokens=3, stop=[text]))
        assert reply.status == 200, reply.body


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Type": "text/plain"}, 415), ({"Content_Type": ""}, 415), ({"Content_Encoding": "gzip"}, 415),
        ({"Content_Type": "application/json; charset=latin-1"}, 415), ({"Content_Type": "multipart/form-data"}, 415),
        ({"Content_Type": "Application/JSON; charset=UTF-8"}, 200),
    ],
)  # fmt: skip
async def test_only_json_is_read(service: Served, headers: dict[str, str], status: int) -> None:
    reply = await service.ask(post("/v1/chat/completions", chat(max_tokens=2), **headers))
    assert reply.status == status
    if status != 200:
        assert "Content-" in reply.error["message"]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /v1/nowhere", 404), ("POST /v1/models", 405), ("GET /v1/chat/completions", 405), ("DELETE /v1/models", 405),
        ("OPTIONS /v1/completions", 405), ("GET /v1/models/", 404), ("PUT /health", 405), ("POST /%ff%fe", 404),
        ("HEAD /dashboard/events", 405),
    ],
)  # fmt: skip
async def test_other_paths_and_methods_are_told_in_the_same_shape(
    service: Served, request_line: str, status: int
) -> None:
    reply = await service.ask(f"{request_line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert reply.status == status
    if not request_line.startswith("HEAD"):
        assert reply.error["type"] == "invalid_request_error"
    if status == 405:
        assert reply.headers["allow"]


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 40,
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)  # fmt: skip
async def test_what_is_no_http_is_told_so(service: Served, sent: bytes) -> None:
    client = await service.connect()
    await client.send(sent)
    reply = await client.reply()
    assert reply.status == 400
    assert reply.error["message"] == "Invalid HTTP request received."
    assert await client.closed()
    await service.quiet()


async def test_fields_that_nobody_knows_can_be_allowed(tmp_path: Path) -> None:
    async with served(tmp_path, sp=1, config={"allow_unknown_fields": True}) as service:
        message = {"role": "user", "content": [{"type": "text", "text": "w4", "x": 1}], "x": 1}
        body = chat(messages=[message], max_tokens=2, x=1, dsi={"x": 1})
        assert (await service.ask(post("/v1/chat/completions", body))).status == 200
        refused = await service.ask(post("/v1/chat/completions", chat(prediction={"type": "content"})))
        assert refused.error["param"] == "prediction", "what is known and not supported is refused all the same"


async def test_who_may_not_ask_hears_nothing_of_the_request(tmp_path: Path) -> None:
    async with served(tmp_path, sp=1, config={"api_keys": ["sk-1"]}) as service:
        for body in (b"{nonsense", chat(temprature=1), chat()):
            assert (await service.ask(post("/v1/chat/completions", body))).status == 401


async def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for(service: Served) -> None:
    """LangChain looks for the code, litellm for these words."""
    most = min(service.orchestrator.max_length, MAX_TOKENS_PER_MESSAGE)
    for path, prompt in (
        ("/v1/completions", {"prompt": "w4 w5"}),
        ("/v1/chat/completions", {"messages": CHAT["messages"]}),
    ):
        reply = await service.ask(post(path, json.dumps({"model": MODEL, "max_tokens": most, **prompt}).encode()))
        assert reply.status == 400
        assert reply.error["code"] == "context_length_exceeded"
        assert reply.error["message"].startswith(f"This model's maximum context length is {most} tokens. However, you")
