"""`dsi-actors conformance ENDPOINT`: plays the orchestrator against one worker, and prints which rules of SPEC.md it breaks.

Start this first, then any worker that connects to ENDPOINT. Exits with 1 if the worker fails a check.
"""

from __future__ import annotations

import argparse
import json
import sys

from dsi_actors.conformance.checks import COMMON, DRAFTER, JOINING, LEAVING, TARGET, Check, is_drafter
from dsi_actors.conformance.peer import Nonconformance, Peer
from dsi_actors.console.options import SubParsers, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.advice import worker_command


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("conformance", help="examine a worker", description=__doc__)
    parser.add_argument("endpoint", metavar="ENDPOINT", help="where to listen, such as tcp://127.0.0.1:5555")
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="F", help="multiplies every time limit (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true")
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
            try:
                peer.close_generations()
                await check(peer)
                problem = ""
            except Nonconformance as found:
                problem = str(found)
            results.append({"check": name, "passed": not problem, "problem": problem})
            if not arguments.json:
                out.print("FAIL" if problem else "pass", style="red" if problem else "green", end="  ")
                out.print(name)
                if problem:
                    out.print(f"      {problem}")

    try:
        err.print(f"waiting for a worker: {worker_command(peer.endpoint, keys=None)}", soft_wrap=True)
        for check in JOINING:
            await examine(check)
            if not results[-1]["passed"]:
                break  # nobody is there of whom the rest could be asked
        else:
            await examine(*COMMON, *(DRAFTER if is_drafter(peer) else TARGET), *LEAVING)
    finally:
        peer.close()
    failed = sum(not result["passed"] for result in results)
    if arguments.json:
        worker = {} if peer.hello is None else {"role": peer.hello.role, "engine": peer.hello.engine}
        sys.stdout.write(json.dumps({"worker": worker, "failed": failed, "results": results}) + "\n")
    else:
        out.print(f"{len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0
