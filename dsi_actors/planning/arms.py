"""Whether a generation speculates, and with which drafter: a bandit whose arms are measured by the time of a token. Pure.

The arms are plain decoding, each kind of drafter, and all of them together. A drafter that takes turns with the target servers,
as in SI, is an arm of its own: where processes share processors and memory, each slows the others down, and that may be faster.
No model of costs knows what drafting takes from the target servers (processors, memory, turns on a GPU), and no number of a
drafter's own says what it is worth: one that has no idea most of the time may be right whenever it has one. So each arm is
judged by milliseconds per committed token, measured under like conditions: in the same *context*, which is the load
(generations that run at a time) and the length of the text, both in powers of two.

One rule holds for all arms. The first WARM_UP tokens after a change are not counted, nor those of a drafter that still reads
the text; after TRIAL counted tokens, or sooner if all its guesses are wrong, an arm is known; from then on the last MEMORY tokens
count. An arm that is not used is tried again after a while, and after twice as long whenever it was found to be slower
again.

Whether speculation pays is decided for all generations of a context together: one that speculates among plain ones
may be fast at the others' cost. Which drafter is the fastest depends on the text, so each generation also judges by
itself (`ArmChoice`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: The arm that drafts nothing, and that of all drafters together. The others are called what the configuration calls their
#: drafter.
PLAIN, TOGETHER = "", "&"
#: Behind the name of a drafter that drafts while no target server computes.
IN_TURNS = "~"
#: Tokens, of each generation in the context.
WARM_UP, TRIAL, MEMORY = 8, 24, 64
#: Guesses of a drafter that has just begun, all of them wrong, after which its trial ends. One that is right three times of
#: ten has so many wrong ones at first in one trial of a hundred.
_HOPELESS = 13
#: Tokens in other arms after which one is tried again: at first, and at most.
_PATIENCE, _MOST_PATIENCE = 512, 16384
#: What a drafter is worth in a context where it was not tried is taken from so many tokens elsewhere.
_ELSEWHERE = 1024.0
#: Speculation may take so much longer than plain decoding before it is left: measurements scatter.
_PAYS = 1.05
#: Another drafter must take so much less time: a change costs the reading of the text.
_BETTER = 0.93
#: A token counts as at most so many times plain decoding: more has another reason, such as a worker that died.
_LONGEST = 4.0
#: Tokens after which a drafter that could not be had is asked for again.
_ASK_AGAIN = 128
#: Texts of fewer tokens than this are alike.
_SHORT = 256


def chooses_arms(algorithm: str, lookahead: int | None) -> bool:
    """Whether a generation that was asked for so may change between speculation and plain decoding."""
    return algorithm == "dsi" and lookahead is None


def arms_of(kinds: Sequence[str], *, trees: bool) -> list[str]:
    """The arms that draft, of drafters of these kinds. `trees`: whether what several say at one place can be verified."""
    return [*kinds, TOGETHER] if trees and len(kinds) > 1 else list(kinds)


class Context(NamedTuple):
    """What must be alike for times to be compared: powers of two of the load and of the length of the text."""

    load: int
    length: int


@dataclass(slots=True)
class _Arm:
    """What a token takes with one arm. In units of the caller: milliseconds, or multiples of plain decoding."""

    tokens: float = 0.0
    mean: float = 0.0
    #: Tokens in other arms since this one was used.
    idle: float = 0.0
    patience: float = _PATIENCE
    #: It was not used for so long that it is tried again.
    due: bool = False

    @property
    def known(self) -> bool:
        return self.tokens >= TRIAL

    def add(self, tokens: float, each: float, memory: float) -> None:
        self.idle = 0.0
        if tokens > 0:
            self.tokens += tokens
            self.mean += (each - self.mean) * min(1.0, tokens / min(self.tokens, memory))
            self.due = self.due and not self.known

    def add_idle(self, tokens: float) -> None:
        self.idle += tokens
        if self.idle > self.patience and not self.due:
            if self.known:
                self.patience = min(2 * self.patience, _MOST_PATIENCE)
            self.tokens, self.mean, self.due = 0.0, 0.0, True


@dataclass(slots=True)
class _Conditions:
    """What is known in one context."""

    arms: defaultdict[str, _Arm] = field(default_factory=lambda: defaultdict(_Arm))
    #: What a token of plain decoding should take here: counts until that was tried.
    promised_ms: float = 0.0

    @property
    def plain_ms(self) -> float:
        plain = self.arms[PLAIN]
        return plain.mean if plain.known else self.promised_ms

    def pays(self, drafter: str) -> bool:
        arm = self.arms[drafter]
        return not arm.known or arm.mean <= _PAYS * self.plain_ms

    def is_best(self, name: str) -> bool:
        """Of the arms that are known."""
        drafters = {other: arm.mean for other, arm in self.arms.items() if other != PLAIN and arm.known}
        if name == PLAIN:
            return not any(map(self.pays, drafters))
        return self.pays(name) and self.arms[name].mean <= min(drafters.values())


class Arms:
    """What all generations of one orchestrator have learnt. `running` tells how many there are."""

    def __init__(self, running: Callable[[], int] = lambda: 1) -> None:
        self._running = running
        #: The average over the last tokens: with four clients there are three for a moment, again and again.
        self._load = 1.0
        self._contexts: defaultdict[Context, _Conditions] = defaultdict(_Conditions)
        #: By drafter, over all contexts: multiples of what plain decoding takes.
        self._elsewhere: dict[str, _Arm] = {}
        #: How long the text of each generation is that has committed something.
        self._lengths: dict[Hashable, int] = {}

    def end_trial(self, drafter: str, position: int) -> None:
        """Judge this drafter by the tokens that it had, however few: none of its guesses was right."""
        arm = self._contexts[self.context(position)].arms[drafter]
        if arm.tokens > 0:
            arm.tokens = max(arm.tokens, TRIAL)

    def generation_begins(self) -> None:
        if not self._running():  # what was before the lull says nothing
            self._load = 1.0

    def generation_ends(self, who: Hashable) -> None:
        self._lengths.pop(who, None)

    def context(self, position: int) -> Context:
        """Of a text of so many tokens, now."""
        return Context(_band(self._load), _length(position))

    @property
    def among_others(self) -> bool:
        """Whether several generations run most of the time."""
        return _band(self._load) > 0

    def pays(self, drafter: str, position: int) -> bool:
        """Whether to speculate with this drafter. True until it is known there."""
        return self._contexts[self.context(position)].pays(drafter)

    def plain_ms(self, position: int) -> float:
        """What a token of plain decoding takes there; 0: not known."""
        return self._contexts[self.context(position)].plain_ms

    def ratio(self, drafter: str, position: int) -> float:
        """What a token takes with this drafter, as a multiple of plain decoding. 0: it is to be tried."""
        conditions = self._contexts[self.context(position)]
        arm = conditions.arms[drafter]
        if arm.known and conditions.plain_ms > 0:
            return arm.mean / conditions.plain_ms
        elsewhere = self._elsewhere.get(drafter)
        return 0.0 if arm.due or elsewhere is None else elsewhere.mean

    def committed(
        self, tokens: int, counted: int, took_ms: float, *, arm: str, promised_ms: float, position: int, who: Hashable
    ) -> None:
        """Generation `who` committed `tokens` tokens, up to `position`, `took_ms` after the ones before; `counted` of
        them count, as they did not come just after a change. `promised_ms`: what one should take in plain decoding at
        this load; 0: nothing was measured, and nothing is judged."""
        running = max(1, self._running())
        share = tokens / running
        self._lengths[who] = _length(position)
        self._load += (running - self._load) * min(1.0, share / MEMORY)
        if promised_ms <= 0 or _band(running) != _band(self._load):  # the load changes just now
            return
        lengths = list(self._lengths.values())
        share /= lengths.count(_length(position)) / len(lengths)
        conditions = self._contexts[self.context(position)]
        conditions.promised_ms = promised_ms
        used = conditions.arms[arm]
        each_ms = min(took_ms / tokens, _LONGEST * max(promised_ms, conditions.plain_ms))
        used.add(share * counted / tokens, each_ms, MEMORY)
        for name in {PLAIN, *self._elsewhere, *conditions.arms} - {arm}:
            conditions.arms[name].add_idle(share)
        if used.known and conditions.is_best(arm):
            used.patience = _PATIENCE
        if arm != PLAIN and counted:
            self._elsewhere.setdefault(arm, _Arm()).add(counted, each_ms / conditions.plain_ms, _ELSEWHERE)


class ArmChoice:
    """Of one generation: the drafter it has, or should ask for, and whether it speculates. A drafter is an arm here: TOGETHER
    stands for all of them.

    `left_to_us`: whether to speculate may be chosen. Where the user fixed how to speculate, drafters are still compared.
    `never_left`: drafters that are not left for plain decoding, since they take nothing from the target and their drafts come in
    bursts, of which a trial sees too few.
    """

    def __init__(
        self, arms: Arms, drafter: str = "", *, left_to_us: bool = True, never_left: Sequence[str] = ()
    ) -> None:
        self.arms = arms
        #: The drafter in use, or to begin with.
        self.drafter = drafter
        self.position = 0
        self.left_to_us = left_to_us
        self._never_left = never_left
        #: Whether the drafter and the target servers should take turns although they could compute at the same time.
        self.takes_turns = False
        self._here: defaultdict[str, _Arm] = defaultdict(_Arm)
        self._promised_ms = 0.0
        self._arm = drafter
        #: Tokens since the arm changed; and at which of them another drafter was asked for, that did not come yet.
        self._since = 0
        self._asked: int | None = None
        #: Wrong guesses since the drafter began. None: one was right.
        self._wrong: int | None = 0

    def pays(self, drafter: str) -> bool:
        if not self.left_to_us or drafter in self._never_left or self.arms.pays(drafter, self.position):
            return True
        return self.takes_turns and drafter == self.drafter and self.arms.pays(drafter + IN_TURNS, self.position)

    @property
    def speculates(self) -> bool:
        return self.pays(self.drafter)

    @property
    def among_others(self) -> bool:
        return self.arms.among_others

    def first(self, drafters: Sequence[str]) -> str:
        """Of those that are there the one to begin with, in the order given where they are alike. "": there is none."""
        return min(drafters, key=self._value, default="")

    def settle_turns(self, expected_ms: Callable[[], float]) -> None:
        """Decide `takes_turns`. `expected_ms` returns the expected time of a token if the two take turns. Turns are tried only if
        this is clearly less than what was measured without turns, and not more than plain decoding takes."""
        both, plain_ms = self.arms.ratio(self.drafter, self.position), self.arms.plain_ms(self.position)
        if not self.left_to_us or self.drafter == TOGETHER or not both or plain_ms <= 0:
            self.takes_turns = False
            return
        turns = self.arms.ratio(self.drafter + IN_TURNS, self.position)
        if turns or not self.takes_turns:  # else it is on trial
            margin = 1.0 if self.takes_turns else _BETTER
            self.takes_turns = (turns or expected_ms() / plain_ms) < min(_PAYS, margin * both)

    def use(self, drafter: str) -> None:
        """From now on this one drafts."""
        self.drafter, self._arm, self._since, self._asked, self._wrong = drafter, drafter, 0, None, 0

    def judged(self, wrong: int, right: int) -> None:
        """So many guesses of the present drafter were compared with the target's tokens."""
        if right or self._wrong is None:
            self._wrong = None
            return
        self._wrong += wrong
        if self._wrong >= _HOPELESS and self.left_to_us:
            self.arms.end_trial(self.drafter, self.position)

    def committed(self, tokens: int, took_ms: float, *, arm: str, promised_ms: float) -> None:
        """`tokens` tokens up to `self.position`, by this arm, `took_ms` after the ones before."""
        if arm != self._arm:
            self._arm, self._since = arm, 0
        counted = max(0, min(tokens, self._since + tokens - WARM_UP))
        self._since += tokens
        if promised_ms <= 0:
            return
        self._promised_ms = promised_ms
        self._here[arm].add(counted, min(took_ms / tokens, _LONGEST * promised_ms), MEMORY)
        if self.left_to_us:
            self.arms.committed(
                tokens, counted, took_ms, arm=arm, promised_ms=promised_ms, position=self.position, who=self
            )

    def another(self, drafters: Sequence[str]) -> str | None:
        """The drafter to change to, of those that are there. None: the present one is on trial, or the best."""
        present = self.drafter
        drafts = self._arm in (present, present + IN_TURNS)
        on_trial = drafts and (self._since < WARM_UP + TRIAL or not self._here[self._arm].known)
        if self.pays(present) and on_trial:
            return None
        if self._asked is not None and self._since < self._asked + _ASK_AGAIN:
            return None
        best = min(drafters, key=self._value, default=present)
        margin = 1.0 if present == TOGETHER else _BETTER  # one of those that draft together has read the text
        if best == present or not self.pays(best) or self._value(best) >= margin * self._value(present):
            return None
        self._asked = self._since
        return best

    def ended(self) -> None:
        self.arms.generation_ends(self)

    def _value(self, drafter: str) -> float:
        """What a token would take, as a multiple of plain decoding, which is what a drafter that does not pay is not used for."""
        if not self.pays(drafter):
            return 1.0
        plain_ms = self.arms.plain_ms(self.position) or self._promised_ms
        here = [self._here[name] for name in (drafter, drafter + IN_TURNS) if name in self._here]
        if plain_ms > 0 and any(arm.known for arm in here):
            return min(arm.mean for arm in here if arm.known) / plain_ms
        return self.arms.ratio(drafter, self.position)


def _length(position: int) -> int:
    return _band(max(position, _SHORT) / _SHORT)


def _band(number: float) -> int:
    return round(math.log2(number))
