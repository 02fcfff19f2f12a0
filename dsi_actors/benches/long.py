"""`dsi-actors bench long`: what a token costs after a long text, beside what it costs after a short one.

Timed workers take as long for a forward in any text. So whatever a long text adds is work of this project, in the orchestrator
or in the workers. With --target a real model runs instead; its attention takes longer in a long text, as it must. Each round runs
every way at every length; medians of the rounds. The lookahead is fixed, so that all lengths are decoded alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from dsi_actors.benches.timed_workers import Way, add_scenario_options, check_sizes, scenario_from
from dsi_actors.config import NGRAM, SELF_INT8, Config, Sampling
from dsi_actors.console.machine import describe_machine, processor_s_of
from dsi_actors.console.numbers import numbers
from dsi_actors.console.options import (
    SubParsers,
    add_device_options,
    add_json_option,
    add_logging_option,
    add_ready_timeout_option,
    devices_from,
)
from dsi_actors.console.progress import model_directory, prepare_shown
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.tokenizer import Tokenizer
from dsi_protocol import MAX_TOKENS_PER_MESSAGE

_LOOKAHEAD, _ROWS = 4, 4
#: Its state follows the text: it is a part of what a long text could make dearer.
_PENALTY = 1.1
#: How long a real model may take to read a prompt.
_READING_S = 1800.0
_WORDS = "the a river of light and stone went on under many old trees while she counted small boats that came back late"
#: Between two looks of the task that notices when the event loop stands still.
_TICK_S = 0.001


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("long", help="what a token costs after a long text", description=__doc__)
    parser.add_argument(
        "--positions", default="1024,8192,32768", metavar="N,...", help="lengths of the prompt (default %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=256, metavar="S",
        help="of each generation; the second half is measured (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="rounds (default %(default)s)")
    parser.add_argument("--sp", type=int, default=2, metavar="N", help="target servers (default %(default)s)")
    add_scenario_options(parser)
    parser.add_argument("--target", metavar="REF", help="a real model, at the lengths that it takes")
    parser.add_argument(
        "--drafter", action="append", default=[], metavar="REF", dest="drafters",
        help=f"with --target; may be repeated: each has workers of its own (default {SELF_INT8})",
    )  # fmt: skip
    add_device_options(parser)
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error", target_ms=1.0, drafter_ms=0.2, alternatives=0.5)


@dataclass(frozen=True, slots=True)
class _Run:
    """One generation. Times are those of the second half of its tokens: while the first half comes, a drafter may still read the
    prompt."""

    output: list[int]
    first_token_ms: float
    tokens: int
    #: By what took it: the wall clock, and the processors of each role, the orchestrator's among them.
    seconds: dict[str, float]

    @property
    def ms_per_token(self) -> float:
        return self.seconds["wall"] * 1e3 / self.tokens


@dataclass(slots=True)
class _Place:
    """One way at one length."""

    name: str
    orchestrator: Orchestrator
    way: Way
    prompt: list[int]
    runs: list[_Run] = field(default_factory=list)
    #: The longest time for which the event loop stood still while the prompt was read.
    longest_pause_ms: float = 0.0


async def run(arguments: argparse.Namespace) -> int:
    check_sizes(arguments, "sp", "repeats")
    if arguments.tokens < 16:
        raise ConfigError(f"--tokens {arguments.tokens}: give at least 16, of which the second half is measured")
    positions = sorted(set(numbers(arguments.positions, "--positions", int, 1, MAX_TOKENS_PER_MESSAGE)))
    if arguments.drafters and arguments.target is None:
        raise ConfigError("--drafter is for a real model: give --target, too")
    configs = _timed(arguments) if arguments.target is None else _real(arguments, positions)
    if arguments.target is not None:
        for config in configs.values():
            await prepare_shown(config)
        tokenizer = Tokenizer(await model_directory(arguments.target))
    async with contextlib.AsyncExitStack() as stack:
        orchestrators = {
            drafter: await stack.enter_async_context(Orchestrator(config)) for drafter, config in configs.items()
        }
        fitting = _fitting(positions, arguments.tokens, [each.max_length for each in orchestrators.values()])
        prompts = [_prompt(length) if arguments.target is None else _words(length, tokenizer) for length in fitting]
        places = [
            _Place(name, orchestrator, way, prompt)
            for drafter, orchestrator in orchestrators.items()
            for name, way in _ways(drafter, arguments, first=drafter == next(iter(orchestrators)))
            for prompt in prompts
        ]
        for place in places:  # each worker reads each prompt
            async with _watched(place):
                await _generate(place, arguments.tokens, 0)
        for repeat in range(arguments.repeats):
            for place in places:
                place.runs.append(await _generate(place, arguments.tokens, repeat))
    rows = _rows(places, arguments)
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
    else:
        terminal().print(_table(rows))
    return 0


def _timed(arguments: argparse.Namespace) -> dict[str, Config]:
    """By drafter. Prompt lookup is real: it indexes the text."""
    scenario = scenario_from(arguments)
    common: dict[str, Any] = {
        "engine": "timed", "sp": arguments.sp, "devices": ("cpu",), "log_level": arguments.log_level,
        "ready_timeout_s": arguments.ready_timeout, "target_options": {"latency_ms": scenario.target_ms},
    }  # fmt: skip
    drafter = {
        "latency_ms": scenario.drafter_ms, "acceptance": scenario.acceptance, "alternatives": scenario.alternatives
    }  # fmt: skip
    return {
        "timed": Config(drafter_options=drafter, **common),
        NGRAM: Config(drafter=NGRAM, drafter_options={"remember": False}, **common),
    }


def _real(arguments: argparse.Namespace, positions: Sequence[int]) -> dict[str, Config]:
    """By drafter. There is a slot for each prompt, so that each is read once."""
    engine = {"max_length": max(positions) + arguments.tokens, "slots": len(positions)}
    return {
        drafter: Config(
            target=arguments.target, drafter=drafter, sp=arguments.sp, devices=devices_from(arguments), tp=arguments.tp,
            target_options=engine, drafter_options={**engine, "remember": False}, log_level=arguments.log_level,
            ready_timeout_s=arguments.ready_timeout, request_timeout_s=_READING_S,
        )
        for drafter in dict.fromkeys(arguments.drafters or [SELF_INT8])
    }  # fmt: skip


def _fitting(positions: Sequence[int], tokens: int, limits: Sequence[int]) -> list[int]:
    """The lengths that all target servers take. Raises ConfigError if there is none."""
    limit = min(*limits, MAX_TOKENS_PER_MESSAGE)
    fitting = [length for length in positions if length + tokens <= limit]
    if not fitting:
        raise ConfigError(
            f"no length of --positions and --tokens {tokens} fit the target's limit of {limit} positions: give shorter ones"
        )
    if len(fitting) < len(positions):
        terminal(stderr=True).print(f"lengths over {limit - tokens} are left out: the target takes {limit} positions")
    return fitting


def _ways(drafter: str, arguments: argparse.Namespace, *, first: bool) -> list[tuple[str, Way]]:
    """With their names. `first`: it is the first drafter, whose workers do plain decoding, too."""
    sp = arguments.sp
    chain, tree = Way("dsi", sp, _LOOKAHEAD, 1), Way("dsi", sp, _LOOKAHEAD, _ROWS)
    if arguments.target is None and drafter == NGRAM:
        return [(f"DSI SP={sp} {drafter}", chain)]
    plain = [("AR", Way("ar"))] if first else []
    ways = [("SI", Way("si", 1, _LOOKAHEAD, 1)), (f"DSI SP={sp} chain", chain), (f"DSI SP={sp} tree", tree)]
    if arguments.target is not None:
        return plain + [(f"{name} {drafter}", way) for name, way in ways]
    return plain + (ways if arguments.alternatives else ways[:-1])


def _prompt(length: int) -> list[int]:
    return [(7 * place + length) % 900 + 1 for place in range(length)]


def _words(length: int, tokenizer: Tokenizer) -> list[int]:
    """Words in an order of their own for each length: no prompt begins like another one."""
    chance = random.Random(length)
    return tokenizer.encode(" ".join(chance.choices(_WORDS.split(), k=length)))[:length]


async def _generate(place: _Place, tokens: int, seed: int) -> _Run:
    way, orchestrator = place.way, place.orchestrator
    output, begun, before_s = list[int](), 0, dict[str, float]()
    sampling = Sampling(max_tokens=tokens, repetition_penalty=_PENALTY, seed=seed)
    async with orchestrator.generate(
        place.prompt, sampling, algorithm=way.algorithm, sp=way.sp, lookahead=way.lookahead or "auto", rows=way.rows
    ) as stream:
        async for chunk in stream:
            output += chunk
            if not before_s and len(output) >= tokens // 2:
                begun, before_s = len(output), _seconds(orchestrator)
        after_s = _seconds(orchestrator)
        report = await stream.report()
    used_s = {name: after_s[name] - before_s[name] for name in after_s}
    return _Run(output, report.first_token_ms, max(1, len(output) - begun), used_s)


def _seconds(orchestrator: Orchestrator) -> dict[str, float]:
    """On the wall clock, and of processors that each role has used so far."""
    found = {"wall": time.perf_counter(), "orchestrator": time.process_time(), "target": 0.0, "drafter": 0.0}
    for worker in orchestrator.workers:
        found[worker.role] += processor_s_of(worker.hello.process)
    return found


@asynccontextmanager
async def _watched(place: _Place) -> AsyncIterator[None]:
    """Notices how long the event loop stands still in the block."""

    async def tick() -> None:
        while True:
            begun_s = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            late_ms = (time.perf_counter() - begun_s - _TICK_S) * 1e3
            place.longest_pause_ms = max(place.longest_pause_ms, late_ms)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()


def _rows(places: Sequence[_Place], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Raises ConfigError if two ways gave different text."""
    texts: dict[int, list[int]] = {}
    shortest: dict[str, _Place] = {}
    rows = []
    for place in places:
        positions = len(place.prompt)
        text = texts.setdefault(positions, place.runs[0].output)
        if any(each.output != text for each in place.runs):
            raise ConfigError(f"{place.name} gave another text than {places[0].name}: this is a bug")
        pairs = zip(place.runs, shortest.setdefault(place.name, place).runs, strict=True)
        tokens = sum(each.tokens for each in place.runs)
        each_ms = [each.ms_per_token for each in place.runs]
        rows.append({
            "target": arguments.target or "timed", "way": place.name, "algorithm": place.way.algorithm,
            "positions": positions, "tokens": len(text), "repeats": len(place.runs),
            "ms_per_token": statistics.median(each_ms), "fastest_ms_per_token": min(each_ms),
            "slowest_ms_per_token": max(each_ms),
            "ratio_to_shortest": statistics.median(each.ms_per_token / other.ms_per_token for each, other in pairs),
            **{
                f"{role}_processor_ms_per_token": sum(each.seconds[role] for each in place.runs) * 1e3 / tokens
                for role in ("orchestrator", "target", "drafter")
            },
            "first_token_ms": statistics.median(each.first_token_ms for each in place.runs),
            "longest_pause_ms": place.longest_pause_ms,
        })  # fmt: skip
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"long texts, {rows[0]['target']}")
    for title in (
        "way", "positions", "ms/token", "over the shortest", "processor ms/token: orchestrator", "targets", "drafter",
        "first token ms", "longest pause ms",
    ):  # fmt: skip
        table.add_column(title, justify="left" if title == "way" else "right")
    for row in rows:
        processors = [f"{row[f'{role}_processor_ms_per_token']:.3f}" for role in ("orchestrator", "target", "drafter")]
        table.add_row(
            row["way"], str(row["positions"]), f"{row['ms_per_token']:.3f}", f"{row['ratio_to_shortest']:.2f}", *processors,
            f"{row['first_token_ms']:.0f}", f"{row['longest_pause_ms']:.1f}",
        )  # fmt: skip
    return table
