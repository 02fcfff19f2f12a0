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
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.simulation.run import Scenario


@dataclass(frozen=True, slots=True)
class Pair:
    name: str
    target_ms: float
    drafter_ms: float
    acceptance: float
    paper_factor: float

    def scenario(self, alternatives: float) -> Scenario:
        return Scenario(
            target_ms=self.target_ms, drafter_ms=self.drafter_ms, acceptance=self.acceptance, alternatives=alternatives
        )


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
    parser.add_argument(
        "--alternatives", type=float, action="append", metavar="H",
        help="chance that the drafter's second choice is right where its first is not: DSI with trees beside DSI with chains; "
        "may be repeated (default: 0, chains only)",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=len(PAIRS), metavar="N", help="only the first N (default all)")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=50, metavar="S", help="default %(default)s, as in the paper")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of everything that is drawn")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    check_sizes(arguments, "tokens", "repeats", "pairs")
    servers = numbers(arguments.sp, "--sp", int, 1, 64)
    chances = arguments.alternatives or [0.0]
    if not all(0 <= chance <= 1 for chance in chances):
        raise ConfigError("--alternatives must lie in [0, 1]")
    if not 0 <= arguments.skip < arguments.pairs:
        raise ConfigError("--skip must be at least 0, and leave a pair")
    rows: list[dict[str, Any]] = []
    headings = [f"DSI SP={sp}{kind}" for sp in servers for kind in _kinds(max(chances))]
    table = Table("", "AR", "SI best", *headings, "over SI", "paper")
    for pair, chance in ((pair, chance) for pair in PAIRS[arguments.skip : arguments.pairs] for chance in chances):
        scenario = pair.scenario(chance)
        ar, si = Way("ar"), best_si_way(scenario)
        dsi = [Way("dsi", sp, rows=rows) for sp in servers for rows in ((1, None) if chance else (None,))]
        ways = [ar, si, *(Way("si", 1, k) for k in (1, 5, 10)), *dsi]
        async with TimedBench(scenario, sp=max(servers), log_level=arguments.log_level) as bench:
            runs = await alternate(
                bench, ways, tokens=arguments.tokens, repeats=arguments.repeats, seed=arguments.seed
            )  # fmt: skip
        shown = {way: row_of(scenario, way, runs[way]) for way in runs}
        for way, row in shown.items():
            row |= {"pair": pair.name, "ratio_to_ar": ratio(runs[way], runs[ar])}
            row |= {"ratio_to_best_si": ratio(runs[way], runs[si]), "paper_factor_over_si": pair.paper_factor}
            if chance and way.algorithm == "dsi":
                row |= {"ratio_to_chain": ratio(runs[way], runs[Way("dsi", way.sp, rows=1)])}
            rows.append(row)
        table.add_row(
            f"{pair.name}\n{pair.target_ms:g} / {pair.drafter_ms:g} / {pair.acceptance:g}"
            + (f" / {chance:g}" if chance else ""),
            *(
                f"{row['ms_per_token']:.1f}\n{row['ratio_to_ideal']:.3f}"
                for row in (shown[way] for way in (ar, si, *dsi))
            ),
            f"{1 / ratio(runs[dsi[-1]], runs[si]):.2f}x",
            f"{pair.paper_factor:.2f}x",
        )
        sys.stderr.write(f"{pair.name}{f', alternatives {chance:g}' if chance else ''}: done\n")
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    console = terminal(width=max(110, terminal().width))
    console.print(table)
    console.print(
        "Each cell: ms per token, measured / ideal. Under the pair: target ms / drafter ms / acceptance rate (/ chance that an "
        "alternative is right)."
    )
    for sp in servers:
        of_sp = [row for row in rows if row["algorithm"] == "dsi" and row["sp"] == sp]
        console.print(
            f"DSI, SP={sp}: measured / ideal up to {max(row['ratio_to_ideal'] for row in of_sp):.3f} "
            f"(median {statistics.median(row['ratio_to_ideal'] for row in of_sp):.3f}); "
            f"DSI / best SI up to {max(row['ratio_to_best_si'] for row in of_sp):.3f}; "
            f"DSI / AR up to {max(row['ratio_to_ar'] for row in of_sp):.3f}"
        )
        for chance in filter(None, chances):
            ratios = [row["ratio_to_chain"] for row in of_sp if row["alternatives"] == chance and row["rows"] is None]
            console.print(
                f"  alternatives {chance:g}: tree / chain from {min(ratios):.3f} to {max(ratios):.3f} "
                f"(median {statistics.median(ratios):.3f})"
            )
    return 0


def _kinds(chance: float) -> tuple[str, ...]:
    return (" chain", " tree") if chance else ("",)
