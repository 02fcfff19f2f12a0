"""The two checks that both sides of the protocol compute, so that they can name a prefix and a vocabulary."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence


def prefix_checksum(tokens: Sequence[int], previous: int = 0) -> int:
    """CRC-32 (zlib's) of the tokens as little-endian u32, continued from `previous`.

    A request names the prefix it builds on by length and by this: a worker that missed a message, or got them in
    another order, then asks for the prefix instead of answering for another text. CRC-32 finds every difference that
    lies within one token, and any other with chance 1 - 2^-32.
    """
    return zlib.crc32(struct.pack(f"<{len(tokens)}I", *tokens), previous)


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 (hex) over the tokens in the order of their ids: each as id (u32), length in bytes (u32), UTF-8 bytes."""
    digest = hashlib.sha256()
    for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        text = token.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<II", token_id, len(text)) + text)
    return digest.hexdigest()
