"""`dsi-actors bench acceptance`: how often a drafter is right, against what theory says it can be.

When target and drafter draw with the same noise (Gumbel coupling), they agree with a probability between
(1 - TV) / (1 + TV) and 1 - TV, where TV is the total variation distance of their distributions (arXiv 2408.07978).
1 - TV is the best that any coupling reaches, and what rejection sampling (Leviathan et al., 2023) reaches.

Outputs are SI's, which waits for its drafts: so a slow machine compares as many as a fast one. Each is read again by
transformers, with both models: the mean of both bounds over its positions stands beside the acceptance rate that the
generations had. Temperature 0 is greedy: there the bounds say nothing.

The second table says what a tree of drafts would gain: how often the target's token is the drafter's first, second, and third to
fifth choice under the shared noise, by the drafter's own probability of its first choice. Where the first choice is wrong, the
second is right with the chance h.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
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
#: Bounds of the bins of confidence.
_CONFIDENCES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
_CHOICES = ("first", "second", "third_to_fifth")


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("acceptance", help="acceptance rate against theory", description=__doc__)
    add_target_option(parser)
    add_drafter_option(parser)
    parser.add_argument("--layers", type=int, metavar="N", help="weaken the drafter: keep only its first N layers")
    parser.add_argument(
        "--temperatures", default="0,0.5,0.8,1.0", metavar="LIST", help="0 is greedy (default %(default)s)"
    )
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
        drafter_options={} if arguments.layers is None else {"layers": arguments.layers},
    )  # fmt: skip
    await prepare_shown(config)
    reference = ReferenceProcess(
        arguments.target, dtype=arguments.dtype, drafter=arguments.drafter, layers=arguments.layers
    )
    async with Orchestrator(config) as orchestrator, reference:
        rows = [await _measure(orchestrator, reference, prompts, at, arguments.max_tokens) for at in temperatures]
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
        return 0
    table = Table("temperature", "(1-TV)/(1+TV)", "measured", "1-TV", "standard error", "drafts compared")
    for row in rows:
        names = ("lower", "acceptance_rate", "upper", "standard_error")
        figures = ["" if row[name] is None else f"{row[name]:.3f}" for name in names]
        table.add_row(f"{row['temperature']:g}", *figures, str(row["drafts_compared"]))
    terminal().print(table)
    choices = Table("temperature", "confidence", "positions", "1st", "2nd", "3rd to 5th", "h")
    for row in rows:
        for each in row["choices"]:
            low, high = each["confidence_from"], each["confidence_to"]
            figures = [_share(each[name]) for name in (*_CHOICES, "alternative_rate")]
            choices.add_row(f"{row['temperature']:g}", f"{low:g} to {high:g}", str(each["positions"]), *figures)
    terminal().print(choices)
    return 0


def _temperature(text: str) -> float:
    try:
        temperature = float(text)
    except ValueError:
        raise ConfigError(f"--temperatures: {text!r} is no number") from None
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperatures: {text} is not a number of at least 0")
    return temperature


async def _measure(
    orchestrator: Orchestrator, reference: ReferenceProcess, prompts: list[Prompt], temperature: float, max_tokens: int
) -> dict[str, Any]:
    accepted = rejected = 0
    distances: list[float] = []
    choices: list[tuple[int, float]] = []
    for seed, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        output: list[int] = []
        async with orchestrator.generate(prompt.ids, sampling, algorithm="si", lookahead=_LOOKAHEAD) as stream:
            async for tokens in stream:
                output += tokens
                accepted += sum(tokens.accepted)
            rejected += (await stream.report()).rejections
        answer = await reference.ask(
            distance=[*prompt.ids, *output], start=len(prompt.ids), temperature=temperature, seed=seed
        )  # fmt: skip
        distances += answer["total_variation"]
        choices += zip(answer["ranks"], answer["confidences"], strict=True)
    compared = accepted + rejected
    rate = accepted / max(1, compared)
    return {
        "temperature": temperature,
        "lower": statistics.fmean((1 - distance) / (1 + distance) for distance in distances) if distances else None,
        "acceptance_rate": rate,
        "upper": statistics.fmean(1 - distance for distance in distances) if distances else None,
        "standard_error": math.sqrt(rate * (1 - rate) / max(1, compared)),
        "drafts_compared": compared,
        "positions": len(choices),
        "choices": [_choices(choices, *bounds) for bounds in (*pairwise(_CONFIDENCES), (0.0, 1.0))],
    }


def _choices(all_choices: Sequence[tuple[int, float]], low: float, high: float) -> dict[str, Any]:
    """The shares of the ranks of the target's token among the drafter's choices, where the drafter's confidence lies in
    [low, high), or in [low, 1]. `all_choices`: (rank, confidence) of each position."""
    ranks = [rank for rank, confidence in all_choices if low <= confidence < high or confidence == high == 1]
    count = Counter(ranks)
    first, second, third_to_fifth = count[1], count[2], count[3] + count[4] + count[5]
    found: dict[str, Any] = {"confidence_from": low, "confidence_to": high, "positions": len(ranks)}
    for name, number in zip(_CHOICES, (first, second, third_to_fifth), strict=True):
        found[name] = number / len(ranks) if ranks else None
    found["alternative_rate"] = second / (len(ranks) - first) if len(ranks) > first else None
    return found


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
