"""What is known of the workers before a generation begins: what they measured at their start, and what earlier
generations learnt.

What generations learn is kept by context (arms.py), since a forward for a long text, or one that is shared, takes
longer: a generation begins with what others learnt under the conditions that are most like its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from dsi_actors.config import NGRAM, Algorithm, Config
from dsi_actors.core.policy import UNLIMITED
from dsi_actors.planning.arms import TOGETHER, ArmChoice, Arms, Context, arms_of, chooses_arms
from dsi_actors.planning.controller import Controller
from dsi_actors.planning.estimates import Estimates, Guesser
from dsi_actors.planning.tuner import Tuner, may_branch
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import Ready

Learnt = TypeVar("Learnt", Estimates, Guesser)

#: A generation counts for what it learnt in full from so many tokens on.
_FULL_WEIGHT = 64
#: Texts that are this much shorter or longer (powers of two) differ as much as one running generation from two.
_LENGTHS_FOR_A_LOAD = 3
#: Behind all other ranks.
_LAST = 1 << 20


class Knowledge:
    """Of one orchestrator. `of_role` gives the workers that are ready, `running` tells how many generations there are."""

    def __init__(
        self, config: Config, of_role: Callable[[str], Sequence[WorkerHandle]], running: Callable[[], int]
    ) -> None:
        self._config = config
        self._of_role = of_role
        self._running = running
        self._arms = Arms(running)
        #: Of the target servers, by context.
        self._learned: dict[Context, Estimates] = {}
        #: Of drafters, by kind (TOGETHER: of all of them) and context.
        self._guessers: dict[str, dict[Context, Guesser]] = {}
        #: See `rank`.
        self._ranks = {kind: rank for rank, kind in enumerate(sorted(config.drafters, key=NGRAM.__eq__))}

    def estimates(self, position: int = 0) -> Estimates:
        """What the next generation begins with, for a text of so many tokens."""
        choice = ArmChoice(self._arms, left_to_us=False)
        choice.position = position
        return self._of_drafter(choice.first(self._kinds()), self._arms.context(position))

    def controller(
        self, algorithm: Algorithm, sp: int | None, lookahead: int | None, *, position: int, rows: int | None = None
    ) -> Controller:
        """Of a generation that begins now, at the end of its prompt; `lookahead` None lets it be chosen. `rows`: see Tuner."""
        self._arms.generation_begins()
        choice = ArmChoice(self._arms, left_to_us=chooses_arms(algorithm, lookahead), never_left=(NGRAM,))
        choice.position = position
        targets = self._of_role("target")
        sp = sp or self._config.sp or len(targets)
        kind = choice.first(arms_of(self._kinds(), trees=may_branch(lookahead, rows) and rows_of(targets) > 1))
        choice.use(kind)
        known, kinds = self._of_drafter(kind, self._arms.context(position)), self._kinds_of(kind)
        known.rows = rows_of_trees(targets, [worker for each in kinds for worker in self._drafters(each)])
        overlaps = can_overlap(targets, self._drafters(kinds[0]))
        tuner = Tuner(algorithm, sp, lookahead, known, rows=rows, overlaps=overlaps)
        tuner.servers = min(sp, max(1, len(targets)))
        tuner.estimates.sharers = -(-(self._running() + 1) // max(1, len(targets)))
        return Controller(tuner, choice)

    def rank(self, kind: str) -> int:
        """Of drafters that draft together the one with the lowest rank leads (core/drafting.py): in the order of the
        configuration, others behind. Prompt lookup comes last: it has no idea most of the time, and a plan is made for the
        leader."""
        return self._ranks.setdefault(kind, len(self._ranks)) if kind != NGRAM else _LAST

    def guesser(self, kinds: Sequence[str], position: int, latency_ms: float) -> Guesser:
        """What is known of a drafter, or of several together, the leader first, which measured this latency at its start."""
        return self._guesser(kinds, self._arms.context(position), latency_ms)

    def learn(self, estimates: Estimates, drafter: str, position: int, tokens: int) -> None:
        """From a generation of so many tokens that ended at `position`, with the kind of its last drafter, if it had one."""
        context = self._arms.context(position)
        before = self._learned.get(context)
        share = min(1.0, tokens / _FULL_WEIGHT)
        self._learned[context] = estimates if before is None else before.moved_to(estimates, share)
        if drafter:
            self._guessers.setdefault(drafter, {})[context] = Guesser.of(estimates)

    def measured_alone(self, target_ms: float) -> None:
        """A verification of one position takes so long while nothing else computes. Wider ones were
        measured among as many others at the start."""
        known = self.estimates()
        scale = target_ms / known.target_ms
        self._learned[self._arms.context(0)] = replace(
            known,
            target_ms=target_ms,
            calibrated_ms=target_ms,
            window_ms=known.window_ms * scale,
            position_ms=known.position_ms * scale,
        )

    def _of_drafter(self, kind: str, context: Context) -> Estimates:
        """Of several together: the leader's, as far as nothing is known of all of them."""
        estimates = _nearest(self._learned, context)
        if estimates is None:
            estimates = _as_measured([worker.ready for worker in self._of_role("target") if worker.ready is not None])
        kinds = self._kinds_of(kind)
        latencies_us = [worker.ready.latency_us for worker in self._drafters(kinds[0]) if worker.ready is not None]
        if not latencies_us:
            return replace(estimates)
        guesser = self._guesser(kinds, context, latencies_us[0] / 1e3)
        return replace(
            estimates, drafter_ms=guesser.drafter_ms, accepted=guesser.accepted, judged=guesser.judged,
            alternatives=guesser.alternatives, offered=guesser.offered, drafter_row=self._row_share(kinds[0]),
        )  # fmt: skip

    def _guesser(self, kinds: Sequence[str], context: Context, latency_ms: float) -> Guesser:
        together = _nearest(self._guessers.get(TOGETHER, {}), context) if len(kinds) > 1 else None
        return together or _nearest(self._guessers.get(kinds[0], {}), context) or Guesser.unjudged(latency_ms)

    def _row_share(self, kind: str) -> float:
        """What a further row adds to a step of this drafter, as a share of the step."""
        shares = [
            max(0.0, (ready.window_latency_us - ready.latency_us) / ready.latency_us / (ready.rows - 1))
            for worker in self._drafters(kind)
            if (ready := worker.ready) is not None and ready.latency_us and ready.rows > 1
        ]
        return max(shares, default=0.0)

    def _kinds(self) -> list[str]:
        """Of the drafters that are there, in the order of the configuration."""
        kinds = {worker.kind for worker in self._of_role("drafter")}
        named = [kind for kind in self._config.drafters if kind in kinds]
        return [*named, *sorted(kinds.difference(named))]

    def _kinds_of(self, arm: str) -> list[str]:
        """The leader first."""
        return sorted(self._kinds(), key=self.rank) if arm == TOGETHER else [arm]

    def _drafters(self, kind: str) -> list[WorkerHandle]:
        return [worker for worker in self._of_role("drafter") if worker.kind == kind]


def can_overlap(targets: Collection[WorkerHandle], drafters: Collection[WorkerHandle]) -> bool:
    """Whether some drafter can compute while these targets do. Processes on one GPU take turns, and lose time by it."""
    taken = {gpu for worker in targets for gpu in worker.gpus}
    return not drafters or any(taken.isdisjoint(worker.gpus) for worker in drafters)


def rows_of(workers: Collection[WorkerHandle]) -> int:
    """Rows of a tree that all of these take: 1 is a chain."""
    return max(1, min((worker.ready.rows for worker in workers if worker.ready is not None), default=1))


def rows_of_trees(targets: Collection[WorkerHandle], drafters: Collection[WorkerHandle]) -> int:
    """Rows that a step of some drafter may have: its trees are verified by all of these targets."""
    most = max((rows_of([drafter]) for drafter in drafters), default=UNLIMITED)
    return min(rows_of(targets) if targets or not drafters else UNLIMITED, most)


def _nearest(by_context: dict[Context, Learnt], context: Context) -> Learnt | None:
    """What was learnt in the context that is most like this one."""

    def distance(other: Context) -> int:
        return _LENGTHS_FOR_A_LOAD * abs(other.load - context.load) + abs(other.length - context.length)

    return by_context[min(by_context, key=distance)] if by_context else None


def _as_measured(targets: Sequence[Ready]) -> Estimates:
    target_ms = max((ready.latency_us for ready in targets), default=0) / 1e3
    return Estimates(
        target_ms=target_ms,
        calibrated_ms=target_ms,
        window_ms=max((ready.window_latency_us for ready in targets), default=0) / 1e3,
        window=max(1, min((ready.window for ready in targets), default=1)),
        position_ms=max((_position_us(ready) for ready in targets), default=0.0) / 1e3,
    )


def _position_us(ready: Ready) -> float:
    """What each further position adds to a forward for several generations."""
    positions = ready.slots * ready.window - 1
    return max(0.0, (ready.batch_latency_us - ready.latency_us) / positions) if positions > 0 else 0.0
