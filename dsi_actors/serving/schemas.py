"""What clients send: the parts of OpenAI's requests that mean something here. What would be ignored silently is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_MOST_STOPS = 16
_MOST_CHOICES = 16


class DsiOptions(BaseModel):
    """How to decode. Never changes the text."""

    model_config = ConfigDict(extra="forbid")

    algorithm: Literal["dsi", "si", "ar"] = "dsi"
    sp: Annotated[int, Field(ge=1, le=1024)] | None = None
    lookahead: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """What chat and text completions share. Fields that are not named here are ignored, as OpenAI's own service does."""

    model_config = ConfigDict(extra="ignore")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    stop: str | list[str] | None = Field(None, validate_default=True)
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    #: Not OpenAI's, but everybody's.
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    dsi: DsiOptions = Field(default_factory=DsiOptions)
    # Refused unless they say nothing.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > _MOST_STOPS or not all(stops):
            raise ValueError(f"give at most {_MOST_STOPS} stop strings, none of them empty")
        return stops

    @model_validator(mode="after")
    def _nothing_silently_ignored(self) -> _Request:
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: leave it out, or use repetition_penalty")
        for name in ("logit_bias", "tools", "functions"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: leave it out")
        if self.response_format and self.response_format.get("type") != "text":
            raise ValueError("response_format must be text: no other is supported")
        return self

    @property
    def stops(self) -> list[str]:
        assert isinstance(self.stop, list)
        return self.stop


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def as_dict(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _only_the_chosen_token(self) -> ChatRequest:
        if self.top_logprobs:
            raise ValueError("top_logprobs is not supported: logprobs are those of the chosen tokens")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    #: Text, or token ids; or one of either in a list.
    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    #: How many alternatives to list: 0 lists the chosen tokens alone.
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _plain_completions(self) -> CompletionRequest:
        if self.logprobs:
            raise ValueError("logprobs above 0 are not supported: 0 gives those of the chosen tokens")
        if self.echo or self.suffix or (self.best_of or 1) > self.n:
            raise ValueError("echo, suffix and best_of are not supported: leave them out")
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], list) and len(self.prompt) > 1:
            raise ValueError("one prompt for each request: send several requests")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens
