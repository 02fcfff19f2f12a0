"""How much text a token can stand for: so that a text that is too long can be refused before it is tokenized."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import BPE

from dsi_actors.tokenization.library import parts_of

#: Nothing limits it.
UNBOUNDED = sys.maxsize
#: How much shorter Unicode's normal forms make a text, at most: U+212A (3 bytes) becomes K, a bold A (4 bytes) A.
_COMPOSITION = 4
_MOST_BYTES_OF_A_CHARACTER = 4


def max_token_bytes(library: LibraryTokenizer, spelled: Iterable[bytes]) -> int:
    """The most bytes of text that become one token. `spelled`: the bytes of each token.

    UNBOUNDED where text can vanish, or where one token stands for a word of any length: tokenizers that drop spaces or
    know an unknown word, such as WordPiece.
    """
    if not _keeps_text(library):
        return UNBOUNDED
    longest = max((len(token) for token in spelled), default=0)
    if not _is_byte_level(library):  # what the decoder makes of a token may be shorter than what became the token
        longest = max(longest, *(len(token.encode()) for token in library.get_vocab(with_added_tokens=True)))
    shrinks = any(part["type"] in ("NFC", "NFD", "NFKC", "NFKD") for part in _normalizers(library))
    return max(longest, _MOST_BYTES_OF_A_CHARACTER) * (_COMPOSITION if shrinks else 1)


def _keeps_text(library: LibraryTokenizer) -> bool:
    added = library.get_added_tokens_decoder().values()
    return (
        not any(token.lstrip or token.rstrip for token in added)  # such a token swallows any number of spaces
        and all(_normalizer_keeps(part) for part in _normalizers(library))
        and all(_pre_tokenizer_keeps(part) for part in parts_of(library.pre_tokenizer, "pretokenizers"))
        and _model_keeps(library)
    )


def _normalizers(library: LibraryTokenizer) -> list[dict[str, Any]]:
    return parts_of(library.normalizer, "normalizers")


def _normalizer_keeps(part: dict[str, Any]) -> bool:
    match part:
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" | "Prepend" | "ByteLevel"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return len(content.encode()) >= len(pattern.encode())
    return False


def _pre_tokenizer_keeps(part: dict[str, Any]) -> bool:
    match part:
        case {"type": "ByteLevel" | "Metaspace" | "Digits" | "UnicodeScripts"}:
            return True
        case {"type": "Split" | "Punctuation", "behavior": str(behavior)}:
            return behavior != "Removed"
    return False


def _model_keeps(library: LibraryTokenizer) -> bool:
    """Whether each character that has no token of its own becomes one or several. Byte-level vocabularies may lack rare
    bytes, such as SmolLM2's some control characters: what vanishes there is no text that a bound is for."""
    model = library.model
    if not isinstance(model, BPE):
        return False
    if _is_byte_level(library):
        return True
    if model.byte_fallback and all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk


def _is_byte_level(library: LibraryTokenizer) -> bool:
    parts = [*_normalizers(library), *parts_of(library.pre_tokenizer, "pretokenizers")]
    return any(part["type"] == "ByteLevel" for part in parts)
