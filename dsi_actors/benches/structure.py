"""`dsi-actors bench structure`: what structured output costs per token.

Plain decoding (AR) by one target server, free and with a structure, alternating in one run. Both write the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from rich.table import Table

from dsi_actors.benches.prompts import Prompt, add_prompt_options, read_prompts
from dsi_actors.config import Config, Sampling
from dsi_actors.console.machine import describe_machine
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
from dsi_actors.host.requirements import require_models
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.structure import Structure
from dsi_actors.tokenizer import Tokenizer

#: An answer with this schema is longer than any measurement.
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "kind": {"enum": ["animal", "plant", "mineral"]},
            "sizes": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "kind", "sizes"],
        "additionalProperties": False,
    },
}
#: Any JSON, in an array, since a small model's object ends soon.
ANY_OBJECTS: dict[str, Any] = {"type": "array", "minItems": 100, "items": {"type": "object", "minProperties": 2}}
REGEX = "([A-Z][a-z]{2,12}( [a-z]{1,12}){2,9}[.] ){100}"
STRUCTURES = ("json_schema", "json_object", "regex")


def structure_of(kind: str) -> Structure:
    """The structure of one of STRUCTURES. Raises ConfigError."""
    if kind == "regex":
        return Structure.regex(REGEX)
    return Structure.json_schema(SCHEMA if kind == "json_schema" else ANY_OBJECTS)


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("structure", help="what structured output costs per token", description=__doc__)
    add_target_option(parser)
    add_prompt_options(parser, limit=2, max_tokens=64)
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="T", help="torch threads of the target server")
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1 or arguments.max_tokens < 2 or arguments.threads < 1:
        raise ConfigError("--repeats and --threads must be at least 1, --max-tokens at least 2")
    config = Config(
        target=arguments.target, drafter=None, sp=1, log_level=arguments.log_level, ready_timeout_s=arguments.ready_timeout,
        target_options={"threads": arguments.threads},
    )  # fmt: skip
    require_models(config.local_models, what="this benchmark")
    tokenizer = Tokenizer(await model_directory(arguments.target))
    if not tokenizer.stop_token_ids:
        raise ConfigError(f"{arguments.target} has no stop token: an answer with a structure could not end")
    prompts = read_prompts(arguments, tokenizer)
    common: dict[str, Any] = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature, "seed": 2024}
    async with Orchestrator(config) as orchestrator:
        rows = []
        for kind in STRUCTURES:
            sampling = Sampling(**common, structure=structure_of(kind), stop_token_ids=tokenizer.stop_token_ids)
            rows.append(await _measure(orchestrator, prompts, kind, Sampling(**common), sampling, arguments.repeats))
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    table = Table("structure", "free ms per token", "structured ms per token", "ratio", "tokens")
    for row in rows:
        table.add_row(
            row["structure"], f"{row['free_ms_per_token']:.2f}", f"{row['structured_ms_per_token']:.2f}",
            f"{row['ratio']:.3f}", str(row["tokens"]),
        )  # fmt: skip
    terminal().print(table)
    return 0


async def _measure(
    orchestrator: Orchestrator, prompts: list[Prompt], kind: str, free: Sampling, structured: Sampling, repeats: int
) -> dict[str, Any]:
    """The medians over prompts and repeats, after one round that is not counted."""
    times: dict[bool, list[float]] = {False: [], True: []}
    tokens = 0
    for repeat in range(repeats + 1):
        for prompt in prompts:
            for with_structure in (False, True) if repeat % 2 else (True, False):
                ms, count = await _ms_per_token(orchestrator, prompt, structured if with_structure else free)
                if repeat:
                    times[with_structure].append(ms)
                    tokens += count if with_structure else 0
    free_ms, structured_ms = (statistics.median(times[each]) for each in (False, True))
    return {
        "structure": kind,
        "free_ms_per_token": free_ms,
        "structured_ms_per_token": structured_ms,
        "ratio": structured_ms / free_ms,
        "generations": len(times[True]),
        "tokens": tokens,
    }


async def _ms_per_token(orchestrator: Orchestrator, prompt: Prompt, sampling: Sampling) -> tuple[float, int]:
    """The time per token from the first token on, and the number of tokens."""
    times_s: list[float] = []
    async for tokens in orchestrator.generate(prompt.ids, sampling, algorithm="ar"):
        times_s += [time.perf_counter()] * len(tokens)
    return (times_s[-1] - times_s[0]) * 1e3 / max(1, len(times_s) - 1), len(times_s)
