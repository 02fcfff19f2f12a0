"""The messages of a chat, as clients send them and as chat templates read them."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from dsi_actors.serving.fields import Label, Refused, Strict
from dsi_actors.serving.strict_json import loads

_MOST_CALLS = 128
_MOST_NAME_CHARACTERS = 256
#: Values in the arguments of one call.
_MOST_ARGUMENT_VALUES = 1 << 14


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: Label = None


def _content(given: Any, info: ValidationInfo) -> Any:
    """The text of a message that comes in parts."""
    if not isinstance(given, list):
        return given
    return "".join(TextPart.model_validate(part, context=info.context).text for part in given)


class CalledFunction(Strict):
    name: Annotated[str, Field(min_length=1, max_length=_MOST_NAME_CHARACTERS)]
    #: JSON, written by a model: it may be broken.
    arguments: str = "{}"


class ToolCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Label = None

    def as_dict(self) -> dict[str, Any]:
        """As chat templates want it: arguments are an object. Those that are no JSON stay text."""
        arguments: Any = self.function.arguments
        with contextlib.suppress(ValueError):
            arguments = loads(arguments or "{}", most_values=_MOST_ARGUMENT_VALUES)
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    #: Of an assistant.
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MOST_CALLS)] = Field(default_factory=list)
    reasoning_content: str | None = None
    #: Of a tool: which call it answers.
    tool_call_id: str | None = None
    name: str | None = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None
    annotations: Label = None

    @model_validator(mode="after")
    def _is_complete(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls stand in a message of the assistant only")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def as_dict(self) -> dict[str, Any]:
        """As chat templates want it."""
        made: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        if self.tool_calls:
            made["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        for name in ("reasoning_content", "tool_call_id", "name"):
            if (value := getattr(self, name)) is not None:
                made[name] = value
        return made


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    #: A JSON schema.
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Strict):
    type: Literal["function"]
    function: Function
    cache_control: Label = None

    def as_dict(self) -> dict[str, Any]:
        """As chat templates want it."""
        function = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": "function", "function": {**function, "parameters": self.function.schema_of_arguments}}
