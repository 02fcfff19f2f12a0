"""`dsi-actors bench exact`: is the text the same, whatever the algorithm, the drafter, the servers, the lookahead?

For each dtype, prompt and kind of sampling (--kinds), plain decoding (AR) gives the reference. Every other way must give the same
token ids: AR, SI and DSI × drafters × SP × lookahead × chains and trees of drafts, each drafter with worker processes of its
own. Trees have as many rows as the workers take, up to the number in the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from dsi_actors.benches.prompts import add_prompt_options, read_prompts
from dsi_actors.config import LLAMA_CPP, NGRAM, RANDOM, SELF_INT8, TRANSFORMERS, Algorithm, Config, Sampling
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import (
    SubParsers,
    add_device_options,
    add_json_option,
    add_logging_option,
    add_ready_timeout_option,
    add_target_option,
    devices_from,
)
from dsi_actors.console.progress import model_directory, prepare_shown
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.structure import Structure
from dsi_actors.tokenizer import Tokenizer

#: What is tried of each engine.
_DTYPES = {TRANSFORMERS: "float32,bfloat16", LLAMA_CPP: "none,f16,q8_0"}
DRAFTERS = (SELF_INT8, NGRAM, RANDOM)
LOOKAHEADS: tuple[int | Literal["auto"], ...] = (1, 3, 8, "auto")
#: Trees of drafts: two tokens between verifications, and up to three branches.
TREE_LOOKAHEAD, TREE_ROWS = 2, 4
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}


PENALISED: dict[str, Any] = {
    "temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {0: -100, 5: 1.5}, "min_tokens": 8,
}  # fmt: skip
#: A value of this schema is short.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "maxLength": 40},
        "certain": {"type": "boolean"},
        "steps": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
    },
    "required": ["answer", "certain", "steps"],
    "additionalProperties": False,
}
KINDS = ("greedy", "sampled", "penalised", "structured")

_Key = tuple[str, str, str, int, int]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to get the text."""

    algorithm: Algorithm
    sp: int
    lookahead: int | Literal["auto"]
    #: The most rows of a drafting step. 1: chains. 0: the planner chooses.
    rows: int


def ways(servers: int) -> Iterator[Way]:
    yield Way("ar", 1, "auto", 1)
    for lookahead, rows in [*((each, 0 if each == "auto" else 1) for each in LOOKAHEADS), (TREE_LOOKAHEAD, TREE_ROWS)]:
        yield Way("si", 1, lookahead, rows)
        for sp in range(1, servers + 1):
            yield Way("dsi", sp, lookahead, rows)


def sampling_of(kind: str, max_tokens: int, stops: tuple[int, ...]) -> Sampling:
    """The sampling parameters of a kind. `stops`: the model's stop tokens. Raises ConfigError."""
    match kind:
        case "sampled":
            return Sampling(max_tokens=max_tokens, seed=2024, **SAMPLED)
        case "penalised":
            more = {**PENALISED, "min_tokens": min(PENALISED["min_tokens"], max_tokens)}
            return Sampling(max_tokens=max_tokens, seed=2024, stop_token_ids=stops, **more)
        case "structured":
            structure = Structure.json_schema(SCHEMA)
            return Sampling(
                max_tokens=max_tokens, seed=2024, temperature=0.8, stop_token_ids=stops, structure=structure
            )
    return Sampling(max_tokens=max_tokens)


@dataclass(slots=True)
class Findings:
    """Counts by (dtype, drafter, algorithm, sp, rows), and the references: by (dtype, prompt id, kind)."""

    compared: Counter[_Key] = field(default_factory=Counter)
    differing: Counter[_Key] = field(default_factory=Counter)
    tokens: Counter[_Key] = field(default_factory=Counter)
    references: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)

    def take(self, key: _Key, reference: tuple[str, str, str], text: list[int]) -> bool:
        """Compare with the reference, or become it. Returns whether it is the same."""
        expected = self.references.setdefault(reference, text)
        if expected is text:
            return True
        self.compared[key] += 1
        self.tokens[key] += len(text)
        self.differing[key] += text != expected
        return text == expected

    def rows(self) -> list[dict[str, Any]]:
        names = ("dtype", "drafter", "algorithm", "sp", "rows")
        return [
            {
                **dict(zip(names, key, strict=True)),
                "compared": count,
                "differing": self.differing[key],
                "tokens": self.tokens[key],
            }
            for key, count in sorted(self.compared.items())
        ]


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("exact", help="the same text in every way?", description=__doc__)
    add_target_option(parser)
    add_prompt_options(parser, limit=2, max_tokens=32)
    parser.add_argument("--servers", type=int, default=3, metavar="N", help="SP from 1 to this (default %(default)s)")
    parser.add_argument(
        "--engine",
        choices=list(_DTYPES),
        default=TRANSFORMERS,
        help="of the targets and drafters (default %(default)s)",
    )
    parser.add_argument(
        "--dtypes", metavar="LIST",
        help="numbers that targets compute with; for llama-cpp kinds of weights, of which none means the file's own (default: "
        f"{'; '.join(f'{dtypes} for {engine}' for engine, dtypes in _DTYPES.items())})",
    )  # fmt: skip
    parser.add_argument("--drafters", default=",".join(DRAFTERS), metavar="LIST", help="default %(default)s")
    parser.add_argument(
        "--kinds", default="greedy,sampled", metavar="LIST",
        help=f"kinds of sampling, of {', '.join(KINDS)}; structured is JSON of a schema (default %(default)s)",
    )  # fmt: skip
    add_device_options(parser)
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    kinds = arguments.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"--kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    tokenizer = Tokenizer(await model_directory(arguments.target))
    prompts = read_prompts(arguments, tokenizer)
    samplings = {kind: sampling_of(kind, arguments.max_tokens, tokenizer.stop_token_ids) for kind in kinds}
    findings = Findings()
    err = terminal(stderr=True)
    option = "quantization" if arguments.engine == LLAMA_CPP else "dtype"
    for dtype in (arguments.dtypes or _DTYPES[arguments.engine]).split(","):
        for drafter in arguments.drafters.split(","):
            config = Config(
                target=arguments.target, drafter=drafter, sp=arguments.servers, devices=devices_from(arguments), tp=arguments.tp,
                engine=arguments.engine, target_options={option: dtype},
                ready_timeout_s=arguments.ready_timeout, log_level=arguments.log_level,
            )  # fmt: skip
            await prepare_shown(config)
            async with Orchestrator(config) as orchestrator:
                for prompt in prompts:
                    for kind, sampling in samplings.items():
                        for way in ways(arguments.servers):
                            stream = orchestrator.generate(
                                prompt.ids, sampling, algorithm=way.algorithm, sp=way.sp, lookahead=way.lookahead,
                                rows=way.rows or None,
                            )  # fmt: skip
                            text = [token async for tokens in stream for token in tokens]
                            await stream.aclose()
                            if not findings.take(
                                (dtype, drafter, way.algorithm, way.sp, way.rows), (dtype, prompt.name, kind), text
                            ):
                                err.print(f"DIFFERENT: {dtype} {drafter} {prompt.name} {kind} {way}", style="red")
                    err.print(f"{dtype} {drafter} {prompt.name}: {findings.compared.total()} compared so far")
    return _report(findings, as_json=arguments.json)


def _report(findings: Findings, *, as_json: bool) -> int:
    compared, differing = findings.compared.total(), findings.differing.total()
    if as_json:
        summary = {"compared": compared, "differing": differing, "results": findings.rows()}
        sys.stdout.write(json.dumps({"machine": describe_machine(), **summary}) + "\n")
    else:
        table = Table("dtype", "drafter", "algorithm", "SP", "rows", "compared", "differing", "tokens")
        for row in findings.rows():
            table.add_row(*(str(value) for value in row.values()))
        terminal().print(table)
        sys.stdout.write(f"{compared} outputs compared, {differing} different\n")
    return 1 if differing else 0
