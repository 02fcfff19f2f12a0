"""`dsi-actors bench never-slower`: is DSI ever slower than plain decoding, or than the best SI?

A grid of acceptance rates, drafter latencies (as shares of the target's) and numbers of target servers, with and without
jitter, with and without alternatives beside the drafts. Each cell is run with real processes and messages, and in the
simulator. The best SI knows the true chances; DSI must find them out. DSI / AR and DSI / best SI are medians over repeats, each
with its own draw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from dsi_actors.benches.timed_workers import TimedBench, Way, alternate, best_si_way, check_sizes, ratio
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.numbers import numbers
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.planning.expectation import equation_1_servers
from dsi_actors.simulation.run import Scenario, SimulatedRun, simulate

_SIMULATED_TOKENS = 100


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("never-slower", help="DSI against AR and the best SI on a grid", description=__doc__)
    parser.add_argument("--target-ms", type=float, default=20.0, metavar="T", help="default %(default)s")
    parser.add_argument("--acceptances", default="0,0.25,0.5,0.75,0.9,1", metavar="LIST", help="default %(default)s")
    parser.add_argument("--shares", default="0.05,0.3,0.7,1.2", metavar="LIST", help="drafter / target latency")
    parser.add_argument("--sp", default="1,2,4", metavar="LIST", help="target servers (default %(default)s)")
    parser.add_argument("--jitters", default="0,0.2", metavar="LIST", help="coefficients of variation")
    parser.add_argument(
        "--alternatives", default="0", metavar="LIST",
        help="chances that a second choice is right where the first is not; 0 drafts chains (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=50, metavar="S", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="default %(default)s")
    parser.add_argument("--simulations", type=int, default=100, metavar="R", help="runs of each in the simulator")
    parser.add_argument("--simulate-only", action="store_true", help="no processes, no wall clock")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    check_sizes(arguments, "tokens", "repeats", "simulations")
    acceptances = numbers(arguments.acceptances, "--acceptances", float, 0.0, 1.0)
    shares = numbers(arguments.shares, "--shares", float, 0.0, 100.0)
    servers = numbers(arguments.sp, "--sp", int, 1, 64)
    jitters = numbers(arguments.jitters, "--jitters", float, 0.0, 10.0)
    chances = numbers(arguments.alternatives, "--alternatives", float, 0.0, 1.0)
    if not 0 < arguments.target_ms < 1e6:
        raise ConfigError(f"--target-ms must be above 0, not {arguments.target_ms:g}")
    rows: list[dict[str, Any]] = []
    for jitter, share, acceptance, chance in itertools.product(jitters, shares, acceptances, chances):
        scenario = Scenario(
            target_ms=arguments.target_ms, drafter_ms=share * arguments.target_ms, acceptance=acceptance,
            alternatives=chance, jitter=jitter,
        )  # fmt: skip
        cells = {sp: _simulated(scenario, sp, arguments.simulations) for sp in servers}
        if not arguments.simulate_only:
            for sp, measured in (await _measured(scenario, servers, arguments)).items():
                cells[sp] |= measured
        rows += cells.values()
        sys.stderr.write(
            f"jitter {jitter:g}, d/t {share:g}, acceptance {acceptance:g}, alternatives {chance:g}: done\n"
        )
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    _print(rows, servers)
    return 0


async def _measured(
    scenario: Scenario, servers: Sequence[int], arguments: argparse.Namespace
) -> dict[int, dict[str, Any]]:
    ar, si = Way("ar"), best_si_way(scenario)
    async with TimedBench(scenario, sp=max(servers), log_level=arguments.log_level) as bench:
        ways = [ar, si, *(Way("dsi", sp) for sp in servers)]
        runs = await alternate(bench, ways, tokens=arguments.tokens, repeats=arguments.repeats, seed=0)
    return {
        sp: {
            "ms_per_token": statistics.median(run.ms_per_token for run in runs[Way("dsi", sp)]),
            "ar_ms_per_token": statistics.median(run.ms_per_token for run in runs[ar]),
            "si_ms_per_token": statistics.median(run.ms_per_token for run in runs[si]),
            "ratio_to_ar": ratio(runs[Way("dsi", sp)], runs[ar]),
            "ratio_to_best_si": ratio(runs[Way("dsi", sp)], runs[si]),
        }
        for sp in servers
    }


def _simulated(scenario: Scenario, sp: int, repeats: int) -> dict[str, Any]:
    """Means over many draws; and in how many runs DSI took longer than AR though Equation 1 holds."""
    best_si = best_si_way(scenario)

    def simulated(way: Way, repeats: int, seed: int) -> list[SimulatedRun]:
        return simulate(
            scenario, way.algorithm, sp=sp, lookahead=way.lookahead, rows=way.rows, tokens=_SIMULATED_TOKENS,
            repeats=repeats, seed=seed,
        )  # fmt: skip

    ar = simulated(Way("ar"), repeats, 0)
    si = simulated(best_si, repeats, 0)
    dsi = simulated(Way("dsi", sp), repeats + 1, -1)[1:]  # the first one finds out what the others begin with
    enough = [  # a run that ended in plain decoding has no lookahead
        not run.lookahead or equation_1_servers(scenario.target_ms, scenario.drafter_ms, run.lookahead) <= sp
        for run in dsi
    ]
    slower = [run.ms_per_token > plain.ms_per_token * (1 + 1e-9) for run, plain in zip(dsi, ar, strict=True)]
    means = {name: statistics.fmean(run.ms_per_token for run in runs) for name, runs in _named(ar, si, dsi)}
    return {
        "acceptance": scenario.acceptance,
        "alternatives": scenario.alternatives,
        "drafter_share": scenario.drafter_ms / scenario.target_ms,
        "sp": sp,
        "jitter": scenario.jitter,
        "lookahead": dsi[-1].lookahead,
        "first_wait": dsi[-1].first_wait,
        "rows": dsi[-1].rows,
        "best_si_lookahead": best_si.lookahead,
        "best_si_rows": best_si.rows,
        "simulated_ms_per_token": means["dsi"],
        "simulated_ratio_to_ar": means["dsi"] / means["ar"],
        "simulated_ratio_to_best_si": means["dsi"] / means["si"],
        "simulated_runs": repeats,
        "simulated_runs_with_enough_servers": sum(enough),
        "simulated_runs_slower_than_ar_with_enough_servers": sum(
            late for late, held in zip(slower, enough, strict=True) if held
        ),
    }


def _named(*runs: Any) -> list[tuple[str, Any]]:
    return list(zip(("ar", "si", "dsi"), runs, strict=True))


def _print(rows: list[dict[str, Any]], servers: Sequence[int]) -> None:
    measured = "ratio_to_ar" in rows[0]
    columns = [f"{name} SP={sp}" for name in ("DSI/AR", "DSI/SI") for sp in servers]
    table = Table("jitter", "d/t", "acceptance", "alternatives", *columns)
    keys = [("ratio_to_ar", sp) for sp in servers] + [("ratio_to_best_si", sp) for sp in servers]
    for first in range(0, len(rows), len(servers)):
        cells = {row["sp"]: row for row in rows[first : first + len(servers)]}
        row = rows[first]
        figures = [
            (f"{cells[sp][key]:.3f} " if measured else "") + f"({cells[sp]['simulated_' + key]:.3f})"
            for key, sp in keys
        ]
        table.add_row(
            f"{row['jitter']:g}",
            f"{row['drafter_share']:g}",
            f"{row['acceptance']:g}",
            f"{row['alternatives']:g}",
            *figures,
        )
    console = terminal(width=max(120, terminal().width))
    console.print(table)
    console.print("Measured on the wall clock (in the simulator).")
    for sp in servers:
        of_sp = [row for row in rows if row["sp"] == sp]
        for key, name in (("ratio_to_ar", "DSI / AR"), ("ratio_to_best_si", "DSI / best SI")):
            worst = f"{max(row[key] for row in of_sp):.3f} on the wall clock, " if measured else ""
            simulated = max(row[f"simulated_{key}"] for row in of_sp)
            console.print(f"SP={sp}: {name} at most {worst}{simulated:.4f} in the simulator")
    steady = [row for row in rows if not row["jitter"]]
    console.print(
        f"Without jitter and with enough servers (Equation 1): slower than AR in "
        f"{sum(row['simulated_runs_slower_than_ar_with_enough_servers'] for row in steady)} of "
        f"{sum(row['simulated_runs_with_enough_servers'] for row in steady)} simulated runs"
    )
