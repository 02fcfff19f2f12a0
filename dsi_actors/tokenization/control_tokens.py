"""Control tokens in a chat are the template's alone: in what people write they are plain text.

A message may say "<|im_end|>", which would end the user's turn if it became that token. What a message says and what the
template says can be told apart only before the template is rendered. So where a message names a control token:

1. each such name in a message is replaced by a mark, which templates leave as it is;
2. the template is rendered; the control tokens that are named now are the template's own. They get other names, which
   contain a secret number;
3. the marks become the names again;
4. a copy of the tokenizer encodes the text. The copy knows control tokens by their other names alone.

The text is encoded as a whole, so everything else gets the tokens that it always gets.

Control tokens are the special tokens, and tokens in brackets that the template itself writes: some tokenizers do not call
their role markers special (DeepSeek's <｜User｜>). In an assistant's message only special tokens are masked: the rest,
such as <think>, was the model's own output.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from dsi_actors.tokenization.library import encode, library_errors, pattern_of

_SECRET_DIGITS = 24
_CODE_DIGITS = 6
#: A noncharacter: no vocabulary has it.
_UNKNOWN = "\ufdd0"


class ControlTokens:
    """The control tokens of a tokenizer whose chats this template writes. Threads may share it."""

    def __init__(self, library: LibraryTokenizer, template: str) -> None:
        self._library = library
        added = library.get_added_tokens_decoder()
        #: By name: "<|im_end|>" and so on.
        self._special = {token.content: number for number, token in added.items() if token.special}
        self._all = self._special | {
            token.content: number
            for number, token in added.items()
            if not token.special and _is_bracketed(token.content) and token.content in template
        }
        self._others = [(number, token) for number, token in added.items() if token.content not in self._all]
        self._special_names, self._all_names = pattern_of(self._special), pattern_of(self._all)
        #: A mark, or another name, is a secret number and the token's code: digits, which no filter of a template changes.
        self._mark, self._secret = (f"{secrets.randbelow(10**_SECRET_DIGITS):0{_SECRET_DIGITS}d}" for _ in range(2))
        self._code = {name: f"{place:0{_CODE_DIGITS}d}" for place, name in enumerate(self._all)}

    def mask(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """The messages with marks for control tokens. None: they name none, and need no care."""
        masked = [self._masked(dict(message), message.get("role") == "assistant") for message in messages]
        return None if masked == list(messages) else masked

    def mask_value(self, value: Any) -> Any:
        """The same for what else a user gives, such as the descriptions of tools."""
        return self._masked(value, False)

    def encode(self, rendered: str) -> list[int]:
        """The tokens of what the template made of masked messages. Raises ConfigError."""
        text = self._all_names.sub(lambda found: self._secret + self._code[found[0]], rendered)
        name_of = {code: name for name, code in self._code.items()}
        text = re.sub(f"{self._mark}(\\d{{{_CODE_DIGITS}}})", lambda found: name_of[found[1]], text)
        copy, number_of = self._copy
        found: list[int] = []
        for token in encode(copy, text, add_special_tokens=False):
            if token in number_of:
                found.append(number_of[token])
            elif token in self._words:
                found += self._spelled(self._words[token])
            else:
                found.append(token)
        return found

    def _masked(self, value: Any, assistant: bool) -> Any:
        """All texts in a value of JSON, the keys of its objects among them."""
        if isinstance(value, str):
            names = self._special_names if assistant else self._all_names
            return names.sub(lambda found: self._mark + self._code[found[0]], value)
        if isinstance(value, Mapping):
            return {self._masked(key, assistant): self._masked(inner, assistant) for key, inner in value.items()}
        return [self._masked(inner, assistant) for inner in value] if isinstance(value, list | tuple) else value

    @cached_property
    def _copy(self) -> tuple[LibraryTokenizer, dict[int, int]]:
        """The tokenizer with other names for control tokens, and the number that each of its added tokens really has."""
        copy = LibraryTokenizer(self._library.model)
        copy.normalizer, copy.pre_tokenizer = self._library.normalizer, self._library.pre_tokenizer
        flags = {token.content: token for token in self._library.get_added_tokens_decoder().values()}
        secret = {self._secret + code: name for name, code in self._code.items()}
        copy.add_special_tokens([
            AddedToken(other, lstrip=flags[name].lstrip, rstrip=flags[name].rstrip, normalized=False, special=True)
            for other, name in secret.items()
        ])  # fmt: skip
        copy.add_tokens([token for _, token in self._others])
        number_of = {copy.token_to_id(other): self._all[name] for other, name in secret.items()}
        number_of |= {copy.token_to_id(token.content): number for number, token in self._others}
        return copy, {copied: number for copied, number in number_of.items() if copied is not None}

    @cached_property
    def _words(self) -> dict[int, str]:
        """Control tokens that the model's vocabulary has as words, so that plain text may become them (SentencePiece's
        </s>). The unknown token is none of them: any text may contain it."""
        model = self._library.model
        try:
            unknown = {token.id for token in model.tokenize(_UNKNOWN)}
        except Exception:  # the model has no unknown token
            unknown = set()
        return {n: name for name, n in self._all.items() if model.token_to_id(name) == n and n not in unknown}

    def _spelled(self, name: str) -> list[int]:
        """The tokens of such a word in two pieces."""
        with library_errors(f"the tokenizer cannot encode {name} as plain text"):
            return [token.id for piece in (name[:1], name[1:]) for token in self._library.model.tokenize(piece)]


def _is_bracketed(name: str) -> bool:
    return len(name) > 2 and name[0] in "<[{|" and name[-1] in ">]}|"
