"""Drafts several tokens without Python between them: kernels choose each token and make it the next input.

Python only queues the forward passes of the next tokens, while the device computes the first. So a drafted token takes as long as
its kernels. The tokens are read once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum

import torch
import triton

from dsi_protocol import SamplingParameters
from dsi_protocol.gumbel import mix
from dsi_workers.decoding.gpu.choice_kernels import BLOCK_TOKENS, choose_in_blocks, take_choices
from dsi_workers.decoding.gpu.recording import Part, Recording
from dsi_workers.decoding.packed import PackedBatch

#: The most tokens that are drafted at once: as many as the device keeps until Python reads them.
MOST_DRAFTS = 16


class _Kind(Enum):
    """How tokens are chosen: each kind is recorded by itself."""

    GREEDY = "greedy"
    SAMPLED = "sampled"
    #: By top_k, top_p or min_p. The vocabulary is sorted for that, so only one row can be drafted so.
    FILTERED = "filtered"


def can_draft(parameters: Sequence[SamplingParameters]) -> bool:
    """Whether tokens of generations with these parameters can be chosen here, in one forward pass."""
    kind = _kind_of(parameters)
    return not any(each.changes_logits for each in parameters) and (kind is not _Kind.FILTERED or len(parameters) == 1)


def _kind_of(parameters: Sequence[SamplingParameters]) -> _Kind:
    sampled = [each for each in parameters if not each.greedy]
    if any(each.top_k or each.top_p < 1 or each.min_p for each in sampled):
        return _Kind.FILTERED
    return _Kind.SAMPLED if sampled else _Kind.GREEDY


class Drafts:
    """Drafts with one recorded forward pass."""

    def __init__(self, recording: Recording, capture: Callable[[Part], Part]) -> None:
        self._recording, self._capture = recording, capture
        rows, self._vocabulary = recording.logits.shape
        device = recording.logits.device
        self._blocks = triton.cdiv(self._vocabulary, BLOCK_TOKENS)
        self._best = torch.zeros(rows, self._blocks, device=device)
        self._best_tokens = torch.zeros(rows, self._blocks, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(MOST_DRAFTS, rows, dtype=torch.int32, device=device)
        #: How many tokens were drafted, and how many of the vocabulary may be chosen.
        self._steps, self._words = torch.zeros(2, 1, dtype=torch.int32, device=device)
        self._keys = torch.zeros(rows, dtype=torch.int64, device=device)
        #: Of each row: temperature and threshold. Then top_p, top_k and min_p of the first row.
        self._numbers = torch.ones(2 * rows + 3, device=device)
        self._temperatures, self._thresholds, self._filters = self._numbers.split((rows, rows, 3))
        self._choosing: dict[_Kind, Part] = {}

    def draft(
        self, packed: PackedBatch, parameters: Sequence[SamplingParameters], *, count: int, words: int,
        between: Callable[[], None],
    ) -> list[list[int]]:  # fmt: skip
        """Continue each row of `packed` by `count` tokens below `words`. Each row is of a generation of its own, with its
        parameters, for which `can_draft` must be true."""
        assert count <= MOST_DRAFTS
        kind = _kind_of(parameters)
        choose = self._choosing.get(kind)
        if choose is None:
            choose = self._choosing[kind] = self._recorded(kind)
        self._recording.set_inputs(packed)
        self._set(parameters, words)
        for _ in range(count):
            self._recording.run(between)
            choose()
        drafted: list[list[int]] = self._tokens[:count, : len(parameters)].T.tolist()
        return drafted

    def _recorded(self, kind: _Kind) -> Part:
        def choose() -> None:
            self._choose(kind)

        self._recording.disable()
        for _ in range(2):  # compiles the kernels
            choose()
        return self._capture(choose)

    def _set(self, parameters: Sequence[SamplingParameters], words: int) -> None:
        """Copy the parameters of the rows to the device, and begin at the first token."""
        rows, first = len(self._keys), parameters[0]
        temperatures = [1.0 if each.greedy else each.temperature for each in parameters]
        filters = [
            first.top_p,
            float(first.top_k or self._vocabulary),
            math.log(first.min_p) if first.min_p else -math.inf,
        ]
        padding = [1.0] * (2 * rows - len(temperatures))
        self._numbers.copy_(torch.tensor([*temperatures, *padding, *filters]))
        keys = [mix(each.seed) for each in parameters]
        signed = [key - (1 << 64) if key >= 1 << 63 else key for key in keys]
        self._keys.copy_(torch.tensor([*signed, *[0] * (rows - len(signed))]))
        self._words.fill_(words)
        self._steps.zero_()

    def _choose(self, kind: _Kind) -> None:
        recording, rows = self._recording, len(self._keys)
        if kind is _Kind.FILTERED:
            self._thresholds[:1].copy_(self._threshold(recording.logits[:1]))
        choose_in_blocks[(rows, self._blocks)](
            recording.logits, recording.positions, self._keys, self._temperatures, self._thresholds, self._words, self._best,
            self._best_tokens, self._vocabulary, self._blocks, sampled=kind is not _Kind.GREEDY,
            filtered=kind is _Kind.FILTERED, block=BLOCK_TOKENS, num_warps=4,
        )  # fmt: skip
        take_choices[(1,)](
            self._best, self._best_tokens, self._tokens, self._steps, recording.ids, recording.positions, recording.units,
            recording.ends, rows, self._blocks, block_rows=rows, block=triton.next_power_of_2(self._blocks), num_warps=4,
        )  # fmt: skip

    def _threshold(self, logits: torch.Tensor) -> torch.Tensor:
        """The least logit that top_k, top_p and min_p leave, [1], for logits [1, vocabulary]: as `filter_scores` in sampling.py
        does, with parameters in the device's memory. Logits are compared as they are: a quotient has other digits elsewhere."""
        places = torch.arange(self._vocabulary, device=logits.device)
        temperature, (top_p, top_k, log_min_p) = self._temperatures[0], self._filters
        known = logits[0].float().nan_to_num(nan=-torch.inf).masked_fill(places >= self._words, -torch.inf)
        ordered = known.sort(descending=True).values.masked_fill(places >= top_k, -torch.inf)
        probabilities = (ordered / temperature).softmax(dim=0)
        dropped = (probabilities.cumsum(dim=0) - probabilities >= top_p) | (places >= top_k)
        least = ordered.masked_fill(dropped, torch.inf).min()
        return torch.maximum(least, ordered[0] + temperature * log_min_p)[None]
