"""Text to token ids and back, without torch: tokenizer.json by the tokenizers library, chat templates by Jinja."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.decoders import DecodeStream

from dsi_actors.errors import ConfigError
from dsi_protocol import vocabulary_hash


class Tokenizer:
    """The tokenizer of the model in `directory`. Raises ConfigError if it has none."""

    def __init__(self, directory: Path) -> None:
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{directory} has no tokenizer.json: use a model that has one")
        self._tokenizer = LibraryTokenizer.from_file(str(file))
        self._tokenizer.no_truncation()  # files keep the settings of the last training run
        self._tokenizer.no_padding()
        self._config = _read_json(directory / "tokenizer_config.json")
        self._template = _chat_template_source(directory, self._config)
        self.stop_token_ids = self._find_stop_tokens(_read_json(directory / "generation_config.json"))

    def vocabulary_hash(self) -> str:
        return vocabulary_hash(self._tokenizer.get_vocab(with_added_tokens=True))

    @cached_property
    def max_token_bytes(self) -> int:
        """No token stands for more bytes of text than this."""
        return max(len(token.encode("utf-8", "replace")) for token in self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, with the special tokens that the model puts around it."""
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # For a batch the library lets go of the interpreter's lock; for one text it holds up all other threads.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation ({"role": ..., "content": ...}) by the model's own chat template, up to where
        the answer begins. Raises ConfigError if the model has no template."""
        if self._template is None:
            raise ConfigError("this model has no chat template: give it plain text")
        special = {
            key: _special_text(self._config.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        given = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            text = _template_environment().from_string(self._template).render(**given, **special)
        except (jinja2.TemplateError, TypeError) as error:
            raise ConfigError(f"the model's chat template failed ({error}): give it plain text") from None
        return self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream(self) -> TokenStream:
        return TokenStream(self._tokenizer)

    def _find_stop_tokens(self, generation_config: dict[str, Any]) -> tuple[int, ...]:
        eos = generation_config.get("eos_token_id")
        found = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        token = self._tokenizer.token_to_id(_special_text(self._config.get("eos_token")))
        if token is not None:
            found.add(token)
        return tuple(sorted(found))


class TokenStream:
    """Text as tokens come: a character appears once all of its bytes are there."""

    def __init__(self, tokenizer: LibraryTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)

    def add(self, token_id: int) -> str:
        return self._decode.step(self._tokenizer, token_id) or ""


def _chat_template_source(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _template_environment() -> jinja2.Environment:
    """Templates come with models from anywhere: they run in Jinja's sandbox, with what transformers gives them."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: object, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the model's own words for training: here it is its content."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _special_text(token: object) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
