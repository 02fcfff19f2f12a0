"""`dsi-actors conformance ENDPOINT`: plays the orchestrator against one worker, and prints which rules of SPEC.md it breaks.

Start this first, then any worker that connects to ENDPOINT. Exits with 1 if the worker fails a check.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from dsi_actors.conformance.checks import COMMON, DRAFTER, FOREIGN_ENGINE, JOINING, LEAVING, TARGET, Check
from dsi_actors.conformance.differences import Difference, Nonconformance
from dsi_actors.conformance.peer import Peer
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.advice import worker_command


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
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


async def run(arguments: argparse.Namespace) -> int:
    if not arguments.patience > 0:
        raise ConfigError("--patience must be positive")
    out, err = terminal(soft_wrap=True), terminal(stderr=True)
    peer = Peer(arguments.endpoint, arguments.patience)
    results: list[dict[str, object]] = []

    async def examine(*checks: Check) -> None:
        for check in checks:
            name = (check.__doc__ or check.__name__).strip().splitlines()[0]
            problem, summary, differences = "", "", tuple[Difference, ...]()
            try:
                peer.close_generations()
                await check(peer)
            except Nonconformance as found:
                problem, summary, differences = str(found), found.summary, found.differences
            results.append(
                {
                    "check": name,
                    "passed": not problem,
                    "problem": problem,
                    "differences": [asdict(difference) for difference in differences],
                }
            )
            if not arguments.json:
                out.print("FAIL" if problem else "pass", style="red" if problem else "green", end="  ")
                out.print(name)
                for line in (summary, *map(str, differences)) if problem else ():
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
    if arguments.json:
        worker = {} if peer.hello is None else {"role": peer.hello.role, "engine": peer.hello.engine}
        sys.stdout.write(json.dumps({"worker": worker, "failed": failed, "results": results}) + "\n")
    else:
        out.print(f"{len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0
