"""`dsi-actors bench acceptance`: how often a drafter is right, against what theory says it can be.

When target and drafter draw with the same noise (Gumbel coupling), they agree with a probability between
(1 - TV) / (1 + TV) and 1 - TV, where TV is the total variation distance of their distributions (arXiv 2408.07978).
1 - TV is the best that any coupling reaches, and what rejection sampling (Leviathan et al., 2023) reaches.

Outputs are SI's, which waits for its drafts: so a slow machine compares as many as a fast one. Each is read again by
transformers, with both models: the mean of both bounds over its positions stands beside the acceptance rate that the
generations had.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from typing import Any

from rich.table import Table

from dsi_actors.benches.prompts import Prompt, add_prompt_options, read_prompts
from dsi_actors.benches.reference import ReferenceProcess
from dsi_actors.config import NGRAM, RANDOM, Config, Sampling
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import (
    SubParsers,
    add_drafter_option,
    add_json_option,
    add_logging_option,
    add_ready_timeout_option,
    add_target_option,
)
from dsi_actors.console.progress import model_directory, prepare_shown
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.tokenizer import Tokenizer

_LOOKAHEAD = 3


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("acceptance", help="acceptance rate against theory", description=__doc__)
    add_target_option(parser)
    add_drafter_option(parser)
    parser.add_argument("--temperatures", default="0.5,0.8,1.0", metavar="LIST", help="default %(default)s")
    add_prompt_options(parser, limit=10, max_tokens=64)
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="of the target (default %(default)s)")
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    if arguments.drafter in (NGRAM, RANDOM, "none"):
        raise ConfigError(f"the drafter {arguments.drafter!r} has no distribution to compare: give a model")
    temperatures = [_temperature(text) for text in arguments.temperatures.split(",")]
    prompts = read_prompts(arguments, Tokenizer(await model_directory(arguments.target)))
    config = Config(
        target=arguments.target, drafter=arguments.drafter, sp=1, log_level=arguments.log_level,
        target_options={"dtype": arguments.dtype}, ready_timeout_s=arguments.ready_timeout,
    )  # fmt: skip
    await prepare_shown(config)
    reference = ReferenceProcess(arguments.target, dtype=arguments.dtype, drafter=arguments.drafter)
    async with Orchestrator(config) as orchestrator, reference:
        rows = [await _measure(orchestrator, reference, prompts, at, arguments.max_tokens) for at in temperatures]
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    table = Table("temperature", "(1-TV)/(1+TV)", "measured", "1-TV", "standard error", "drafts compared")
    for row in rows:
        figures = [f"{row[name]:.3f}" for name in ("lower", "acceptance_rate", "upper", "standard_error")]
        table.add_row(f"{row['temperature']:g}", *figures, str(row["drafts_compared"]))
    terminal().print(table)
    return 0


def _temperature(text: str) -> float:
    try:
        temperature = float(text)
    except ValueError:
        raise ConfigError(f"--temperatures: {text!r} is no number") from None
    if not 0 < temperature < math.inf:
        raise ConfigError(f"--temperatures: {text} is not positive")
    return temperature


async def _measure(
    orchestrator: Orchestrator, reference: ReferenceProcess, prompts: list[Prompt], temperature: float, max_tokens: int
) -> dict[str, Any]:
    accepted = rejected = 0
    distances: list[float] = []
    for seed, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        output: list[int] = []
        async with orchestrator.generate(prompt.ids, sampling, algorithm="si", lookahead=_LOOKAHEAD) as stream:
            async for tokens in stream:
                output += tokens
                accepted += sum(tokens.accepted)
            rejected += (await stream.report()).rejections
        answer = await reference.ask(
            distance=[*prompt.ids, *output], start=len(prompt.ids), temperature=temperature
        )  # fmt: skip
        distances += answer["total_variation"]
    compared = accepted + rejected
    rate = accepted / max(1, compared)
    return {
        "temperature": temperature,
        "lower": statistics.fmean((1 - distance) / (1 + distance) for distance in distances),
        "acceptance_rate": rate,
        "upper": statistics.fmean(1 - distance for distance in distances),
        "standard_error": math.sqrt(rate * (1 - rate) / max(1, compared)),
        "drafts_compared": compared,
        "positions": len(distances),
    }
