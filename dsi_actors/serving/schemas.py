"""What clients send: the parts of OpenAI's requests that mean something here. A field that does not is refused, not ignored.

Types are strict (true is no number, "5" is none either), and null means that the field is absent, as in OpenAI's requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, FailFast, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from dsi_actors.serving.errors import ApiError, from_validation
from dsi_actors.serving.fields import Label, Refused, Strict
from dsi_actors.serving.messages import ChatMessage, Tool
from dsi_actors.serving.strict_json import loads
from dsi_protocol.sampling import MAX_LISTED, MAX_TOP_LOGPROBS

_MOST_STOPS = 16
_MOST_STOP_CHARACTERS = 500
_MOST_CHOICES = 16
_MOST_BAD_WORDS = 128
MOST_MESSAGES = 4096
MOST_TOOLS = 128
#: Of a completion, as OpenAI has it.
_MOST_ALTERNATIVES = 5
_MOST_PROMPTS = 2048
#: Values in the JSON of a request beside its prompt's token ids.
_MOST_OTHER_VALUES = 1 << 16


_TOKEN_ID = re.compile("[0-9]{1,9}")
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 32)]


def _auto_or_number(given: Any) -> Any:
    if given == "auto" or (type(given) is int and 1 <= given <= 1024):
        return given
    raise ValueError("give auto or a whole number in [1, 1024]")


class DsiOptions(Strict):
    """How to decode. Never changes the text."""

    algorithm: Literal["dsi", "si", "ar"] = "dsi"
    sp: Annotated[int, Field(ge=1, le=1024)] | None = None
    lookahead: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_number)] = "auto"
    rows: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_number)] = "auto"


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Label = None


class JsonSchema(Strict):
    name: Label = None
    description: Label = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Label = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


def _stops(given: Any) -> list[str]:
    return _texts(
        [given] if isinstance(given, str) else given, _MOST_STOPS, "stop strings", "a text or a list of texts"
    )


#: Texts before which an answer ends.
Stops: TypeAlias = Annotated[list[str], BeforeValidator(_stops)]


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


def _text_alone(given: Any) -> Any:
    if given not in ([], ["text"]):
        raise ValueError("only text is supported: leave it out")
    return given


def _biases(given: Any) -> Any:
    """By token id. A key of JSON is a text."""
    if not isinstance(given, dict) or len(given) > MAX_LISTED or not all(map(_TOKEN_ID.fullmatch, given)):
        raise ValueError(f"give a bias for each of at most {MAX_LISTED} token ids")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in given.values()):
        raise ValueError("give biases in [-100, 100]")
    return {int(token): float(bias) for token, bias in given.items()}


_STRUCTURES = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
)  # fmt: skip


class Request(Strict):
    """What all requests for text share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    stop: Stops = Field(default_factory=list)
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
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    user: Label = None

    @property
    def places(self) -> int:
        """Generations that it takes."""
        return self.n

    @property
    def names_structure(self) -> bool:
        """Whether a field says something about the form of the answer."""
        return any(getattr(self, name) is not None for name in _STRUCTURES)


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


def _tool_choice(given: Any, info: ValidationInfo) -> Any:
    if given in ("auto", "none", "required"):
        return given
    if not isinstance(given, dict):
        raise ValueError("give auto, none, required, or a function's name")
    return NamedTool.model_validate(given, context=info.context)


class ChatRequest(Request):
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    #: How many of the most probable tokens to list at each place.
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: Annotated[list[Tool], FailFast(), Field(max_length=MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool = True
    # For the model's chat template.
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    # OpenAI's, without a meaning here.
    metadata: Label = None
    store: Label = None
    service_tier: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Label = None
    functions: Refused = None
    function_call: Refused = None
    audio: Refused = None
    modalities: Annotated[Any, BeforeValidator(_text_alone)] = None
    prediction: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None
    #: See `hinted`. This is no field of a request: no client can send it.
    _hints: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _tools_are_consistent(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError(f"tools: the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
        choice = self.tool_choice
        if choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools: give some, or leave it out")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no tool {choice.function.name!r} among tools")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set it to true, or leave top_logprobs out")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message: the last message must be the assistant's")
        return self

    def hinted(self, hints: Mapping[str, Any]) -> ChatRequest:
        """Add options for the chat template, and return this request. A template that does not read an option does not get it,
        where one of `chat_template_kwargs` would get 400."""
        self._hints = {name: value for name, value in hints.items() if value is not None}
        return self

    @property
    def hints(self) -> Mapping[str, Any]:
        return self._hints

    @property
    def names_structure(self) -> bool:
        return bool(self.forced_tools) or super().names_structure

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced_tools(self) -> list[Tool]:
        """Those of which the answer must call one. Empty: it need not."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def alternatives(self) -> int:
        """Of the most probable tokens, how many to list at each place."""
        return self.top_logprobs

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def _prompts(given: Any) -> list[str] | list[list[int]]:
    """One prompt or several. Checked here and not by pydantic, which would report on each of a hundred thousand token ids."""
    prompts = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    if len(prompts) > _MOST_PROMPTS:
        raise ValueError(f"give at most {_MOST_PROMPTS} prompts")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    if all(isinstance(prompt, list) and set(map(type, prompt)) <= {int} for prompt in prompts):
        return prompts
    raise ValueError("give a text or a list of token ids, or a list of one of these")


class CompletionRequest(Request):
    #: Texts, or token ids.
    prompt: Annotated[Any, BeforeValidator(_prompts)]
    #: 0: nothing is generated.
    max_tokens: Annotated[int, Field(ge=0)] = 16
    #: How many of the most probable tokens to list at each place. 0: the chosen tokens alone.
    logprobs: Annotated[int, Field(ge=0, le=_MOST_ALTERNATIVES)] | None = None
    #: The answer begins with the prompt, for which `logprobs` counts, too.
    echo: bool = False
    #: vLLM's: how many of the most probable tokens to list at each place of the prompt.
    prompt_logprobs: Annotated[int, Field(ge=0, le=_MOST_ALTERNATIVES)] | None = None
    suffix: Refused = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _plain_completions(self) -> CompletionRequest:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is for whole answers: leave it or stream out")
        if (self.best_of or 1) > self.n:
            raise ValueError("best_of: more than n is not supported: leave it out")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        found: list[str] | list[list[int]] = self.prompt
        return found

    @property
    def places(self) -> int:
        return self.n * len(self.prompts)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        """Of the most probable tokens, how many to list at each place."""
        return self.logprobs or 0

    @property
    def prompt_alternatives(self) -> int | None:
        """The same of the prompt. None: nothing is asked about it."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in asked if count is not None), default=None)

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


AnyRequest: TypeAlias = ChatRequest | CompletionRequest


Kind = TypeVar("Kind", bound=Strict)


def parse(body: bytes, kind: type[Kind], *, max_length: int, allow_unknown_fields: bool = False) -> Kind:
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
        return kind.model_validate(values, context={"allow_unknown_fields": allow_unknown_fields})
    except ValidationError as error:
        raise from_validation(error) from None
