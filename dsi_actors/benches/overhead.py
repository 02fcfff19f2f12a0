"""`dsi-actors bench overhead`: what messages, orchestrator and cancels cost, apart from any model.

Real worker processes, real sockets, the `timed` engine. With --target the cancel is measured on that model's forwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import zmq
from rich.table import Table

from dsi_actors.config import Config, Sampling
from dsi_actors.console.machine import describe_machine, memory_of
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option, add_ready_timeout_option
from dsi_actors.console.progress import prepare_shown
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.temporary import socket_directory
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.percentiles import percentile
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import (
    Cancelled,
    OpenGeneration,
    Ready,
    Reply,
    Verified,
    Verify,
    Welcome,
    decode,
    encode,
    prefix_checksum,
)

_TOKENS = tuple(range(1, 17))
_SOCKET = "floor.sock"
#: Not the number of any generation that the orchestrator gives out.
_GENERATION = 1 << 40


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("overhead", help="round trip, orchestrator CPU, cancel latency", description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000, metavar="R", help="round trips (default %(default)s)")
    parser.add_argument("--cancels", type=int, default=200, metavar="R", help="cancels (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=300, metavar="S", help="tokens of the generation for CPU time")
    parser.add_argument(
        "--long", type=int, default=10_000, metavar="S", help="tokens of the generation for growth of memory"
    )
    parser.add_argument("--target-ms", type=float, default=20.0, metavar="T", help="milliseconds of a verification")
    parser.add_argument("--drafter-ms", type=float, default=4.0, metavar="D", help="milliseconds of a drafted token")
    parser.add_argument("--acceptance", type=float, default=0.8, metavar="A", help="chance that a draft is right")
    parser.add_argument("--sp", type=int, default=2, metavar="N", help="target servers")
    parser.add_argument("--target", metavar="REF", help="measure cancels inside the forwards of this model")
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    if min(arguments.repeats, arguments.cancels, arguments.tokens, arguments.long) < 1:
        raise ConfigError("--repeats, --cancels, --tokens and --long must be at least 1")
    rows = [
        await _round_trip(arguments),
        await _orchestrator_cpu(arguments),
        await asyncio.to_thread(_floor, arguments),
        *await _cancel_and_memory(arguments),
        await _growth(arguments),
    ]
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    table = Table("measured", "value", title=None)
    for row in rows:
        for name, value in row.items():
            if name != "measured":
                table.add_row(f"{row['measured']}: {name}", f"{value:.1f}" if isinstance(value, float) else str(value))
    terminal().print(table)
    return 0


def _timed(arguments: argparse.Namespace, **target: float) -> Config:
    return Config(
        engine="timed", sp=arguments.sp, devices=("cpu",), log_level=arguments.log_level,
        target_options={"latency_ms": arguments.target_ms, **target},
        drafter_options={"latency_ms": arguments.drafter_ms, "acceptance": arguments.acceptance},
    )  # fmt: skip


async def _round_trip(arguments: argparse.Namespace) -> dict[str, Any]:
    """Orchestrator → worker → orchestrator: a verification that takes no time."""
    async with Orchestrator(_timed(arguments, latency_ms=0.0)) as orchestrator:
        target = _a_target(orchestrator)
        target.open(_GENERATION, 1, "bench", Sampling())  # all but the first token in windows, not as a prompt
        times_us: list[float] = []
        for attempt in range(1, arguments.repeats + 1):
            begun = time.perf_counter()
            reply = await _verify(target, attempt)
            times_us.append((time.perf_counter() - begun) * 1e6)
            assert isinstance(reply, Verified), reply
        return {"measured": "round trip", **_percentiles("us", times_us)}


async def _orchestrator_cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU time of this process for each committed token of a DSI generation."""
    async with Orchestrator(_timed(arguments)) as orchestrator:
        await _drain(orchestrator, 16)
        begun = time.process_time()
        await _drain(orchestrator, arguments.tokens)
        cpu_us = (time.process_time() - begun) * 1e6
    return {"measured": "orchestrator CPU", "us_per_token": cpu_us / arguments.tokens, "tokens": arguments.tokens}


def _floor(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU time for each message of a loop that does nothing but what ZeroMQ and msgpack need: no actors, no asyncio.

    A worker is asked about as often as in `_orchestrator_cpu`, so that the processor sleeps as long in between."""
    with socket_directory(_SOCKET) as directory, zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.RCVTIMEO, 30_000)
        endpoint = f"ipc://{directory}/{_SOCKET}"
        router.bind(endpoint)
        command = [sys.executable, "-m", "dsi_actors.worker", "--gpu", "cpu", "--connect", endpoint, "--supervised"]
        with subprocess.Popen([*command, "--log-level", "error"], stdin=subprocess.PIPE) as worker:
            identity, _ = router.recv_multipart()
            options = {"latency_ms": arguments.target_ms / 4, "calibrate": False}
            router.send_multipart([identity, encode(Welcome(1, "target", "timed", "", options, 60_000, 600_000))])
            while not isinstance(decode(router.recv_multipart()[1]), Ready):
                pass
            opened = OpenGeneration(_GENERATION, 1, "bench")
            router.send_multipart([identity, encode(opened)])
            begun = 0.0
            for attempt in range(1, arguments.repeats + 11):
                if attempt == 11:  # warm
                    begun = time.process_time()
                router.send_multipart([identity, encode(_request(attempt))])
                while not isinstance(decode(router.recv_multipart()[1]), Verified):
                    pass
            cpu_us = (time.process_time() - begun) * 1e6
            assert worker.stdin is not None
            worker.stdin.close()
    return {"measured": "ZeroMQ and msgpack alone", "us_per_message": cpu_us / arguments.repeats / 2}


async def _growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one long generation adds to memory between its first tenth and its end, here and in the workers."""
    fast = dict(vars(arguments), target_ms=0.5, drafter_ms=0.1)
    async with Orchestrator(_timed(argparse.Namespace(**fast))) as orchestrator:
        processes = {"orchestrator": os.getpid()}
        processes |= {f"{worker.role} {worker.number}": worker.hello.process for worker in orchestrator.workers}
        before: dict[str, int] = {}
        tokens = 0
        async for chunk in orchestrator.generate(_TOKENS, Sampling(max_tokens=arguments.long)):
            tokens += len(chunk)
            if not before and tokens >= arguments.long // 10:
                before = _private_bytes(processes)
        after = _private_bytes(processes)
    grown = {f"{name} grown_bytes": after[name] - before.get(name, 0) for name in after}
    return {"measured": f"a generation of {arguments.long} tokens", **grown}


def _private_bytes(processes: dict[str, int]) -> dict[str, int]:
    found = {name: memory_of(process).get("private_bytes") for name, process in processes.items()}
    return {name: size for name, size in found.items() if size is not None}


async def _drain(orchestrator: Orchestrator, tokens: int) -> None:
    async for _ in orchestrator.generate(_TOKENS, Sampling(max_tokens=tokens)):
        pass


async def _cancel_and_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """From the cancel to the reply that says that the worker is free again; and what each worker holds in memory."""
    if arguments.target is None:
        config, name = _timed(arguments, latency_ms=10_000.0), "timed"
    else:
        config = Config(
            target=arguments.target,
            sp=arguments.sp,
            ready_timeout_s=arguments.ready_timeout,
            log_level=arguments.log_level,
        )
        name = arguments.target
    times_us: list[float] = []
    await prepare_shown(config)
    async with Orchestrator(config) as orchestrator:
        target = _a_target(orchestrator)
        target.open(_GENERATION, 1, "bench", Sampling())  # all but the first token in windows, not as a prompt
        attempt, late = 0, 0
        if arguments.target is not None:  # read the prefix once, so that what is cancelled is one verification
            attempt = 1
            await _verify(target, attempt)
        while len(times_us) < arguments.cancels and late < 10 * arguments.cancels:
            attempt += 1
            running = _verify(target, attempt)
            # At another point of the forward each time.
            await asyncio.sleep(0.005 + 0.02 * (attempt % 16) / 16)
            begun = time.perf_counter()
            target.cancel(_GENERATION, attempt)
            reply = await running
            if isinstance(reply, Cancelled):
                times_us.append((time.perf_counter() - begun) * 1e6)
            else:
                late += 1
        memory = [
            {"measured": f"memory of {worker.role} {worker.number} ({name})", **memory_of(worker.hello.process)}
            for worker in orchestrator.workers
        ]
    if not times_us:
        raise ConfigError(f"the forwards of {name} are too short to be cancelled")
    return [{"measured": f"cancel to free ({name})", **_percentiles("us", times_us)}, *memory]


def _a_target(orchestrator: Orchestrator) -> WorkerHandle:
    return next(worker for worker in orchestrator.workers if worker.role == "target")


def _verify(target: WorkerHandle, attempt: int) -> asyncio.Future[Reply | None]:
    reply: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
    target.verify(_request(attempt), reply.set_result)
    return reply


def _request(attempt: int) -> Verify:
    """Verify the last tokens, as wide as one window; the worker holds them from the first attempt on."""
    start = len(_TOKENS) - 6
    if attempt == 1:
        return Verify(_GENERATION, attempt, 0, 0, _TOKENS, start)
    return Verify(_GENERATION, attempt, len(_TOKENS), prefix_checksum(_TOKENS), (), start)


def _percentiles(unit: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"p50_{unit}": percentile(values, 50), f"p99_{unit}": percentile(values, 99), f"max_{unit}": max(values),
        "count": len(values),
    }  # fmt: skip
