"""`dsi-actors bench schemas`: do answers keep to random JSON schemas?

Each schema has one answer, by an algorithm that is drawn, greedily or sampled. Every answer that comes to its end must be JSON
that the library jsonschema finds valid. No answer may hang. A schema may be refused, but only before any work. Answers that
--max-tokens cuts are counted apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dsi_actors.benches.random_schemas import Schema, random_schema
from dsi_actors.config import ALGORITHMS, Algorithm, Config, Sampling
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import (
    SubParsers,
    add_json_option,
    add_logging_option,
    add_ready_timeout_option,
    add_target_option,
)
from dsi_actors.console.progress import model_directory, prepare_shown
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError, DsiError
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.structure import Structure
from dsi_actors.tokenizer import Tokenizer

OUTCOMES = ("valid", "cut", "refused", "invalid", "failed", "hung")
#: What the project promises never to do.
_BAD = ("invalid", "failed", "hung")


@dataclass(slots=True)
class Findings:
    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    #: Of the bad outcomes: the number of the schema, what happened, the schema, the text.
    examples: list[dict[str, Any]] = field(default_factory=list)

    def take(self, outcome: str, number: int, schema: Schema, text: str, reason: str = "") -> None:
        self.counts[outcome] += 1
        if outcome in _BAD:
            self.examples.append(
                {"number": number, "outcome": outcome, "reason": reason, "schema": schema, "text": text}
            )


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("schemas", help="do answers keep to random JSON schemas?", description=__doc__)
    add_target_option(parser)
    parser.add_argument("--drafter", default="self-int8", metavar="REF", help="default %(default)s")
    parser.add_argument("--schemas", type=int, default=1000, metavar="N", help="default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=400, metavar="M", help="of an answer (default %(default)s)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="answers at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of everything that is drawn")
    parser.add_argument(
        "--hangs-after", type=float, default=600.0, metavar="S", help="seconds for an answer (default %(default)s)"
    )
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    if arguments.schemas < 1 or arguments.clients < 1 or arguments.max_tokens < 1:
        raise ConfigError("--schemas, --clients and --max-tokens must be at least 1")
    try:
        import jsonschema
    except ImportError:
        raise ConfigError("this benchmark needs jsonschema, not installed here: pip install jsonschema") from None
    config = Config(
        target=arguments.target, drafter=arguments.drafter, sp=2, log_level=arguments.log_level,
        ready_timeout_s=arguments.ready_timeout, request_timeout_s=arguments.hangs_after,
    )  # fmt: skip
    await prepare_shown(config)
    tokenizer = Tokenizer(await model_directory(arguments.target))
    if not tokenizer.stop_token_ids:
        raise ConfigError(f"{arguments.target} has no stop token: an answer with a structure could not end")
    findings, err, begun_s = Findings(), terminal(stderr=True), time.perf_counter()
    numbers = iter(range(arguments.schemas))
    async with Orchestrator(config) as orchestrator, asyncio.TaskGroup() as clients:

        async def client() -> None:
            for number in numbers:
                await _one(orchestrator, tokenizer, jsonschema, arguments, number, findings)
                if findings.counts.total() % 50 == 0:
                    err.print(f"{findings.counts.total()} of {arguments.schemas}: {dict(findings.counts)}")

        for _ in range(arguments.clients):
            clients.create_task(client())
    return _report(findings, time.perf_counter() - begun_s, as_json=arguments.json)


async def _one(
    orchestrator: Orchestrator, tokenizer: Tokenizer, jsonschema: Any, arguments: argparse.Namespace, number: int,
    findings: Findings,
) -> None:  # fmt: skip
    chance = random.Random(arguments.seed * 1_000_003 + number)
    schema = random_schema(chance)
    algorithm: Algorithm = chance.choice(ALGORITHMS)
    temperature = chance.choice([0.0, 1.0, 2.0])
    try:
        structure = await asyncio.to_thread(Structure.json_schema, schema)
    except ConfigError:
        findings.take("refused", number, schema, "")
        return
    sampling = Sampling(
        max_tokens=arguments.max_tokens, temperature=temperature, seed=number, structure=structure,
        stop_token_ids=tokenizer.stop_token_ids,
    )  # fmt: skip
    prompt = tokenizer.encode(f"A JSON value, number {number}: ")
    tokens, stream = list[int](), orchestrator.generate(prompt, sampling, algorithm=algorithm)
    try:
        async with asyncio.timeout(arguments.hangs_after):
            async for more in stream:
                tokens += more
    except TimeoutError:
        findings.take("hung", number, schema, tokenizer.decode(tokens))
        return
    except DsiError as error:
        findings.take("failed", number, schema, tokenizer.decode(tokens), str(error))
        return
    finally:
        await stream.aclose()
    findings.tokens += len(tokens)
    if (await stream.report()).finish_reason != "stop":
        findings.take("cut", number, schema, tokenizer.decode(tokens))
        return
    text = tokenizer.decode(tokens[:-1])
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        findings.take("invalid", number, schema, text, str(error).partition("\n")[0])
    else:
        findings.take("valid", number, schema, text)


def _report(findings: Findings, took_s: float, *, as_json: bool) -> int:
    counts = {outcome: findings.counts[outcome] for outcome in OUTCOMES}
    bad = sum(counts[outcome] for outcome in _BAD)
    row = {"schemas": sum(counts.values()), **counts, "tokens": findings.tokens, "seconds": round(took_s, 1)}
    if as_json:
        sys.stdout.write(
            json.dumps({"machine": describe_machine(), "results": [row], "examples": findings.examples}) + "\n"
        )
    else:
        for example in findings.examples:
            sys.stdout.write(json.dumps(example, ensure_ascii=False) + "\n")
        sys.stdout.write(f"{row['schemas']} schemas: {', '.join(f'{n} {name}' for name, n in counts.items())}\n")
    return 1 if bad else 0
