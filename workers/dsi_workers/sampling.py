"""From logits to a token: transformers' own processors, then argmax(log p + g) with noise that is the same everywhere.

The choice depends on the logits, the parameters, the seed, the position and the tokens before it, and on nothing else:
not on who drafted, what was verified together, or which worker it is. A drafter that samples with the same noise agrees
with the target as often as their distributions are close (arXiv 2408.07978), and only token ids travel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from dsi_protocol.gumbel import (
    FRACTION_BITS,
    GAMMA,
    LN_2,
    LN_LN_2,
    POINT_BITS,
    half_log_table,
    stream_key,
)
from dsi_workers.session import SamplingParameters


class Sampler:
    """Chooses the tokens of one session."""

    def __init__(self, parameters: SamplingParameters) -> None:
        self._parameters = parameters
        self._processors: list[Any] = _processors(parameters)

    def choose(self, logits: torch.Tensor, position: int, prefix: Sequence[int]) -> int:
        """The token at `position`, which follows `prefix` (all tokens before it). logits: [vocabulary]."""
        scores = logits.float()[None]
        if self._processors:
            ids: Any = torch.tensor([list(prefix)], device=logits.device)
            for processor in self._processors:
                scores = processor(ids, scores)
        if self._parameters.temperature == 0:
            return int(scores[0].argmax())
        candidates = (scores[0] > -torch.inf).nonzero()[:, 0]
        noise = gumbel_noise(stream_key(self._parameters.seed, position), candidates)
        return int(candidates[(scores[0, candidates].double() + noise).argmax()])


def _processors(parameters: SamplingParameters) -> list[Any]:
    """In transformers' order: the penalty on what was said, then temperature, top-k, top-p, min-p."""
    from transformers.generation import logits_process as library  # half a second that greedy decoding does not need

    processors: list[Any] = []
    if parameters.repetition_penalty != 1:
        processors.append(library.RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty))
    if parameters.temperature == 0:
        return processors  # greedy: what follows changes no order
    if parameters.temperature != 1:
        processors.append(library.TemperatureLogitsWarper(parameters.temperature))
    if parameters.top_k:
        processors.append(library.TopKLogitsWarper(parameters.top_k))
    if parameters.top_p < 1:
        processors.append(library.TopPLogitsWarper(parameters.top_p))
    if parameters.min_p > 0:
        processors.append(library.MinPLogitsWarper(parameters.min_p))
    return processors


def gumbel_noise(key: int, tokens: torch.Tensor) -> torch.Tensor:
    """dsi_protocol.gumbel for many tokens of one stream: int64 [n] -> float64 [n], the same bits."""
    bits = _mix(_signed(key) + (tokens + 1) * _signed(GAMMA))
    bits = torch.where(bits == 0, torch.ones_like(bits), bits)
    zeros = _leading_zeros(bits)
    fraction = (bits << zeros) >> (63 - FRACTION_BITS) & ((1 << FRACTION_BITS) - 1)
    exponential = ((zeros << POINT_BITS) + _half_log(fraction)).clamp(min=1)
    exponent = _floor_log2(exponential)
    fraction = ((exponential - (torch.ones_like(bits) << exponent)) << (46 - exponent)) >> (46 - FRACTION_BITS)
    logarithm = ((exponent - POINT_BITS) << POINT_BITS) + (1 << POINT_BITS) - _half_log(fraction)
    return -(logarithm.double() * 2.0**-POINT_BITS * LN_2) - LN_LN_2


def _mix(number: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function; int64 arithmetic wraps as unsigned arithmetic does."""
    number = number ^ _shift_right(number, 30)
    number = number * _signed(0xBF58476D1CE4E5B9)
    number = number ^ _shift_right(number, 27)
    number = number * _signed(0x94D049BB133111EB)
    return number ^ _shift_right(number, 31)


def _shift_right(number: torch.Tensor, by: int) -> torch.Tensor:
    """Logical, where >> of a signed tensor is arithmetic."""
    return (number >> by) & ((1 << (64 - by)) - 1)


def _leading_zeros(bits: torch.Tensor) -> torch.Tensor:
    """Of 64-bit patterns that are not zero."""
    high, low = _shift_right(bits, 32), bits & 0xFFFFFFFF
    return torch.where(high > 0, 31 - _floor_log2(high.clamp(min=1)), 63 - _floor_log2(low.clamp(min=1)))


def _floor_log2(number: torch.Tensor) -> torch.Tensor:
    """Of positive integers below 2^53: the exponent of the double that is equal to it."""
    return torch.frexp(number.double()).exponent.long() - 1


def _half_log(fraction: torch.Tensor) -> torch.Tensor:
    table = _table_on(fraction.device)
    cell, within = fraction >> 32, fraction & 0xFFFFFFFF
    upper = table[cell]
    return upper - ((upper - table[cell + 1]) * within >> 32)


@functools.cache
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.tensor(half_log_table(), device=device)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
