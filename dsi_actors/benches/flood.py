"""`dsi-actors bench flood`: how much do strangers who flood the socket slow down a generation that runs meanwhile?

Real processes on this machine, the attacker too: it takes processor time from the workers whatever the orchestrator does. The
same generation without and under attack in turn; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from dsi_actors.benches.timed_workers import add_scenario_options, check_sizes, scenario_from
from dsi_actors.chaos.strangers import FRAMES
from dsi_actors.config import Config, Sampling
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.temporary import temporary_directory
from dsi_actors.keys import new_keys
from dsi_actors.orchestrator import Orchestrator

_ATTACKS = ("nobody", *FRAMES, "half handshakes")
_WORKERS = ("target", "target", "drafter")
_SECONDS = 600.0  # longer than a generation; it is ended before


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("flood", help="strangers against a generation", description=__doc__)
    add_scenario_options(parser)
    parser.add_argument("--tokens", type=int, default=100, metavar="S", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="default %(default)s")
    parser.add_argument("--keys", action="store_true", help="workers have keys, strangers none")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


async def run(arguments: argparse.Namespace) -> int:
    check_sizes(arguments, "tokens", "repeats")
    scenario = scenario_from(arguments)
    with temporary_directory() as directory:
        keys = Path(directory) / "keys"
        names = [f"worker-{number}" for number in range(len(_WORKERS))]
        key_files = new_keys(keys, names) if arguments.keys else [None] * len(names)
        config = Config(
            engine="timed", listen="tcp://127.0.0.1:*", keys=str(keys) if arguments.keys else None,
            log_level=arguments.log_level, target_options={"latency_ms": scenario.target_ms},
            drafter_options={"latency_ms": scenario.drafter_ms, "acceptance": scenario.acceptance},
        )  # fmt: skip
        times_ms: dict[str, list[float]] = {attack: [] for attack in _ATTACKS}
        async with Orchestrator(config) as orchestrator, contextlib.AsyncExitStack() as stack:
            for role, key in zip(_WORKERS, key_files, strict=True):
                words = [
                    "--gpu",
                    "cpu",
                    "--role",
                    role,
                    "--connect",
                    orchestrator.endpoint,
                    "--log-level",
                    "error",
                    "--supervised",
                ]
                await stack.enter_async_context(
                    _process("dsi_actors.worker", *words, *(["--key", str(key)] if key else []))
                )
            if not await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=60):
                raise ConfigError("the workers did not start")
            await _generate(orchestrator, arguments.tokens)
            for _ in range(arguments.repeats):
                for attack in _ATTACKS:
                    times_ms[attack].append(await _under(attack, orchestrator, arguments.tokens))
    quiet_ms = times_ms["nobody"]
    rows: list[dict[str, Any]] = [
        {
            "attack": attack,
            "ms_per_token": statistics.median(times),
            "ratio_to_quiet": statistics.median(time / quiet for time, quiet in zip(times, quiet_ms, strict=True)),
        }
        for attack, times in times_ms.items()
    ]
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    table = Table("strangers send", "ms per token", "slower by")
    for row in rows:
        table.add_row(row["attack"], f"{row['ms_per_token']:.2f}", f"{100 * (row['ratio_to_quiet'] - 1):.0f} %")
    terminal().print(table)
    return 0


async def _under(attack: str, orchestrator: Orchestrator, tokens: int) -> float:
    if attack == "nobody":
        return await _generate(orchestrator, tokens)
    async with _process("dsi_actors.chaos.strangers", attack, orchestrator.endpoint, str(_SECONDS)):
        await asyncio.sleep(1.0)  # it has begun
        return await _generate(orchestrator, tokens)


async def _generate(orchestrator: Orchestrator, tokens: int) -> float:
    """Milliseconds per token."""
    async with orchestrator.generate((1,), Sampling(max_tokens=tokens)) as stream:
        async for _ in stream:
            pass
        return (await stream.report()).total_ms / tokens


@asynccontextmanager
async def _process(module: str, *arguments: str) -> AsyncIterator[None]:
    """It ends when the block is left, or when its standard input closes because this process has ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
