"""`dsi-actors bench timed`: AR, SI and DSI with real processes and messages, and models that only take time.

Beside each stands the ideal: the simulator with the same policy and the same draws, where messages take no time. Times
are per token from the start of a generation to its last token; medians.
"""

from __future__ import annotations

import argparse
import json
import sys

from rich.table import Table

from dsi_actors.benches.timed_workers import (
    TimedBench,
    Way,
    add_scenario_options,
    alternate,
    best_si_way,
    check_sizes,
    row_of,
    scenario_from,
)
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.terminal import terminal


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("timed", help="the runtime against the ideal", description=__doc__)
    add_scenario_options(parser)
    parser.add_argument("--sp", type=int, default=2, metavar="N", help="target servers (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, metavar="S", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of everything that is drawn")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    check_sizes(arguments, "sp", "tokens", "repeats")
    scenario = scenario_from(arguments)
    ways = [Way("ar"), best_si_way(scenario), *(Way("si", 1, k) for k in (1, 5, 10)), Way("dsi", arguments.sp)]
    if scenario.alternatives:  # beside the tree
        ways += [best_si_way(scenario, chain=True), Way("dsi", arguments.sp, rows=1)]
    async with TimedBench(scenario, sp=arguments.sp, log_level=arguments.log_level) as bench:
        runs = await alternate(
            bench, ways, tokens=arguments.tokens, repeats=arguments.repeats, seed=arguments.seed
        )  # fmt: skip
    rows = [row_of(scenario, way, runs[way]) for way in runs]
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    table = Table("", "lookahead", "ms per token", "ideal", "ratio", "forwards", "wasted")
    for way, row in zip(runs, rows, strict=True):
        table.add_row(
            str(way), str(row["lookahead"] or "-"), f"{row['ms_per_token']:.2f}", f"{row['ideal_ms_per_token']:.2f}",
            f"{row['ratio_to_ideal']:.3f}", f"{row['target_forwards']:.0f}", f"{row['wasted_target_forwards']:.0f}",
        )  # fmt: skip
    terminal().print(table)
    return 0
