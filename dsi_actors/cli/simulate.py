"""`dsi-actors simulate`: what a pair of models would give, without the models and without waiting.

The core that decides in a real generation decides here, too; time is virtual. Latencies are constant, jittered, or
replayed from a trace; acceptance is drawn independently for each position, or replayed.

A trace is a JSON object with any of "target_ms" (milliseconds of each verification), "drafter_ms" (of each drafted
token), "accepted" (for each drafted position whether it was right); `dsi-actors generate --json` prints one as "trace".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from dsi_actors.benches.timed_workers import add_scenario_options, check_sizes, scenario_from
from dsi_actors.config import ALGORITHMS, Algorithm
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option, lookahead, rows
from dsi_actors.console.pool import process_pool, results_in
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.devices import cores
from dsi_actors.results import Trace
from dsi_actors.simulation.run import Scenario, mean_of, simulate

#: Fewer tokens than this are simulated before other processes would have started.
_WORTH_PROCESSES = 50_000


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("simulate", help="any pair of models in virtual time", description=__doc__)
    parser.add_argument("--algorithm", choices=[*ALGORITHMS, "all"], default="all", help="which to run")
    add_scenario_options(parser)
    parser.add_argument(
        "--lookahead", type=lookahead, default="auto", metavar="auto|K", help="drafted tokens between two verifications"
    )
    parser.add_argument(
        "--rows",
        type=rows,
        default="auto",
        metavar="auto|R",
        help="the most rows of a drafting step; 1 drafts chains (default %(default)s: chosen)",
    )
    parser.add_argument(
        "--second-drafter-ms", type=float, default=0.0, metavar="D", help="a token of a second drafter beside the first"
    )
    parser.add_argument(
        "--second-acceptance", type=float, default=0.0, metavar="A",
        help="chance that the second drafter is right, whatever the first says; 0: there is none (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--sp", type=int, default=2, metavar="N", help="target servers (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, metavar="S", help="of a generation (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, metavar="R", help="generations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of everything that is drawn")
    parser.add_argument("--cancel-ms", type=float, default=0.0, metavar="C", help="cancels take effect so often")
    parser.add_argument("--trace", metavar="FILE", help="replay what was recorded instead of drawing")
    parser.add_argument("--no-calibration", action="store_true", help="begin without knowing the latencies")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int | Coroutine[Any, Any, int]:
    check_sizes(arguments, "sp", "tokens", "repeats")
    if not 0 <= arguments.cancel_ms < float("inf"):
        raise ConfigError(f"--cancel-ms must be at least 0, not {arguments.cancel_ms:g}")
    if not 0 <= arguments.second_drafter_ms < float("inf"):
        raise ConfigError(f"--second-drafter-ms must be a number of at least 0, not {arguments.second_drafter_ms:g}")
    if not 0 <= arguments.second_acceptance <= 1:
        raise ConfigError(f"--second-acceptance must lie in [0, 1], not {arguments.second_acceptance:g}")
    trace = _read_trace(arguments.trace) if arguments.trace else Trace()
    scenario = scenario_from(
        arguments, cancel_ms=arguments.cancel_ms, trace=trace, second_drafter_ms=arguments.second_drafter_ms,
        second_acceptance=arguments.second_acceptance,
    )  # fmt: skip
    algorithms = ALGORITHMS[::-1] if arguments.algorithm == "all" else (arguments.algorithm,)
    processes = min(cores(), arguments.repeats)
    if processes > 1 and arguments.tokens * arguments.repeats >= _WORTH_PROCESSES:
        return _simulate_in(processes, scenario, algorithms, arguments)
    settings = _settings(arguments, arguments.repeats, arguments.seed)
    return _show([mean_of(simulate(scenario, algorithm, **settings)) for algorithm in algorithms], arguments)


async def _simulate_in(
    processes: int, scenario: Scenario, algorithms: Sequence[Algorithm], arguments: argparse.Namespace
) -> int:
    """Each process takes its share of the generations."""
    each, more = divmod(arguments.repeats, processes)
    shares = [each + (number < more) for number in range(processes)]
    settings = [
        _settings(arguments, share, arguments.seed + sum(shares[:number])) for number, share in enumerate(shares)
    ]  # fmt: skip
    rows = []
    with process_pool(processes) as pool:
        for algorithm in algorithms:
            calls = [partial(simulate, scenario, algorithm, **given) for given in settings]
            rows.append(mean_of([run for part in await results_in(pool, calls) for run in part]))
    return _show(rows, arguments)


def _settings(arguments: argparse.Namespace, repeats: int, seed: int) -> dict[str, Any]:
    return {
        "sp": arguments.sp, "lookahead": None if arguments.lookahead == "auto" else arguments.lookahead,
        "tokens": arguments.tokens, "repeats": repeats, "seed": seed,
        "calibrated": not arguments.no_calibration, "rows": arguments.rows,
    }  # fmt: skip


def _show(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> int:
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    table = Table(
        "", "SP", "lookahead", "wait", "rows", "ms per token", "first token ms", "acceptance", "forwards", "wasted"
    )
    for row in rows:
        drafted = row["algorithm"] != "ar"
        table.add_row(
            str(row["algorithm"]).upper(), str(row["sp"]), str(row["lookahead"]) if drafted else "-",
            str(row["first_wait"]) if drafted else "-", str(row["rows"]) if drafted else "-",
            f"{row['ms_per_token']:.2f}", f"{row['first_token_ms']:.1f}",
            f"{row['acceptance_rate']:.3f}" if drafted else "-", f"{row['target_forwards']:.1f}",
            f"{row['wasted_target_forwards']:.1f}",
        )  # fmt: skip
    terminal().print(table)
    return 0


def _read_trace(file: str) -> Trace:
    try:
        read = json.loads(Path(file).read_text(encoding="utf-8"))
        read = read.get("trace", read)
        trace = Trace(
            tuple(float(ms) for ms in read.get("target_ms", ())),
            tuple(float(ms) for ms in read.get("drafter_ms", ())),
            tuple(bool(accepted) for accepted in read.get("accepted", ())),
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read as a trace: {error}") from None
    if not (trace.target_ms or trace.drafter_ms or trace.accepted):
        raise ConfigError(f"{file} is no trace: it has none of target_ms, drafter_ms, accepted")
    if not all(0 < ms < float("inf") for ms in (*trace.target_ms, *trace.drafter_ms)):
        raise ConfigError(f"{file} has latencies that are not above 0")
    return trace
