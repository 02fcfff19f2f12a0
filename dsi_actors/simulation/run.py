"""One simulated generation, or many of them: the ideal that a real run is compared with."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from dsi_actors.core import GenerationCore
from dsi_actors.planning.arms import Arms
from dsi_actors.planning.controller import Controller
from dsi_actors.planning.estimates import Estimates
from dsi_actors.results import Trace
from dsi_actors.simulation.discrete_events import DiscreteEventDriver
from dsi_actors.simulation.scripts import AcceptanceScript, LatencyMs, independent, lognormal, recorded, replayed

#: Rows that a simulated drafter's step may have.
MOST_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Latencies and acceptance of a simulated pair of models, and of a second drafter beside the first."""

    target_ms: float
    drafter_ms: float
    acceptance: float
    #: The chance that the drafter's second choice is the target's where its first is not. 0: it drafts chains.
    alternatives: float = 0.0
    #: A second drafter, which drafts at the same time: milliseconds of a token, and the chance that it is right, wherever the
    #: first one is. 0: there is none.
    second_drafter_ms: float = 0.0
    second_acceptance: float = 0.0
    #: Coefficient of variation of all latencies, lognormal.
    jitter: float = 0.0
    #: A cancelled verification goes on to the next multiple of this.
    cancel_ms: float = 0.0
    trace: Trace = field(default_factory=Trace)

    @property
    def estimates(self) -> Estimates:
        """What workers would have measured when they started."""
        return Estimates(
            self.target_ms, self.target_ms, window=1 << 20, drafter_ms=self.drafter_ms, calibrated_ms=self.target_ms,
            rows=MOST_ROWS if self.alternatives else 1,
        )  # fmt: skip  # the timed engine and the paper: a verification takes t, however long it is

    def latencies(self, seed: int) -> tuple[LatencyMs, LatencyMs]:
        """Each from a generator of its own: the n-th verification meets the same draw in every algorithm."""
        trace, of_target, of_drafter = self.trace, random.Random(2 * seed), random.Random(2 * seed + 1)
        target = recorded(trace.target_ms) if trace.target_ms else lognormal(self.target_ms, self.jitter, of_target)
        drafter = (
            recorded(trace.drafter_ms) if trace.drafter_ms else lognormal(self.drafter_ms, self.jitter, of_drafter)
        )
        return target, drafter

    def script(self, seed: int, first: int) -> AcceptanceScript:
        """What target and drafter say, drawn from `seed`; positions before `first` are the prompt."""
        return AcceptanceScript(self.accepted(seed, first), independent(self.alternatives, seed, draw=1))

    def second_drafter(self, seed: int, draws: int) -> list[tuple[AcceptanceScript, LatencyMs]]:
        """What it says and how long it takes, as DiscreteEventDriver has it; empty if there is none."""
        if not self.second_acceptance:
            return []
        latency_ms = lognormal(self.second_drafter_ms, self.jitter, random.Random(f"second {seed}"))
        return [(AcceptanceScript(independent(self.second_acceptance, draws, draw=2)), latency_ms)]

    def accepted(self, seed: int, first: int) -> Callable[[int], bool]:
        return replayed(self.trace.accepted, first) if self.trace.accepted else independent(self.acceptance, seed)


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """Names as in GenerationReport, but `ms_per_token` counts from the start: total time / tokens."""

    algorithm: str
    sp: int
    lookahead: int
    first_wait: int
    rows: int
    tokens: int
    ms_per_token: float
    first_token_ms: float
    acceptance_rate: float
    alternative_rate: float
    target_forwards: int
    wasted_target_forwards: int
    target_busy_ms: float
    drafter_busy_ms: float


def simulate_once(
    scenario: Scenario, controller: Controller, *, tokens: int, seed: int, draws: int | None = None, prompt_length: int = 1,
    check: bool = False,
) -> SimulatedRun:  # fmt: skip
    """One generation of `tokens` tokens under the controller's policies. `draws`: the seed of acceptance, if it is another."""
    draws = seed if draws is None else draws
    others = scenario.second_drafter(seed, draws)
    controller.tuner.together = bool(others)
    core = GenerationCore([0] * prompt_length, policy=controller.begin(), max_tokens=tokens)
    target_ms, drafter_ms = scenario.latencies(seed)
    driver = DiscreteEventDriver(
        core,
        scenario.script(draws, prompt_length),
        target_ms=target_ms,
        drafter_ms=drafter_ms if core.policy.algorithm != "ar" else None,
        servers=core.policy.sp,
        others=others,
        controller=controller,
        cancel_ms=scenario.cancel_ms,
        check=check,
    )
    driver.run()
    counters, policy = core.counters, core.policy
    return SimulatedRun(
        algorithm=policy.algorithm,
        sp=policy.sp,
        lookahead=policy.lookahead if policy.max_ahead else 0,
        first_wait=policy.first_wait,
        rows=policy.rows,
        tokens=tokens,
        ms_per_token=driver.now_ms / tokens,
        first_token_ms=driver.commits[0][0],
        acceptance_rate=counters.accepted / counters.judged if counters.judged else 0.0,
        alternative_rate=counters.alternatives / counters.offered if counters.offered else 0.0,
        target_forwards=counters.verifications,
        wasted_target_forwards=counters.verifications - counters.useful_verifications,
        target_busy_ms=driver.target_busy_ms,
        drafter_busy_ms=driver.drafter_busy_ms,
    )


def simulate(
    scenario: Scenario, algorithm: str, *, sp: int, lookahead: int | None, tokens: int, repeats: int, seed: int,
    calibrated: bool = True, rows: int | None = None,
) -> list[SimulatedRun]:  # fmt: skip
    """Generation after generation, each beginning with what the last one taught. `lookahead` None: chosen. `rows`: see Tuner.

    Seeds are seed, seed + 1, ...; `calibrated` False begins without any latency known."""
    estimates = scenario.estimates if calibrated else Estimates(window=1 << 20, rows=scenario.estimates.rows)
    runs: list[SimulatedRun] = []
    arms = Arms()
    for repeat in range(repeats):
        servers = 1 if algorithm in ("ar", "si") else sp
        controller = Controller.with_one_drafter(algorithm, servers, lookahead, estimates, arms, rows=rows)
        runs.append(simulate_once(scenario, controller, tokens=tokens, seed=seed + repeat))
        controller.ended()
        estimates = controller.tuner.carry_over()
    return runs


def mean_of(runs: Sequence[SimulatedRun]) -> dict[str, float | int | str]:
    """One row for all: means of what varies."""
    row = asdict(runs[-1])
    for name, value in row.items():
        if name not in ("algorithm", "sp", "lookahead", "first_wait", "rows"):
            row[name] = (
                statistics.fmean(getattr(run, name) for run in runs) if isinstance(value, float | int) else value
            )
    return row
