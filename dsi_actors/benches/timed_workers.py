"""Real processes, sockets and clock, made-up models: the timed engine, and the simulator's ideal beside each run."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from dsi_actors.config import Algorithm, Config, Sampling
from dsi_actors.errors import ConfigError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.planning.controller import Controller
from dsi_actors.planning.estimates import Estimates, flat
from dsi_actors.planning.expectation import Branching
from dsi_actors.planning.search import best_si
from dsi_actors.results import GenerationReport
from dsi_actors.simulation.run import MOST_ROWS, Scenario, simulate_once

_PROMPT = (1,)
_SEED = 7
_MOST_GPUS = 64


@dataclass(frozen=True, slots=True)
class Way:
    """What to run: AR, SI or DSI, on so many target servers. `lookahead` None: chosen by the policy."""

    algorithm: Algorithm
    sp: int = 1
    lookahead: int | None = None
    #: The most rows of a drafting step: 1 drafts chains, None lets it be chosen.
    rows: int | None = None

    def __str__(self) -> str:
        if self.algorithm == "ar":
            return "AR"
        servers = f" SP={self.sp}" if self.algorithm == "dsi" else ""
        chain = " chain" if self.rows == 1 and self.lookahead is None else ""
        return f"{self.algorithm.upper()}{servers}" + (f" k={self.lookahead}" if self.lookahead else "") + chain


@dataclass(frozen=True, slots=True)
class Run:
    """Milliseconds per token from the start of the generation to its last token, real and simulated."""

    ms_per_token: float
    ideal_ms_per_token: float
    report: GenerationReport
    output: list[int]


class TimedBench:
    """The workers for one scenario. Use as an async context manager."""

    def __init__(self, scenario: Scenario, *, sp: int, log_level: Any) -> None:
        self.scenario = scenario
        common = {"seed": _SEED, "jitter": scenario.jitter}
        self._orchestrator = Orchestrator(
            Config(
                engine="timed", sp=sp, devices=("cpu",), log_level=log_level,
                target_options={"latency_ms": scenario.target_ms, **common},
                drafter_options={
                    "latency_ms": scenario.drafter_ms, "acceptance": scenario.acceptance,
                    "alternatives": scenario.alternatives, **common,
                },
            )
        )  # fmt: skip

    async def __aenter__(self) -> TimedBench:
        await self._orchestrator.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._orchestrator.__aexit__(kind, error, traceback)

    async def run(self, way: Way, *, tokens: int, seed: int) -> Run:
        known = self._orchestrator.estimates
        ideal_ms = self._ideal_ms(way, known, tokens=tokens, seed=seed)
        lookahead: int | Literal["auto"] = "auto" if way.lookahead is None else way.lookahead
        output: list[int] = []
        async with self._orchestrator.generate(
            _PROMPT,
            Sampling(max_tokens=tokens, seed=seed),
            algorithm=way.algorithm,
            sp=way.sp,
            lookahead=lookahead,
            rows=way.rows,
        ) as stream:
            async for chunk in stream:
                output += chunk
            report = await stream.report()
        await asyncio.sleep(0.01)  # what was cancelled has ended everywhere
        return Run(report.total_ms / tokens, ideal_ms, report, output)

    def _ideal_ms(self, way: Way, known: Estimates, *, tokens: int, seed: int) -> float:
        """The same draws of acceptance, the same policy from the same estimates, and nothing but the models takes time."""
        runs = 10 if self.scenario.jitter else 1  # latencies are drawn anew each time
        times_ms: list[float] = []
        for latency_seed in range(runs):
            controller = Controller.with_one_drafter(way.algorithm, way.sp, way.lookahead, known, rows=way.rows)
            scenario = self.scenario
            simulated = simulate_once(
                scenario, controller, tokens=tokens, seed=latency_seed, prompt_length=len(_PROMPT), draws=_SEED + seed
            )
            times_ms.append(simulated.ms_per_token)
        return statistics.fmean(times_ms)


def best_si_way(scenario: Scenario, *, chain: bool = False) -> Way:
    """SI with the lookahead, and the rows of a tree, that are best for this scenario's true latencies and chances: known to
    nobody else. `chain`: without a tree."""
    branching = Branching(scenario.alternatives, MOST_ROWS if scenario.alternatives and not chain else 1)
    policy = best_si(flat(scenario.target_ms), scenario.drafter_ms, scenario.acceptance, branching)
    return Way("si", 1, policy.lookahead, policy.rows)


async def alternate(
    bench: TimedBench, ways: Iterable[Way], *, tokens: int, repeats: int, seed: int
) -> dict[Way, list[Run]]:
    """Each way once, then all again: what disturbs the machine disturbs all of them. Another draw in each repeat.

    Raises ConfigError if two ways gave different text."""
    ways = list(dict.fromkeys(ways))
    runs: dict[Way, list[Run]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways:
            runs[way].append(await bench.run(way, tokens=tokens, seed=seed + repeat))
            if runs[way][-1].output != runs[ways[0]][-1].output:
                raise ConfigError(f"{way} gave another text than {ways[0]}: this is a bug")
    return runs


def row_of(scenario: Scenario, way: Way, runs: Sequence[Run]) -> dict[str, Any]:
    """Medians. `ratio_to_ideal` is the median of the ratios of each run to its own ideal."""
    reports = [run.report for run in runs]
    return {
        "algorithm": way.algorithm,
        "sp": way.sp,
        "lookahead": way.lookahead or reports[-1].lookahead,
        "chosen": way.lookahead is None and way.algorithm != "ar",
        "target_ms": scenario.target_ms,
        "drafter_ms": scenario.drafter_ms,
        "acceptance": scenario.acceptance,
        "alternatives": scenario.alternatives,
        "rows": way.rows,
        "jitter": scenario.jitter,
        "tokens": reports[0].tokens,
        "repeats": len(runs),
        "ms_per_token": statistics.median(run.ms_per_token for run in runs),
        "fastest_ms_per_token": min(run.ms_per_token for run in runs),
        "slowest_ms_per_token": max(run.ms_per_token for run in runs),
        "ideal_ms_per_token": statistics.median(run.ideal_ms_per_token for run in runs),
        "ratio_to_ideal": statistics.median(run.ms_per_token / run.ideal_ms_per_token for run in runs),
        "acceptance_rate": statistics.fmean(report.acceptance_rate for report in reports),
        "alternative_rate": statistics.fmean(report.alternative_rate for report in reports),
        "target_forwards": statistics.fmean(report.target_forwards for report in reports),
        "wasted_target_forwards": statistics.fmean(report.wasted_target_forwards for report in reports),
        "target_busy_ms": statistics.fmean(report.target_busy_ms for report in reports),
        "drafter_busy_ms": statistics.fmean(report.drafter_busy_ms for report in reports),
    }


def ratio(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """How much longer `runs` took than `others`: the median over repeats, each with its own draw."""
    return statistics.median(run.ms_per_token / other.ms_per_token for run, other in zip(runs, others, strict=True))


def add_scenario_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target-ms", type=float, default=20.0, metavar="T", help="a verification")
    parser.add_argument("--drafter-ms", type=float, default=4.0, metavar="D", help="a drafted token")
    parser.add_argument("--acceptance", type=float, default=0.8, metavar="A", help="chance that a draft is right")
    parser.add_argument(
        "--alternatives", type=float, default=0.0, metavar="H",
        help="chance that the drafter's second choice is right where its first is not; 0 drafts chains (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--jitter", type=float, default=0.0, metavar="CV", help="coefficient of variation of latencies, lognormal"
    )


def scenario_from(arguments: argparse.Namespace, **more: Any) -> Scenario:
    """Raises ConfigError."""
    for name in ("target_ms", "drafter_ms", "jitter"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be a number of at least 0, not {value:g}")
    if arguments.target_ms == 0:
        raise ConfigError("--target-ms must be above 0")
    for name in ("acceptance", "alternatives"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise ConfigError(f"--{name} must lie in [0, 1], not {getattr(arguments, name):g}")
    return Scenario(
        target_ms=arguments.target_ms, drafter_ms=arguments.drafter_ms, acceptance=arguments.acceptance,
        alternatives=arguments.alternatives, jitter=arguments.jitter, **more,
    )  # fmt: skip


def check_sizes(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ConfigError."""
    for name in names:
        size = getattr(arguments, name)
        if size < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {size}")
        if name in ("sp", "gpus") and size > _MOST_GPUS:
            raise ConfigError(f"--{name} {size}: more than {_MOST_GPUS} devices for one request make no sense")
