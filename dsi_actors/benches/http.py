"""`dsi-actors bench http`: what the service costs beside the orchestrator that it is built on.

The same prompts are asked in turn of the orchestrator, in this process, and of the service around it, by clients in another
process that stream over HTTP. Every text must be the same. The models are timed ones, unless --target names one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import WordLevel

from dsi_actors.config import SELF_INT8, Config, Sampling
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.numbers import numbers
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option, add_ready_timeout_option
from dsi_actors.console.pool import process_pool, results_in
from dsi_actors.console.progress import model_directory
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.requirements import require_models
from dsi_actors.host.temporary import temporary_directory
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.tokenizer import Tokenizer

_MODEL = "bench"
_PROMPTS = 8
_WORDS = 1000
#: As many as the service lets connect, by default.
_MOST_CLIENTS = 512
_TIMEOUT_S = 600.0


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("http", help="the service beside the orchestrator", description=__doc__)
    parser.add_argument("--clients", default="1,16", metavar="N,...", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=9, metavar="R", help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=64, metavar="S", help="of each answer (default %(default)s)")
    parser.add_argument("--sp", type=int, default=2, metavar="N", help="target servers (default %(default)s)")
    parser.add_argument("--target-ms", type=float, default=20.0, metavar="T", help="default %(default)s")
    parser.add_argument("--drafter-ms", type=float, default=4.0, metavar="D", help="default %(default)s")
    parser.add_argument("--target", metavar="REF", help="a real model, with an int8 copy of it as the drafter")
    add_json_option(parser)
    add_ready_timeout_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    first_ms: float
    total_ms: float


class _Bench:
    def __init__(
        self, orchestrator: Orchestrator, tokenizer: Tokenizer, url: str, clients: ProcessPoolExecutor
    ) -> None:
        self._orchestrator = orchestrator
        self._tokenizer = tokenizer
        self._url = url
        self._clients = clients

    async def measure(self, clients: int, repeats: int, tokens: int) -> dict[str, Any]:
        """Both ways alternate; the first of each is not counted."""
        pairs = []
        for repeat in range(repeats + 1):
            numbers = [(repeat + client) % _PROMPTS for client in range(clients)]
            here = await asyncio.gather(*(self._ask_here(number, tokens) for number in numbers))
            pairs.append((here, await self._ask_service(numbers, tokens)))
        heres, services = zip(*pairs[1:], strict=True)
        ratios = [_total_ms(service) / _total_ms(here) for here, service in pairs[1:]]
        return {
            "clients": clients, "tokens": tokens, "repeats": repeats,
            "ms_per_token": statistics.median(map(_total_ms, heres)) / tokens,
            "http_ms_per_token": statistics.median(map(_total_ms, services)) / tokens,
            "ratio": statistics.median(ratios), "lowest_ratio": min(ratios), "highest_ratio": max(ratios),
            "first_token_ms": statistics.median(answer.first_ms for wave in heres for answer in wave),
            "http_first_token_ms": statistics.median(answer.first_ms for wave in services for answer in wave),
            "differing": sum(
                mine.text != theirs.text
                for here, service in pairs for mine, theirs in zip(here, service, strict=True)
            ),
        }  # fmt: skip

    async def _ask_here(self, number: int, tokens: int) -> _Answer:
        begun_s, first_s, found = time.perf_counter(), 0.0, list[int]()
        sampling = Sampling(max_tokens=tokens, temperature=0.0, seed=number)
        prompt_ids = _prompt(number)
        async for chunk in self._orchestrator.generate(prompt_ids, sampling):
            first_s = first_s or time.perf_counter()
            found += chunk
        ended_s = time.perf_counter()
        text = self._tokenizer.decode(found, after=prompt_ids)
        return _Answer(text, (first_s - begun_s) * 1e3, (ended_s - begun_s) * 1e3)

    async def _ask_service(self, numbers: Sequence[int], tokens: int) -> list[_Answer]:
        bodies = [_body(number, tokens) for number in numbers]
        [answers] = await results_in(self._clients, [partial(_ask_all, self._url, bodies)])
        return answers


def _total_ms(wave: Sequence[_Answer]) -> float:
    return statistics.fmean(answer.total_ms for answer in wave)


def _prompt(number: int) -> list[int]:
    return [(7 * number + place) % 900 + 1 for place in range(5 + 30 * number)]


def _body(number: int, tokens: int) -> bytes:
    return json.dumps({
        "model": _MODEL, "prompt": _prompt(number), "max_tokens": tokens, "temperature": 0, "seed": number,
        "stream": True, "ignore_eos": True,
    }).encode()  # fmt: skip


def _ask_all(url: str, bodies: Sequence[bytes]) -> list[_Answer]:
    """In the clients' process: one thread for each."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(lambda body: _ask(url, body), bodies))


def _ask(url: str, body: bytes) -> _Answer:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    begun_s, first_s, text = time.perf_counter(), 0.0, ""
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            first_s = first_s or time.perf_counter()
            text += event["choices"][0]["text"]
    return _Answer(text, (first_s - begun_s) * 1e3, (time.perf_counter() - begun_s) * 1e3)


@contextlib.asynccontextmanager
async def _served(orchestrator: Orchestrator, tokenizer: Tokenizer) -> AsyncIterator[str]:
    """The URL for completions."""
    from dsi_actors.serving.address import HttpAddress
    from dsi_actors.serving.app import create_app
    from dsi_actors.serving.server import make_server
    from dsi_actors.serving.service import ServiceConfig

    app = create_app(orchestrator, tokenizer, ServiceConfig(model=_MODEL))
    address = HttpAddress("127.0.0.1", 0)
    address.listen()
    server = make_server(app, drain_s=1.0)
    serving = asyncio.create_task(server.serve(address.sockets))
    try:
        while not server.started:
            if serving.done():
                await serving
                raise ConfigError("the service did not start")
            await asyncio.sleep(0.01)
        yield f"{address.url}/v1/completions"
    finally:
        server.should_exit = True
        await serving


async def run(arguments: argparse.Namespace) -> int:
    require_models(_config(arguments).local_models, "serve", *_config(arguments).local_extras, what="this benchmark")
    crowds = numbers(arguments.clients, "--clients", int, 1, _MOST_CLIENTS)
    if arguments.repeats < 1 or arguments.tokens < 2:
        raise ConfigError("--repeats must be at least 1, --tokens at least 2")
    with temporary_directory() as directory, process_pool(1, start="spawn") as clients:
        tokenizer = Tokenizer(await model_directory(arguments.target) if arguments.target else _words(Path(directory)))
        async with (
            Orchestrator(_config(arguments)) as orchestrator,
            _served(orchestrator, tokenizer) as url,
        ):
            bench = _Bench(orchestrator, tokenizer, url, clients)
            results = [await bench.measure(number, arguments.repeats, arguments.tokens) for number in crowds]
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": results}) + "\n")
    else:
        terminal().print(_table(results))
    return 1 if any(row["differing"] for row in results) else 0


def _words(directory: Path) -> Path:
    """A tokenizer for what the timed engine says."""
    LibraryTokenizer(WordLevel({f"w{token}": token for token in range(_WORDS)}, unk_token="w0")).save(
        str(directory / "tokenizer.json")
    )
    return directory


def _config(arguments: argparse.Namespace) -> Config:
    common: dict[str, Any] = {
        "sp": arguments.sp, "devices": ("cpu",), "ready_timeout_s": arguments.ready_timeout, "log_level": arguments.log_level,
    }  # fmt: skip
    if arguments.target:
        return Config(target=arguments.target, drafter=SELF_INT8, **common)
    timed = {"seed": 7, "vocabulary_size": _WORDS}
    return Config(
        engine="timed", target_options={**timed, "latency_ms": arguments.target_ms},
        drafter_options={**timed, "latency_ms": arguments.drafter_ms, "acceptance": 0.8}, **common,
    )  # fmt: skip


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="the service beside the orchestrator")
    for title in (
        "clients",
        "ms/token",
        "over HTTP",
        "ratio (lowest, highest)",
        "first token ms",
        "over HTTP",
        "texts",
    ):
        table.add_column(title, justify="right")
    for row in results:
        table.add_row(
            str(row["clients"]), f"{row['ms_per_token']:.2f}", f"{row['http_ms_per_token']:.2f}",
            f"{row['ratio']:.3f} ({row['lowest_ratio']:.3f}, {row['highest_ratio']:.3f})",
            f"{row['first_token_ms']:.1f}", f"{row['http_first_token_ms']:.1f}",
            "alike" if not row["differing"] else f"{row['differing']} DIFFER",
        )  # fmt: skip
    return table
