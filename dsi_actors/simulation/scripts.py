"""What models would say and how long they would take, made up: the input of a simulation.

A text is a row of positions. The truth is token 0 everywhere; a drafter that errs says 1. Whether it errs at a position
is drawn once, so every algorithm meets the same draws; the timed engine draws the same from the same seed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from dsi_protocol.gumbel import random_bits, stream_key

#: Milliseconds of the next verification, by the positions that it reads; or of the next drafted token (positions: 1).
LatencyMs = Callable[[int], float]


class Script(Protocol):
    """What target and drafter say. `tokens` is the whole text before; it may be looked at, not kept."""

    def draft(self, tokens: Sequence[int]) -> int:
        """The drafter's guess after `tokens`."""

    def answer(self, tokens: list[int], start: int) -> tuple[int, ...]:
        """A target server's answer to a verification of `tokens` from `start` on (Verified in SPEC.md)."""


class AcceptanceScript:
    """A drafter that is right where `accepted` says so. Nothing depends on the text."""

    def __init__(self, accepted: Callable[[int], bool]) -> None:
        self._accepted = accepted

    def draft(self, tokens: Sequence[int]) -> int:
        return 0 if self._accepted(len(tokens)) else 1

    def answer(self, tokens: list[int], start: int) -> tuple[int, ...]:
        try:
            first_wrong = tokens.index(1, start)
        except ValueError:
            first_wrong = len(tokens)
        return (0,) * (first_wrong - start + 1)


def independent(acceptance: float, seed: int) -> Callable[[int], bool]:
    """Right with this chance at each position, independently."""
    threshold = acceptance * 2**64
    return lambda position: random_bits(stream_key(seed, position), 0) < threshold


def replayed(accepted: Sequence[bool], first: int) -> Callable[[int], bool]:
    """What was recorded, from position `first` on, over and over."""
    return lambda position: accepted[(position - first) % len(accepted)]


def constant(latency_ms: float) -> LatencyMs:
    return lambda positions: latency_ms


def lognormal(mean_ms: float, variation: float, generator: random.Random) -> LatencyMs:
    """Jitter: lognormal with this mean and coefficient of variation (standard deviation over mean)."""
    if variation == 0 or mean_ms == 0:
        return constant(mean_ms)
    variance = math.log1p(variation**2)
    location, scale = math.log(mean_ms) - variance / 2, math.sqrt(variance)
    return lambda positions: generator.lognormvariate(location, scale)


def recorded(latencies_ms: Sequence[float]) -> LatencyMs:
    """What was measured, in order, over and over."""
    endless = itertools.cycle(latencies_ms)
    return lambda positions: next(endless)
