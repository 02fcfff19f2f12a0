"""From token ids to text, one token at a time. Nothing here raises, and text that was given is never taken back.

Each token becomes its bytes, by the rules of the `decoder` in tokenizer.json, and the bytes become text by Python's
incremental UTF-8 decoder, which puts U+FFFD in the place of bytes that are no UTF-8. For valid text the result is that
of the tokenizers library. The library's own stream is not used: it raises on bytes that are no UTF-8.

Decoders that do not work token by token (CTC, patterns) have no such rules: for them the library decodes the last few
tokens again with each new one.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tokenizers import Tokenizer as LibraryTokenizer

from dsi_actors.tokenization.library import is_library_error, parts_of

_REPLACEMENT = "\ufffd"
_MOST_BYTES_OF_A_CHARACTER = 4
#: Tokens that the library decodes again with each new one, at least.
_WINDOW = 16
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")

#: One step from a token to its bytes: the text that is left, and whether the token is the first of the whole text.
#: Bytes are final.
_Step: TypeAlias = Callable[[str, bool], "str | bytes"]


class TokenStream(ABC):
    """Text as tokens come. A character appears once all of its bytes are there."""

    #: The bytes that the last token added to the text: they may end, or begin, inside a character.
    own: bytes = b""

    @abstractmethod
    def add(self, token_id: int) -> str:
        """The text that this token completes: often all of its own, sometimes none."""

    @abstractmethod
    def spell(self, token_id: int) -> bytes:
        """The bytes that this token would add to the text if it came next. Nothing is added."""

    @abstractmethod
    def flush(self) -> str:
        """The rest, now that nothing follows: U+FFFD if a character is incomplete."""


class Detokenizer:
    """The way from tokens to text of one tokenizer. Special tokens have no text."""

    def __init__(self, library: LibraryTokenizer) -> None:
        self._library = library
        self._rules = _read_rules(library)
        self._special = frozenset(
            token.content for token in library.get_added_tokens_decoder().values() if token.special
        )
        self._bytes: dict[int, bytes | None] = {}

    def stream(self, after: Sequence[int] = ()) -> TokenStream:
        """A stream whose text continues that of the tokens `after`. Without them its text stands alone: some tokenizers
        leave out the space that it begins with."""
        stream = _WindowStream(self._library) if self._rules is None else _ByteStream(self, self._rules)
        begun = 0
        for token_id in after:
            begun += 1
            if stream.add(token_id):
                break  # from here on nothing depends on how the text began
        tail, tail_bytes = len(after), 0
        while tail > begun and tail_bytes < _MOST_BYTES_OF_A_CHARACTER:
            tail -= 1
            tail_bytes += len(self.bytes_of(after[tail]) or b"")
        for token_id in after[tail:]:
            stream.add(token_id)
        return stream

    def decode(self, token_ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """All of the text: what a stream gives piece by piece."""
        stream = self.stream(after)
        return "".join([stream.add(token_id) for token_id in token_ids]) + stream.flush()

    def bytes_of(self, token_id: int, *, first: bool = False) -> bytes | None:
        """The bytes of the token in a text; None if it has none there: a special token, or no token at all."""
        if first:
            return self._spell(token_id, first=True)
        if token_id not in self._bytes:
            self._bytes[token_id] = self._spell(token_id, first=False)
        return self._bytes[token_id]

    def _spell(self, token_id: int, *, first: bool) -> bytes | None:
        token = self._library.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None or token in self._special:
            return None
        return token.encode() if self._rules is None else self._rules.spell(token, first)


@dataclass(frozen=True, slots=True)
class _Rules:
    """A decoder that works token by token."""

    steps: tuple[_Step, ...]
    #: Left out at the beginning of the whole text, at most `strip_most` times.
    strip: bytes = b""
    strip_most: int = 0

    def spell(self, token: str, first: bool) -> bytes:
        piece: str | bytes = token
        for step in self.steps:
            if isinstance(piece, bytes):
                break
            piece = step(piece, first)
        return piece if isinstance(piece, bytes) else piece.encode()


class _ByteStream(TokenStream):
    def __init__(self, detokenizer: Detokenizer, rules: _Rules) -> None:
        self._detokenizer = detokenizer
        self._strip, self._strip_left = rules.strip, rules.strip_most
        self._first = True
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        own = self._detokenizer.bytes_of(token_id, first=self._first)
        self.own = b""
        if own is None:
            return ""
        self._first = False
        self.own, self._strip_left = self._stripped(own)
        return self._characters.decode(self.own)

    def spell(self, token_id: int) -> bytes:
        return self._stripped(self._detokenizer.bytes_of(token_id, first=self._first) or b"")[0]

    def _stripped(self, own: bytes) -> tuple[bytes, int]:
        """What is left of a token, and how often more may be left out behind it."""
        left = self._strip_left
        while left and own:
            if own.startswith(self._strip):
                own = own[len(self._strip) :]
                left -= 1
            else:
                left = 0
        return own, left

    def flush(self) -> str:
        return self._characters.decode(b"", final=True)


class _WindowStream(TokenStream):
    def __init__(self, library: LibraryTokenizer) -> None:
        self._library = library
        self._window: list[int] = []
        #: How much of the window's text was given, and how many tokens came since it was complete.
        self._given = 0
        self._incomplete = 0

    def add(self, token_id: int) -> str:
        if len(self._window) >= 2 * _WINDOW and not self._incomplete:
            del self._window[:-_WINDOW]
            self._given = len(self._decode())
        if 0 <= token_id < 1 << 32:
            self._window.append(token_id)
        text = self._decode()
        self._incomplete = self._incomplete + 1 if text.endswith(_REPLACEMENT) else 0
        if 0 < self._incomplete < _MOST_BYTES_OF_A_CHARACTER:
            text = text.rstrip(_REPLACEMENT)
        else:
            self._incomplete = 0
        return self._give(text)

    def spell(self, token_id: int) -> bytes:
        text = self._decode(token_id) if 0 <= token_id < 1 << 32 else ""
        return text[self._given :].encode()

    def flush(self) -> str:
        self._incomplete = 0
        return self._give(self._decode())

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        self.own = piece.encode()
        return piece

    def _decode(self, *more: int) -> str:
        try:
            return self._library.decode([*self._window, *more], skip_special_tokens=True)
        except BaseException as error:
            if not is_library_error(error):
                raise
            return ""


# The decoder of tokenizer.json


def _read_rules(library: LibraryTokenizer) -> _Rules | None:
    """None: the decoder does not work token by token."""
    if library.decoder is None:
        return _Rules((_spaced,))
    steps: list[_Step] = []
    strip, strip_most = b"", 0
    fused = False
    for part in parts_of(library.decoder, "decoders"):
        match part:
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0} if fused and not strip:
                if not content.isascii():
                    return None
                strip, strip_most = content.encode(), start
            case _ if fused:
                return None
            case {"type": "ByteLevel"}:
                steps.append(_byte_level)
                fused = True
            case {"type": "ByteFallback"}:
                steps.append(_byte_fallback)
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                steps.append(_Replace(pattern, content))
            case {"type": "Metaspace", "replacement": str(mark)}:
                steps.append(_Metaspace(mark, keeps_first=part.get("prepend_scheme") == "never"))
            case {"type": "WordPiece", "prefix": str(prefix), "cleanup": bool(cleanup)}:
                steps.append(_WordPiece(prefix, cleanup))
            case _:
                return None
    return _Rules(tuple(steps), strip, strip_most)


def _spaced(token: str, first: bool) -> str:
    """What the library does without a decoder."""
    return token if first else f" {token}"


@dataclass(frozen=True, slots=True)
class _Replace:
    pattern: str
    content: str

    def __call__(self, token: str, first: bool) -> str:
        return token.replace(self.pattern, self.content) if self.pattern else token


@dataclass(frozen=True, slots=True)
class _Metaspace:
    mark: str
    keeps_first: bool

    def __call__(self, token: str, first: bool) -> str:
        return token.replace(self.mark, "" if first and not self.keeps_first else " ")


@dataclass(frozen=True, slots=True)
class _WordPiece:
    prefix: str
    cleanup: bool

    def __call__(self, token: str, first: bool) -> str:
        if not first:
            token = token.removeprefix(self.prefix) if token.startswith(self.prefix) else f" {token}"
        if self.cleanup:
            for before, after in _CLEANUP:
                token = token.replace(before, after)
        return token


_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _byte_fallback(token: str, first: bool) -> str | bytes:
    """A token such as <0xE2> is a byte."""
    found = _BYTE.fullmatch(token)
    return token if found is None else bytes.fromhex(found[1])


def _byte_level(token: str, first: bool) -> bytes:
    """Each character stands for a byte. A token with other characters, as only added ones have, is text."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable characters of Latin-1 stand for themselves, the other bytes for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_characters()
