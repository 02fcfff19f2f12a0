"""Text in, text out, on top of token ids: what is asked in text, and the text of the answer as it comes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypedDict

from dsi_actors.config import Algorithm, Sampling
from dsi_actors.errors import ConfigError, OrchestratorClosed
from dsi_actors.results import Answer, GenerationReport
from dsi_actors.stream import GenerationStream
from dsi_actors.structure import Structure
from dsi_actors.text import TextAssembler
from dsi_actors.tokenizer import Tokenizer

#: A text, or the messages of a conversation: {"role": ..., "content": ...}.
Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]


class TextOptions(TypedDict, total=False):
    """What may be given beside a prompt.

    First the fields of `Sampling`. Where one is not given, the model's generation_config.json decides, else the default of
    `Sampling`. Two of them differ: `bad_words` may be texts, and `stop_token_ids` come beside the model's own.

    * `stop`: the text ends before the first of these texts.
    * `raw`: the answer continues the prompt's text. Otherwise a prompt that is a text is a user's message, if the model has
      a chat template.
    * `ignore_eos`: the model's own stop tokens do not end the answer.
    * `chat_template_kwargs`: what the model's chat template reads beside messages, by name, such as enable_thinking.

    The others are those of `Orchestrator.generate`.
    """

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    bad_words: Sequence[str | Sequence[int]]
    structure: Structure | None
    seed: int
    min_tokens: int
    stop_token_ids: Sequence[int]
    logprobs: bool
    top_logprobs: int

    stop: str | Sequence[str]
    raw: bool
    ignore_eos: bool
    chat_template_kwargs: Mapping[str, Any]

    algorithm: Algorithm
    sp: int | None
    lookahead: int | Literal["auto"]
    rows: int | None
    correlation: str | None


def sampling_for(
    tokenizer: Tokenizer, given: Mapping[str, Any], *, stop: Sequence[str] = (), ignore_eos: bool = False,
    temperature: float = 0.0,
) -> Sampling:  # fmt: skip
    """The parameters that are `given`, by their names in `Sampling`, and the model's own for the others.

    The answer ends at the model's stop tokens, unless `ignore_eos`, and at special tokens that `stop` names. `bad_words` may be
    texts. `temperature`: where neither `given` nor the model has one. Raises ConfigError."""
    own_stops = () if ignore_eos else tokenizer.stop_token_ids
    stops = (*given.get("stop_token_ids", ()), *own_stops, *tokenizer.stop_tokens_of(stop))
    words = [
        spelled
        for word in given.get("bad_words", ())
        for spelled in (tokenizer.spellings(word) if isinstance(word, str) else [word])
    ]
    named = {**given, "stop_token_ids": tuple(sorted(set(stops))), "bad_words": words}
    return Sampling(**{"temperature": temperature, **tokenizer.sampling_defaults, **named})


@dataclass(frozen=True, slots=True)
class PreparedText:
    """A request of text as a generation takes it."""

    prompt_ids: list[int]
    sampling: Sampling
    #: The tokens whose text the answer continues; empty if the answer stands alone, as in a chat.
    after: Sequence[int]


@dataclass(frozen=True, slots=True)
class TextRequest:
    """What is asked in text. Raises ConfigError for what no model can be asked."""

    prompt: Prompt
    #: Fields of `Sampling` by name: those that are given.
    given: Mapping[str, Any] = field(default_factory=dict)
    stop: Sequence[str] = ()
    raw: bool = False
    ignore_eos: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) and not _are_messages(self.prompt):
            raise ConfigError(
                "the prompt must be a text, or a list of messages such as {'role': 'user', 'content': TEXT}"
            )
        if not self.prompt:
            raise ConfigError("the prompt is empty: give some text")
        if self.raw and (self.chat_template_kwargs or not isinstance(self.prompt, str)):
            raise ConfigError("raw is for a prompt that is a text, without chat_template_kwargs: leave it out")
        if not isinstance(self.stop, Sequence) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ConfigError("stop must be a text, or a list of texts, none of them empty")
        given = dict(self.given)
        words = given.pop("bad_words", ())
        if isinstance(words, str) or not isinstance(words, Iterable) or "" in words:
            raise ConfigError("bad_words must be a list of texts, none of them empty, or of sequences of token ids")
        if given.get("structure") is not None:  # the model's own stop tokens end it
            given.setdefault("stop_token_ids", (0,))
        Sampling(**given)

    def prepared(self, tokenizer: Tokenizer) -> PreparedText:
        """For the model of this tokenizer. Long texts take time: call it in a thread. Raises ConfigError."""
        sampling = sampling_for(tokenizer, self.given, stop=self.stop, ignore_eos=self.ignore_eos)
        prompt, options = self.prompt, self.chat_template_kwargs
        if not isinstance(prompt, str):
            return PreparedText(tokenizer.chat(prompt, options=options).token_ids, sampling, ())
        if not self.raw and (tokenizer.has_chat_template or options):
            messages = [{"role": "user", "content": prompt}]
            return PreparedText(tokenizer.chat(messages, options=options).token_ids, sampling, ())
        prompt_ids = tokenizer.encode(prompt)
        return PreparedText(prompt_ids, sampling, prompt_ids)


def _are_messages(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in prompt
    )


def read_options(prompt: Prompt, options: TextOptions) -> tuple[TextRequest, dict[str, Any]]:
    """What is asked, and how it is to be generated: the options of `Orchestrator.generate`. Raises ConfigError."""
    given: dict[str, Any] = dict(options)
    for name in given:
        if name not in TextOptions.__annotations__:
            raise ConfigError(f"there is no option {name}: choose among {', '.join(TextOptions.__annotations__)}")
    how = {name: given.pop(name) for name in _HOW if name in given}
    asked = {name: given.pop(name) for name in _ASKED if name in given}
    if isinstance(stop := asked.get("stop", ()), str):
        asked["stop"] = (stop,)
    return TextRequest(prompt, given, **asked), how


#: Options that are about text, and those of `Orchestrator.generate`. The others are fields of Sampling.
_ASKED = ("stop", "raw", "ignore_eos", "chat_template_kwargs")
_HOW = ("algorithm", "sp", "lookahead", "rows", "correlation")


class TextStream:
    """Async iterator over the text of an answer, piece by piece. Characters are whole, no piece is empty, and nothing from a
    stop string on is given. Work starts with the first iteration and ends with the last reference."""

    def __init__(self, begin: Callable[[], Awaitable[tuple[GenerationStream, TextAssembler]]]) -> None:
        self._begin: Callable[[], Awaitable[tuple[GenerationStream, TextAssembler]]] | None = begin
        self._stream: GenerationStream | None = None
        self._text: TextAssembler | None = None
        self._over = False
        #: The tokens so far, up to and including the one that completed a stop string, and their log probabilities if asked for.
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        if self._begin is not None:
            begin, self._begin = self._begin, None
            self._stream, self._text = await begin()
        while self._stream is not None and self._text is not None and not self._over:
            try:
                tokens = await anext(self._stream)
            except StopAsyncIteration:
                self._over = True
                text = self._text.rest().text
            else:
                piece = self._text.add(tokens)
                text = piece.text
                self.token_ids += [token.token_id for token in piece.tokens]
                self.logprobs += [token.logprob for token in piece.tokens if token.logprob is not None]
                if self._text.stopped:
                    self._over = True
                    self._stream.cancel()
            if text:
                return text
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Nobody wants the rest: cancel all work for it. Returns at once."""
        self._begin, self._over = None, True
        if self._stream is not None:
            self._stream.cancel()

    async def aclose(self) -> None:
        """Cancel, and wait until no work is left."""
        self._begin, self._over = None, True
        if self._stream is not None:
            await self._stream.aclose()

    async def report(self) -> GenerationReport:
        """What the answer cost: known shortly after its last piece."""
        if self._stream is None:
            raise OrchestratorClosed("the generation did not run")
        return await self._stream.report()

    async def answer(self) -> Answer:
        """The rest of the text, as a whole."""
        async with self:
            text = "".join([piece async for piece in self])
            report = await self.report()
        stopped = self._text is not None and self._text.stopped
        reason = "length" if report.finish_reason == "length" and not stopped else "stop"
        return Answer(text, self.token_ids, self.logprobs, reason, report)

    async def __aenter__(self) -> TextStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
