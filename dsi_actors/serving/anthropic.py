"""What Anthropic's clients send to /v1/messages, as a request of the chat endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field, ValidationInfo, model_validator

from dsi_actors.serving.fields import Label, Refused, Strict, Tagged
from dsi_actors.serving.schemas import MOST_MESSAGES, MOST_TOOLS, ChatRequest, DsiOptions, Stops

_MOST_BLOCKS = 4096


class _Text(Strict):
    type: Literal["text"]
    text: str
    citations: Label = None
    cache_control: Label = None


def _text(given: Any, info: ValidationInfo) -> Any:
    """Return the text of a list of text blocks, joined. Anything but a list is returned as it is."""
    if not isinstance(given, list):
        return given
    return "".join(_Text.model_validate(block, context=info.context).text for block in given)


class Block(Tagged):
    """A part of the content of a message."""

    NEEDED: ClassVar = {
        "text": ("text",), "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",), "thinking": ("thinking",),
    }  # fmt: skip
    OPTIONAL: ClassVar = {
        "text": ("citations",), "tool_use": ("caller", "toolset_name"),
        "tool_result": ("content", "is_error", "toolset_name"), "thinking": ("signature",),
    }  # fmt: skip

    type: Literal["text", "tool_use", "tool_result", "thinking"]
    text: str | None = None
    citations: Label = None
    # A call of a tool.
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    caller: Label = None
    toolset_name: Label = None
    # What a tool answered.
    tool_use_id: str | None = None
    content: Annotated[str | None, BeforeValidator(_text)] = None
    is_error: Label = None
    # Reasoning. This service signs nothing and checks no signature.
    thinking: str | None = None
    signature: Label = None
    cache_control: Label = None


def _blocks(given: Any) -> Any:
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


class Turn(Strict):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], FailFast(), Field(min_length=1, max_length=_MOST_BLOCKS), BeforeValidator(_blocks)]

    @model_validator(mode="after")
    def _blocks_are_of_the_role(self) -> Turn:
        theirs = {"user": ("tool_result",), "assistant": ("tool_use", "thinking"), "system": ()}[self.role]
        for block in self.content:
            if block.type not in ("text", *theirs):
                raise ValueError(f"a block of the type {block.type} cannot stand in a message of the role {self.role}")
        return self

    def as_chat(self) -> Iterator[dict[str, Any]]:
        """Return the same as messages of the chat endpoint. There, each answer of a tool is a message of its own."""
        texts = [block.text or "" for block in self.content if block.type == "text"]
        if self.role != "assistant":
            for block in self.content:
                if block.type == "tool_result":
                    yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.content or ""}
            if texts:
                yield {"role": self.role, "content": "".join(texts)}
            return
        made: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        thoughts = [block.thinking or "" for block in self.content if block.type == "thinking"]
        if thoughts:
            made["reasoning_content"] = "".join(thoughts)
        calls = [
            {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}
            for block in self.content
            if block.type == "tool_use"
        ]
        yield {**made, "tool_calls": calls} if calls else made


class _Tool(Strict):
    type: Literal["custom"] = "custom"
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Label = None
    cache_control: Label = None
    input_examples: Label = None
    eager_input_streaming: Label = None
    defer_loading: Label = None
    allowed_callers: Label = None

    def as_chat(self) -> dict[str, Any]:
        return {"name": self.name, "description": self.description, "parameters": self.input_schema}


class _ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _names_a_tool(self) -> _ToolChoice:
        if (self.name is not None) != (self.type == "tool"):
            raise ValueError("name belongs to the type tool")
        return self

    def as_chat(self) -> Any:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class _Thinking(Strict):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    #: No effect: the model decides how long it reasons.
    budget_tokens: Label = None
    display: Label = None


class _Format(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class _Output(Strict):
    format: _Format | None = None
    effort: str | None = None


class CountRequest(Strict):
    """The body of a request to /v1/messages/count_tokens: a conversation, and what else becomes a part of the prompt."""

    model: str
    messages: Annotated[list[Turn], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    system: Annotated[str | None, BeforeValidator(_text)] = None
    tools: Annotated[list[_Tool], FailFast(), Field(max_length=MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: _ToolChoice | None = None
    thinking: _Thinking | None = None
    output_config: _Output = Field(default_factory=_Output)
    #: Not Anthropic's: for the model's chat template.
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    cache_control: Label = None
    speed: Label = None
    user_profile_id: Label = None
    context_management: Label = None
    mcp_servers: Refused = None

    def as_chat(self) -> ChatRequest:
        """Return the same as a request of the chat endpoint. Raises ValidationError."""
        return ChatRequest.model_validate({**self._asked(), "max_tokens": 1}).hinted(self._hints())

    def _hints(self) -> dict[str, Any]:
        """Return options for the chat template. Clients send them whatever the model is, so a template may lack them."""
        thinks = None if self.thinking is None else self.thinking.type != "disabled"
        return {"enable_thinking": thinks, "reasoning_effort": self.output_config.effort}

    def _asked(self) -> dict[str, Any]:
        """Return the fields of a chat request that both endpoints have."""
        messages = [message for turn in self.messages for message in turn.as_chat()]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        last = messages[-1]
        made: dict[str, Any] = {
            "model": self.model, "messages": messages, "chat_template_kwargs": self.chat_template_kwargs,
            "continue_final_message": last["role"] == "assistant" and "tool_calls" not in last,
        }  # fmt: skip
        if self.tools:
            made["tools"] = [{"type": "function", "function": tool.as_chat()} for tool in self.tools]
        if self.tool_choice is not None:
            made["tool_choice"] = self.tool_choice.as_chat()
            made["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.output_config.format is not None:
            made["response_format"] = {
                "type": "json_schema",
                "json_schema": {"schema": self.output_config.format.schema_},
            }
        return made


class MessagesRequest(CountRequest):
    """The body of a request to /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Stops = Field(default_factory=list)
    stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    # Not Anthropic's.
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    dsi: DsiOptions = Field(default_factory=DsiOptions)
    metadata: Label = None
    service_tier: Label = None
    inference_geo: Label = None
    diagnostics: Label = None
    container: Refused = None

    def as_chat(self) -> ChatRequest:
        """Return the same as a request of the chat endpoint. Raises ValidationError."""
        same = ("max_tokens", "stream", "temperature", "top_k", "top_p", "seed", "min_p", "repetition_penalty")
        made = {name: getattr(self, name) for name in same}
        made |= {"stop": self.stop_sequences, "dsi": self.dsi.model_dump()}
        return ChatRequest.model_validate({**self._asked(), **made}).hinted(self._hints())
