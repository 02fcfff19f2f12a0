"""Text to token ids and back, without torch: tokenizer.json by the tokenizers library, chat templates by Jinja."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from dsi_actors.errors import ConfigError
from dsi_actors.tokenization.bounds import max_token_bytes
from dsi_actors.tokenization.chat_template import ChatTemplate
from dsi_actors.tokenization.control_tokens import ControlTokens
from dsi_actors.tokenization.detokenizer import Detokenizer, TokenStream
from dsi_actors.tokenization.hermes import with_tools
from dsi_actors.tokenization.library import encode, library_errors, pattern_of
from dsi_actors.tokenization.sampling_defaults import sampling_defaults
from dsi_actors.tokenization.settings import Settings, read_text
from dsi_protocol import vocabulary_hash

__all__ = ["ChatPrompt", "PromptTooLong", "TokenStream", "Tokenizer"]


class PromptTooLong(ConfigError):
    """A text that cannot fit, whatever its tokens."""

    def __init__(self, size_bytes: int, most_bytes: int) -> None:
        super().__init__(f"the prompt has {size_bytes} bytes: no text of more than {most_bytes} bytes fits")
        self.size_bytes = size_bytes


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as a model reads it."""

    token_ids: list[int]
    #: Gives what the template itself wrote of the answer: its role, and <think> perhaps. It renders the chat once more.
    beginning: Callable[[], str]


class Tokenizer:
    """The tokenizer of the model in `directory`. Raises ConfigError if it has none, or files that cannot be used.

    Threads may share it: no call changes what another call sees. `encode` and `encode_chat` take about a second for
    1 MB of text. They release Python's global lock for most of that time, so call them in a worker thread where an event
    loop must go on. (A chat template that computes a lot holds the lock, like all Python code; chat_template.py bounds it.)
    """

    def __init__(self, directory: Path) -> None:
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{directory} has no tokenizer.json: use a model that has one")
        with library_errors(f"{file} cannot be used: download the model again"):
            self._library = LibraryTokenizer.from_file(str(file))
            self._library.no_truncation()  # files keep the settings of the last training run
            self._library.no_padding()
            self._detokenizer = Detokenizer(self._library)
        config = Settings(directory / "tokenizer_config.json")
        self._template = _chat_template(directory, config)
        self._named_tokens = {key: config.token(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        generation, model = (Settings(directory / name) for name in ("generation_config.json", "config.json"))
        self.stop_token_ids = self._find_stop_tokens(generation, model)
        #: How the model writes reasoning and calls of tools, as transformers declares it. None: it does not say.
        self.response_template: Mapping[str, Any] | None = config.values.get("response_template")
        #: Sampling parameters by name, as generation_config.json has them for those that a user does not give.
        self.sampling_defaults = sampling_defaults(generation)
        #: Tokens that have no text, by number: "<|im_end|>" and so on.
        self.special_tokens: Mapping[int, str] = {
            number: token.content for number, token in self._library.get_added_tokens_decoder().items() if token.special
        }
        self._special_names = pattern_of(self.special_tokens.values())

    def vocabulary_hash(self) -> str:
        return vocabulary_hash(self._library.get_vocab(with_added_tokens=True))

    @cached_property
    def max_token_bytes(self) -> int:
        """The most bytes of text that can become one token: a text of more than n times as many bytes has more than n
        tokens. sys.maxsize where there is no such bound (see tokenization/bounds.py)."""
        numbers = self._library.get_vocab(with_added_tokens=True).values()
        return max_token_bytes(self._library, (self._detokenizer.bytes_of(number) or b"" for number in numbers))

    # Text to tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, with the special tokens that the model puts around it. The names of special tokens in
        the text become these tokens. Raises ConfigError for text that is no valid Unicode."""
        return encode(self._library, text, add_special_tokens=True)

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """The tokens of a word at the beginning of a text, and behind a space if that is another first token."""
        first, spaced = (
            tuple(encode(self._library, text, add_special_tokens=False)) for text in (word, f" {word.lstrip()}")
        )
        found = [first]
        if spaced[:1] != first[:1] and len(spaced) == len(first):
            found.append(spaced)
        return [ids for ids in found if ids]

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation ({"role": ..., "content": ...}) by the model's own chat template, up to where
        the answer begins. The names of special tokens in a message are plain text (tokenization/control_tokens.py).
        Raises ConfigError if the model has no template, or one that fails."""
        return self.chat(messages).token_ids

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None, continued: bool = False, answer_begins: bool = True,
        most_bytes: int | None = None,
    ) -> ChatPrompt:  # fmt: skip
        """A conversation with all that a chat template may read: tools, and `options` by name. A template that knows nothing of
        tools has them written into messages (tokenization/hermes.py). `continued`: the answer continues the last message.
        `answer_begins`: the template writes the beginning of an answer, such as its role.

        Raises ConfigError, and PromptTooLong for a text of more than `most_bytes`."""
        template, names = self._template, self._named_tokens
        if template is None:
            raise ConfigError("this model has no chat template: give it plain text")
        if "tools" not in template.reads and (tools or any(message.get("role") == "tool" for message in messages)):
            messages, tools = with_tools(messages, tools), ()
        control = self._control_tokens
        masked, masked_rest = control.mask(messages), control.mask_value([tools, options or {}])
        is_masked = masked is not None or masked_rest != [list(tools), options or {}]
        tools, options = masked_rest

        def rendered(messages: Sequence[Mapping[str, Any]], answer_begins: bool) -> str:
            return template.render(messages, names, tools=tools, options=options, answer_begins=answer_begins)

        messages = messages if masked is None else masked
        text = rendered(messages, answer_begins and not continued)
        if continued:
            text = _cut_behind(text, messages[-1]["content"])
        if most_bytes is not None and (size := len(text.encode(errors="replace"))) > most_bytes:
            raise PromptTooLong(size, most_bytes)
        ids = control.encode(text) if is_masked else encode(self._library, text, add_special_tokens=False)

        def beginning() -> str:
            earlier = messages[:-1] if continued else messages
            before = rendered(earlier, False) if earlier else ""
            return text.removeprefix(before) if text.startswith(before) else ""

        return ChatPrompt(ids, beginning)

    def chat_template_names(self, word: str) -> bool:
        """Whether the chat template has this word in it."""
        return self._template is not None and word in self._template.source

    def chat_template_reads(self, name: str) -> bool:
        """Whether the chat template reads an option of this name."""
        return self._template is not None and name in self._template.reads

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        assert self._template is not None
        return ControlTokens(self._library, self._template.source)

    # Tokens to text

    def decode(self, token_ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of the tokens, as `stream` gives it piece by piece."""
        return self._detokenizer.decode(token_ids, after)

    def stream(self, *, after: Sequence[int] = ()) -> TokenStream:
        """Text as tokens come. With `after` it continues the text of these tokens, so that both together are the text of
        all; without, it stands alone: then some tokenizers leave out a space at its beginning."""
        return self._detokenizer.stream(after)

    def stop_tokens_of(self, stops: Iterable[str]) -> tuple[int, ...]:
        """Those stop strings that are special tokens."""
        wanted = set(stops)
        return tuple(number for number, name in self.special_tokens.items() if name in wanted)

    def names_special_token(self, text: str) -> bool:
        return self._special_names.search(text) is not None

    def _find_stop_tokens(self, generation: Settings, model: Settings) -> tuple[int, ...]:
        """What generation_config.json names, or config.json where that names none; and the tokenizer's own end of text."""
        inner = model.within("text_config")  # of a model that takes more than text
        places = (generation, model, inner)
        found = set(next((ids for place in places if (ids := place.token_ids("eos_token_id"))), ()))
        token = self._library.token_to_id(self._named_tokens["eos_token"])
        if token is not None:
            found.add(token)
        return tuple(sorted(found))


def _cut_behind(text: str, content: str) -> str:
    """The text up to the end of its last message, which says `content`, as transformers cuts it."""
    said = content.strip()
    begun = text.rfind(said)
    if not said or begun < 0:
        raise ConfigError("the model's chat template does not write the last message as it is: it cannot be continued")
    whole = content.lstrip()
    return text[: begun + len(whole if text.startswith(whole, begun) else said)]


def _chat_template(directory: Path, config: Settings) -> ChatTemplate | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(read_text(file))
    processor = Settings(directory / "chat_template.json")
    if processor.values.get("chat_template") is not None:  # as processors of several kinds of input are saved
        config = processor
    source = config.values.get("chat_template")
    if isinstance(source, list):  # several, by name
        if not all(isinstance(entry, dict) for entry in source):
            raise config.wrong("chat_template", "a text, or a list of templates with names")
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise config.wrong("chat_template", "a text, or a list of templates with names")
    return ChatTemplate(source)
