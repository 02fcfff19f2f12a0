"""`dsi-actors plan`: how many target servers are worth having, what each number gives, and what it costs.

Expected times per token in the long run (planning/expectation.py), for a target that takes T for a verification and a
drafter that takes D for a token and is right with chance A. One of the GPUs is the drafter's, the others are target
servers. A verification takes T however long it is, unless --window-ms says what one of --window positions takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.table import Table

from dsi_actors.benches.timed_workers import check_sizes, scenario_from
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.pictures import check_picture, draw_plan
from dsi_actors.console.terminal import terminal
from dsi_actors.core import Policy
from dsi_actors.errors import ConfigError
from dsi_actors.planning.expectation import Branching, Expectation, equation_1_servers, expect, limit
from dsi_actors.planning.search import best_dsi, best_si
from dsi_actors.planning.tuner import Estimates
from dsi_actors.simulation.run import MOST_ROWS

#: A further server is worth having if it makes a token faster by more than this share.
_WORTH = 0.01


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("plan", help="how many GPUs are worth having", description=__doc__)
    parser.add_argument("--target-ms", type=float, required=True, metavar="T", help="a verification")
    parser.add_argument("--drafter-ms", type=float, required=True, metavar="D", help="a drafted token")
    parser.add_argument("--acceptance", type=float, required=True, metavar="A", help="chance that a draft is right")
    parser.add_argument(
        "--alternatives", type=float, default=0.0, metavar="H",
        help="chance that the drafter's second choice is right where its first is not; 0 drafts chains (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="with the drafter's (default %(default)s)")
    parser.add_argument("--window-ms", type=float, metavar="T", help="a verification of a full window")
    parser.add_argument("--window", type=int, default=8, metavar="W", help="its positions (default %(default)s)")
    parser.add_argument("--picture", metavar="FILE", help="draw it: .png, .svg or .pdf")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, jitter=0.0)


def run(arguments: argparse.Namespace) -> int:
    check_sizes(arguments, "gpus", "window")
    scenario = scenario_from(arguments)
    if arguments.gpus < 2:
        raise ConfigError("--gpus 1: speculation needs a GPU for the drafter and one for a target server, at least 2")
    if arguments.window_ms is not None and not scenario.target_ms <= arguments.window_ms < float("inf"):
        raise ConfigError(f"--window-ms must be at least --target-ms, not {arguments.window_ms:g}")
    check_picture(arguments.picture)
    target_ms, drafter_ms, acceptance = scenario.target_ms, scenario.drafter_ms, scenario.acceptance
    window = arguments.window if arguments.window_ms is not None else 1 << 20
    cost_ms = Estimates(target_ms, arguments.window_ms or target_ms, window).cost_ms
    most = max(1, min(32, window - 1))
    chance = scenario.alternatives
    branching = Branching(chance, MOST_ROWS if chance else 1)
    policies = [Policy.autoregressive(), best_si(cost_ms, drafter_ms, acceptance, branching, most=most)]
    policies += [best_dsi(cost_ms, drafter_ms, acceptance, sp, branching, most=most) for sp in range(1, arguments.gpus)]
    rows = [_row(policy, expect(policy, cost_ms, drafter_ms, acceptance, branching), cost_ms(1)) for policy in policies]
    best_ms = min(row["ms_per_token"] for row in rows)
    worth = next((row for row in rows[2:] if row["ms_per_token"] <= best_ms * (1 + _WORTH)), None)
    servers = equation_1_servers(target_ms, drafter_ms)
    limit_ms = limit(target_ms, drafter_ms, acceptance, chance)
    if arguments.picture:
        title = f"t = {target_ms:g} ms, d = {drafter_ms:g} ms, acceptance {acceptance:g}"
        draw_plan(arguments.picture, title, rows, limit_ms)
    if arguments.json:
        summary = {
            "equation_1_servers": servers,
            "servers_worth_having": worth["sp"] if worth else 0,
            "limit_ms_per_token": limit_ms,
        }
        sys.stdout.write(json.dumps({"machine": describe_machine(), **summary, "results": rows}) + "\n")
        return 0
    table = Table(
        "", "GPUs", "SP", "lookahead", "wait", "rows", "ms per token", "x AR", "forwards", "busy GPU ms", "held GPU ms"
    )
    for row in rows:
        drafted = row["algorithm"] != "ar"
        table.add_row(
            row["algorithm"].upper(), str(row["gpus"]), str(row["sp"]), str(row["lookahead"]) if drafted else "-",
            str(row["first_wait"]) if drafted else "-", str(row["rows"]) if drafted else "-",
            f"{row['ms_per_token']:.2f}", f"{row['speed_over_ar']:.2f}",
            f"{row['target_forwards_per_token']:.2f}", f"{row['busy_gpu_seconds_per_token'] * 1e3:.1f}",
            f"{row['gpu_seconds_per_token'] * 1e3:.1f}",
        )  # fmt: skip
    console = terminal(width=max(110, terminal().width))
    console.print(table)
    console.print(
        f"Equation 1: {servers} target servers are enough for lookahead 1, SP = ceil(t / (k d)). "
        f"The limit for {'a tree, d + (1-a) (t-d) / (1+h)' if chance else 'one chain of drafts, a d + (1-a) t'}, is "
        f"{limit_ms:.2f} ms per token."
    )
    if worth is None or worth["speed_over_ar"] <= 1 + _WORTH:
        console.print("Speculation is not worth a GPU here: plain decoding is as fast.")
    else:
        console.print(f"Worth having: {worth['sp']} target server(s); more make a token faster by at most 1 %.")
    return 0


def _row(policy: Policy, expectation: Expectation, target_ms: float) -> dict[str, Any]:
    """Held: every device for all of the time. Busy: while it computes."""
    gpus = policy.sp + (policy.max_ahead > 0)
    return {
        "algorithm": policy.algorithm,
        "gpus": gpus,
        "sp": policy.sp,
        "lookahead": policy.lookahead if policy.max_ahead else 0,
        "first_wait": policy.first_wait,
        "rows": policy.rows,
        "ms_per_token": expectation.ms_per_token,
        "speed_over_ar": target_ms / expectation.ms_per_token,
        "target_forwards_per_token": expectation.target_forwards,
        "target_busy_ms_per_token": expectation.target_busy_ms,
        "drafter_busy_ms_per_token": expectation.drafter_busy_ms,
        "busy_gpu_seconds_per_token": (expectation.target_busy_ms + expectation.drafter_busy_ms) / 1e3,
        "gpu_seconds_per_token": gpus * expectation.ms_per_token / 1e3,
    }
