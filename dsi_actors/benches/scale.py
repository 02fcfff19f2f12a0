"""`dsi-actors bench scale`: how many workers, generations and messages one orchestrator holds.

Workers are real processes whose models only take time: one drafter, the others target servers. As many clients as target
servers ask for one text after another, each decoded by DSI. The processor time of the orchestrator for each token tells how
many tokens per second fill a core: there it saturates, however many workers there are. Workers share the processors of this
machine with it, so with many of them a token takes longer than it would on machines of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

from rich.table import Table

from dsi_actors.config import Config, Sampling
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.numbers import numbers
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option, add_ready_timeout_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.orchestrator import Orchestrator

_PROMPT = (1, 2, 3)
_MOST_WORKERS = 256


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("scale", help="how many workers one orchestrator holds", description=__doc__)
    parser.add_argument("--workers", default="2,4,8,16,32,64", metavar="N,...", help="default %(default)s")
    parser.add_argument("--sp", type=int, default=2, metavar="N", help="target servers of a text (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each measurement")
    parser.add_argument("--tokens", type=int, default=64, metavar="S", help="of each text (default %(default)s)")
    parser.add_argument("--target-ms", type=float, default=100.0, metavar="T", help="milliseconds of a verification")
    parser.add_argument("--drafter-ms", type=float, default=10.0, metavar="D", help="milliseconds of a drafted token")
    parser.add_argument("--acceptance", type=float, default=0.8, metavar="A", help="chance that a draft is right")
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


async def run(arguments: argparse.Namespace) -> int:
    crowds = numbers(arguments.workers, "--workers", int, 2, _MOST_WORKERS)
    if arguments.seconds <= 0 or arguments.tokens < 1 or arguments.sp < 1:
        raise ConfigError("--seconds must be positive, --tokens and --sp at least 1")
    results = [await _measure(arguments, workers) for workers in crowds]
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": results}) + "\n")
    else:
        terminal().print(_table(results))
    return 0


async def _measure(arguments: argparse.Namespace, workers: int) -> dict[str, Any]:
    servers = workers - 1
    async with Orchestrator(_config(arguments, servers)) as orchestrator:
        await _text(orchestrator, arguments, 0)  # what comes once, such as the first plans
        messages, cpu_s, begun_s = sum(orchestrator.messages), time.process_time(), time.perf_counter()
        end_s = begun_s + arguments.seconds

        async def client(number: int) -> int:
            tokens = 0
            while time.perf_counter() < end_s:
                tokens += await _text(orchestrator, arguments, number)
            return tokens

        tokens = sum(await asyncio.gather(*(client(number) for number in range(servers))))
        took_s = time.perf_counter() - begun_s
        cpu_s = time.process_time() - cpu_s
        messages = sum(orchestrator.messages) - messages
    return {
        "workers": workers, "clients": servers, "sp": min(arguments.sp, servers),
        "tokens_per_s": tokens / took_s, "ms_per_token": took_s * 1e3 * servers / tokens,
        "messages_per_s": messages / took_s, "messages_per_token": messages / tokens,
        "orchestrator_cpu_us_per_token": cpu_s * 1e6 / tokens, "orchestrator_share_of_a_core": cpu_s / took_s,
        "tokens_per_s_that_fill_a_core": tokens / cpu_s,
    }  # fmt: skip


async def _text(orchestrator: Orchestrator, arguments: argparse.Namespace, seed: int) -> int:
    stream = orchestrator.generate(_PROMPT, Sampling(max_tokens=arguments.tokens, seed=seed), sp=arguments.sp)
    return sum([len(tokens) async for tokens in stream])


def _config(arguments: argparse.Namespace, servers: int) -> Config:
    return Config(
        engine="timed", sp=servers, devices=("cpu",), ready_timeout_s=arguments.ready_timeout, log_level=arguments.log_level,
        target_options={"latency_ms": arguments.target_ms, "slots": 8},
        drafter_options={"latency_ms": arguments.drafter_ms, "acceptance": arguments.acceptance, "slots": max(8, servers)},
    )  # fmt: skip


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="scale")
    for title in (
        "workers", "clients", "tokens/s", "ms/token", "messages/s", "messages/token", "orchestrator µs/token", "of a core",
        "tokens/s that fill a core",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for row in results:
        table.add_row(
            str(row["workers"]), str(row["clients"]), f"{row['tokens_per_s']:.1f}", f"{row['ms_per_token']:.1f}",
            f"{row['messages_per_s']:.0f}", f"{row['messages_per_token']:.1f}", f"{row['orchestrator_cpu_us_per_token']:.0f}",
            f"{row['orchestrator_share_of_a_core']:.2f}", f"{row['tokens_per_s_that_fill_a_core']:.0f}",
        )  # fmt: skip
    return table
