"""What is known of the workers before a generation begins: what they measured at their start, and what generations that ended
have learnt of them since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from dsi_actors.actors.pacing import Pacing, can_overlap
from dsi_actors.actors.root import Root
from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_actors.config import NGRAM, Algorithm, Config
from dsi_actors.planning.drafters import DrafterChoice, Drafters, Pays, always, guesser_of, unjudged
from dsi_actors.planning.pace import Pace
from dsi_actors.planning.tuner import Estimates, Tuner, chooses
from dsi_protocol import Ready


class Knowledge:
    """Of one orchestrator. `running` tells how many generations there are."""

    def __init__(self, config: Config, running: Callable[[], int]) -> None:
        self._config = config
        #: What the last generation with a drafter taught about latencies and acceptance.
        self._learned: Estimates | None = None
        self._pace = Pace(running)
        self._drafters = Drafters()

    def estimates(self, root: Root) -> Estimates:
        """What the next generation begins with."""
        return self._of_drafter(root, self._first_drafter(root, always))

    def _of_drafter(self, root: Root, kind: str) -> Estimates:
        estimates = self._learned
        if estimates is None:
            estimates = _as_measured([worker.ready for worker in root.of_role("target") if worker.ready is not None])
        latencies_us = [worker.ready.latency_us for worker in _drafters_of(root, kind) if worker.ready is not None]
        if not latencies_us:
            return estimates
        guesser = self._drafters.guesser(kind) or unjudged(latencies_us[0] / 1e3)
        return replace(estimates, drafter_ms=guesser.drafter_ms, accepted=guesser.accepted, judged=guesser.judged)

    def pacing(
        self, root: Root, algorithm: Algorithm, sp: int | None, lookahead: int | None, *, position: int
    ) -> Pacing:
        """Of a generation that begins now, at the end of its prompt; `lookahead` None lets it be chosen. Its tuner is to
        choose a policy next."""
        self._pace.generation_begins()
        pays = (lambda kind: self._pace.pays(kind, position)) if chooses(algorithm, lookahead) else always
        kind = self._first_drafter(root, pays)
        targets = root.of_role("target")
        sp = sp or self._config.sp or len(targets)
        overlaps = can_overlap(targets, _drafters_of(root, kind))
        tuner = Tuner(algorithm, sp, lookahead, self._of_drafter(root, kind), self._pace, overlaps=overlaps)
        tuner.drafter_is(kind, computes=kind != NGRAM)
        tuner.position = position
        tuner.servers = min(sp, max(1, len(targets)))
        tuner.estimates.sharers = -(-(len(root.generations) + 1) // max(1, len(targets)))
        return Pacing(tuner, DrafterChoice(self._drafters, kind))

    def learn(self, estimates: Estimates, drafter: str) -> None:
        """From a generation that ended, with the kind of its last drafter, if it had one."""
        self._learned = estimates
        if drafter:
            self._drafters.learn(drafter, guesser_of(estimates))

    def measured_alone(self, root: Root, target_ms: float) -> None:
        """A verification of one position takes so long while nothing else computes. Wider ones were
        measured among as many others at the start."""
        known = self.estimates(root)
        scale = target_ms / known.target_ms
        self._learned = replace(
            known,
            target_ms=target_ms,
            calibrated_ms=target_ms,
            window_ms=known.window_ms * scale,
            position_ms=known.position_ms * scale,
        )

    def _first_drafter(self, root: Root, pays: Pays) -> str:
        """The kind that the next generation begins with."""
        kinds = {worker.kind for worker in root.of_role("drafter")}
        named = [kind for kind in self._config.drafters if kind in kinds]
        return self._drafters.first([*named, *sorted(kinds.difference(named))], pays)


def _drafters_of(root: Root, kind: str) -> list[WorkerHandle]:
    return [worker for worker in root.of_role("drafter") if worker.kind == kind]


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
