"""From a request to what is to be generated: tokens of its prompts, sampling, and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dsi_actors.config import Sampling
from dsi_actors.errors import ConfigError, NoTargetError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.serving.completions import Job, seed_or_any
from dsi_actors.serving.errors import ApiError, context_length_exceeded
from dsi_actors.serving.limits import FairThreads
from dsi_actors.serving.parts import PlainReader, Reader, TemplateReader, hermes_template, loaded
from dsi_actors.serving.schemas import AnyRequest, ChatRequest, CompletionRequest
from dsi_actors.serving.structured import structure_of
from dsi_actors.structure import Structure
from dsi_actors.text_stream import sampling_for
from dsi_actors.tokenization.sampling_defaults import DEFAULT_NAMES
from dsi_actors.tokenizer import PromptTooLong, Tokenizer
from dsi_protocol import MAX_TOKENS_PER_MESSAGE

#: OpenAI's, where neither a request nor the model's generation_config.json names one.
_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class _Encoded:
    prompts: list[list[int]]
    reader: Callable[[], Reader] | None = None
    shown: Collection[str] = ()


class Preparation:
    """Makes jobs of requests, in threads."""

    def __init__(
        self, orchestrator: Orchestrator, tokenizer: Tokenizer, threads: FairThreads, *, default_max_tokens: int,
        allow_unknown_fields: bool,
    ) -> None:  # fmt: skip
        self._orchestrator = orchestrator
        self._tokenizer = tokenizer
        self._threads = threads
        self._default_max_tokens = default_max_tokens
        self._allow_unknown_fields = allow_unknown_fields
        #: The bytes of text that a token may stand for. Known from the start: the vocabulary is large.
        self.token_bytes = tokenizer.max_token_bytes

    @property
    def max_length(self) -> int:
        """Positions, prompt and answer together, that a generation may have; 0 while no target server is there."""
        return min(self._orchestrator.max_length, MAX_TOKENS_PER_MESSAGE)

    async def job(self, asked: AnyRequest, client: Hashable, size_bytes: int, correlation: str) -> Job:
        """Raises ApiError and ConfigError."""
        structure = None
        if asked.names_structure:
            structure = await self._threads.run(client, size_bytes, partial(structure_of, asked))
        while not (max_length := self.max_length):
            patience_s = self._orchestrator.config.ready_timeout_s
            if not await self._orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=patience_s):
                raise NoTargetError(f"no target server came within {patience_s:g} s")
        encoding = partial(self._encode, asked, max_length, structure)
        encoded = await self._threads.run(client, size_bytes, encoding)
        longest = max(map(len, encoded.prompts))
        max_tokens = asked.most_tokens
        if max_tokens is None:
            max_tokens = min(self._default_max_tokens, max(1, max_length - longest))
        if longest + max_tokens > max_length:
            raise context_length_exceeded(longest, max_tokens, max_length, chat=isinstance(asked, ChatRequest))
        options, more = asked.dsi, dict[str, Any]()
        if isinstance(asked, CompletionRequest):
            more = {"echoes": asked.echo, "prompt_alternatives": asked.prompt_alternatives, "generates": max_tokens > 0}
            more["tells_prompt"] = asked.prompt_logprobs is not None
        return Job(
            encoded.prompts, self._sampling(asked, max_tokens, structure), asked.stop, asked.n, options.algorithm, options.sp,
            options.lookahead, None if options.rows == "auto" else options.rows, correlation,
            continues=isinstance(asked, CompletionRequest) or asked.continue_final_message,
            reader=encoded.reader, shown=encoded.shown, **more,
        )  # fmt: skip

    def _sampling(self, asked: AnyRequest, max_tokens: int, structure: Structure | None) -> Sampling:
        given = {name: value for name in DEFAULT_NAMES if (value := getattr(asked, name)) is not None}
        given |= {
            name: getattr(asked, name)
            for name in (
                "presence_penalty",
                "frequency_penalty",
                "logit_bias",
                "min_tokens",
                "bad_words",
                "stop_token_ids",
            )
        }
        given |= {"structure": structure, "max_tokens": max(1, max_tokens), "seed": seed_or_any(asked.seed)}
        given |= {"logprobs": asked.wants_logprobs, "top_logprobs": asked.alternatives}
        try:
            return sampling_for(
                self._tokenizer, given, stop=asked.stop, ignore_eos=asked.ignore_eos, temperature=_TEMPERATURE
            )
        except ConfigError as error:
            name = str(error).partition(" ")[0]
            raise ApiError(400, str(error), param=name if name in type(asked).model_fields else None) from None

    # In a thread

    def _encode(self, asked: AnyRequest, max_length: int, structure: Structure | None) -> _Encoded:
        """A text that cannot fit, whatever its tokens, is refused before it is tokenized."""
        most = max_length * self.token_bytes
        try:
            if isinstance(asked, ChatRequest):
                return self._encode_chat(asked, most, structure)
            prompts = []
            for prompt in asked.prompts:
                if isinstance(prompt, str) and (size := len(prompt.encode())) > most:
                    raise PromptTooLong(size, most)
                prompts.append(self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt))
            return _Encoded(prompts)
        except PromptTooLong as error:
            raise ApiError(
                400, f"This model's maximum context length is {max_length} tokens. However, your prompt has {error.size_bytes} "
                f"bytes, and no text of more than {most} bytes fits. Please shorten it.", code="context_length_exceeded",
            ) from None  # fmt: skip

    def _encode_chat(self, asked: ChatRequest, most_bytes: int, structure: Structure | None) -> _Encoded:
        size = sum(len((message.content or "").encode()) for message in asked.messages)
        if size > most_bytes:
            raise PromptTooLong(size, most_bytes)
        options = dict(asked.chat_template_kwargs)
        if asked.reasoning_effort is not None:
            options.setdefault("reasoning_effort", asked.reasoning_effort)
        for name, value in asked.hints.items():
            if self._tokenizer.chat_template_reads(name):
                options.setdefault(name, value)
        if self._allow_unknown_fields:
            options = {name: value for name, value in options.items() if self._tokenizer.chat_template_reads(name)}
        tools = [tool.as_dict() for tool in asked.callable_tools]
        prompt = self._tokenizer.chat(
            [message.as_dict() for message in asked.messages], tools=tools, options=options,
            continued=asked.continue_final_message, answer_begins=asked.add_generation_prompt, most_bytes=most_bytes,
        )  # fmt: skip
        found = self._template(asked, structure)
        if found is None:
            return _Encoded([prompt.token_ids], PlainReader)
        template, names = found
        beginning = prompt.beginning() if structure is None else ""
        return _Encoded([prompt.token_ids], partial(TemplateReader, template, beginning, tools), names)

    def _template(self, asked: ChatRequest, structure: Structure | None) -> tuple[Any, Collection[str]] | None:
        """By what the answer is read, and the special tokens that this must see. None: all of the answer is content."""
        calls = bool(asked.callable_tools)
        if structure is not None:  # the grammar begins with the first token, and its calls are those of Hermes
            return (loaded(hermes_template(calls=True, reasoning=False)), ()) if calls else None
        own = self._tokenizer.response_template
        if own is not None:
            text = repr(own)
            return loaded(own), {name for name in self._tokenizer.special_tokens.values() if name in text}
        reasoning = self._tokenizer.chat_template_names("<think>")
        if not (calls or reasoning):
            return None
        names = {"<tool_call>", "</tool_call>"} if calls else set()
        return loaded(hermes_template(calls=calls, reasoning=reasoning)), names | {"<think>", "</think>"}
