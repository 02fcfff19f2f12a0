"""Whether speculation pays: measured, since no model of costs knows what drafting takes from the target servers that it
gives to, be it processors, memory or turns. Pure.

All generations that run beside one another share this knowledge and go one way together: one that speculates among plain
ones may be fast at the others' cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

#: Tokens of each generation that runs: those at the beginning of a trial that are not counted (the drafter reads the text),
#: those after which a way is judged, and those by which it is judged from then on.
_WARM_UP, _TRIAL, _MEMORY = 8, 24, 64
#: Speculation may be so much slower than plain decoding; one wait counts as at most so much longer than was promised.
_PAYS, _MOST_LONGER = 1.05, 10.0
#: The slower way is tried again after so many tokens, and after twice as many whenever it was slower again.
_PATIENCE, _MOST_PATIENCE = 512, 16384


@dataclass(slots=True)
class _Way:
    """How long a token took, as a multiple of what plain decoding should take."""

    tokens: float = 0.0
    ratio: float = 0.0
    untried: float = 0.0
    patience: float = _PATIENCE

    @property
    def known(self) -> bool:
        return self.tokens >= _WARM_UP + _TRIAL

    def add(self, tokens: float, ratio: float) -> None:
        self.untried = 0.0
        self.tokens += tokens
        if (counted := min(self.tokens - _WARM_UP, _MEMORY)) > 0:
            self.ratio += (min(ratio, _MOST_LONGER) - self.ratio) * min(1.0, tokens / counted)

    def not_tried(self, tokens: float) -> None:
        self.untried += tokens
        if self.known and self.untried > self.patience:
            self.tokens, self.ratio = 0.0, 0.0
            self.patience = min(2 * self.patience, _MOST_PATIENCE)


@dataclass(slots=True)
class _Ways:
    speculating: _Way = field(default_factory=_Way)
    plain: _Way = field(default_factory=_Way)

    @property
    def speculation_pays(self) -> bool:
        plain = self.plain.ratio if self.plain.known else 1.0
        return not self.speculating.known or self.speculating.ratio <= _PAYS * plain


class Pace:
    """Of all generations of one orchestrator. `running` tells how many there are. Loads are alike that round to the same
    power of two, on the average of the last tokens: with four clients there are three for a moment, again and again."""

    def __init__(self, running: Callable[[], int] = lambda: 1) -> None:
        self._running = running
        self._load = 1.0
        self._at_load: defaultdict[int, _Ways] = defaultdict(_Ways)

    def generation_begins(self) -> None:
        if not self._running():  # what was before the lull says nothing
            self._load = 1.0

    @property
    def speculation_pays(self) -> bool:
        """As things are. True until enough is known."""
        return self._now().speculation_pays

    def committed(self, tokens: int, took_ms: float, *, speculating: bool, promised_ms: float) -> None:
        """So many tokens of one generation, so long after the ones before. `promised_ms` is what one should take in plain
        decoding at this load, from what the workers measured at their start; 0 where they did not."""
        running = max(1, self._running())
        each = tokens / running
        self._load += (running - self._load) * min(1.0, each / _MEMORY)
        if promised_ms > 0 and _band(running) == _band(self._load):  # else it changes just now
            ways = self._now()
            tried, other = (ways.speculating, ways.plain) if speculating else (ways.plain, ways.speculating)
            tried.add(each, took_ms / tokens / promised_ms)
            other.not_tried(each)
            if ways.speculation_pays == speculating and tried.known:
                tried.patience = _PATIENCE  # it is the better one

    def _now(self) -> _Ways:
        return self._at_load[_band(self._load)]


def _band(load: float) -> int:
    return round(math.log2(load))
