"""LangChain: chat, stream, structured output in its three ways, tools, and the error of a prompt that is too long."""

import sys
from typing import Literal

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class City(BaseModel, extra="forbid"):
    """A city."""

    name: Literal["Oslo", "Rome"]
    capital: bool


model = ChatOpenAI(model="tiny", base_url=sys.argv[1], api_key="any", max_retries=0, max_tokens=100, seed=1)
assert model.invoke("Say hello.").content
assert len([*model.stream("Say hello.")]) > 2
for method in ("json_schema", "function_calling"):
    assert isinstance(model.with_structured_output(City, method=method).invoke("A city."), City)
called = model.bind_tools([City], tool_choice="required", parallel_tool_calls=False).invoke("A city.")
[call] = called.tool_calls
City.model_validate(call["args"])
assert model.invoke([HumanMessage("A city."), called, ToolMessage("done", tool_call_id=call["id"])]) is not None
try:
    model.invoke("hello " * 9000)
except ContextOverflowError:
    pass
else:
    raise AssertionError("a prompt that is too long was taken")
