"""`dsi-actors bench soak`: a mixed load of clients, many of which go away in the middle, for as long as you like.

Long prompts and short ones, all algorithms, lulls and rushes; at the end nobody asks. Whatever a client read must be what a
lone run gives. Memory, tasks and descriptors of this process and memory of the workers must not grow: what they are in the last
quarter is held against the second one. Workers must be idle when nobody asks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from dsi_actors.config import ALGORITHMS, Config, Sampling
from dsi_actors.console.machine import describe_machine, memory_of, processor_s_of
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.orchestrator import Orchestrator

_PROMPTS = 12
_TOKENS = 40
_IDLE_S = 3.0
#: Of a processor, per worker, when nobody asks: heartbeats and looking whether there is something to do.
_IDLE_SHARE = 0.05
_GROWTH_BYTES = 16 << 20


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("soak", help="a mixed load for long: nothing grows", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="default %(default)s")
    parser.add_argument("--clients", type=int, default=24, metavar="N", help="at most at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of everything that is drawn")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


@dataclass(frozen=True, slots=True)
class _Sample:
    """What is held at one moment."""

    at_s: float
    private_bytes: int
    workers_private_bytes: int
    descriptors: int
    tasks: int


class _Soak:
    def __init__(self, orchestrator: Orchestrator, seed: int) -> None:
        self._orchestrator = orchestrator
        self._chance = random.Random(seed)
        self._prompts = [[self._chance.randrange(1, 900) for _ in range(8 + 40 * n)] for n in range(_PROMPTS)]
        self._alone: list[list[int]] = []
        self.samples: list[_Sample] = []
        self.finished = self.vanished = self.differing = 0

    async def run_alone(self) -> None:
        for number in range(_PROMPTS):
            stream = self._orchestrator.generate(self._prompts[number], Sampling(max_tokens=_TOKENS, seed=number))
            self._alone.append([token async for tokens in stream for token in tokens])

    async def run(self, seconds: float, most_clients: int) -> None:
        end_s = time.monotonic() + seconds
        watching = asyncio.create_task(self._watch(end_s, max(0.2, seconds / 200)))
        clients: set[asyncio.Task[None]] = set()
        while time.monotonic() < end_s:
            rush = int(time.monotonic() / 10) % 3  # lulls, ordinary times and rushes take turns
            if len(clients) < (1, most_clients // 4, most_clients)[rush]:
                task = asyncio.create_task(self._client())
                clients.add(task)
                task.add_done_callback(clients.discard)
            await asyncio.sleep(self._chance.random() * 0.1)
        await asyncio.gather(*clients)
        await watching

    async def _client(self) -> None:
        number, chance = self._chance.randrange(_PROMPTS), self._chance
        patience = chance.randrange(1, _TOKENS) if chance.random() < 0.4 else _TOKENS
        stream = self._orchestrator.generate(
            self._prompts[number], Sampling(max_tokens=_TOKENS, seed=number), algorithm=chance.choice(ALGORITHMS)
        )
        found: list[int] = []

        async def read() -> None:
            async with stream:
                async for tokens in stream:
                    found.extend(tokens)
                    if len(found) >= patience:
                        return

        if chance.random() < 0.2:  # it goes away without a word, at any moment
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(read(), chance.random())
        else:
            await read()
        self.differing += found != self._alone[number][: len(found)]
        if len(found) == _TOKENS:
            self.finished += 1
        else:
            self.vanished += 1

    async def _watch(self, end_s: float, every_s: float) -> None:
        while time.monotonic() < end_s:
            self.samples.append(self._sample())
            await asyncio.sleep(every_s)

    def _sample(self) -> _Sample:
        workers = sum(memory_of(process).get("private_bytes", 0) for process in self._orchestrator.process_ids)
        descriptors = psutil.Process().num_fds()
        own = memory_of(os.getpid()).get("private_bytes", 0)
        return _Sample(time.monotonic(), own, workers, descriptors, len(asyncio.all_tasks()))

    async def idle_share(self) -> float:
        """Processor time of the busiest worker while nobody asks, as a share of the time."""
        await asyncio.sleep(1.0)
        processes = self._orchestrator.process_ids
        before_s = [processor_s_of(process) for process in processes]
        await asyncio.sleep(_IDLE_S)
        return max(processor_s_of(each) - before for each, before in zip(processes, before_s, strict=True)) / _IDLE_S

    def growth(self, name: str) -> float:
        """The median of the last quarter less that of the second."""
        values = [float(getattr(sample, name)) for sample in self.samples]
        quarter = max(1, len(values) // 4)
        return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter] or values)


async def run(arguments: argparse.Namespace) -> int:
    if arguments.minutes <= 0 or arguments.clients < 1:
        raise ConfigError("--minutes must be positive and --clients at least 1")
    timed: dict[str, Any] = {"seed": 7, "position_ms": 0.02, "chunk": 128}
    config = Config(
        engine="timed", sp=2, devices=("cpu",), log_level=arguments.log_level,
        target_options={**timed, "latency_ms": 20.0},
        drafter_options={**timed, "latency_ms": 2.0, "acceptance": 0.8},
    )  # fmt: skip
    async with Orchestrator(config) as orchestrator:
        soak = _Soak(orchestrator, arguments.seed)
        await soak.run_alone()
        await soak.run(arguments.minutes * 60, arguments.clients)
        idle_share = await soak.idle_share()
        left = orchestrator.running
    row = {
        "minutes": arguments.minutes, "finished": soak.finished, "vanished": soak.vanished,
        "differing": soak.differing, "left_running": left, "worker_idle_share": round(idle_share, 4),
        **{f"{name}_growth": soak.growth(name) for name in ("private_bytes", "workers_private_bytes", "descriptors", "tasks")},
        "last": {name: value for name, value in asdict(soak.samples[-1]).items() if name != "at_s"},
    }  # fmt: skip
    problems = _problems(row)
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": [row]}) + "\n")
    else:
        console = terminal()
        for name, value in row.items():
            console.print(f"{name}: {value}")
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


def _problems(row: dict[str, Any]) -> list[str]:
    limits = {
        "differing": 0, "left_running": 0, "private_bytes_growth": _GROWTH_BYTES, "descriptors_growth": 4,
        "workers_private_bytes_growth": _GROWTH_BYTES, "worker_idle_share": _IDLE_SHARE,
    }  # fmt: skip
    return [f"{name} is {row[name]}, over {limit}" for name, limit in limits.items() if row[name] > limit]
