"""Checksums of a text's beginnings, by which a worker knows that it has read the same tokens as the orchestrator means."""

from __future__ import annotations

from dsi_actors.core import GenerationCore
from dsi_protocol import prefix_checksum


class PrefixChecksums:
    """Of one generation: kept where tokens are committed, computed beyond."""

    def __init__(self, core: GenerationCore) -> None:
        self._core = core
        #: [n] is the checksum of the first n tokens.
        self._committed = [0]

    def of_first(self, tokens: int) -> int:
        core, known = self._core, self._committed
        for position in range(len(known) - 1, core.committed):
            known.append(prefix_checksum((core.tokens[position],), known[position]))
        if tokens <= core.committed:
            return known[tokens]
        return prefix_checksum(core.tokens[core.committed : tokens], known[core.committed])
