"""The official client: chat, stream, batches, tools, schemas, the Responses API."""

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel


class City(BaseModel, extra="forbid"):
    name: Literal["Oslo", "Rome"]
    capital: bool


client = openai.OpenAI(base_url=sys.argv[1], api_key="any", max_retries=0)
model = client.models.retrieve(client.models.list().data[0].id).id
chat = [{"role": "user", "content": "Say hello."}]
whole = client.chat.completions.create(model=model, messages=chat, max_tokens=8, temperature=0)
chunks = client.chat.completions.create(model=model, messages=chat, max_tokens=8, temperature=0, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
parsed = client.chat.completions.parse(model=model, messages=chat, response_format=City, max_tokens=60, seed=1)
assert isinstance(parsed.choices[0].message.parsed, City)
tool = openai.pydantic_function_tool(City)
called = client.chat.completions.parse(
    model=model, messages=chat, tools=[tool], tool_choice="required", max_tokens=100, parallel_tool_calls=False, seed=1
)
assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, City)
batch = client.completions.create(
    model=model, prompt=["One, two,", "Red, green,"], max_tokens=4, temperature=0, logprobs=0
)
assert len(batch.choices) == 2
assert isinstance(
    client.responses.parse(model=model, input="A city.", text_format=City, max_output_tokens=60).output_parsed, City
)
with client.responses.stream(model=model, input="Say hello.", max_output_tokens=8, temperature=0) as events:
    response = [event for event in events][-1].response
    assert response.output_text
form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 2]}}}
json.loads(client.chat.completions.create(model=model, messages=chat, response_format=form).choices[0].message.content)
