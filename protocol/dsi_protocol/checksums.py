"""Computes the two checksums of the protocol: of a prefix of tokens, and of a vocabulary. SPEC.md section 1.2."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence


def prefix_checksum(tokens: Sequence[int], previous: int = 0) -> int:
    """Returns the CRC-32 (as in zlib) of the tokens as little-endian u32, continued from the checksum `previous`.

    A request names the prefix that it builds on by its length and this checksum. A worker that missed a message, or got
    messages in another order, then asks for the prefix instead of answering about another text. CRC-32 finds every
    difference within one token, and any other difference with probability 1 - 2^-32.
    """
    return zlib.crc32(struct.pack(f"<{len(tokens)}I", *tokens), previous)


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """Returns the SHA-256, in lower-case hex, over all tokens in the order of their ids.

    `vocabulary` maps each token's text to its id. A token is hashed as its id (u32, little-endian), the length of its text
    in bytes (u32, little-endian), and its text in UTF-8.
    """
    digest = hashlib.sha256()
    for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        text = token.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<II", token_id, len(text)) + text)
    return digest.hexdigest()
