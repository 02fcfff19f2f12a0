"""/v1/messages, asked by the official `anthropic` client, beside the chat endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from serving.test_openai import served
from serving.test_tools import CITY, TEMPLATE
from support.engines import make_byte_model

TOOLS: Any = [{"name": "weather", "description": "Tells the weather.", "input_schema": CITY}]
HISTORY: Any = [
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Oslo", "days": 1}},
    ]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "rain"}]}]},
    {"role": "system", "content": "Be short."},
]  # fmt: skip
#: The same for the chat endpoint.
CHAT: Any = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 1}'}},
    ]},
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
    {"role": "system", "content": "Be short."},
]  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = make_byte_model(tmp_path_factory.mktemp("bytes"), positions=4096)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    with served(model) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as made:
        yield made


def ask(client: anthropic.Anthropic, **fields: Any) -> Any:
    given = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 600, **fields}
    given["extra_body"] = {"seed": 1, **given.get("extra_body", {})}
    return client.messages.create(model="tiny", **given)


def streamed(client: anthropic.Anthropic, **fields: Any) -> Any:
    """What the client makes of a stream."""
    given = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 600, **fields}
    given["extra_body"] = {"seed": 1, **given.get("extra_body", {})}
    with client.messages.stream(model="tiny", **given) as events:
        return events.get_final_message()


def known(message: Any) -> Any:
    """But for ids, for costs, and for what was in the cache."""
    usage = message.usage
    blocks = [block.model_dump(exclude={"id"}, exclude_none=True) for block in message.content]
    read = usage.input_tokens + usage.cache_read_input_tokens
    return blocks, message.stop_reason, message.stop_sequence, read, usage.output_tokens


def test_a_text_is_that_of_the_chat_endpoint(client: anthropic.Anthropic, url: str) -> None:
    whole = ask(client, messages=HISTORY, max_tokens=20, system="Be kind.")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as other:
        chat = other.chat.completions.create(model="tiny", max_tokens=20, seed=1, messages=CHAT)
    assert whole.content[0].text == chat.choices[0].message.content
    assert whole.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[chat.choices[0].finish_reason]
    _, _, _, read, written = known(whole)
    assert chat.usage is not None
    assert (read, written) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    assert known(streamed(client, messages=HISTORY, max_tokens=20, system="Be kind.")) == known(whole)


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    text = ask(client, max_tokens=20).content[0].text
    stop = text[5:7]
    for answer in (ask, streamed):
        found = answer(client, max_tokens=20, stop_sequences=["nowhere", stop])
        assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
        assert found.content[0].text == text[: text.index(stop)]


def test_the_beginning_of_an_answer_can_be_given(client: anthropic.Anthropic, url: str) -> None:
    asked: Any = [{"role": "user", "content": "hello"}]
    begun: Any = [*asked, {"role": "assistant", "content": "a"}]

    def count(messages: Any) -> int:
        return client.messages.count_tokens(model="tiny", messages=messages).input_tokens

    assert count(begun) == count(asked) - len("[answer]") + len("[assistant]a")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as other:
        more = {"continue_final_message": True, "add_generation_prompt": False}
        chat = other.chat.completions.create(model="tiny", max_tokens=10, seed=1, messages=begun, extra_body=more)
    assert ask(client, max_tokens=10, messages=begun).content[0].text == chat.choices[0].message.content


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools(client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    asked: Any = {"messages": HISTORY, "tools": TOOLS, "tool_choice": {**choice, "disable_parallel_tool_use": True}}
    whole = ask(client, **asked)
    [call] = whole.content
    assert (call.type, call.name, whole.stop_reason) == ("tool_use", "weather", "tool_use")
    assert call.input["city"] in ("Oslo", "Rome")
    assert known(streamed(client, **asked)) == known(whole)


def test_a_call_that_is_cut_is_told_as_it_is(client: anthropic.Anthropic) -> None:
    whole = ask(client, tools=TOOLS, tool_choice={"type": "any"}, max_tokens=60)  # a whole call has 70 or more
    [call] = whole.content
    assert (whole.stop_reason, set(call.input)) == ("max_tokens", {"_unparsed"})
    assert call.input["_unparsed"].startswith("{")


def test_json_of_a_schema(client: anthropic.Anthropic) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": CITY}}
    found = json.loads(ask(client, output_config=form).content[0].text)
    assert found["city"] in ("Oslo", "Rome")


def test_reasoning_is_a_block_of_its_own(client: anthropic.Anthropic) -> None:
    asked: Any = {"max_tokens": 30, "thinking": {"type": "adaptive"}}
    whole = ask(client, **asked)
    assert whole.content[0].type == "thinking"
    assert whole.content[0].thinking
    assert known(streamed(client, **asked)) == known(whole)


def test_what_a_template_does_not_know_changes_nothing(client: anthropic.Anthropic) -> None:
    """A client sends it whatever the model is."""
    plain = known(ask(client, max_tokens=10))
    assert known(ask(client, max_tokens=10, output_config={"effort": "low"})) == plain
    assert known(ask(client, max_tokens=10, thinking={"type": "disabled"})) == plain
    assert known(ask(client, max_tokens=10, thinking={"type": "adaptive"})) != plain, "the template has this option"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extra_body": {"colour": 1}}, "there is no field 'colour'"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content: must have at least 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type: must be"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "id": "b"}]}]}, "there is no field 'id' in"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]}, "cannot stand in"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]}, "tools[0].type: must be 'custom'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"max_tokens": 10_000}, "maximum context length"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_gets_400(client: anthropic.Anthropic, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **fields)
    assert words in str(caught.value)
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_tokens_are_counted_without_an_answer(client: anthropic.Anthropic) -> None:
    asked: Any = {"messages": HISTORY, "system": [{"type": "text", "text": "Be kind."}], "tools": TOOLS}
    counted = client.messages.count_tokens(model="tiny", **asked).input_tokens
    usage = ask(client, max_tokens=1, **asked).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_an_error_has_the_shape_that_clients_know(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="other", max_tokens=1, messages=[{"role": "user", "content": "a"}])
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
