"""What clients send: the parts of OpenAI's requests that mean something here. What would be ignored silently is refused.

Types are strict (true is no number, "5" is none either), and null means that the field is absent, as in OpenAI's requests.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from dsi_actors.serving.errors import ApiError, from_validation
from dsi_actors.serving.strict_json import loads
from dsi_protocol.sampling import MAX_LISTED

_MOST_STOPS = 16
_MOST_STOP_CHARACTERS = 500
_MOST_CHOICES = 16
_MOST_BAD_WORDS = 128
_MOST_MESSAGES = 4096
#: Values in the JSON of a request beside its prompt's token ids.
_MOST_OTHER_VALUES = 1 << 16


_TOKEN_ID = re.compile("[0-9]{1,9}")
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 32)]


class _Strict(BaseModel):
    """Fields that are not named are ignored, as OpenAI's own service does."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


def _auto_or_number(given: Any) -> Any:
    if given == "auto" or (type(given) is int and 1 <= given <= 1024):
        return given
    raise ValueError("give auto or a whole number in [1, 1024]")


class DsiOptions(_Strict):
    """How to decode. Never changes the text."""

    model_config = ConfigDict(extra="forbid")

    algorithm: Literal["dsi", "si", "ar"] = "dsi"
    sp: Annotated[int, Field(ge=1, le=1024)] | None = None
    lookahead: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_number)] = "auto"
    rows: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_number)] = "auto"


class StreamOptions(_Strict):
    include_usage: bool = False


def _stops(given: Any) -> list[str]:
    return _texts(
        [given] if isinstance(given, str) else given, _MOST_STOPS, "stop strings", "a text or a list of texts"
    )


def _bad_words(given: Any) -> list[str]:
    return _texts(given, _MOST_BAD_WORDS, "texts", "a list of texts")


def _texts(given: Any, most: int, what: str, expected: str) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"give {expected}")
    if len(given) > most or not all(0 < len(text) <= _MOST_STOP_CHARACTERS for text in given):
        raise ValueError(
            f"give at most {most} {what}, none of them empty or longer than {_MOST_STOP_CHARACTERS} characters"
        )
    return given


def _biases(given: Any) -> Any:
    """By token id. A key of JSON is a text."""
    if not isinstance(given, dict) or len(given) > MAX_LISTED or not all(map(_TOKEN_ID.fullmatch, given)):
        raise ValueError(f"give a bias for each of at most {MAX_LISTED} token ids")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in given.values()):
        raise ValueError("give biases in [-100, 100]")
    return {int(token): float(bias) for token, bias in given.items()}


class _Request(_Strict):
    """What chat and text completions share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    #: Signed or unsigned: both name the same 64 bits.
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    # Of sampling: None means that the model's defaults count, and OpenAI's where it has none.
    temperature: float | None = None
    top_p: float | None = None
    #: Not OpenAI's, but everybody's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    dsi: DsiOptions = Field(default_factory=DsiOptions)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = Field(default_factory=dict)
    # vLLM's.
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_LISTED)] = Field(default_factory=list)
    bad_words: Annotated[list[str], BeforeValidator(_bad_words)] = Field(default_factory=list)
    # The form of the answer: structured.py reads them.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # Refused unless they say nothing.
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @property
    def names_structure(self) -> bool:
        """Whether a field says something about the form of the answer."""
        names = (
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
        )
        return any(getattr(self, name) is not None for name in names)

    @model_validator(mode="after")
    def _nothing_silently_ignored(self) -> _Request:
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: leave it out")
        return self


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _content(given: Any) -> Any:
    """The text of a message that comes in parts."""
    if not isinstance(given, list):
        return given
    return "".join(TextPart.model_validate(part).text for part in given)


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    # Refused unless they say nothing.
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _text_alone(self) -> ChatMessage:
        if self.tool_calls or self.function_call:
            raise ValueError("tool_calls and function_call are not supported: leave them out")
        return self

    def as_dict(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(_Request):
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=_MOST_MESSAGES)]
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


def _prompt(given: Any) -> str | list[int]:
    """One prompt. Checked here and not by pydantic, which would report on each of a hundred thousand token ids."""
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        if len(given) > 1:
            raise ValueError("one prompt for each request: send several requests")
        [given] = given
    if isinstance(given, str) or (isinstance(given, list) and set(map(type, given)) <= {int}):
        return given
    raise ValueError("give a text or a list of token ids")


class CompletionRequest(_Request):
    #: Text, or token ids; or one of either in a list.
    prompt: Annotated[Any, BeforeValidator(_prompt)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
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
        return self

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


AnyRequest: TypeAlias = ChatRequest | CompletionRequest


def parse(body: bytes, kind: type[AnyRequest], *, max_length: int) -> AnyRequest:
    """The request in `body`. Raises ApiError, whatever the bytes. `max_length`: positions that a target server takes."""
    try:
        values = loads(body.decode(), most_values=max_length + _MOST_OTHER_VALUES)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON that this service reads: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise from_validation(error) from None
