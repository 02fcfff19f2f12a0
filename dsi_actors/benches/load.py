"""`dsi-actors bench load`: many clients at once on the same workers, ours beside plain decoding (ar) or other fixed ways.

Each client asks for one generation after another, of prompts that were first run alone: every text must be the same. All
is real but the models, unless --target names one, which runs on the CPU or on --gpu. A target's forward takes --target-ms and
--position-ms for each position beyond the first, whoever it is for; the fixed ways share servers and forwards like ours
does. With --one-device the forwards of all workers take turns, as on one GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from dsi_actors.config import SELF_INT8, Algorithm, Config, Sampling
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.numbers import numbers
from dsi_actors.console.options import (
    SubParsers,
    add_device_options,
    add_json_option,
    add_logging_option,
    add_ready_timeout_option,
    default_of,
    devices_from,
)
from dsi_actors.console.progress import prepare_shown
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.percentiles import percentile

_PROMPTS = 8
#: As many generations as an orchestrator takes, by default.
_MOST_CLIENTS: int = default_of(Config, "max_generations")
_WAYS: tuple[tuple[Algorithm, int | None], ...] = (
    ("dsi", None),
    ("ar", None),
    ("si", 2),
    ("si", 4),
    ("dsi", 1),
    ("dsi", 4),
)


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("load", help="many clients at once", description=__doc__)
    parser.add_argument("--clients", default="1,4,16,64", metavar="N,...", help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=15.0, metavar="S", help="of each measurement")
    parser.add_argument("--tokens", type=int, default=48, metavar="S", help="of each generation (default %(default)s)")
    parser.add_argument("--sp", type=int, default=2, metavar="N", help="target servers (default %(default)s)")
    parser.add_argument("--target-ms", type=float, default=100.0, metavar="T", help="milliseconds of a verification")
    parser.add_argument("--drafter-ms", type=float, default=8.0, metavar="D", help="milliseconds of a drafted token")
    parser.add_argument("--acceptance", type=float, default=0.8, metavar="A", help="chance that a draft is right")
    parser.add_argument("--position-ms", type=float, default=0.3, metavar="P", help="default %(default)s")
    parser.add_argument("--target", metavar="REF", help="a real model, with an int8 copy of it as the drafter")
    add_device_options(parser)
    parser.add_argument("--fixed", action="store_true", help="run other fixed ways than plain decoding, too")
    parser.add_argument("--one-device", action="store_true", help="drafter and targets take turns, as on one GPU")
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="R",
        help="measurements of each way, in turn; the median is shown (default %(default)s)",
    )
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


@dataclass(slots=True)
class _Client:
    """What one client saw."""

    tokens: int = 0
    first_ms: list[float] = field(default_factory=list)
    intervals_ms: list[float] = field(default_factory=list)
    different: int = 0
    generations: int = 0


class _Load:
    """Prompts, what each gives alone, and clients that ask for them."""

    def __init__(self, orchestrator: Orchestrator, tokens: int) -> None:
        self._orchestrator = orchestrator
        self._tokens = tokens
        self._prompts = [
            [(7 * number + place) % 900 + 1 for place in range(5 + 30 * number)] for number in range(_PROMPTS)
        ]
        self._alone: list[list[int]] = []

    def _sampling(self, number: int) -> Sampling:
        return Sampling(max_tokens=self._tokens, seed=number, temperature=0.0)

    async def run_alone(self) -> None:
        for number, prompt in enumerate(self._prompts):
            stream = self._orchestrator.generate(prompt, self._sampling(number), algorithm="dsi")
            self._alone.append([token async for tokens in stream for token in tokens])

    async def measure(
        self, clients: int, seconds: float, algorithm: Algorithm, lookahead: int | None
    ) -> dict[str, Any]:
        seen = [_Client() for _ in range(clients)]
        begun_s = time.perf_counter()
        end_s = begun_s + seconds
        tasks = [
            asyncio.create_task(self._ask(client, number, end_s, algorithm, "auto" if lookahead is None else lookahead))
            for number, client in enumerate(seen)
        ]
        await asyncio.gather(*tasks)
        return _row(seen, seconds)

    async def _ask(
        self, client: _Client, number: int, end_s: float, algorithm: Algorithm, lookahead: int | Literal["auto"]
    ) -> None:
        while time.perf_counter() < end_s:
            number = (number + 1) % _PROMPTS
            last_s, found = time.perf_counter(), list[int]()
            stream = self._orchestrator.generate(
                self._prompts[number], self._sampling(number), algorithm=algorithm, lookahead=lookahead
            )
            async with stream:
                async for tokens in stream:
                    now_s = time.perf_counter()
                    if found:
                        client.intervals_ms += [(now_s - last_s) * 1e3 / len(tokens)] * len(tokens)
                    else:
                        client.first_ms.append((now_s - last_s) * 1e3)
                    last_s = now_s
                    found += tokens
                    if now_s < end_s:
                        client.tokens += len(tokens)
                    else:
                        break
            client.generations += 1
            client.different += found != self._alone[number][: len(found)]


def _row(clients: Sequence[_Client], seconds: float) -> dict[str, Any]:
    first = [value for client in clients for value in client.first_ms]
    intervals = [value for client in clients for value in client.intervals_ms]
    rates = sorted(client.tokens for client in clients)
    return {
        "tokens_per_s": sum(rates) / seconds,
        "first_token_ms_p50": percentile(first, 50), "first_token_ms_p99": percentile(first, 99),
        "ms_per_token": statistics.fmean(intervals) if intervals else 0.0,
        "ms_per_token_p50": percentile(intervals, 50), "ms_per_token_p99": percentile(intervals, 99),
        "slowest_over_fastest_client": rates[0] / rates[-1] if rates[-1] else 0.0,
        "generations": sum(client.generations for client in clients),
        "differing": sum(client.different for client in clients),
    }  # fmt: skip


def _median(rows: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the median rate, and of each repeat the rate as a share of plain decoding's in the same repeat."""
    shares = [row["tokens_per_s"] / max(1e-9, other["tokens_per_s"]) for row, other in zip(rows, plain, strict=True)]
    row = sorted(rows, key=lambda row: float(row["tokens_per_s"]))[len(rows) // 2]
    return {**row, "differing": sum(each["differing"] for each in rows), "of_plain": statistics.median(shares)}


async def run(arguments: argparse.Namespace) -> int:
    crowds = numbers(arguments.clients, "--clients", int, 1, _MOST_CLIENTS)
    if arguments.seconds <= 0 or arguments.tokens < 2:
        raise ConfigError("--seconds must be positive, --tokens at least 2")
    if arguments.repeats < 1:
        raise ConfigError("--repeats must be at least 1")
    if (devices_from(arguments) or arguments.tp > 1) and not arguments.target:
        raise ConfigError("--gpu, --gpus and --tp are for a --target: models that are timed have no device")
    if arguments.one_device and arguments.target:
        raise ConfigError("--one-device is for models that are timed: a --target is on the device that it is on")
    ways = _WAYS if arguments.fixed else _WAYS[:2]
    results: list[dict[str, Any]] = []
    config = _config(arguments, max(crowds))
    await prepare_shown(config)
    async with Orchestrator(config) as orchestrator:
        if arguments.one_device:
            for worker in orchestrator.workers:
                worker.gpus = frozenset({"the one device"})
        load = _Load(orchestrator, arguments.tokens)
        await load.run_alone()
        for clients in crowds:
            measured: dict[tuple[Algorithm, int | None], list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(arguments.repeats):
                for way, rows in measured.items():
                    rows.append(await load.measure(clients, arguments.seconds, *way))
            plain = measured["ar", None]
            for (algorithm, lookahead), rows in measured.items():
                way_and_crowd = {"clients": clients, "algorithm": algorithm, "lookahead": lookahead or "auto"}
                results.append({**way_and_crowd, "sp": arguments.sp, **_median(rows, plain)})
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": results}) + "\n")
    else:
        terminal().print(_table(results))
    return 1 if any(row["differing"] for row in results) else 0


def _config(arguments: argparse.Namespace, clients: int) -> Config:
    common: dict[str, Any] = {
        "sp": arguments.sp, "tp": arguments.tp, "devices": devices_from(arguments) or ("cpu",),
        "ready_timeout_s": arguments.ready_timeout, "log_level": arguments.log_level,
    }  # fmt: skip
    if arguments.target:
        return Config(target=arguments.target, drafter=SELF_INT8, **common)
    timed = {"seed": 7, "position_ms": arguments.position_ms, "slots": max(2, min(64, clients)), "chunk": 128}
    drafter = {**timed, "latency_ms": arguments.drafter_ms, "acceptance": arguments.acceptance}
    drafter["position_ms"] = arguments.position_ms * arguments.drafter_ms / arguments.target_ms
    if arguments.one_device:
        timed["device"] = drafter["device"] = f"load-{os.getpid()}"
    return Config(
        engine="timed", target_options={**timed, "latency_ms": arguments.target_ms}, drafter_options=drafter, **common
    )


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="load")
    for title in (
        "clients", "way", "tokens/s", "of plain", "first token ms p50 / p99", "ms/token", "p50 / p99", "slowest/fastest", "texts",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for row in results:
        table.add_row(
            str(row["clients"]), f"{row['algorithm']} k={row['lookahead']}" if row["algorithm"] != "ar" else "ar",
            f"{row['tokens_per_s']:.1f}", f"{row['of_plain']:.2f}",
            f"{row['first_token_ms_p50']:.0f} / {row['first_token_ms_p99']:.0f}",
            f"{row['ms_per_token']:.1f}", f"{row['ms_per_token_p50']:.1f} / {row['ms_per_token_p99']:.1f}",
            f"{row['slowest_over_fastest_client']:.2f}",
            f"{row['generations']} alike" if not row["differing"] else f"{row['differing']} DIFFER",
        )  # fmt: skip
    return table
