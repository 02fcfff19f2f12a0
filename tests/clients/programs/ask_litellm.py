"""litellm: chat, stream, tools, schemas, and the error of a prompt that is too long."""

import json
import sys
from typing import Literal

import litellm
from pydantic import BaseModel


class City(BaseModel, extra="forbid"):
    name: Literal["Oslo", "Rome"]
    capital: bool


asked = {"model": "openai/tiny", "api_base": sys.argv[1], "api_key": "any", "max_tokens": 100, "temperature": 0}
chat = [{"role": "user", "content": "Say hello."}]
assert litellm.completion(messages=chat, **asked).choices[0].message.content
assert len([*litellm.completion(messages=chat, stream=True, **asked)]) > 2
City.model_validate_json(litellm.completion(messages=chat, response_format=City, **asked).choices[0].message.content)
tool = {"type": "function", "function": {"name": "city", "parameters": City.model_json_schema()}}
called = litellm.completion(messages=chat, tools=[tool], tool_choice="required", parallel_tool_calls=False, **asked)
assert called.choices[0].finish_reason == "tool_calls"
City.model_validate(json.loads(called.choices[0].message.tool_calls[0].function.arguments))
try:
    litellm.completion(messages=[{"role": "user", "content": "hello " * 9000}], **asked)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a prompt that is too long was taken")
