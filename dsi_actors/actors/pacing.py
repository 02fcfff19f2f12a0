"""What a generation learns of its workers while it runs, and what it changes by that: its policy, its drafter."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_actors.config import NGRAM
from dsi_actors.planning.drafters import DrafterChoice, guesser_of, unjudged
from dsi_actors.planning.tuner import Estimates, Tuner


class Pacing:
    """Of one generation."""

    def __init__(self, tuner: Tuner, choice: DrafterChoice) -> None:
        self.tuner = tuner
        self._choice = choice
        #: Drafts from this position on are the present drafter's own.
        self._own_from = 0

    @property
    def kind(self) -> str:
        """Of the drafter in use, or to begin with."""
        return self._choice.kind

    @property
    def estimates(self) -> Estimates:
        return self.tuner.estimates

    def servers_are(self, servers: Collection[WorkerHandle], drafter: WorkerHandle | None) -> None:
        self.tuner.servers = len(servers)
        self.tuner.overlaps = can_overlap(servers, [] if drafter is None else [drafter])

    def drafter_is(self, worker: WorkerHandle, servers: Collection[WorkerHandle], position: int) -> None:
        """From now on; what is drafted before `position` is another one's."""
        if worker.kind != self._choice.kind:
            latency_ms = worker.ready.latency_us / 1e3 if worker.ready is not None else 0.0
            known = self._choice.drafters.guesser(worker.kind) or unjudged(latency_ms)
            self.tuner.another_drafter(known.drafter_ms, known.accepted, known.judged)
        self._choice.use(worker.kind)
        self.tuner.drafter_is(worker.kind, computes=worker.kind != NGRAM)
        self._own_from = position
        self.servers_are(servers, worker)

    def drafter_left(self) -> None:
        """It may come back."""
        self._choice.drafters.learn(self._choice.kind, guesser_of(self.tuner.carry_over()))

    def judged(self, accepted: int, judged: int, committed: int) -> None:
        """So many further drafts were compared with the target's own, which is known up to `committed`."""
        if committed > self._own_from:
            self.tuner.judged(accepted, judged)
        if accepted < judged:  # what had been drafted beyond is dropped, whoever drafted it
            self._own_from = min(self._own_from, committed)

    def committed(
        self, tokens: int, took_ms: float, *, committed: int, drafts: bool, kinds: Sequence[str]
    ) -> str | None:
        """So many tokens, so long after the ones before (0 where that says nothing), up to the position `committed`. `kinds`:
        of drafters that are there. Returns another one to ask for."""
        self.tuner.position = committed
        if self.tuner.drafting and not drafts:
            return None  # nobody drafts: that is neither way
        choice, change = self._choice, None
        if len(kinds) > 1 and drafts and took_ms > 0:
            if not self.tuner.drafting:
                choice.passed(tokens)
            elif committed > self._own_from:
                choice.committed(tokens, took_ms, self.tuner.estimates.promised_ms)
            change = choice.change(kinds, self.tuner.would_pay)
            if self.tuner.drafting and not choice.settled(kinds, self.tuner.would_pay):
                return change  # that it is slow says nothing of speculation
        self.tuner.paced(tokens, took_ms)
        return change

    def ended(self) -> None:
        self._choice.ended()
        self.tuner.ended()


def can_overlap(targets: Collection[WorkerHandle], drafters: Collection[WorkerHandle]) -> bool:
    """Whether some drafter can compute while these targets do. Processes on one GPU take turns, and lose time by it."""
    taken = {worker.gpu for worker in targets} - {""}
    return not drafters or any(worker.gpu not in taken for worker in drafters)
