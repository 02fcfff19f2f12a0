"""`dsi-actors bench exact-cost`: what it costs that the text never depends on how it was computed.

Plain decoding (AR) by one of our target servers, which is exact, against transformers' own greedy `generate`, which is
not: alternating in one run, each in a process of its own with the same number of threads, the other one idle. `--tp N` adds
a target server that is a group of N processes with one thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from typing import Any

from rich.table import Table

from dsi_actors.benches.prompts import Prompt, add_prompt_options, read_prompts
from dsi_actors.benches.reference import ReferenceProcess
from dsi_actors.config import Config, Sampling
from dsi_actors.console.machine import describe_machine, memory_of
from dsi_actors.console.options import (
    SubParsers,
    add_json_option,
    add_logging_option,
    add_ready_timeout_option,
    add_target_option,
)
from dsi_actors.console.progress import model_directory
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.tokenizer import Tokenizer

_OURS, _THEIRS = "exact (AR)", "transformers generate"


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("exact-cost", help="what exactness costs", description=__doc__)
    add_target_option(parser)
    add_prompt_options(parser, limit=5, max_tokens=32)
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="default %(default)s")
    parser.add_argument("--dtypes", default="float32,bfloat16", metavar="LIST", help="default %(default)s")
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="run a group of N processes, too (default: none)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="T", help="torch threads of each process")
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1 or arguments.max_tokens < 2 or min(arguments.threads, arguments.tp) < 1:
        raise ConfigError("--repeats, --threads and --tp must be at least 1, --max-tokens at least 2")
    prompts = read_prompts(arguments, Tokenizer(await model_directory(arguments.target)))
    rows = [row for dtype in arguments.dtypes.split(",") for row in await _measure(arguments, dtype, prompts)]
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    table = Table("dtype", "", "ms per token", "first token ms", "resident MB", "private MB")
    for row in rows:
        memory = [f"{row[name] / 1e6:.0f}" if name in row else "-" for name in ("resident_bytes", "private_bytes")]
        times = [f"{row['ms_per_token']:.1f}", f"{row['first_token_ms']:.0f}"]
        table.add_row(row["dtype"], row["path"], *times, *memory)
    console = terminal()
    console.print(table)
    by_dtype = {dtype: [row for row in rows if row["dtype"] == dtype] for dtype in arguments.dtypes.split(",")}
    for dtype, (ours, *others) in by_dtype.items():
        for other in others:
            ratio, first = (ours[name] / other[name] for name in ("ms_per_token", "first_token_ms"))
            console.print(f"{dtype}: {_OURS} / {other['path']} {ratio:.2f} per token, {first:.2f} to the first token")
    return 0


async def _measure(arguments: argparse.Namespace, dtype: str, prompts: list[Prompt]) -> list[dict[str, Any]]:
    group = f"{_OURS}, group of {arguments.tp}"
    ours = {
        _OURS: _config(arguments, dtype),
        **({group: _config(arguments, dtype, tp=arguments.tp)} if arguments.tp > 1 else {}),
    }
    names = [*ours, _THEIRS]
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    reference = ReferenceProcess(arguments.target, dtype=dtype, threads=arguments.threads)
    async with contextlib.AsyncExitStack() as stack:
        running = {name: await stack.enter_async_context(Orchestrator(config)) for name, config in ours.items()}
        await stack.enter_async_context(reference)
        for repeat in range(arguments.repeats):
            for prompt in prompts:
                for name in names if repeat % 2 else reversed(names):
                    if name in running:
                        times[name].append(await _ours(running[name], prompt, arguments.max_tokens))
                    else:
                        request = {"generate": prompt.ids, "max_tokens": arguments.max_tokens, "stop": []}
                        times[name].append((await reference.ask(**request))["times_ms"])
        processes = {name: orchestrator.process_ids[0] for name, orchestrator in running.items()}
        memory = {name: memory_of(process) for name, process in {**processes, _THEIRS: reference.process_id}.items()}
    return [
        {
            "dtype": dtype,
            "path": name,
            "tp": arguments.tp if name not in (_OURS, _THEIRS) else 1,
            "threads": arguments.threads if name in (_OURS, _THEIRS) else 1,
            "ms_per_token": statistics.median((run[-1] - run[0]) / (len(run) - 1) for run in runs),
            "first_token_ms": statistics.median(run[0] for run in runs),
            "generations": len(runs),
            **memory[name],
        }
        for name, runs in times.items()
    ]


def _config(arguments: argparse.Namespace, dtype: str, *, tp: int = 1) -> Config:
    """A single process has all threads, a rank of a group one."""
    return Config(
        target=arguments.target, drafter=None, sp=1, tp=tp, log_level=arguments.log_level,
        target_options={"dtype": dtype, "threads": arguments.threads if tp == 1 else 1},
        ready_timeout_s=arguments.ready_timeout, devices=("cpu",) if tp > 1 else (),
    )  # fmt: skip


async def _ours(orchestrator: Orchestrator, prompt: Prompt, max_tokens: int) -> list[float]:
    """When each token was there, in ms from the start."""
    begun = time.perf_counter()
    times_ms: list[float] = []
    async for tokens in orchestrator.generate(prompt.ids, Sampling(max_tokens=max_tokens), algorithm="ar"):
        times_ms += [(time.perf_counter() - begun) * 1e3] * len(tokens)
    return times_ms
