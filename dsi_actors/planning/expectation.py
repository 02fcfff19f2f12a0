"""What a policy can be expected to take per token, from the latencies and the acceptance rate. Pure arithmetic.

A generation is a chain of cycles. A cycle begins when a correction is committed: the drafter starts behind it, and so do
the verifications, as the core plans them. The r-th draft is the first wrong one with probability a^(r-1) (1-a); the
cycle then ends, r tokens longer, with the first verification that covers the r-1 drafts before it. When verifications
start and end does not depend on chance as long as no draft is wrong. So one walk along the cycle in which nothing is
rejected gives T(r) for all r, and the time per token is E[T] / E[r] (renewal theory).

With enough servers, lookahead 1 and no wait this is a d + (1-a) t (arXiv 2405.14105); `simulation` runs the core itself
through time, and tests hold the two together.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dsi_actors.core import Policy
from dsi_actors.core.policy import UNLIMITED

#: Milliseconds of a verification that reads so many positions.
CostMs = Callable[[int], float]

MAX_LOOKAHEAD = 32
#: Of policies that are equally fast to within this share, the one that keeps the target servers least busy is taken.
_TIE = 0.002
#: A walk ends when so few cycles are left, or after so many steps; the rest goes on at its pace. Walking on changes no plan.
_NEGLIGIBLE = 3e-3
_MOST_STEPS = 32
_MOST_ROUNDS = 4
#: Verifications end so early and drafts come so late (in units of the drafter's latency): a plan must not count on a
#: block that comes in the very moment in which a verification ends.
_LATE = 1e-4
#: Blocks of drafts in the time of one target forward, if it has not more servers than half as many.
_MOST_BLOCKS = 32
_CANDIDATES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


@dataclass(frozen=True, slots=True)
class Expectation:
    """Per committed token, in the long run."""

    ms_per_token: float
    target_forwards: float
    #: Device time of all target servers together, and of the drafter.
    target_busy_ms: float
    drafter_busy_ms: float


def equation_1_servers(target_ms: float, drafter_ms: float, lookahead: int = 1) -> int:
    """The servers that are enough: SP = ceil(t / (k d)) (arXiv 2405.14105, Equation 1)."""
    return max(1, math.ceil(target_ms / (lookahead * drafter_ms) - 1e-9)) if drafter_ms > 0 else MAX_LOOKAHEAD


def expect(policy: Policy, cost_ms: CostMs, drafter_ms: float, acceptance: float) -> Expectation:
    """Of any policy."""
    if policy.max_ahead == 0:
        return Expectation(cost_ms(1), 1.0, cost_ms(1), 0.0)
    if policy.span == 0:
        return Expectation(cost_ms(1), 1.0, cost_ms(1), cost_ms(1))
    if policy.algorithm == "si" or policy.first_wait == policy.max_ahead:  # nothing is drafted during a verification
        return _expect_si(cost_ms, drafter_ms, acceptance, policy.lookahead)
    return _expect_dsi(policy, cost_ms, drafter_ms, acceptance)


def best_si(cost_ms: CostMs, drafter_ms: float, acceptance: float, *, most: int = MAX_LOOKAHEAD) -> Policy:
    """The lookahead that makes SI fastest."""
    policies = [Policy.speculative(lookahead) for lookahead in range(1, most + 1)]
    return _best(policies, lambda policy: expect(policy, cost_ms, drafter_ms, acceptance))


def best_dsi(
    cost_ms: CostMs,
    drafter_ms: float,
    acceptance: float,
    sp: int,
    *,
    most: int = MAX_LOOKAHEAD,
    queued: int | None = None,
) -> Policy:
    """The wait after a rejection and the stagger between verifications that make DSI fastest on `sp` servers.

    The family contains AR (span 0), SI itself (`best_in_turns`), and SI that drafts on while it verifies (wait and span of k).
    Where servers are shared, a verification waits for the forward of others to end, in which time `queued` tokens are drafted:
    so many are waited for, since that costs nothing, and no more, since who is not in the next forward waits for the one after.
    """
    target_ms = cost_ms(1)
    if (
        drafter_ms >= target_ms
    ):  # a draft comes when the target has said it already: plain decoding, and drafts to judge
        return Policy.distributed(1, 1, span=0)
    in_time = math.ceil(target_ms / max(drafter_ms, 1e-6))
    waits = [wait for wait in _CANDIDATES if wait <= min(most, in_time)]
    if queued is not None:
        waits = [max(wait for wait in waits if wait <= queued)]
    lookaheads = [k for k in _CANDIDATES[1:] if k <= min(most, max(1, in_time if sp > 1 else in_time // 4))]
    if (
        queued is not None
    ):  # four messages of drafts in each forward are enough: more would keep the orchestrator busy for nothing
        lookaheads = [max(k for k in lookaheads if k <= max(1, in_time // 4))]
    # A block of drafts is a message, and a drafter that takes next to no time would send hundreds of them: blocks as large as
    # needed, or as large as there are.
    finest = target_ms / (max(_MOST_BLOCKS, 2 * sp) * max(drafter_ms, 1e-6))
    lookaheads = [k for k in lookaheads if k >= finest] or lookaheads[-1:]
    # Where a long verification takes no longer than a short one there is no reason to check less than there is.
    # The longest of equals: drafts that come in bursts, as those of prompt lookup, may be more than are expected.
    spans = sorted({span for span in _CANDIDATES[1:] if span < most} | {most}, reverse=True)
    if cost_ms(most + 1) <= target_ms:
        spans = [UNLIMITED] if cost_ms(8 * most) <= target_ms else [most]

    def policy(wait: int, k: int, span: int) -> Policy:
        ahead = drafts_ahead(target_ms, drafter_ms, k, wait)
        return Policy.distributed(k, sp, min(wait, span), max_ahead=ahead, span=span)

    expected = functools.cache(lambda policy: expect(policy, cost_ms, drafter_ms, acceptance))
    # One at a time, until nothing gets better: they hardly depend on one another.
    best = policy(0, lookaheads[0], spans[0])
    if spans != [UNLIMITED]:
        si = best_si(cost_ms, drafter_ms, acceptance, most=most)
        best = policy(min(si.lookahead, waits[-1]), lookaheads[0], si.lookahead)
    for _ in range(_MOST_ROUNDS):
        before, wait, span = best, best.first_wait, best.span
        best = _best([policy(wait, k, span) for k in lookaheads], expected)
        best = _best([policy(wait, best.lookahead, span) for wait in waits], expected)
        best = _best([policy(best.first_wait, best.lookahead, span) for span in spans], expected)
        if best == before:
            break
    plain = Policy.distributed(best.lookahead, sp, max_ahead=best.max_ahead, span=0)
    others = [plain] if queued is not None else [plain, best_in_turns(cost_ms, drafter_ms, acceptance, sp, most=most)]
    return _best([best, *others], expected)


def best_in_turns(
    cost_ms: CostMs, drafter_ms: float, acceptance: float, sp: int, *, most: int = MAX_LOOKAHEAD
) -> Policy:
    """Where drafter and targets cannot compute at the same time: SI as a policy of DSI, or plain decoding."""
    si = best_si(cost_ms, drafter_ms, acceptance, most=most)
    if expect(si, cost_ms, drafter_ms, acceptance).ms_per_token >= cost_ms(1):
        return Policy.undrafted(sp)
    return replace(si, algorithm="dsi", sp=sp)


def drafts_ahead(target_ms: float, drafter_ms: float, lookahead: int, wait: int) -> int:
    """How far the drafter may run ahead so that it never waits: what it drafts while two verifications run, and a block."""
    return min(512, math.ceil(2 * target_ms / max(drafter_ms, target_ms / 128)) + wait + 2 * lookahead)


def _best(policies: Iterable[Policy], expected: Callable[[Policy], Expectation]) -> Policy:
    pairs = [(policy, expected(policy)) for policy in policies]
    fastest_ms = min(expectation.ms_per_token for _, expectation in pairs)
    ties = [pair for pair in pairs if pair[1].ms_per_token <= fastest_ms * (1 + _TIE)]
    return min(ties, key=lambda pair: (pair[1].target_busy_ms, pair[1].ms_per_token))[0]


def _expect_si(cost_ms: CostMs, drafter_ms: float, acceptance: float, lookahead: int) -> Expectation:
    """(k d + t) (1 - a) / (1 - a^(k+1)) (Leviathan et al., 2023)."""
    tokens = sum(acceptance**i for i in range(lookahead + 1))
    target_ms = cost_ms(lookahead + 1)
    return Expectation(
        (lookahead * drafter_ms + target_ms) / tokens, 1 / tokens, target_ms / tokens, lookahead * drafter_ms / tokens
    )


class _Cycle:
    """The walk along a cycle in which every draft is right. Inputs: 0 is the correction, then the drafts 1, 2, ..."""

    def __init__(self, policy: Policy, cost_ms: CostMs, drafter_ms: float) -> None:
        self._policy = policy
        self._cost_ms = cost_ms
        self._drafter_ms = max(drafter_ms, 1e-6)
        #: For each server: when it is free, and the last input that it has read.
        self._servers: list[tuple[float, int]] = [(0.0, -1)] * policy.sp
        self._live: deque[tuple[float, int, int]] = deque()  # (end, covers inputs up to, server)
        self._committed = 0
        self.now_ms = 0.0
        self.started = 0
        self.busy_ms = 0.0

    def next_end(self) -> tuple[int, float]:
        """(tokens known, when): the next verification that ends, in order of time."""
        while True:
            self._start_what_is_due()
            # While all servers are at work no draft changes anything.
            arrival = math.inf if len(self._live) == self._policy.sp else self._next_arrival()
            if self._live and self._live[0][0] <= arrival:
                self.now_ms, covers, server = self._live.popleft()
                self._servers[server] = (self.now_ms, covers)
                self._committed = max(self._committed, covers + 1)
                self._cancel_outrun()
                return self._committed, self.now_ms
            self.now_ms = arrival

    def _cancel_outrun(self) -> None:
        """Verifications that can yield nothing beyond what is committed; one that reads less can end sooner."""
        if any(covers < self._committed for _, covers, _ in self._live):
            self.busy_ms -= sum(end - self.now_ms for end, covers, _ in self._live if covers < self._committed)
            self._live = deque(each for each in self._live if each[1] >= self._committed)

    def _start_what_is_due(self) -> None:
        policy = self._policy
        while len(self._live) < policy.sp:
            drafted = self._drafted()
            front = max((covers for _, covers, _ in self._live), default=self._committed)
            if self._live:
                due = policy.span > 0 and drafted - front >= policy.lookahead
            else:
                due = drafted - self._committed >= policy.first_wait or policy.first_wait == 0
            if not due:
                return
            running = {server for _, _, server in self._live}
            server = max(
                (number for number in range(policy.sp) if number not in running),
                key=lambda number: self._servers[number][1],
            )
            covers = min(max(drafted, self._committed), front + policy.span)
            begin = min(self._servers[server][1] + 1, self._committed)
            took_ms = self._cost_ms(covers - begin + 1)
            self.started += 1
            self.busy_ms += took_ms
            self._live.append((self.now_ms + took_ms - _LATE * self._drafter_ms, covers, server))
            if len(self._live) > 1 and self._live[-1][0] < self._live[-2][0]:
                self._live = deque(sorted(self._live))

    def _drafted(self) -> int:
        """Drafts that have arrived by now: the first block has `first_wait` tokens, the others `lookahead`."""
        wait, block = self._policy.first_wait, self._policy.lookahead
        made = self._made()
        arrived = made // block * block if not wait else (wait + (made - wait) // block * block if made >= wait else 0)
        return min(arrived, self._committed + self._policy.max_ahead)

    def _next_arrival(self) -> float:
        wait, block = self._policy.first_wait, self._policy.lookahead
        made = self._made()
        if wait and made < wait:
            return (wait + _LATE) * self._drafter_ms
        if made - self._committed > 2 * self._policy.max_ahead and self._live:
            return math.inf  # the drafter has stopped until something is committed
        return (wait + ((made - wait) // block + 1) * block + _LATE) * self._drafter_ms

    def _made(self) -> int:
        return max(0, int(self.now_ms / self._drafter_ms - _LATE + 1e-9))


def _expect_dsi(policy: Policy, cost_ms: CostMs, drafter_ms: float, acceptance: float) -> Expectation:
    cycle = _Cycle(policy, cost_ms, drafter_ms)
    known = 0
    survived = 1.0  # the chance that the first `known` drafts are right
    time_ms = forwards = busy_ms = 0.0  # expectations over what ends within the walk
    marks: list[tuple[int, float, int, float]] = [(0, 0.0, 0, 0.0)]
    for _ in range(_MOST_STEPS):
        now_known, now_ms = cycle.next_end()
        left = acceptance**now_known
        chance = survived - left
        time_ms += chance * now_ms
        forwards += chance * cycle.started
        busy_ms += chance * _busy_until(cycle, now_ms)
        known, survived = now_known, left
        marks.append((known, now_ms, cycle.started, _busy_until(cycle, now_ms)))
        if survived < _NEGLIGIBLE:
            break
    # What is left goes on at the pace of the second half of the walk.
    half, last = marks[len(marks) // 2], marks[-1]
    tokens = max(1, last[0] - half[0])
    pace = [(late - early) / tokens for early, late in zip(half[1:], last[1:], strict=True)]
    rejection = 1 - acceptance
    time_ms, forwards, busy_ms = (
        rejection * expected + survived * (rejection * at_end + slope)
        for expected, at_end, slope in zip((time_ms, forwards, busy_ms), last[1:], pace, strict=True)
    )
    return Expectation(time_ms, forwards, busy_ms, time_ms)


def _busy_until(cycle: _Cycle, now_ms: float) -> float:
    """Device time spent: what still runs now is cancelled."""
    return cycle.busy_ms - sum(end - now_ms for end, _, _ in cycle._live)
