"""Checksums of a text's beginnings, by which a worker knows that it has read the same tokens as the orchestrator means."""

from __future__ import annotations

from dsi_actors.core import GenerationCore
from dsi_protocol import prefix_checksum

#: A checksum is kept every so many committed tokens: none is further away than this.
_SPACING = 512


class PrefixChecksums:
    """Of one generation. Tokens are packed and summed in pieces: 100,000 of them, a long prompt, take 2 ms."""

    def __init__(self, core: GenerationCore) -> None:
        self._core = core
        #: [n] is the checksum of the first n * _SPACING tokens.
        self._kept = [0]
        #: Of committed tokens, the last one that was asked for: its length and checksum. Most often the next is a bit longer.
        self._last = (0, 0)

    def of_first(self, tokens: int) -> int:
        core, kept = self._core, self._kept
        for begin in range(_SPACING * (len(kept) - 1), min(tokens, core.committed) - _SPACING + 1, _SPACING):
            kept.append(prefix_checksum(core.tokens[begin : begin + _SPACING], kept[-1]))
        nearest = min(tokens, core.committed) // _SPACING
        begin, checksum = max((nearest * _SPACING, kept[nearest]), self._last if self._last[0] <= tokens else (0, 0))
        checksum = prefix_checksum(core.tokens[begin:tokens], checksum)
        if tokens <= core.committed:
            self._last = (tokens, checksum)
        return checksum
