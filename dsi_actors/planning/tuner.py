"""Chooses the policy of one generation from what is measured while it runs. Pure: told of latencies, asked for a policy.

The orchestrator and the simulator drive this same class, as they do the core.
"""

from __future__ import annotations

import math
from dataclasses import replace

from dsi_actors.core import Policy
from dsi_actors.core.actions import Judged
from dsi_actors.core.policy import UNLIMITED
from dsi_actors.planning.estimates import ASSUMED_ACCEPTANCE, PRIOR_WEIGHT, Estimates, Guesser
from dsi_actors.planning.expectation import Branching, expect
from dsi_actors.planning.plans import ACCEPTANCE_STEP, ALTERNATIVES_STEP, RATIO_STEP, PlanInputs, plan
from dsi_actors.planning.search import Search, Steps, in_one_go, with_rows

#: Of what was judged, the share that is forgotten with each further token: what counts are the last hundred or so.
_FORGOTTEN = 0.01
_LATENCY_WEIGHT = 0.1
#: A drafter's latency is a mean of so many tokens, the last ones; what it is thought to be at first counts for so many of them. A
#: chain of two takes next to nothing for what it copies, and as long as its model for the next block.
_DRAFTED, _DRAFTED_PRIOR = 64.0, 8.0
#: No forward is faster. A worker may say what it likes: estimates stay numbers that can be planned with.
_LEAST_MS = 1e-3
#: While nothing is drafted, what was judged is forgotten in about so many tokens: it may be another text by then.
_UNJUDGED = 1024
#: Judged tokens between two looks at the policy.
_LOOK_EVERY = 4
#: Drafter and targets slow one another down if verifications take at least this many times as long as in plain decoding.
_SLOWED = 1.1
#: More is not because of the other one.
_MOST_SLOWED = 3.0


class Tuner:
    """Plans how one generation speculates. `lookahead` fixes it; None lets it be chosen. `rows`: the most rows of a drafting
    step, with a fixed lookahead just these (None: 1); 1 is a chain. `overlaps`: the drafter can compute while targets do."""

    def __init__(
        self,
        algorithm: str,
        sp: int,
        lookahead: int | None,
        estimates: Estimates,
        *,
        rows: int | None = None,
        overlaps: bool = True,
    ) -> None:
        #: Our own copy: it changes with every observation.
        self.estimates = known = replace(estimates)
        self._algorithm = algorithm
        self._sp = sp
        #: Servers that are there now, of the `sp` that may be used.
        self.servers = sp
        self._fixed = lookahead
        self._most_rows = rows
        #: Whether to speculate at all, and whether several drafters draft at the same time: decided elsewhere (arms.py).
        self.speculates, self.together = True, False
        #: Whether the next plan makes drafter and targets take turns although they could overlap: decided in arms.py, too.
        self.takes_turns = False
        #: Whether the plan in use does.
        self.in_turns = False
        self._drafted = _DRAFTED_PRIOR if known.drafter_ms > 0 else 0.0
        #: Whether the drafter can compute while targets do.
        self.overlaps = overlaps
        #: Drafters that were in use before the present one.
        self._drafters = 0
        #: Whether other generations run most of the time.
        self.among_others = False
        self._since_look = 0
        self._planned_for = (replace(known), self._circumstances)
        self._policy: Policy | None = None

    @property
    def drafting(self) -> bool:
        return self._policy is not None and self._policy.max_ahead > 0

    @property
    def may_branch(self) -> bool:
        return may_branch(self._fixed, self._most_rows)

    @property
    def _drafts_wait_for_others(self) -> bool:
        """Whether each drafted token waits for a forward that verifies others, since drafter and targets take turns on one device
        that several generations share. With k drafts a round takes k + 1 such forwards, and yields at most k + 1 tokens: no
        faster than plain decoding, and slower by the drafter's own time."""
        return self.among_others and not self.overlaps

    @property
    def _circumstances(self) -> tuple[int, bool, bool, bool, int, bool, bool, int]:
        return (
            self.servers, self.speculates, self.overlaps, self.among_others, self.estimates.rows, self.together,
            self.takes_turns, self._drafters,
        )  # fmt: skip

    def choose(self) -> Policy:
        """The policy to begin with."""
        return in_one_go(self._choosing())

    def _choosing(self) -> Search:
        """Begins anew if the circumstances change between two steps."""
        policy: Policy | None = None
        while policy is None:
            planned_for = (replace(self.estimates), self._circumstances)
            search = self._search()
            while policy is None and planned_for[1] == self._circumstances:
                try:
                    next(search)
                except StopIteration as end:
                    policy = end.value
                else:
                    yield
        self._planned_for = planned_for
        if self.together and policy.max_ahead:  # even if each of them drafts a chain
            policy = replace(policy, branches=UNLIMITED)
        self._policy, self.in_turns = policy, self.takes_turns
        return policy

    def expected_in_turns_ms(self) -> float:
        """Return the expected milliseconds of a token if drafter and target servers took turns.

        Both are assumed to be slowed down now by the same factor: that by which verifications take longer than in plain decoding.
        In turns they are not slowed down. Infinity if the factor is below `_SLOWED`, or not measured.
        """
        known = self.estimates
        if known.drafter_ms <= 0 or self._alone == 1:
            return math.inf
        policy = in_one_go(self._plan("si", 1))
        return (
            expect(policy, known.cost_ms, known.drafter_ms, known.acceptance, self._branching).ms_per_token
            * self._alone
        )

    @property
    def _alone(self) -> float:
        """How long target or drafter takes while the other one rests, as a share of how long it takes beside it. Both are assumed
        to be slowed down by the same factor: that by which verifications take longer than in plain decoding."""
        known = self.estimates
        if known.sharers > 1 or min(known.calibrated_ms, known.target_ms) <= 0:
            return 1.0
        slowed = known.target_ms / known.calibrated_ms
        return 1.0 if slowed < _SLOWED else 1 / min(slowed, _MOST_SLOWED)

    def verified(
        self, positions: int, took_ms: float, *, branches: int = 0, sharers: int = 1, waited_ms: float = 0.0
    ) -> None:
        """A verification that read so many positions of the text, and so many on branches. One that read more than a window read
        a prompt: not counted. Of `sharers` generations on one server each waits for others: then `waited_ms` counts, from the
        question to the answer."""
        known = self.estimates
        known.sharers = sharers
        if positions > known.window:
            return
        if sharers > 1:
            one_ms = max(_LEAST_MS, waited_ms - known.position_ms * sharers * (positions + branches - 1))
            known.shared_ms += (one_ms - known.shared_ms) * (_LATENCY_WEIGHT if known.shared_ms > 0 else 1)
            return
        took_ms = max(_LEAST_MS, took_ms)
        if positions + branches == 1 and not (self.drafting and known.calibrated_ms):
            known.calibrated_ms += (took_ms - known.calibrated_ms) * (_LATENCY_WEIGHT if known.calibrated_ms > 0 else 1)
        if known.target_ms <= 0:
            known.target_ms, known.window_ms = took_ms, max(took_ms, known.window_ms)
            return
        factor = 1 + _LATENCY_WEIGHT * (took_ms / max(1e-6, known.cost_ms(positions, branches)) - 1)
        known.target_ms *= factor
        known.window_ms *= factor

    def undrafted(self, tokens: int) -> None:
        """So many tokens were committed while nobody drafted."""
        self._since_look += tokens  # nothing is judged, but speculation may pay again
        known, share = self.estimates, min(1.0, tokens / _UNJUDGED)
        known.accepted += (ASSUMED_ACCEPTANCE * PRIOR_WEIGHT - known.accepted) * share
        known.judged += (PRIOR_WEIGHT - known.judged) * share

    def drafted(self, tokens: int, took_ms: float, *, beside: float = 1.0) -> None:
        """`beside`: the share of this time in which something was verified. What counts is how long it would have taken beside
        verifications."""
        known, took_ms = self.estimates, max(_LEAST_MS * tokens, took_ms)
        took_ms /= beside + (1 - beside) * self._alone
        self._drafted = min(self._drafted + tokens, max(_DRAFTED, tokens))
        known.drafter_ms += (took_ms / max(1, tokens) - known.drafter_ms) * tokens / max(1.0, self._drafted)

    def another_drafter(self, guesser: Guesser) -> None:
        """Another drafter is in use, of which this is known."""
        self._drafters += 1
        self.estimates = replace(
            self.estimates, drafter_ms=guesser.drafter_ms, accepted=guesser.accepted, judged=guesser.judged,
            alternatives=guesser.alternatives, offered=guesser.offered,
        )  # fmt: skip
        self._drafted = _DRAFTED_PRIOR if guesser.drafter_ms > 0 else 0.0

    def judged(self, what: Judged) -> None:
        """Further drafts were compared with the target's own tokens."""
        if what.judged:
            known, kept = self.estimates, (1 - _FORGOTTEN) ** what.judged
            known.accepted = known.accepted * kept + what.accepted
            known.judged = known.judged * kept + what.judged
            kept = (1 - _FORGOTTEN) ** what.offered
            known.alternatives = known.alternatives * kept + what.alternatives
            known.offered = known.offered * kept + what.offered
            self._since_look += what.judged

    def look_again(self) -> None:
        """Circumstances changed: the next look plans again."""
        self._since_look = _LOOK_EVERY

    def retune(self) -> Policy | None:
        """The policy to change to, if another one is better now."""
        return in_one_go(self.retuning())

    def retuning(self) -> Steps[Policy | None]:
        """The same in steps, none of which takes long. Measurements may arrive between two of them."""
        if self._fixed is not None or self._algorithm == "ar" or self._since_look < _LOOK_EVERY:
            return None
        self._since_look = 0
        estimates, circumstances = self._planned_for
        if circumstances == self._circumstances and not _differ(self.estimates, estimates):
            return None
        before = self._policy
        policy = yield from self._choosing()
        return policy if policy != before else None

    def carry_over(self) -> Estimates:
        """For later generations: the latencies, and the acceptance rate as a guess of little weight."""
        known = self.estimates
        return replace(
            known,
            accepted=known.acceptance * PRIOR_WEIGHT,
            judged=PRIOR_WEIGHT,
            alternatives=known.alternative_rate * PRIOR_WEIGHT,
            offered=PRIOR_WEIGHT,
        )

    def _search(self) -> Search:
        if self._algorithm == "ar":
            return Policy.autoregressive()
        known, sp, fixed = self.estimates, self._sp, self._fixed
        target_ms, _ = known.latencies_ms
        if fixed is not None:
            policy = Policy.speculative(fixed) if self._algorithm == "si" else Policy.distributed(fixed, sp)
            policy = with_rows(policy, min(self._most_rows or 1, known.rows))
            return replace(policy, branches=UNLIMITED) if self.may_branch else policy  # drafters may come that branch
        if self._algorithm == "dsi" and (not self.speculates or self._drafts_wait_for_others):
            return Policy.undrafted(sp)
        if target_ms <= 0 or known.drafter_ms <= 0:  # not calibrated: begin as plain decoding does, and measure
            return Policy.speculative(1) if self._algorithm == "si" else Policy.distributed(1, sp)
        policy = yield from self._plan(self._algorithm, max(1, min(sp, self.servers)))
        return replace(policy, sp=1 if self._algorithm == "si" else sp)

    def _plan(self, algorithm: str, sp: int) -> Search:
        return plan(
            PlanInputs.near(
                self.estimates, algorithm, sp, self._branching,
                overlaps=self.overlaps and not self.takes_turns, alone=self._alone,
            )
        )  # fmt: skip

    @property
    def _branching(self) -> Branching:
        known = self.estimates
        return Branching(known.alternative_rate, min(self._most_rows or known.rows, known.rows), known.drafter_row)


def may_branch(lookahead: int | None, rows: int | None) -> bool:
    """Whether verifications may have branches where the user asked for so many: see Tuner."""
    return lookahead is None if rows is None else rows > 1


def _differ(left: Estimates, right: Estimates) -> bool:
    if (left.sharers > 1) != (right.sharers > 1):
        return True
    lefts, rights = ((*known.latencies_ms, known.drafter_ms) for known in (left, right))
    if min(*lefts, *rights) <= 0 or abs(left.acceptance - right.acceptance) > ACCEPTANCE_STEP:
        return True
    if left.rows > 1 and abs(left.alternative_rate - right.alternative_rate) > ALTERNATIVES_STEP:
        return True
    changes = [now / lefts[-1] * rights[-1] / before for now, before in zip(lefts[:-1], rights[:-1], strict=True)]
    return not all(1 / RATIO_STEP < change < RATIO_STEP for change in changes)
