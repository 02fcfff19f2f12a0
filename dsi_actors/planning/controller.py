"""What one generation learns of its workers while it runs, and what it changes by that: its policy and its drafter. Pure.

The tuner plans how to speculate, from latencies and acceptance; the choice of arms says whether to speculate at all,
and with which drafter, from what tokens took. The orchestrator and the simulator drive this same class, as they do
the core."""

from __future__ import annotations

from collections.abc import Sequence

from dsi_actors.core import Policy
from dsi_actors.core.actions import Judged
from dsi_actors.planning.arms import IN_TURNS, PLAIN, TOGETHER, ArmChoice, Arms, chooses_arms
from dsi_actors.planning.estimates import Estimates, Guesser
from dsi_actors.planning.search import Steps
from dsi_actors.planning.tuner import Tuner


class Controller:
    """Of one generation."""

    def __init__(self, tuner: Tuner, choice: ArmChoice) -> None:
        self.tuner = tuner
        self.choice = choice
        #: Drafts from this position on are the present drafter's own.
        self._own_from = 0
        tuner.together = choice.drafter == TOGETHER
        self._decide()

    @staticmethod
    def with_one_drafter(
        algorithm: str, sp: int, lookahead: int | None, estimates: Estimates, arms: Arms | None = None,
        *, rows: int | None = None,
    ) -> Controller:  # fmt: skip
        """Where there is one drafter for all generations, as in the simulator."""
        choice = ArmChoice(arms or Arms(), "drafter", left_to_us=chooses_arms(algorithm, lookahead))
        return Controller(Tuner(algorithm, sp, lookahead, estimates, rows=rows), choice)

    @property
    def drafter(self) -> str:
        """The kind in use, or to begin with; TOGETHER: all of them."""
        return self.choice.drafter

    @property
    def estimates(self) -> Estimates:
        return self.tuner.estimates

    def begin(self) -> Policy:
        return self.tuner.choose()

    def set_servers(self, number: int, *, overlaps: bool | None, rows: int) -> None:
        """So many target servers are there. `overlaps`: the drafter can compute while they do; None: one of both is not there.
        `rows`: of a tree, that all of these workers take."""
        self.tuner.servers = number
        if overlaps is not None:
            self.tuner.overlaps = overlaps
        self.tuner.estimates.rows = rows

    def drafter_joined(self, kind: str, guesser: Guesser, position: int) -> None:
        """This drafter is there (TOGETHER: several); what is drafted before `position` is another one's. `guesser`: what is known
        of it, if it is not the one that was planned with."""
        if kind != self.choice.drafter:
            self.tuner.another_drafter(guesser)
        self.choice.use(kind)
        self.tuner.together = kind == TOGETHER
        self._own_from = position
        self._decide()
        self.tuner.look_again()

    def judged(self, what: Judged, committed: int) -> None:
        """Drafts were compared with the target's own tokens, which are known up to `committed`."""
        if committed > self._own_from:
            self.tuner.judged(what)
            self.choice.judged(what.judged - what.accepted - what.alternatives, what.accepted + what.alternatives)
        if what.accepted < what.judged:  # what had been drafted beyond is dropped, whoever drafted it
            self._own_from = min(self._own_from, committed)

    def committed(
        self, tokens: int, took_ms: float, position: int, *, drafts: bool, reads: bool = False,
        drafters: Sequence[str] = (),
    ) -> str | None:  # fmt: skip
        """`tokens` tokens, up to `position`, `took_ms` after the ones before (0 where that says nothing). `drafts`: a drafter is
        there; `reads`: one that was asked has yet to read the text; `drafters`: the kinds that could be had, and TOGETHER if they
        could be had at the same time. Returns another one to ask for, if that is better."""
        tuner, choice = self.tuner, self.choice
        choice.position = position
        if took_ms <= 0 or (tuner.drafting and (reads or not drafts)):
            return None  # nobody drafts though somebody should: that is neither arm
        if not tuner.drafting and choice.left_to_us:
            tuner.undrafted(tokens)
        if not tuner.drafting or position > self._own_from:
            arm = PLAIN
            if tuner.drafting:
                arm = choice.drafter + IN_TURNS if tuner.in_turns else choice.drafter
            choice.committed(tokens, took_ms, arm=arm, promised_ms=self.estimates.promised_ms)
        another = choice.another(drafters) if drafts and len(drafters) > 1 else None
        self._decide()
        return another

    def retune(self) -> Policy | None:
        """The policy to change to, if another one is better now."""
        return self.tuner.retune()

    def retuning(self) -> Steps[Policy | None]:
        """The same in steps."""
        return self.tuner.retuning()

    def ended(self) -> None:
        self.choice.ended()

    def _decide(self) -> None:
        if self.tuner.overlaps:
            self.choice.settle_turns(self.tuner.expected_in_turns_ms)
        self.tuner.takes_turns = self.choice.takes_turns
        self.tuner.speculates, self.tuner.among_others = self.choice.speculates, self.choice.among_others
