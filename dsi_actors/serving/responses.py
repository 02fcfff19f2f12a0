"""What clients send to /v1/responses, as a request of the chat endpoint."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field, ValidationInfo

from dsi_actors.serving.fields import Label, Refused, Strict, Tagged
from dsi_actors.serving.schemas import MOST_MESSAGES, MOST_TOOLS, ChatRequest, DsiOptions, StreamOptions


class _Text(Strict):
    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: Label = None
    logprobs: Label = None


def _content(given: Any, info: ValidationInfo) -> Any:
    if not isinstance(given, list):
        return given
    return "".join(_Text.model_validate(part, context=info.context).text for part in given)


class Item(Tagged):
    """One item of the input: a message, a call, what a tool answered, or reasoning."""

    NEEDED: ClassVar = {
        "message": ("role", "content"), "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"), "reasoning": (),
    }  # fmt: skip
    OPTIONAL: ClassVar = {"message": ("phase",), "reasoning": ("content", "summary", "encrypted_content")}

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: Label = None
    status: Label = None
    phase: Label = None
    # A message. Reasoning has `content`, too.
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[str | None, BeforeValidator(_content)] = None
    # A call of a function.
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[str | None, BeforeValidator(_content)] = None
    # Reasoning. Its summary is not given to the model.
    summary: Label = None
    encrypted_content: Label = None


def _input(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class _Function(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Label = None
    defer_loading: Label = None


class _Format(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: Label = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Label = None


class _TextOptions(Strict):
    format: _Format = Field(default_factory=_Format)
    verbosity: Refused = None


class _Reasoning(Strict):
    effort: str | None = None
    summary: Label = None
    generate_summary: Label = None


class ResponsesRequest(Strict):
    model: str
    input: Annotated[list[Item], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES), BeforeValidator(_input)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: _TextOptions = Field(default_factory=_TextOptions)
    tools: Annotated[list[_Function], FailFast(), Field(max_length=MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    reasoning: _Reasoning = Field(default_factory=_Reasoning)
    # Not OpenAI's.
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    dsi: DsiOptions = Field(default_factory=DsiOptions)
    #: Nothing is stored, whatever it says.
    store: Label = None
    include: Label = None
    truncation: Label = None
    metadata: Label = None
    user: Label = None
    service_tier: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Label = None
    prompt_cache_options: Label = None
    previous_response_id: Refused = None
    conversation: Refused = None
    background: Refused = None
    prompt: Refused = None
    max_tool_calls: Refused = None
    top_logprobs: Refused = None
    context_management: Refused = None
    moderation: Refused = None

    def as_chat(self) -> ChatRequest:
        """Raises ValidationError."""
        made: dict[str, Any] = {
            "model": self.model, "stream": self.stream, "messages": self._messages(), "temperature": self.temperature,
            "top_p": self.top_p, "max_completion_tokens": self.max_output_tokens, "seed": self.seed, "top_k": self.top_k,
            "min_p": self.min_p, "repetition_penalty": self.repetition_penalty,
            "parallel_tool_calls": self.parallel_tool_calls, "reasoning_effort": self.reasoning.effort,
            "chat_template_kwargs": self.chat_template_kwargs, "dsi": self.dsi.model_dump(),
        }  # fmt: skip
        made["tools"] = [
            {"type": "function", "function": {key: getattr(tool, key) for key in ("name", "description", "parameters")}}
            for tool in self.tools
        ]
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
            choice = {"type": "function", "function": {"name": choice["name"]}}
        made["tool_choice"] = choice
        form = self.text.format
        if form.type != "text":
            schema = {"json_schema": {"schema": form.schema_}} if form.type == "json_schema" else {}
            made["response_format"] = {"type": form.type, **schema}
        return ChatRequest.model_validate(made)

    def _messages(self) -> list[dict[str, Any]]:
        """Calls that follow each other, and the text before them, are one message of the assistant."""
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        reasoning: str | None = None
        for item in self.input:
            if item.type == "reasoning":
                reasoning = item.content or reasoning
            elif item.type == "function_call_output":
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            elif item.type == "message" and item.role != "assistant":
                found.append({"role": item.role, "content": item.content})
            else:
                if not found or found[-1]["role"] != "assistant" or item.type == "message":
                    found.append({"role": "assistant", "reasoning_content": reasoning})
                    reasoning = None
                if item.type == "message":
                    found[-1]["content"] = item.content
                else:
                    function = {"name": item.name, "arguments": item.arguments}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    found[-1].setdefault("tool_calls", []).append(call)
        return found
