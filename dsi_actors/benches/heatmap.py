"""`dsi-actors bench heatmap`: the paper's heat maps. SI/AR, DSI/SI, DSI/AR and DSI/min(AR, SI), by drafter and acceptance.

From the simulator; with --measure from real processes and messages, on a coarser grid. SI has the lookahead that is best
for the true acceptance rate; DSI chooses its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from dsi_actors.benches.timed_workers import TimedBench, Way, alternate, best_si_way, check_sizes
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.pictures import check_picture, draw_heat_maps
from dsi_actors.console.pool import process_pool, results_in
from dsi_actors.console.terminal import terminal
from dsi_actors.host.devices import cores
from dsi_actors.simulation.run import Scenario, simulate


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("heatmap", help="the paper's heat maps", description=__doc__)
    parser.add_argument("--target-ms", type=float, default=20.0, metavar="T", help="default %(default)s")
    parser.add_argument("--sp", type=int, default=7, metavar="N", help="target servers (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of each axis (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, metavar="S", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=10, metavar="R", help="default %(default)s")
    parser.add_argument("--measure", action="store_true", help="on the wall clock, not in the simulator")
    parser.add_argument("--picture", metavar="FILE", help="draw it: .png, .svg or .pdf")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    check_sizes(arguments, "sp", "steps", "tokens", "repeats")
    check_picture(arguments.picture)
    steps = arguments.steps
    shares = [(step + 1) / steps for step in range(steps)]
    acceptances = [step / max(1, steps - 1) for step in range(steps)]
    scenarios = [
        Scenario(target_ms=arguments.target_ms, drafter_ms=share * arguments.target_ms, acceptance=acceptance)
        for acceptance in acceptances
        for share in shares
    ]
    if arguments.measure:
        cells = [await _measured(scenario, arguments) for scenario in scenarios]
    else:
        with process_pool(cores()) as pool:
            sizes = (arguments.sp, arguments.tokens, arguments.repeats)
            cells = await results_in(pool, [partial(_simulated, scenario, *sizes) for scenario in scenarios])
    panels = {
        "SI / AR": [cell["si"] / cell["ar"] for cell in cells],
        "DSI / SI": [cell["dsi"] / cell["si"] for cell in cells],
        "DSI / AR": [cell["dsi"] / cell["ar"] for cell in cells],
        "DSI / min(AR, SI)": [cell["dsi"] / min(cell["ar"], cell["si"]) for cell in cells],
    }
    if arguments.picture:
        how = "measured" if arguments.measure else "simulated"
        draw_heat_maps(
            arguments.picture, f"Time per token, {how}: SP = {arguments.sp}, {arguments.tokens} tokens",
            [(name, _in_rows(values, steps)) for name, values in panels.items()], shares, acceptances,
        )  # fmt: skip
    if arguments.json:
        rows = [
            {"acceptance": scenario.acceptance, "drafter_share": scenario.drafter_ms / scenario.target_ms}
            | {f"{name}_ms_per_token": value for name, value in cell.items()}
            for scenario, cell in zip(scenarios, cells, strict=True)
        ]
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    for name, values in panels.items():
        terminal().print(f"{name}: {min(values):.3f} to {max(values):.3f}")
    return 0


def _simulated(scenario: Scenario, sp: int, tokens: int, repeats: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for algorithm, lookahead in (("ar", None), ("si", best_si_way(scenario).lookahead), ("dsi", None)):
        runs = simulate(scenario, algorithm, sp=sp, lookahead=lookahead, tokens=tokens, repeats=repeats, seed=0)
        found[algorithm] = statistics.fmean(run.ms_per_token for run in runs)
    return found


async def _measured(scenario: Scenario, arguments: argparse.Namespace) -> dict[str, float]:
    ways = {"ar": Way("ar"), "si": best_si_way(scenario), "dsi": Way("dsi", arguments.sp)}
    async with TimedBench(scenario, sp=arguments.sp, log_level=arguments.log_level) as bench:
        runs: dict[Way, Any] = await alternate(
            bench, ways.values(), tokens=arguments.tokens, repeats=arguments.repeats, seed=0
        )
    return {name: statistics.median(run.ms_per_token for run in runs[way]) for name, way in ways.items()}


def _in_rows(values: Sequence[float], width: int) -> list[list[float]]:
    return [list(values[first : first + width]) for first in range(0, len(values), width)]
