"""Whether speculation pays: measured, since no model of costs knows what drafting takes from the target servers that it
gives to, be it processors, memory or turns. Pure.

Generations that run beside one another share this knowledge. Those with texts about as long and with the same drafter go one way
together: one that speculates among plain ones may be fast at the others' cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

#: Tokens of each generation that is alike: those at the beginning of a trial that are not counted (the drafter reads the text),
#: those after which a way is judged, and those by which it is judged from then on.
_WARM_UP, _TRIAL, _MEMORY = 8, 24, 64
#: Speculation may be so much slower than plain decoding; one wait counts as at most so much longer than was promised.
_PAYS, _MOST_LONGER = 1.05, 10.0
#: The slower way is tried again after so many tokens, and after twice as many whenever it was slower again.
_PATIENCE, _MOST_PATIENCE = 512, 16384
#: Texts of fewer tokens than this are alike.
_SHORT = 256


@dataclass(slots=True)
class _Way:
    """How long a token took. Milliseconds, not multiples of a promise: promises change, and what was measured stays."""

    tokens: float = 0.0
    ms: float = 0.0
    untried: float = 0.0
    patience: float = _PATIENCE

    @property
    def known(self) -> bool:
        return self.tokens >= _WARM_UP + _TRIAL

    def add(self, tokens: float, ms: float) -> None:
        self.untried = 0.0
        self.tokens += tokens
        if (counted := min(self.tokens - _WARM_UP, _MEMORY)) > 0:
            self.ms += (ms - self.ms) * min(1.0, tokens / counted)

    def not_tried(self, tokens: float) -> None:
        self.untried += tokens
        if self.known and self.untried > self.patience:
            self.tokens, self.ms = 0.0, 0.0
            self.patience = min(2 * self.patience, _MOST_PATIENCE)


@dataclass(slots=True)
class _Ways:
    """Under like circumstances. By the drafter; None is plain decoding."""

    by_drafter: defaultdict[str | None, _Way] = field(default_factory=lambda: defaultdict(_Way))
    #: What a token of plain decoding should take: counts until that was tried.
    promised_ms: float = 0.0

    def pays(self, drafter: str) -> bool:
        drafted, plain = self.by_drafter[drafter], self.by_drafter[None]
        return not drafted.known or drafted.ms <= _PAYS * (plain.ms if plain.known else self.promised_ms)

    def is_best(self, drafter: str | None) -> bool:
        if drafter is not None:
            return self.pays(drafter)
        drafters = [name for name in self.by_drafter if name is not None]
        return not any(self.by_drafter[name].known and self.pays(name) for name in drafters)


class Pace:
    """Of all generations of one orchestrator. `running` tells how many there are. Loads are alike that round to the same
    power of two, on the average of the last tokens: with four clients there are three for a moment, again and again. So are
    texts, by their length: a longer one takes longer, in every way."""

    def __init__(self, running: Callable[[], int] = lambda: 1) -> None:
        self._running = running
        self._load = 1.0
        self._ways: defaultdict[tuple[int, int], _Ways] = defaultdict(_Ways)
        #: How long the text of each generation is that has committed something.
        self._lengths: dict[Hashable, int] = {}

    def generation_begins(self) -> None:
        if not self._running():  # what was before the lull says nothing
            self._load = 1.0

    def pays(self, drafter: str, position: int) -> bool:
        """Whether to speculate with this one, in a text that is so long, as things are. True until enough is known."""
        return self._alike(position).pays(drafter)

    def ended(self, who: Hashable) -> None:
        """A generation is over."""
        self._lengths.pop(who, None)

    def committed(
        self,
        tokens: int,
        took_ms: float,
        *,
        drafter: str | None,
        promised_ms: float,
        position: int,
        who: Hashable = None,
    ) -> None:
        """So many tokens of one generation, `who`, up to `position`, so long after the ones before, by this drafter; None: in
        plain decoding. `promised_ms` is what one should take in plain decoding at this load; 0: nothing was measured, and
        nothing is judged."""
        running = max(1, self._running())
        each = tokens / running
        self._lengths[who] = _length(position)
        self._load += (running - self._load) * min(1.0, each / _MEMORY)
        if promised_ms <= 0 or _band(running) != _band(self._load):  # the load changes just now
            return
        lengths = list(self._lengths.values())
        each /= lengths.count(_length(position)) / len(lengths)
        ways = self._alike(position)
        ways.promised_ms = promised_ms
        tried = ways.by_drafter[drafter]
        tried.add(each, min(took_ms / tokens, _MOST_LONGER * promised_ms))
        for name, way in ways.by_drafter.items():
            if name != drafter:
                way.not_tried(each)
        if tried.known and ways.is_best(drafter):
            tried.patience = _PATIENCE

    def _alike(self, position: int) -> _Ways:
        return self._ways[_band(self._load), _length(position)]


def _length(position: int) -> int:
    return _band(max(position, _SHORT) / _SHORT)


def _band(number: float) -> int:
    return round(math.log2(number))
