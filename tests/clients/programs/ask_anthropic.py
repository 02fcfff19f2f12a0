"""Anthropic's client: a text, a stream, a tool, a schema."""

import sys
from typing import Literal

import anthropic
from pydantic import BaseModel


class City(BaseModel, extra="forbid"):
    name: Literal["Oslo", "Rome"]
    capital: bool


client = anthropic.Anthropic(base_url=sys.argv[1].removesuffix("/v1"), api_key="any", max_retries=0)
model = client.models.list().data[0].id
chat = [{"role": "user", "content": "Say hello."}]
whole = client.messages.create(model=model, messages=chat, max_tokens=8, extra_body={"temperature": 0})
with client.messages.stream(model=model, messages=chat, max_tokens=8, extra_body={"temperature": 0}) as stream:
    assert "".join(stream.text_stream) == whole.content[0].text
    assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
assert client.messages.count_tokens(model=model, messages=chat).input_tokens > 0
tool = {"name": "city", "description": "Takes a city.", "input_schema": City.model_json_schema()}
choice = {"type": "any", "disable_parallel_tool_use": True}
called = client.messages.create(model=model, messages=chat, tools=[tool], tool_choice=choice, max_tokens=100)
[call] = called.content
assert called.stop_reason == "tool_use"
City.model_validate(call.input)
answer = {"type": "tool_result", "tool_use_id": call.id, "content": "thanks"}
told = [*chat, {"role": "assistant", "content": called.content}, {"role": "user", "content": [answer]}]
assert client.messages.create(model=model, messages=told, tools=[tool], max_tokens=4).usage.output_tokens > 0
parsed = client.messages.parse(model=model, messages=chat, output_format=City, max_tokens=60)
assert isinstance(parsed.parsed_output, City)
