"""Which drafter a generation takes, where there are several: the one under which tokens have come fastest. Pure.

How often a drafter is right depends on the text, and no number of its own says what it is worth: one that has no idea half of
the time may be right whenever it has one. So what counts is how long a token took. A generation begins with the drafter that has
been the fastest of late; after a trial it changes to another one, if that was faster here, or elsewhere, or was never tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from dsi_actors.planning.tuner import Estimates

#: Tokens after a change that are not counted (the drafter reads the text), and those after which it is judged.
WARM_UP, TRIAL = 8, 24
#: Tokens by which a drafter is judged from then on, in one generation and over all: texts differ.
_MEMORY, _CARRIED = 64.0, 1024.0
#: Another one must have taken so much less time: a change costs the reading of the text.
_BETTER = 0.93
#: A token took at most so many times what it takes in plain decoding: more has another reason, such as a worker that died.
_MOST = 4.0
#: One that was not used is tried again after so many generations, and after twice as many whenever it was slower again.
_PATIENCE, _MOST_PATIENCE = 32, 1024
#: What does not pay is not used: tokens then take as long as in plain decoding.
PLAIN = 1.0
#: Tokens after which one that could not be had is asked for again.
_ASK_AGAIN = 128

#: Whether a drafter was found to be faster than plain decoding, or may be.
Pays: TypeAlias = Callable[[str], bool]


def always(kind: str) -> bool:
    return True


@dataclass(slots=True)
class _Way:
    """How long a token took, as a multiple of what it should take in plain decoding."""

    tokens: float = 0.0
    ratio: float = 0.0
    #: Generations since it was used, and until it is tried again.
    unused: int = 0
    patience: int = _PATIENCE

    @property
    def is_forgotten(self) -> bool:
        return self.unused >= self.patience

    def add(self, tokens: float, ratio: float, memory: float) -> None:
        self.tokens = min(self.tokens + tokens, max(memory, tokens))
        self.ratio += (ratio - self.ratio) * tokens / self.tokens


@dataclass(frozen=True, slots=True)
class Guesser:
    """What the planner must know of a drafter: milliseconds of a token, and of so many judged how many were right."""

    drafter_ms: float
    accepted: float
    judged: float


def unjudged(drafter_ms: float) -> Guesser:
    """Of which only the latency is known."""
    return guesser_of(Estimates(drafter_ms=drafter_ms))


def guesser_of(estimates: Estimates) -> Guesser:
    return Guesser(estimates.drafter_ms, estimates.accepted, estimates.judged)


class Drafters:
    """What all generations of one orchestrator have learnt. A kind is what the configuration calls a drafter."""

    def __init__(self) -> None:
        self._ways: dict[str, _Way] = {}
        self._guessers: dict[str, Guesser] = {}

    def first(self, kinds: Sequence[str], pays: Pays = always) -> str:
        """To begin with: one that was never tried, or not for long, in the order given, else the fastest. "": there is none."""
        forgotten = (kind for kind in kinds if pays(kind) and kind in self._ways and self._ways[kind].is_forgotten)
        return next(forgotten, min(kinds, key=lambda kind: self.ratio(kind) if pays(kind) else PLAIN, default=""))

    def ratio(self, kind: str) -> float:
        """0: it was never tried."""
        return self._ways[kind].ratio if kind in self._ways else 0.0

    def guesser(self, kind: str) -> Guesser | None:
        return self._guessers.get(kind)

    def learn(self, kind: str, guesser: Guesser) -> None:
        self._guessers[kind] = guesser

    def generation_ended(self, used: Iterable[str]) -> None:
        """It had these in use: the others may have become better."""
        used = set(used)
        for kind, way in self._ways.items():
            if kind not in used:
                way.unused += 1
                if way.unused == way.patience:  # what was known of it is old
                    way.tokens = min(way.tokens, _MEMORY)
                continue
            if way.is_forgotten:
                way.patience = min(2 * way.patience, _MOST_PATIENCE)
            if way.ratio == min(other.ratio for other in self._ways.values()):
                way.patience = _PATIENCE
            way.unused = 0

    def tried(self, kind: str, tokens: float, ratio: float) -> None:
        self._ways.setdefault(kind, _Way()).add(tokens, ratio, _CARRIED)


@dataclass(slots=True)
class DrafterChoice:
    """Of one generation."""

    drafters: Drafters
    #: The kind in use.
    kind: str = ""
    _here: dict[str, _Way] = field(default_factory=dict)
    #: What was in use, whether it drafted anything or not.
    _used: set[str] = field(default_factory=set)
    #: Tokens since the last change; and when another one was asked for, that did not come yet.
    _since: float = 0.0
    _asked: float | None = None

    def use(self, kind: str) -> None:
        """From now on this one drafts."""
        self.kind, self._since, self._asked = kind, 0.0, None
        self._used.add(kind)

    def committed(self, tokens: int, took_ms: float, promised_ms: float) -> None:
        """So many tokens while the drafter was in use; `promised_ms` is what one should take in plain decoding."""
        counted = min(float(tokens), self._since + tokens - WARM_UP)
        self._since += tokens
        if counted > 0 and promised_ms > 0:
            ratio = min(took_ms / tokens / promised_ms, _MOST)
            self._here.setdefault(self.kind, _Way()).add(counted, ratio, _MEMORY)
            self.drafters.tried(self.kind, counted, ratio)

    def passed(self, tokens: int) -> None:
        """So many tokens in plain decoding."""
        self._since += tokens

    def settled(self, kinds: Sequence[str], pays: Pays = always) -> bool:
        """Whether each of them was tried, here or before, or could not be had: else what is slow now may be fast with another."""
        return self._asked is not None or all(self._ratio(kind) > 0 or not pays(kind) for kind in kinds)

    def change(self, kinds: Sequence[str], pays: Pays = always) -> str | None:
        """Of those that there are, the one to change to; none while the present one is on trial, or the best."""
        here = self._here.get(self.kind)
        if not pays(self.kind):
            present = PLAIN
        elif here is None or here.tokens < TRIAL or self._since < WARM_UP + TRIAL:
            return None
        else:
            present = here.ratio
        if self._asked is not None and self._since < self._asked + _ASK_AGAIN:
            return None
        best = min(kinds, key=lambda kind: self._ratio(kind) if pays(kind) else PLAIN, default=self.kind)
        if best == self.kind or not pays(best) or self._ratio(best) >= _BETTER * present:
            return None
        self._asked = self._since
        return best

    def ended(self) -> None:
        if self._used:
            self.drafters.generation_ended(self._used)

    def _ratio(self, kind: str) -> float:
        here = self._here.get(kind)
        return here.ratio if here is not None and here.tokens >= TRIAL else self.drafters.ratio(kind)
