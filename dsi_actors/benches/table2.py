"""`dsi-actors bench table2`: the ten pairs of the paper's Table 2, with real processes and messages.

Latencies and acceptance rates are the paper's (arXiv 2405.14105, Table 2), as they are cited; models only take time. The
last column is the paper's own factor of DSI over SI, simulated on SP = 7. Of these factors only the ends of the range,
1.29x and 1.92x, could be confirmed by the paper's text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dsi_actors.benches.timed_workers import TimedBench, Way, alternate, best_si_way, check_sizes, ratio, row_of
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.numbers import numbers
from dsi_actors.console.options import SubParsers, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.simulation.run import Scenario


@dataclass(frozen=True, slots=True)
class Pair:
    name: str
    target_ms: float
    drafter_ms: float
    acceptance: float
    paper_factor: float

    @property
    def scenario(self) -> Scenario:
        return Scenario(target_ms=self.target_ms, drafter_ms=self.drafter_ms, acceptance=self.acceptance)


PAIRS = (
    Pair("Starcoder-15B / 168M, HumanEval", 20.6, 6.8, 0.93, 1.92),
    Pair("Starcoder-15B / 168M, MBPP", 21.0, 6.8, 0.90, 1.66),
    Pair("Phi3-14B / 4B, Alpaca", 49.6, 33.4, 0.87, 1.60),
    Pair("Phi3-14B / 4B, HumanEval", 52.1, 34.0, 0.95, 1.41),
    Pair("Phi3-14B / 4B, CNN-DM", 52.4, 34.6, 0.93, 1.39),
    Pair("Phi3-14B / 4B, MBPP", 52.2, 34.3, 0.94, 1.37),
    Pair("Vicuna-13B / 68M, CNN-DM", 37.7, 2.5, 0.63, 1.47),
    Pair("Vicuna-13B / 68M, Alpaca", 33.3, 2.5, 0.58, 1.41),
    Pair("Vicuna-7B / 68M, CNN-DM", 29.4, 2.5, 0.67, 1.29),
    Pair("Vicuna-7B / 68M, Alpaca", 26.0, 2.5, 0.59, 1.70),
)


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("table2", help="the paper's ten pairs of models", description=__doc__)
    parser.add_argument("--sp", default="1,2,3,7", metavar="LIST", help="target servers (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), metavar="N", help="only the first N (default all)")
    parser.add_argument("--tokens", type=int, default=50, metavar="S", help="default %(default)s, as in the paper")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--json", action="store_true")
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    check_sizes(arguments, "tokens", "repeats", "pairs")
    servers = numbers(arguments.sp, "--sp", int, 1, 64)
    rows: list[dict[str, Any]] = []
    table = Table("", "AR", "SI best", *(f"DSI SP={sp}" for sp in servers), "over SI", "paper")
    for pair in PAIRS[: arguments.pairs]:
        si = best_si_way(pair.scenario)
        ways = [Way("ar"), si, *(Way("si", 1, k) for k in (1, 5, 10)), *(Way("dsi", sp) for sp in servers)]
        async with TimedBench(pair.scenario, sp=max(servers), log_level=arguments.log_level) as bench:
            runs = await alternate(
                bench, ways, tokens=arguments.tokens, repeats=arguments.repeats, seed=arguments.seed
            )  # fmt: skip
        for way in runs:
            row = row_of(pair.scenario, way, runs[way])
            row |= {"pair": pair.name, "ratio_to_ar": ratio(runs[way], runs[Way("ar")])}
            row |= {"ratio_to_best_si": ratio(runs[way], runs[si]), "paper_factor_over_si": pair.paper_factor}
            rows.append(row)
        shown = [next(row for row in reversed(rows) if _is(row, way)) for way in (Way("ar"), si, *ways[5:])]
        table.add_row(
            f"{pair.name}\n{pair.target_ms:g} / {pair.drafter_ms:g} / {pair.acceptance:g}",
            *(f"{row['ms_per_token']:.1f}\n{row['ratio_to_ideal']:.3f}" for row in shown),
            f"{1 / ratio(runs[ways[-1]], runs[si]):.2f}x",
            f"{pair.paper_factor:.2f}x",
        )
        sys.stderr.write(f"{pair.name}: done\n")
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    console = terminal(width=max(110, terminal().width))
    console.print(table)
    console.print(
        "Each cell: ms per token, measured / ideal. Under the pair: target ms / drafter ms / acceptance rate."
    )
    for sp in servers:
        of_sp = [row for row in rows if row["algorithm"] == "dsi" and row["sp"] == sp]
        console.print(
            f"DSI, SP={sp}: measured / ideal up to {max(row['ratio_to_ideal'] for row in of_sp):.3f} "
            f"(median {statistics.median(row['ratio_to_ideal'] for row in of_sp):.3f}); "
            f"DSI / best SI up to {max(row['ratio_to_best_si'] for row in of_sp):.3f}; "
            f"DSI / AR up to {max(row['ratio_to_ar'] for row in of_sp):.3f}"
        )
    return 0


def _is(row: dict[str, Any], way: Way) -> bool:
    return bool(row["algorithm"] == way.algorithm and row["sp"] == way.sp and way.lookahead in (None, row["lookahead"]))
