"""`dsi-actors bench real`: real models, beside what people use today, on the same processors in one run.

transformers' `generate` and its assisted generation (by the same drafter, and by prompt lookup) on the first of our devices,
our plain decoding, SI and DSI, all greedy. With --llama-cpp also llama.cpp's plain decoding, its prompt lookup and its
speculation with a drafter, and ours on the engine llama-cpp with the same file. Each round gives every way a prompt, another one
to each, so that what disturbs the machine disturbs all and no worker still holds the prompt that it is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from dsi_actors.benches.line_process import LineProcess
from dsi_actors.benches.prompts import Prompt, add_prompt_options, read_prompts
from dsi_actors.benches.reference import LlamaCppProcess, ReferenceProcess
from dsi_actors.config import (
    LLAMA_CPP,
    NGRAM,
    NGRAM_FOR,
    SELF_COPIES,
    SELF_INT8,
    TRANSFORMERS,
    Algorithm,
    Config,
    Sampling,
)
from dsi_actors.console.machine import describe_machine, processor_s_of
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
from dsi_actors.host.devices import device_name, local_devices
from dsi_actors.host.requirements import require
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.results import GenerationReport
from dsi_actors.tokenizer import Tokenizer

_WARM_UP_TOKENS = 16
_ASSISTANCE = {"": "generate", "drafter": "assisted, same drafter", "lookup": "assisted, prompt lookup"}


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("real", help="real models beside transformers", description=__doc__)
    add_target_option(parser)
    parser.add_argument(
        "--drafter", action="append", default=[], metavar="REF", dest="drafters",
        help="may be repeated: each has workers of its own; the others are assisted by the first model, or by a copy of the "
        f"target in int8 or q4_0 (default {SELF_INT8})",
    )  # fmt: skip
    parser.add_argument(
        "--choose",
        action="store_true",
        help="one more way: all the drafters, of which each generation takes the fastest",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="weaken the drafters: keep only their first N layers")
    parser.add_argument("--chains", action="store_true", help="one more way: DSI that drafts chains, and no trees")
    add_prompt_options(parser, limit=8, max_tokens=64)
    parser.add_argument("--sp", type=int, default=1, metavar="N", help="target servers (default %(default)s)")
    add_device_options(parser)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of our target")
    parser.add_argument("--threads", type=int, default=1, metavar="T", help="of each worker (default %(default)s)")
    parser.add_argument(
        "--library", default="float32:1,float32:2,bfloat16:1,bfloat16:2", metavar="DTYPE:THREADS,...",
        help="how transformers runs (default %(default)s); none leaves it out",
    )  # fmt: skip
    parser.add_argument(
        "--llama-cpp", default="none", metavar="KIND:THREADS,...",
        help="how llama.cpp runs, such as f16:1,f16:2,q8_0:1, with the weights written in this kind (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--engines", metavar="LIST",
        help=f"of ours (default: {TRANSFORMERS}, and with --llama-cpp {LLAMA_CPP}, too)",
    )  # fmt: skip
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


@dataclass(frozen=True, slots=True)
class _Text:
    """What one way made of one prompt."""

    tokens: list[int]
    first_ms: float
    total_ms: float
    processor_ms: float
    report: GenerationReport | None = None


_Ask = Callable[[Prompt, int], Awaitable[_Text]]


@dataclass(slots=True)
class _Way:
    """`alike`: the way whose text it should give. `plain`: our plain decoding of the same weights."""

    name: str
    alike: str
    plain: str
    ask: _Ask
    texts: dict[str, _Text] = field(default_factory=dict)


def _ours(
    orchestrator: Orchestrator, algorithm: Algorithm, stop: Sequence[int], sp: int, *, rows: int | None = None
) -> _Ask:
    async def ask(prompt: Prompt, max_tokens: int) -> _Text:
        sampling = Sampling(max_tokens=max_tokens, stop_token_ids=tuple(stop))
        processes = [*orchestrator.process_ids, os.getpid()]
        before_s = sum(map(processor_s_of, processes))
        begun_s, first_s, found = time.perf_counter(), 0.0, list[int]()
        async with orchestrator.generate(prompt.ids, sampling, algorithm=algorithm, sp=sp, rows=rows) as stream:
            async for tokens in stream:
                first_s = first_s or time.perf_counter()
                found += tokens
            ended_s = time.perf_counter()
            report = await stream.report()
        used_s = sum(map(processor_s_of, processes)) - before_s
        return _Text(found, (first_s - begun_s) * 1e3, (ended_s - begun_s) * 1e3, used_s * 1e3, report)

    return ask


def _library(reference: LineProcess, threads: int, assist: str, stop: Sequence[int]) -> _Ask:
    async def ask(prompt: Prompt, max_tokens: int) -> _Text:
        before_s = processor_s_of(reference.process_id)
        answer = await reference.ask(
            generate=prompt.ids, max_tokens=max_tokens, stop=list(stop), threads=threads, assist=assist
        )
        used_s = processor_s_of(reference.process_id) - before_s
        times_ms = answer["times_ms"]
        return _Text(answer["tokens"], times_ms[0], times_ms[-1], used_s * 1e3)

    return ask


async def run(arguments: argparse.Namespace) -> int:
    library, llama = _library_settings(arguments.library), _llama_settings(arguments.llama_cpp)
    setups = _setups(arguments, list(dict.fromkeys(kind for kind, _ in llama)))
    drafters = list(dict.fromkeys(arguments.drafters)) or [SELF_INT8]
    if arguments.layers is not None and (NGRAM in drafters or any(setup.kind for setup in setups)):
        raise ConfigError(
            f"--layers is for models on the engine {TRANSFORMERS}: leave out --drafter {NGRAM} and --engines {LLAMA_CPP}"
        )
    tokenizer = Tokenizer(await model_directory(arguments.target))
    prompts = read_prompts(arguments, tokenizer)
    if len(prompts) < 2:
        raise ConfigError("give at least two prompts, --limit 2: a worker that is given one again need not read it")
    stop = tokenizer.stop_token_ids
    for setup in setups:
        for drafter in drafters:
            await prepare_shown(setup.config(arguments, drafter))
    async with contextlib.AsyncExitStack() as stack:
        ways = await _theirs(stack, arguments, library, llama, drafters, stop, setups)
        for setup in setups:
            ways += await _own(stack, arguments, setup, drafters, stop)
        err = terminal(stderr=True)
        for way in ways:
            await way.ask(prompts[0], _WARM_UP_TOKENS)
        for turn in range(len(prompts)):
            for place, way in enumerate(ways):
                prompt = prompts[(turn + place) % len(prompts)]
                way.texts[prompt.name] = await way.ask(prompt, arguments.max_tokens)
            err.print(f"{turn + 1} of {len(prompts)} rounds")
    rows = _rows(ways)
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": rows}) + "\n")
    else:
        terminal().print(_table(rows))
    return 1 if any(row["differing"] for row in rows if row["way"].startswith("ours")) else 0


@dataclass(frozen=True, slots=True)
class _Setup:
    """An engine of ours. `kind`: in which kind of weights llama.cpp has the model."""

    engine: str
    kind: str = ""

    @property
    def name(self) -> str:
        return f"ours on llama.cpp {self.kind}" if self.kind else "ours"

    def config(self, arguments: argparse.Namespace, drafter: str | tuple[str, ...]) -> Config:
        # Each prompt is asked several times: nothing of it may be found where it was left.
        engine = {"slots": 1, "threads": arguments.threads}
        own = {"quantization": self.kind} if self.kind else {"dtype": arguments.dtype}
        weakened = {"layers": arguments.layers} if arguments.layers is not None else {}
        return Config(
            target=arguments.target, drafter=drafter, sp=arguments.sp, devices=devices_from(arguments), tp=arguments.tp,
            engine=self.engine, target_options={**engine, **own}, drafter_options={**engine, **weakened, "remember": False},
            ready_timeout_s=arguments.ready_timeout, log_level=arguments.log_level,
        )  # fmt: skip


def _setups(arguments: argparse.Namespace, kinds: Sequence[str]) -> list[_Setup]:
    """The engines of ours. Raises ConfigError."""
    wished = arguments.engines or ",".join([TRANSFORMERS, *[LLAMA_CPP][: len(kinds)]])
    setups = list[_Setup]()
    for engine in wished.split(","):
        if engine == LLAMA_CPP and kinds:
            setups += [_Setup(engine, kind) for kind in kinds]
        elif engine == TRANSFORMERS:
            setups.append(_Setup(engine))
        else:
            raise ConfigError(f"--engines {engine}: give {TRANSFORMERS}, or {LLAMA_CPP} together with --llama-cpp")
    return setups


async def _own(
    stack: contextlib.AsyncExitStack, arguments: argparse.Namespace, setup: _Setup, drafters: Sequence[str],
    stop: Sequence[int],
) -> list[_Way]:  # fmt: skip
    """Our ways with one engine."""
    orchestrators = [
        await stack.enter_async_context(Orchestrator(setup.config(arguments, drafter))) for drafter in drafters
    ]
    plain = f"{setup.name}: AR"
    ways = [_Way(plain, plain, plain, _ours(orchestrators[0], "ar", stop, arguments.sp))]
    algorithms: tuple[Algorithm, ...] = ("si", "dsi")
    ways += [
        _Way(f"{setup.name}: {algorithm.upper()} {drafter}", plain, plain, _ours(each, algorithm, stop, arguments.sp))
        for each, drafter in zip(orchestrators, drafters, strict=True) for algorithm in algorithms
    ]  # fmt: skip
    if arguments.chains:
        ways += [
            _Way(f"{setup.name}: DSI chains {drafter}", plain, plain, _ours(each, "dsi", stop, arguments.sp, rows=1))
            for each, drafter in zip(orchestrators, drafters, strict=True)
        ]
    if arguments.choose and len(drafters) > 1:
        chooses = await stack.enter_async_context(Orchestrator(setup.config(arguments, tuple(drafters))))
        ask = _ours(chooses, "dsi", stop, arguments.sp)
        ways.append(_Way(f"{setup.name}: DSI {' or '.join(drafters)}", plain, plain, ask))
    return ways


async def _theirs(
    stack: contextlib.AsyncExitStack, arguments: argparse.Namespace, library: Sequence[tuple[str, int]],
    llama: Sequence[tuple[str, int]], drafters: Sequence[str], stop: Sequence[int], setups: Sequence[_Setup],
) -> list[_Way]:  # fmt: skip
    """The ways of transformers and of llama.cpp."""
    model = next((each.removeprefix(NGRAM_FOR) for each in drafters if each != NGRAM), "")
    device = device_name(local_devices(devices_from(arguments))[0])
    processes: dict[str, LineProcess] = {
        dtype: ReferenceProcess(arguments.target, dtype=dtype, drafter=model, layers=arguments.layers, device=device)
        for dtype in dict(library)
    }
    drafts = "" if model in SELF_COPIES else model
    processes |= {f"llama.cpp {kind}": LlamaCppProcess(arguments.target, kind, drafts) for kind in dict(llama)}
    for process in processes.values():
        await stack.enter_async_context(process)
    ways = list[_Way]()
    for kind, threads in [*library, *((f"llama.cpp {kind}", threads) for kind, threads in llama)]:
        name = f"{kind}, {threads} threads"
        own = next((f"{each.name}: AR" for each in setups if each.name == f"ours on {kind}"), f"{setups[0].name}: AR")
        ways += [
            _Way(f"{name}: {label}", f"{name}: {_ASSISTANCE['']}", own, _library(processes[kind], threads, assist, stop))
            for assist, label in _ASSISTANCE.items() if assist != "drafter" or model
        ]  # fmt: skip
    return ways


def _llama_settings(text: str) -> list[tuple[str, int]]:
    """Raises ConfigError."""
    if text == "none":
        return []
    require("--llama-cpp", "torch", "llama-cpp")
    settings = []
    for word in text.split(","):
        kind, _, threads = word.partition(":")
        if not kind or not threads.isdecimal() or int(threads) < 1:
            raise ConfigError(
                f"--llama-cpp {word} is no kind of weights and number of threads: write it as f16:2, or none"
            )
        settings.append((kind, int(threads)))
    return settings


def _library_settings(text: str) -> list[tuple[str, int]]:
    """Raises ConfigError."""
    if text == "none":
        return []
    settings = []
    for word in text.split(","):
        dtype, _, threads = word.partition(":")
        if dtype not in ("float32", "bfloat16") or not threads.isdecimal() or int(threads) < 1:
            raise ConfigError(f"--library {word} is no dtype and number of threads: write it as bfloat16:2, or none")
        settings.append((dtype, int(threads)))
    return settings


def _rows(ways: Sequence[_Way]) -> list[dict[str, Any]]:
    texts = {way.name: way.texts for way in ways}
    return [_row(way, texts[way.alike], texts[way.plain]) for way in ways]


def _row(way: _Way, alike: dict[str, _Text], plain: dict[str, _Text]) -> dict[str, Any]:
    each_ms = sorted(text.total_ms / len(text.tokens) for text in way.texts.values())
    low_ms, _, high_ms = statistics.quantiles(each_ms, n=4, method="inclusive")
    reports = [text.report for text in way.texts.values() if text.report is not None]
    tokens = sum(len(text.tokens) for text in way.texts.values())
    drafted = [report for report in reports if report.drafted_tokens]
    return {
        "way": way.name, "prompts": len(each_ms), "tokens": tokens,
        "ms_per_token": statistics.median(each_ms), "ms_per_token_q1": low_ms, "ms_per_token_q3": high_ms,
        "first_token_ms": statistics.median(text.first_ms for text in way.texts.values()),
        "processor_ms_per_token": sum(text.processor_ms for text in way.texts.values()) / tokens,
        "acceptance_rate": statistics.fmean(report.acceptance_rate for report in drafted) if drafted else None,
        "alike": way.alike,
        "differing": sum(text.tokens != alike[name].tokens for name, text in way.texts.items()),
        "other_text_than_our_plain_decoding": sum(text.tokens != plain[name].tokens for name, text in way.texts.items()),
    }  # fmt: skip


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    best_ms = min((row["ms_per_token"] for row in rows if row["way"].endswith(_ASSISTANCE[""])), default=None)
    table = Table(title="real models")
    for title in (
        "way", "ms/token", "quartiles", "best generate / this", "first token ms", "processor ms/token", "accepted",
        "texts unlike plain",
    ):  # fmt: skip
        table.add_column(title, justify="left" if title == "way" else "right")
    for row in rows:
        rate = row["acceptance_rate"]
        table.add_row(
            row["way"], f"{row['ms_per_token']:.1f}", f"{row['ms_per_token_q1']:.1f}, {row['ms_per_token_q3']:.1f}",
            "" if best_ms is None else f"{best_ms / row['ms_per_token']:.2f}", f"{row['first_token_ms']:.0f}",
            f"{row['processor_ms_per_token']:.0f}", "" if rate is None else f"{rate:.3f}", str(row["differing"]),
        )  # fmt: skip
    return table
