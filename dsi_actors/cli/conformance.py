"""`dsi-actors conformance ENDPOINT`: plays the orchestrator against one worker, and prints which rules of SPEC.md it breaks.

Start this first, then any worker that connects to ENDPOINT. Exits with 1 if the worker fails a check.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict

from dsi_actors.conformance.checks import COMMON, DRAFTER, FOREIGN_ENGINE, JOINING, LEAVING, TARGET, Check
from dsi_actors.conformance.differences import Difference, Nonconformance, NotApplicable
from dsi_actors.conformance.peer import Peer
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.advice import worker_command
from dsi_protocol import OptionValue


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("conformance", help="examine a worker", description=__doc__)
    parser.add_argument("endpoint", metavar="ENDPOINT", help="where to listen, such as tcp://127.0.0.1:5555")
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="F", help="multiplies every time limit (default %(default)s)"
    )
    parser.add_argument(
        "--foreign-engine",
        action="store_true",
        help="instead of all other checks: welcome the worker with an engine that it does not have",
    )
    parser.add_argument(
        "--option", action="append", default=[], type=_option, metavar="NAME=VALUE", dest="options",
        help="a setting of the worker's engine, such as alternatives=0.5 for a timed drafter; may be repeated",
    )  # fmt: skip
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


def _option(text: str) -> tuple[str, OptionValue]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as NAME=VALUE")
    with contextlib.suppress(ValueError):
        found = json.loads(value)
        if isinstance(found, bool | int | float):
            return name, found
    return name, value


async def run(arguments: argparse.Namespace) -> int:
    if not arguments.patience > 0:
        raise ConfigError("--patience must be positive")
    out, err = terminal(soft_wrap=True), terminal(stderr=True)
    peer = Peer(arguments.endpoint, arguments.patience, dict(arguments.options))
    results: list[dict[str, object]] = []

    async def examine(*checks: Check) -> None:
        for check in checks:
            name = (check.__doc__ or check.__name__).strip().splitlines()[0]
            problem, summary, skipped, differences = "", "", "", tuple[Difference, ...]()
            try:
                peer.close_generations()
                await check(peer)
            except Nonconformance as found:
                problem, summary, differences = str(found), found.summary, found.differences
            except NotApplicable as reason:
                skipped = str(reason)
            results.append(
                {
                    "check": name,
                    "passed": not problem,
                    "skipped": skipped,
                    "problem": problem,
                    "differences": [asdict(difference) for difference in differences],
                }
            )
            if not arguments.json:
                word, style = ("FAIL", "red") if problem else ("skip", "yellow") if skipped else ("pass", "green")
                out.print(word, style=style, end="  ")
                out.print(name)
                for line in (summary, *map(str, differences)) if problem else (skipped,) if skipped else ():
                    out.print(f"      {line}")

    try:
        err.print(f"waiting for a worker: {worker_command(peer.endpoint, keys=None)}", soft_wrap=True)
        joining = FOREIGN_ENGINE if arguments.foreign_engine else JOINING
        for check in joining:
            await examine(check)
            if not results[-1]["passed"]:
                break  # without a worker that has joined nothing else can be examined
        else:
            if not arguments.foreign_engine:
                await examine(*COMMON, *(DRAFTER if peer.drafts else TARGET), *LEAVING)
    finally:
        peer.close()
    failed = sum(not result["passed"] for result in results)
    skipped = sum(bool(result["skipped"]) for result in results)
    if arguments.json:
        worker = {} if peer.hello is None else {"role": peer.hello.role, "engine": peer.hello.engine}
        sys.stdout.write(json.dumps({"worker": worker, "failed": failed, "results": results}) + "\n")
    else:
        unneeded = f", {skipped} did not apply" if skipped else ""
        out.print(f"{len(results) - failed - skipped} of {len(results)} checks passed{unneeded}")
    return 1 if failed else 0
