"""Tools and reasoning by the service, asked by the official `openai` client. The model is random: the grammar makes calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serving.test_openai import served
from support.engines import make_byte_model

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"], "additionalProperties": False, "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
}  # fmt: skip
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "strict": None}},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
#: Shows all that a template may read.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}"
    "[{{ message.role }}]{{ message.content }}{% for call in message.tool_calls %}"
    "({{ call.function.name }} {{ call.function.arguments.city }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
HISTORY: Any = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 1}'}},
    ]},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
]  # fmt: skip


@pytest.fixture(scope="module", params=["a template without tools", "one that reads them"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = make_byte_model(tmp_path_factory.mktemp("bytes"), positions=4096)
    if request.param == "one that reads them":
        (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    with served(model) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 600, "seed": 1, **fields}
    return client.chat.completions.create(model="tiny", **given)


def arguments_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


def check(calls: list[tuple[str, Any]]) -> None:
    for name, given in calls:
        assert given == {} or (
            name == "weather" and given["city"] in ("Oslo", "Rome") and given["days"] in range(1, 10)
        )


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI, choice: Any) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    [whole] = ask(client, **asked).choices
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    calls = arguments_of(whole.message)
    check(calls)
    assert len(calls) == 1
    if choice is NAMED:
        assert calls[0][0] == "weather"
    name, arguments, pieces = "", "", 0
    for chunk in ask(client, stream=True, **asked):
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
            pieces += bool(call.function.arguments)
            assert call.index == 0
        reason = chunk.choices[0].finish_reason
    assert [(name, json.loads(arguments))] == calls
    assert reason == "tool_calls"
    if calls[0][1]:
        assert pieces > 3, "the arguments come as they are written"


def test_the_calls_do_not_depend_on_how_they_are_decoded(client: openai.OpenAI) -> None:
    found = []
    for algorithm in ("ar", "si", "dsi"):
        [choice] = ask(
            client, tools=TOOLS, tool_choice="required", temperature=1, extra_body={"dsi": {"algorithm": algorithm}}
        ).choices
        found.append(arguments_of(choice.message))
        check(found[-1])
    assert found[0] == found[1] == found[2]


def test_calls_or_json(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [[1]]}}}
    for seed in range(4):
        [choice] = ask(client, tools=TOOLS, response_format=form, seed=seed).choices
        if choice.finish_reason == "tool_calls":
            check(arguments_of(choice.message))
        else:
            assert json.loads(choice.message.content) == [1]


def test_a_history_with_calls_is_read(client: openai.OpenAI) -> None:
    with_tools = ask(client, messages=HISTORY, tools=TOOLS, max_tokens=3)
    without = ask(client, messages=HISTORY, tools=TOOLS, tool_choice="none", max_tokens=3)
    plain = ask(client, max_tokens=3)
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + 100 > plain.usage.prompt_tokens + 100


def test_the_last_message_is_continued(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Certainly: "}]
    continued = ask(client, messages=messages, max_tokens=3, extra_body={"continue_final_message": True})
    ended = ask(client, messages=messages, max_tokens=3)
    assert continued.usage.prompt_tokens <= ended.usage.prompt_tokens


def test_options_of_the_template(client: openai.OpenAI, request: pytest.FixtureRequest) -> None:
    asked: Any = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}, "max_tokens": 40}
    if "one that reads them" in request.node.name:
        message = ask(client, **asked).choices[0].message
        assert message.reasoning_content
        assert not message.content
        streamed = [chunk.choices[0].delta for chunk in ask(client, stream=True, **asked)]
        assert (
            "".join(getattr(delta, "reasoning_content", None) or "" for delta in streamed) == message.reasoning_content
        )
    else:
        with pytest.raises(openai.BadRequestError, match="chat template reads no enable_thinking"):
            ask(client, **asked)
    with pytest.raises(openai.BadRequestError, match="chat template reads no reasoning_effort"):
        ask(client, reasoning_effort="low")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [TOOLS[0]] * 2}, "the name 'weather' occurs twice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "there is no tool 'x'"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice: give auto, none, required"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: must be 'function'"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "more than one structure"),
        ({"tools": TOOLS, "extra_body": {"guided_regex": "x"}}, "regex and tools exclude each other"),
        ({"extra_body": {"continue_final_message": True}}, "the last message must be the assistant's"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_gets_400(client: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert words in str(caught.value)
