"""Prompt lookup: guess that what followed the last few tokens earlier in the text follows them again (Saxena, 2023).

The search is the library's own (transformers' PromptLookupCandidateGenerator). It needs no model and no vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dsi_protocol import OptionValue
from dsi_workers.engines.base import Answer, Engine, EngineError, EngineInfo, Interrupt
from dsi_workers.session import Session

#: More than any generation: the generator's own default of 20 gives nothing for longer texts.
_NO_MAX_LENGTH = 10**9


class NgramEngine(Engine):
    """Drafts only. `max_ngram` is the longest run of tokens looked for, `block` the most it guesses at once."""

    def __init__(self, options: Mapping[str, OptionValue]) -> None:
        try:
            import torch
            from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
        except ImportError as error:
            raise EngineError(
                f"the ngram engine needs transformers: pip install 'dsi-actors[torch]' ({error})"
            ) from None
        self._torch = torch
        torch.set_num_threads(1)
        self._lookup = PromptLookupCandidateGenerator(
            num_output_tokens=int(options.get("block", 8)),
            max_matching_ngram_size=int(options.get("max_ngram", 3)),
            max_length=_NO_MAX_LENGTH,
        )
        begun = time.perf_counter()
        self._search(list(range(512)))
        latency_us = max(1, round((time.perf_counter() - begun) * 1e6))
        self.info = EngineInfo(vocabulary="", vocabulary_size=0, max_length=1 << 20, window=0, latency_us=latency_us)

    def verify(self, session: Session, start: int, interrupt: Interrupt) -> Answer:
        raise EngineError("the ngram engine only drafts: it has no tokens of its own to verify with")

    def draft(self, session: Session, count: int, interrupt: Interrupt) -> list[int]:
        interrupt.check()
        self.forwards += 1
        return self._search(session.tokens)[:count]

    def _search(self, tokens: list[int]) -> list[int]:
        ids: Any = self._torch.tensor([tokens])
        candidates, _ = self._lookup.get_candidates(ids)
        found: list[int] = candidates[0, len(tokens) :].tolist()
        return found
