"""`dsi-actors bench start`: from a command to its first token, and where the time goes.

It runs `dsi-actors generate` as a user would, several times, and reads from its log when each process had done what. Workers
start together, so their times run side by side; a model that must be converted first is converted before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from datetime import datetime
from typing import Any

from rich.table import Table

from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import (
    SubParsers,
    add_drafter_option,
    add_json_option,
    add_logging_option,
    add_target_option,
)
from dsi_actors.console.progress import model_directory
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError, DsiError

_PROMPT = "Say hello."
#: What the processes log, in the order in which it happens, and what was done by then.
_WORKER_STEPS = {
    "loading": "is up and has said hello",
    "imported": "has imported torch",
    "read": "has read its model and laid out its weights",
    "bits tried": "knows which widths give the same bits",
    "ready": "has warmed up and measured itself",
}


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("start", help="from command to first token", description=__doc__)
    add_target_option(parser)
    add_drafter_option(parser)
    parser.add_argument("--sp", type=int, default=1, metavar="N", help="target servers (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="default %(default)s")
    parser.add_argument("--no-calibration", action="store_true", help="start without measuring latencies")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1:
        raise ConfigError("--repeats must be at least 1")
    await model_directory(arguments.target)
    words = ["--target", arguments.target, "--drafter", arguments.drafter, "--sp", str(arguments.sp)]
    words += ["--no-calibration"] if arguments.no_calibration else []
    runs = [await _start(words) for _ in range(arguments.repeats)]
    # A worker that was not needed for the first token may not have come so far.
    names = [name for name in runs[0] if all(name in each for each in runs)]
    steps = {
        name: {"ms": statistics.median(each[name] for each in runs), "worst_ms": max(each[name] for each in runs)}
        for name in names
    }
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "repeats": len(runs), "steps": steps}) + "\n")
        return 0
    table = Table(title=f"ms after the command, medians of {len(runs)}")
    for title in ("", "ms", "worst"):
        table.add_column(title, justify="right" if title else "left")
    for name, step in steps.items():
        table.add_row(name, f"{step['ms']:.0f}", f"{step['worst_ms']:.0f}")
    terminal().print(table)
    return 0


async def _start(words: list[str]) -> dict[str, float]:
    """When what was done, in ms after the command, in order of time."""
    begun_s = time.time()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dsi_actors.cli.main", "generate", _PROMPT, *words, "--max-tokens", "1", "--json",
        "--log-level", "info", "--log-format", "json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if process.returncode != 0:
        raise DsiError(f"generate failed: {errors.decode(errors='replace').strip()[-500:]}")
    happened: dict[str, float] = {}
    for text in errors.decode(errors="replace").splitlines():
        line = json.loads(text) if text.startswith("{") else {}
        name = _name_of(line)
        if name:
            happened.setdefault(name, (datetime.fromisoformat(line["time"]).timestamp() - begun_s) * 1e3)
    return dict(sorted(happened.items(), key=lambda each: each[1]))


def _name_of(line: dict[str, Any]) -> str:
    event, role = line.get("event"), line.get("role")
    if role in ("target", "drafter") and event in _WORKER_STEPS:
        return f"{role} {_WORKER_STEPS[event]}"
    return "the first token is there" if line.get("logger") == "dsi.generation" and event == "finished" else ""
