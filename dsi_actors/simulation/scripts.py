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
        """The drafter's first choice after `tokens`."""

    def alternative(self, tokens: Sequence[int]) -> int:
        """The drafter's second choice, another token."""

    def truth(self, tokens: Sequence[int]) -> int:
        """The target's own token after `tokens`."""

    def answer(self, tokens: list[int], start: int) -> tuple[int, ...]:
        """A target server's answer to a verification of the chain `tokens` from `start` on (Verified in SPEC.md)."""


class AcceptanceScript:
    """A drafter whose first choice is right where `accepted` says so, and its second choice, where the first is not, where
    `alternative` says so. Nothing depends on the text: the truth is 0 everywhere."""

    def __init__(
        self, accepted: Callable[[int], bool], alternative: Callable[[int], bool] = lambda position: False
    ) -> None:
        self._accepted = accepted
        self._alternative = alternative

    def draft(self, tokens: Sequence[int]) -> int:
        return 0 if self._accepted(len(tokens)) else 1

    def alternative(self, tokens: Sequence[int]) -> int:
        if self._accepted(len(tokens)):
            return 1
        return 0 if self._alternative(len(tokens)) else 2

    def truth(self, tokens: Sequence[int]) -> int:
        return 0

    def answer(self, tokens: list[int], start: int) -> tuple[int, ...]:
        try:
            first_wrong = tokens.index(1, start)
        except ValueError:
            first_wrong = len(tokens)
        return (0,) * (first_wrong - start + 1)


def independent(chance: float, seed: int, *, draw: int = 0) -> Callable[[int], bool]:
    """True with this chance at each position, independently. Another `draw` is independent of the first."""
    threshold = chance * 2**64
    return lambda position: random_bits(stream_key(seed, position), draw) < threshold


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


def walk(
    truth: Callable[[list[int]], int], text: list[int], tokens: Sequence[int], parents: Sequence[int], start: int
) -> tuple[int, ...]:
    """What a target server answers to a verification of a tree: its own tokens from `start` on, along the tree.

    `truth` gives the target's token after a text; `text` is the text before `tokens`, `parents` as in StartVerify. While this
    runs, `text` is extended in place: copies of a long text would take longer than everything else.
    """
    length = len(text)
    if start < length:  # of what it holds, too, some is checked
        assert not parents
        return walk(truth, text[:start], [*text[start:], *tokens], (), start)
    children: dict[int, dict[int, int]] = {}
    for place, token in enumerate(tokens, 1):
        children.setdefault(parents[place - 1] if parents else place - 1, {}).setdefault(token, place)
    place = 0
    while len(text) < start:
        [(token, place)] = children[place].items()
        text.append(token)
    answer: list[int] = []
    while True:
        answer.append(truth(text))
        text.append(answer[-1])
        found = children.get(place, {}).get(answer[-1])
        if found is None:
            del text[length:]
            return tuple(answer)
        place = found
