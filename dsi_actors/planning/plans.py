"""Plans, each made once: a search takes milliseconds, and near inputs share its result. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from dsi_actors.core import Policy
from dsi_actors.planning.estimates import Estimates
from dsi_actors.planning.expectation import MAX_LOOKAHEAD, Branching
from dsi_actors.planning.search import Search, search_dsi, search_in_turns, search_si

#: How near the inputs are that share a plan. The tuner plans again for no smaller change.
ACCEPTANCE_STEP = 0.04
ALTERNATIVES_STEP = 0.1
RATIO_STEP = 1.1
_ROW_STEP = 0.05
_ALONE_STEP = 0.05
#: Plans that are kept. The oldest goes first.
_MOST_PLANS = 1024


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """All that a plan depends on. Latencies are in units of the drafter's."""

    algorithm: str
    sp: int
    window: int
    target: float
    full_window: float
    acceptance: float
    queued: int | None
    #: Whether drafter and targets may compute at the same time.
    overlaps: bool
    branching: Branching
    #: See expectation.py.
    alone: float

    @classmethod
    def near(
        cls, known: Estimates, algorithm: str, sp: int, branching: Branching, *, overlaps: bool, alone: float
    ) -> Self:
        """These estimates, rounded. The latencies of target and drafter must be known."""
        target_ms, window_ms = known.latencies_ms
        return cls(
            algorithm, sp, known.window,
            _rounded(target_ms / known.drafter_ms), _rounded(max(target_ms, window_ms) / known.drafter_ms),
            _stepped(known.acceptance, ACCEPTANCE_STEP), known.queued, overlaps,
            Branching(
                _stepped(branching.alternatives, ALTERNATIVES_STEP), branching.rows,
                _stepped(branching.row_share, _ROW_STEP),
            ),
            _stepped(alone, _ALONE_STEP),
        )  # fmt: skip

    def search(self) -> Search:
        cost_ms = Estimates(self.target, self.full_window, self.window).cost_ms
        most = max(1, min(MAX_LOOKAHEAD, self.window - 1))  # one forward verifies one window
        known = cost_ms, 1.0, self.acceptance
        if self.algorithm == "si":
            return search_si(*known, self.branching, most=most)
        if not self.overlaps:
            return search_in_turns(*known, self.sp, self.branching, most=most)
        return search_dsi(*known, self.sp, self.branching, most=most, queued=self.queued, alone=self.alone)


_plans: dict[PlanInputs, Policy] = {}


def plan(inputs: PlanInputs) -> Search:
    """In no steps if this was planned before."""
    search, policy = inputs.search(), _plans.get(inputs)
    while policy is None:
        try:
            next(search)
        except StopIteration as end:
            policy = _keep(inputs, end.value)
        else:
            yield
            policy = _plans.get(inputs)  # another generation may have made the same search
    return policy


def _keep(inputs: PlanInputs, policy: Policy) -> Policy:
    while len(_plans) >= _MOST_PLANS:
        del _plans[next(iter(_plans))]
    _plans[inputs] = policy
    return policy


def _stepped(number: float, step: float) -> float:
    return round(number / step) * step


def _rounded(ratio: float) -> float:
    """To the nearest power of a step."""
    return RATIO_STEP ** round(math.log(ratio, RATIO_STEP))
