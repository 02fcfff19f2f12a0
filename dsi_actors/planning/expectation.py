"""What a policy can be expected to take per token, from the latencies and the acceptance rate. Pure arithmetic.

A generation is a chain of cycles. A cycle begins when a correction is committed: the drafter starts behind it, and so do
the verifications, as the core plans them. The r-th draft is the first wrong one with probability a^(r-1) (1-a); the
cycle then ends, r tokens longer, with the first verification that covers the r-1 drafts before it. When verifications
start and end does not depend on chance as long as no draft is wrong. So one walk along the cycle in which nothing is
rejected gives T(r) for all r, and the time per token is E[T] / E[r] (renewal theory).

With enough servers, lookahead 1 and no wait this is a d + (1-a) t (arXiv 2405.14105); `simulation` runs the core itself
through time, and tests hold the two together.

With alternatives beside the main path a wrong draft whose alternative is right ends no cycle. The branch that it becomes was
drafted without alternatives, so until the target has passed what was drafted by then, each wrong draft ends the cycle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from dsi_actors.core import Policy
from dsi_actors.core.policy import worth_verifying


class CostMs(Protocol):
    """Milliseconds of a verification that reads so many positions of the text, and so many more on branches."""

    def __call__(self, positions: int, branches: int = 0, /) -> float: ...


MAX_LOOKAHEAD = 32
#: A walk ends when so few cycles are left, or after so many steps; the rest goes on at its pace. Walking on changes no plan.
_NEGLIGIBLE = 3e-3
_MOST_STEPS = 32
#: Verifications end so early and drafts come so late (in units of the drafter's latency): a plan must not count on a
#: block that comes in the very moment in which a verification ends.
_LATE = 1e-4


@dataclass(frozen=True, slots=True)
class Branching:
    """What a tree of drafts could bring and cost."""

    #: The chance that an alternative is right where the first choice is wrong.
    alternatives: float = 0.0
    #: The most rows that a step of the drafter may have. 1: chains only.
    rows: int = 1
    #: What each further row adds to a step of the drafter, as a share of it.
    row_share: float = 0.0

    def drafter_ms(self, policy: Policy, drafter_ms: float) -> float:
        """A step with the policy's rows."""
        return drafter_ms * (1 + self.row_share * (policy.rows - 1))


CHAIN = Branching()


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


def limit(target_ms: float, drafter_ms: float, acceptance: float, alternatives: float = 0.0) -> float:
    """Milliseconds per token that no number of servers can beat: d + (1-a) (t-d) / (1+h); of a chain a d + (1-a) t.

    Between two corrections, each of which costs t, 1 / (1-a) tokens are right on the main path, and with the chance h as many
    again on the branch of an alternative, which has no alternatives of its own.
    """
    drafter_ms = min(drafter_ms, target_ms)
    return drafter_ms + (1 - acceptance) * (target_ms - drafter_ms) / (1 + alternatives)


def expect(
    policy: Policy,
    cost_ms: CostMs,
    drafter_ms: float,
    acceptance: float,
    branching: Branching = CHAIN,
    *,
    alone: float = 1.0,
) -> Expectation:
    """Of any policy. Latencies are those of a drafter and a target that compute at the same time, if the policy lets them.
    `alone`: how long a step of the drafter takes while nothing is verified, as a share of `drafter_ms`."""
    if policy.max_ahead == 0:
        return Expectation(cost_ms(1), 1.0, cost_ms(1), 0.0)
    if policy.span == 0:
        return Expectation(cost_ms(1), 1.0, cost_ms(1), cost_ms(1))
    drafter_ms = branching.drafter_ms(policy, drafter_ms)
    if policy.algorithm == "si" or policy.first_wait == policy.max_ahead:  # nothing is drafted during a verification
        return _expect_si(policy, cost_ms, drafter_ms, acceptance, branching.alternatives)
    return _expect_dsi(policy, cost_ms, drafter_ms, acceptance, branching.alternatives, alone)


def _expect_si(
    policy: Policy, cost_ms: CostMs, drafter_ms: float, acceptance: float, alternatives: float
) -> Expectation:
    """(k d + t) (1 - a) / (1 - a^(k+1)) (Leviathan et al., 2023); with a tree an alternative that is right adds its token, and
    those of its branch as far as they are right."""
    lookahead = policy.lookahead
    right = [acceptance**i for i in range(lookahead + 1)]
    tokens = sum(right)
    if policy.rows > 1:
        for place in range(lookahead):
            behind = lookahead - place if place < policy.rows - 1 else 1
            tokens += right[place] * (1 - acceptance) * alternatives * sum(right[:behind])
    target_ms = cost_ms(lookahead + 1, branch_positions(policy, lookahead))
    return Expectation(
        (lookahead * drafter_ms + target_ms) / tokens, 1 / tokens, target_ms / tokens, lookahead * drafter_ms / tokens
    )


def branch_positions(policy: Policy, drafts: int) -> int:
    """On all branches beside so many drafts of the main path: an alternative for each, and what continues those that left
    first."""
    if policy.rows == 1:
        return 0
    continued = min(drafts, policy.rows - 1)
    return min(policy.branches, drafts + continued * drafts - continued * (continued + 1) // 2)


class _Cycle:
    """The walk along a cycle in which every draft is right. Inputs: 0 is the correction, then the drafts 1, 2, ...

    Hundreds of walks are taken for one plan, while a generation waits: hence no helpers in its loop.
    """

    def __init__(self, policy: Policy, cost_ms: CostMs, drafter_ms: float, alone: float) -> None:
        self._policy = policy
        self._cost_ms = cost_ms
        self._drafter_ms = max(drafter_ms, 1e-6)
        self._alone = alone
        #: Drafts made, and parts of one.
        self._drafting = 0.0
        #: The last input that each idle server has read. Which of them reads next: the one that has read most.
        self._idle = [-1] * policy.sp
        #: (end, covers inputs up to), in order of the ends.
        self._live: list[tuple[float, int]] = []
        self._committed = 0
        self.now_ms = 0.0
        self.started = 0
        #: Device time of all verifications that were started, of those that run up to their ends.
        self._busy_ms = 0.0

    def next_end(self) -> tuple[int, float]:
        """(tokens known, when): the next verification that ends, in order of time."""
        live = self._live
        while True:
            arrival = math.inf  # while all servers are at work no draft changes anything
            if self._idle:
                self._start_what_is_due()
                if self._idle:
                    arrival = self._next_arrival()
            if live and live[0][0] <= arrival:
                self._draft_until(live[0][0])
                _, covers = live.pop(0)
                self._idle.append(covers)
                self._committed = max(self._committed, covers + 1)
                for outrun in [each for each in live if each[1] < self._committed]:  # they can yield nothing more
                    live.remove(outrun)
                    self._busy_ms -= outrun[0] - self.now_ms
                    self._idle.append(outrun[1])
                return self._committed, self.now_ms
            self._draft_until(arrival)

    def busy_until_now_ms(self) -> float:
        """Device time spent: what still runs now is cancelled."""
        return self._busy_ms - sum(end - self.now_ms for end, _ in self._live)

    def made(self) -> int:
        """Drafts that the drafter has made by now."""
        return max(0, int(self._drafting - _LATE + 1e-9))

    @property
    def _step_ms(self) -> float:
        return self._drafter_ms if self._live else self._drafter_ms * self._alone

    def _draft_until(self, now_ms: float) -> None:
        self._drafting += (now_ms - self.now_ms) / self._step_ms
        self.now_ms = now_ms

    def _time_of(self, drafts: int) -> float:
        """When so many drafts are there, if nothing begins or ends until then."""
        return self.now_ms + (drafts + _LATE - self._drafting) * self._step_ms

    def _start_what_is_due(self) -> None:
        policy, live, known = self._policy, self._live, self._committed
        drafted = self._drafted()
        while self._idle:
            front = max([covers for _, covers in live], default=known)
            if not worth_verifying(policy, drafted - known, front - known, running=bool(live)):
                return
            read = max(self._idle)
            self._idle.remove(read)
            covers = min(max(drafted, known), front + policy.span)
            took_ms = self._cost_ms(covers - min(read + 1, known) + 1, branch_positions(policy, covers - known))
            self.started += 1
            self._busy_ms += took_ms
            end = self.now_ms + took_ms - _LATE * self._drafter_ms
            live.append((end, covers))
            if len(live) > 1 and end < live[-2][0]:  # one that reads less can end sooner
                live.sort()

    def _drafted(self) -> int:
        """Drafts that have arrived by now: the first block has `first_wait` tokens, the others `lookahead`."""
        wait, block = self._policy.first_wait, self._policy.lookahead
        made = self.made()
        arrived = made // block * block if not wait else (wait + (made - wait) // block * block if made >= wait else 0)
        return min(arrived, self._committed + self._policy.max_ahead)

    def _next_arrival(self) -> float:
        wait, block = self._policy.first_wait, self._policy.lookahead
        made = self.made()
        if wait and made < wait:
            return self._time_of(wait)
        if made - self._committed > 2 * self._policy.max_ahead and self._live:
            return math.inf  # the drafter has stopped until something is committed
        return self._time_of(wait + ((made - wait) // block + 1) * block)


class _Survival:
    """The chance that a cycle lasts until so many drafts are judged, and what it gains by alternatives without a branch."""

    def __init__(self, policy: Policy, acceptance: float, alternatives: float) -> None:
        self._acceptance = acceptance
        self._hit = (1 - acceptance) * alternatives if policy.rows > 1 else 0.0
        self._continued = policy.rows - 1
        #: The chance to be on a main path with alternatives, and that to be on a branch whose next n drafts have none, by n.
        self._main = 1.0
        self._branch: dict[int, float] = {}
        self._judged = 0
        #: Tokens that alternatives are expected to have brought that nothing was drafted behind.
        self.gained = 0.0

    @property
    def chance(self) -> float:
        return self._main + sum(self._branch.values())

    def judge(self, until: int, made: int) -> None:
        """Drafts up to number `until` are judged while so many are made."""
        a = self._acceptance
        if not self._hit:
            self._main *= a ** (until - self._judged)
            self._judged = until
            return
        for number in range(self._judged + 1, until + 1):
            branch = {left - 1: a * chance for left, chance in self._branch.items() if left > 1}
            main = a * (self._main + self._branch.get(1, 0.0))
            hit = self._main * self._hit
            if number > self._continued:
                self.gained += hit
            else:
                bare = max(1, made - number)
                branch[bare] = branch.get(bare, 0.0) + hit
            self._main, self._branch = main, branch
        self._judged = until


def _expect_dsi(
    policy: Policy, cost_ms: CostMs, drafter_ms: float, acceptance: float, alternatives: float, alone: float
) -> Expectation:
    cycle = _Cycle(policy, cost_ms, drafter_ms, alone)
    survival = _Survival(policy, acceptance, alternatives)
    known = 0
    survived = 1.0  # the chance that the cycle has not ended with the first `known` tokens
    time_ms = forwards = busy_ms = tokens = 0.0  # expectations over what ends within the walk
    marks: list[tuple[int, float, int, float]] = [(0, 0.0, 0, 0.0)]
    for _ in range(_MOST_STEPS):
        now_known, now_ms = cycle.next_end()
        for number in range(known + 1, now_known + 1):
            tokens += survival.chance
            survival.judge(number, cycle.made())
        left = survival.chance
        chance = survived - left
        time_ms += chance * now_ms
        forwards += chance * cycle.started
        busy_ms += chance * cycle.busy_until_now_ms()
        known, survived = now_known, left
        marks.append((known, now_ms, cycle.started, cycle.busy_until_now_ms()))
        if survived < _NEGLIGIBLE:
            break
    # What is left goes on at the pace of the second half of the walk.
    half, last = marks[len(marks) // 2], marks[-1]
    walked = max(1, last[0] - half[0])
    pace = [(late - early) / walked for early, late in zip(half[1:], last[1:], strict=True)]
    more = 1 / max(1e-9, 1 - acceptance)  # tokens that the rest of a cycle has
    tokens += survived * more + survival.gained
    time_ms, forwards, busy_ms = (
        (expected + survived * (at_end + slope * more)) / tokens
        for expected, at_end, slope in zip((time_ms, forwards, busy_ms), last[1:], pace, strict=True)
    )
    return Expectation(time_ms, forwards, busy_ms, time_ms)
