"""/v1/responses, asked by the official `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serving.test_openai import served
from serving.test_tools import CITY, TEMPLATE
from support.engines import make_byte_model

TOOLS: Any = [{"type": "function", "name": "weather", "parameters": CITY, "strict": True}]
FORM: Any = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
HISTORY: Any = [
    {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
     "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}]},
    {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "weather", "arguments": '{"city": "Oslo", "days": 1}'},
    {"type": "function_call_output", "call_id": "1", "output": "rain"},
]  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = make_byte_model(tmp_path_factory.mktemp("bytes"), positions=4096)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    with served(model) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"input": "hello", "max_output_tokens": 600, "extra_body": {"seed": 1}, **fields}
    return client.responses.create(model="tiny", **given)


def streamed(client: openai.OpenAI, **fields: Any) -> tuple[Any, list[Any]]:
    events = list(ask(client, stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    return events[-1].response, events


def same(one: Any, other: Any) -> bool:
    """But for ids, and for what was in the cache."""

    def known(response: Any) -> Any:
        items = [item.model_dump(exclude={"id", "call_id"}) for item in response.output]
        return response.status, items, response.usage.model_dump(exclude={"input_tokens_details"})

    return bool(known(one) == known(other))


def test_text(client: openai.OpenAI) -> None:
    whole = ask(client, max_output_tokens=20, instructions="Be kind.")
    chat = client.chat.completions.create(
        model="tiny", max_tokens=20, seed=1,
        messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}],
    ).choices[0]  # fmt: skip
    assert whole.output_text == chat.message.content
    assert whole.status == {"length": "incomplete", "stop": "completed"}[chat.finish_reason]
    last, events = streamed(client, max_output_tokens=20, instructions="Be kind.")
    assert same(last, whole)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    found = json.loads(ask(client, text=FORM).output_text)
    assert found["city"] in ("Oslo", "Rome")
    assert json.loads(streamed(client, text=FORM)[0].output_text) == found


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_tools(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"input": HISTORY, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    whole = ask(client, **asked)
    [call] = whole.output
    assert (call.type, call.name, whole.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    last, events = streamed(client, **asked)
    assert same(last, whole)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments


def test_reasoning_is_an_item_of_its_own(client: openai.OpenAI) -> None:
    asked: Any = {"max_output_tokens": 30, "extra_body": {"chat_template_kwargs": {"enable_thinking": True}, "seed": 1}}
    whole = ask(client, **asked)
    assert whole.output[0].type == "reasoning"
    assert whole.output[0].content[0].text
    assert same(streamed(client, **asked)[0], whole)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: is not supported"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type: must be"),
        ({"input": [{"role": "user"}]}, "input[0]: content is missing"),
        ({"input": [{"role": "user", "content": "a", "arguments": "b"}]}, "input[0]: there is no field 'arguments' in"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: must be 'function'"),
        ({"extra_body": {"colour": 1}}, "there is no field 'colour'"),
    ],
)
def test_what_cannot_be_done_gets_400(client: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert words in str(caught.value)
