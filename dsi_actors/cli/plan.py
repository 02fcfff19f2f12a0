"""`dsi-actors plan`: every way to divide GPUs among target servers and a drafter, what each gives, and what it costs.

Expected times per token in the long run (planning/expectation.py), for a target that takes T for a verification and a
drafter that takes D for a token and is right with chance A. `--target-ms tp2=T` says what a target server of two GPUs
takes; with several --target-ms, all degrees of tensor parallelism are planned together. A verification takes T however
long it is, unless --position-ms says what each further position adds, or --window-ms what one of --window positions takes.
--clients says how many generations run at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from dsi_actors.benches.timed_workers import check_sizes, scenario_from
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.pictures import check_picture, draw_plan
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.planning.divisions import AS_FAST, Division, Models, best_of, divisions
from dsi_actors.planning.expectation import Branching, equation_1_servers, limit
from dsi_actors.simulation.run import MOST_ROWS

_MOST_CLIENTS = 4096
_PLACES = {"own": "the drafter on its own GPU", "shared": "the drafter on a GPU of the target", "none": "no drafter"}


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("plan", help="how many GPUs are worth having", description=__doc__)
    parser.add_argument(
        "--target-ms", type=_by_degree, action="append", required=True, metavar="T",
        help="a verification; tpN=T: by a target server of N GPUs. May be given for several N",
    )  # fmt: skip
    parser.add_argument("--drafter-ms", type=float, required=True, metavar="D", help="a drafted token")
    parser.add_argument("--acceptance", type=float, required=True, metavar="A", help="chance that a draft is right")
    parser.add_argument(
        "--alternatives", type=float, default=0.0, metavar="H",
        help="chance that the drafter's second choice is right where its first is not; 0 drafts chains (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="with the drafter's (default %(default)s)")
    parser.add_argument(
        "--clients", type=int, default=1, metavar="C", help="generations that run at a time (default %(default)s)"
    )
    parser.add_argument(
        "--position-ms", type=float, default=0.0, metavar="P",
        help="what each further position adds to a forward, at the least degree (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--window-ms", type=float, metavar="T", help="a verification of a full window, at the least degree"
    )
    parser.add_argument("--window", type=int, default=8, metavar="W", help="its positions (default %(default)s)")
    parser.add_argument("--picture", metavar="FILE", help="draw it: .png, .svg or .pdf")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, jitter=0.0)


def _by_degree(text: str) -> tuple[int, float]:
    """(degree of TP, milliseconds) of `18.3` or `tp2=10.4`."""
    found = re.fullmatch(r"(?:tp(\d+)=)?([^=]+)", text)
    try:
        if found is None:
            raise ValueError
        return int(found[1] or 1), float(found[2])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither milliseconds nor tpN=milliseconds") from None


def run(arguments: argparse.Namespace) -> int:
    models = _models(arguments)
    check_picture(arguments.picture)
    clients = arguments.clients
    found = list(divisions(models, arguments.gpus, clients))
    if not found:
        raise ConfigError(
            f"a target server of {min(models.target_ms)} GPUs is more than --gpus {arguments.gpus}: give more"
        )
    best, cheapest = best_of(found), min(found, key=lambda each: each.gpu_ms)
    rows = [
        {**_row(each, found[0]), "best": each is best, "cheapest": each is cheapest} for each in found
    ]  # fmt: skip
    target_ms, drafter_ms = models.target_ms[best.tp], arguments.drafter_ms
    servers = equation_1_servers(target_ms, drafter_ms)
    limit_ms = limit(target_ms, drafter_ms, arguments.acceptance, arguments.alternatives)
    worth = _servers_worth_having(found, best)
    if arguments.picture:
        times = ", ".join(f"{_degree(tp)} {ms:g}" if tp > 1 else f"{ms:g}" for tp, ms in models.target_ms.items())
        title = f"t = {times} ms, d = {drafter_ms:g} ms, acceptance {arguments.acceptance:g}"
        draw_plan(arguments.picture, title, rows, limit_ms if len(models.target_ms) == clients == 1 else None)
    if arguments.json:
        summary = {
            "equation_1_servers": servers, "servers_worth_having": worth, "limit_ms_per_token": limit_ms,
            "clients": clients,
        }  # fmt: skip
        sys.stdout.write(json.dumps({"machine": describe_machine(), **summary, "results": rows}) + "\n")
        return 0
    console = terminal(width=max(140 if clients == 1 else 160, terminal().width))
    console.print(_table(rows, clients))
    of_degree = f"With {_degree(best.tp)}: " if len(models.target_ms) > 1 else ""
    shape = "a tree, d + (1-a) (t-d) / (1+h)" if arguments.alternatives else "one chain of drafts, a d + (1-a) t"
    console.print(
        f"{of_degree}Equation 1: {servers} target servers are enough for lookahead 1, SP = ceil(t / (k d)). "
        f"The limit for {shape}, is {limit_ms:.2f} ms per token."
    )
    for sentence in _verdict(found, best, cheapest, worth, clients):
        console.print(sentence)
    return 0


def _models(arguments: argparse.Namespace) -> Models:
    """Raises ConfigError."""
    check_sizes(arguments, "gpus", "window", "clients")
    target_ms = dict(sorted(arguments.target_ms))
    if len(target_ms) < len(arguments.target_ms):
        raise ConfigError("--target-ms: the same number of GPUs is given twice")
    for tp, ms in target_ms.items():
        if tp < 1:
            raise ConfigError("--target-ms tp0: a target server has at least 1 GPU")
        scenario_from(argparse.Namespace(**{**vars(arguments), "target_ms": ms}))
    if arguments.gpus < 2:
        raise ConfigError("--gpus 1: speculation needs a GPU for the drafter and one for a target server, at least 2")
    if arguments.clients > _MOST_CLIENTS:
        raise ConfigError(f"--clients must be at most {_MOST_CLIENTS}, not {arguments.clients}")
    if not 0 <= arguments.position_ms < float("inf"):
        raise ConfigError(f"--position-ms must be a number of at least 0, not {arguments.position_ms:g}")
    least_ms, window_ms = target_ms[min(target_ms)], arguments.window_ms
    if window_ms is not None and not least_ms <= window_ms < float("inf"):
        raise ConfigError(f"--window-ms must be at least --target-ms, not {window_ms:g}")
    chance = arguments.alternatives
    if window_ms is None and arguments.position_ms:
        window_ms = least_ms + arguments.position_ms * (arguments.window - 1)
    windows = {} if window_ms is None else {"window_share": window_ms / least_ms, "window": arguments.window}
    return Models(
        target_ms, arguments.drafter_ms, arguments.acceptance, Branching(chance, MOST_ROWS if chance else 1),
        position_ms=arguments.position_ms, **windows,
    )  # fmt: skip


def _servers_worth_having(found: Sequence[Division], best: Division) -> int:
    """The fewest servers of the best degree with which DSI is as fast as the fastest division. 0: it never is."""
    enough_ms = (1 + AS_FAST) * min(each.ms_per_token for each in found)
    servers = [
        each.servers
        for each in found
        if each.algorithm == "dsi" and each.tp == best.tp and each.ms_per_token <= enough_ms
    ]
    return min(servers, default=0)


def _row(division: Division, plain: Division) -> dict[str, Any]:
    """Held: every GPU for all of the time. Busy: while it computes."""
    policy = division.policy
    return {
        "algorithm": division.algorithm,
        "gpus": division.gpus,
        "tp": division.tp,
        "servers": division.servers,
        "sp": division.sp,
        "dp": division.dp,
        "generations_per_server": division.sharers,
        "drafter": division.drafter,
        "lookahead": policy.lookahead if policy.max_ahead else 0,
        "first_wait": policy.first_wait,
        "rows": policy.rows,
        "ms_per_token": division.ms_per_token,
        "tokens_per_s": division.tokens_per_s,
        "speed_over_ar": plain.ms_per_token / division.ms_per_token,
        "target_forwards_per_token": division.target_forwards,
        "target_busy_ms_per_token": division.target_busy_ms,
        "drafter_busy_ms_per_token": division.drafter_busy_ms,
        "busy_gpu_seconds_per_token": (division.target_busy_ms + division.drafter_busy_ms) / 1e3,
        "gpu_seconds_per_token": division.gpu_ms / 1e3,
    }


def _table(rows: Sequence[dict[str, Any]], clients: int) -> Table:
    many = ["DP", "each", "tokens/s"] if clients > 1 else []
    table = Table(
        "", "GPUs", "TP", "SP", *many[:2], "drafter", "lookahead", "wait", "rows", "ms per token", *many[2:], "x AR",
        "forwards", "busy GPU ms", "held GPU ms", "",
    )  # fmt: skip
    for row in rows:
        drafted = row["algorithm"] != "ar"
        best = " ".join(name for name, marked in (("best", row["best"]), ("cheapest", row["cheapest"])) if marked)
        table.add_row(
            row["algorithm"].upper(), str(row["gpus"]), str(row["tp"]), str(row["sp"]),
            *([str(row["dp"]), str(row["generations_per_server"])] if many else []), row["drafter"],
            str(row["lookahead"]) if drafted else "-", str(row["first_wait"]) if drafted else "-",
            str(row["rows"]) if drafted else "-", f"{row['ms_per_token']:.2f}",
            *([f"{row['tokens_per_s']:.0f}"] if many else []), f"{row['speed_over_ar']:.2f}",
            f"{row['target_forwards_per_token']:.2f}", f"{row['busy_gpu_seconds_per_token'] * 1e3:.1f}",
            f"{row['gpu_seconds_per_token'] * 1e3:.1f}", best, style="bold" if best else None,
        )  # fmt: skip
    return table


def _verdict(
    found: Sequence[Division], best: Division, cheapest: Division, worth: int, clients: int
) -> list[str]:  # fmt: skip
    """What to choose, in sentences."""
    plain_ms = min(each.ms_per_token for each in found if each.algorithm == "ar")
    pays = best.ms_per_token * (1 + AS_FAST) < plain_ms
    sentences = [] if pays else ["Speculation is not worth a GPU here: plain decoding is as fast."]
    one_degree = len({each.tp for each in found}) == 1
    if one_degree and clients == 1:
        if pays and worth:
            sentences.append(f"Worth having: {worth} target server(s); more make a token faster by at most 1 %.")
        return sentences
    sentences.append(f"Best: {_named(best)}.")
    if cheapest is not best:
        sentences.append(f"Cheapest: {_named(cheapest)}.")
    return sentences


def _named(division: Division) -> str:
    words = [f"{_degree(division.tp)} SP={division.sp}"]
    if division.dp > 1:
        words.append(f"DP={division.dp}")
    if division.sharers > 1:
        words.append(f"{division.sharers} generations on a server")
    words += [_PLACES[division.drafter], f"{division.gpus} GPU(s)"]
    gives = f"{division.ms_per_token:.2f} ms per token, {division.tokens_per_s:.0f} tokens/s"
    return f"{', '.join(words)}: {gives}, {division.gpu_ms:.1f} GPU ms per token"


def _degree(tp: int) -> str:
    return f"TP={tp}"
