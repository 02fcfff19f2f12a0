"""`dsi-actors bench gpu`: how near one device comes to what it could do, with models of random weights.

For each shape and width: how long a forward takes, over the time in which the device could read every byte that the forward
needs once; how soon a device is free after a cancel; which widths give the same bits; and how much processes that compute on
the same device at the same time slow one another down. For each length of a prompt: how long it takes, its tokens per second,
its arithmetic as a share of the device's peak rate, and how soon the device is free after a cancel. Then how many tokens per
second come by plain decoding, by the number of generations that share a forward. `--gpu cpu` runs it on the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from dsi_actors.benches.line_process import LineProcess
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.numbers import numbers
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.devices import device_name, local_devices

_SHAPES = ("1b", "3b", "8b", "30b-a3b", "tiny", "tiny-moe")
#: Of cancels and of bits: what a verification has.
_WINDOW = 8
#: Drafts at once.
_DRAFTS = (1, 4, 8)
#: Positions of prompts.
_PROMPTS, _PROMPTS_OF_A_CPU = "512,2048,8192,32768", "512"


def add_parser(benches: SubParsers) -> None:
    parser = benches.add_parser("gpu", help="a device against its own limit", description=__doc__)
    parser.add_argument("--gpu", metavar="N", help="number of a CUDA device, or cpu (default: the first, else cpu)")
    parser.add_argument("--shapes", default="1b,3b,8b", metavar="LIST", help=f"of {', '.join(_SHAPES)}")
    parser.add_argument("--widths", default="1,2,4,8,16,32,64,128,256", metavar="LIST", help="default %(default)s")
    parser.add_argument("--generations", default="1,4,8,16,32", metavar="LIST", help="default %(default)s")
    parser.add_argument("--context", type=int, default=512, metavar="L", help="positions before (default %(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="numbers that the weights have"
    )
    parser.add_argument("--no-graphs", action="store_true", help="launch each kernel by itself")
    parser.add_argument("--repeats", type=int, default=20, metavar="R", help="default %(default)s")
    parser.add_argument("--processes", type=int, default=2, metavar="P", help="at the same time (default %(default)s)")
    parser.add_argument(
        "--prompts", metavar="LIST", help=f"positions of prompts (default {_PROMPTS}; on a CPU {_PROMPTS_OF_A_CPU})"
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="positions of a chunk of a prompt (default: the device's)"
    )
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    shapes, widths = arguments.shapes.split(","), numbers(arguments.widths, "--widths", int, 1, 256)
    generations = numbers(arguments.generations, "--generations", int, 1, 256)
    if unknown := [shape for shape in shapes if shape not in _SHAPES]:
        raise ConfigError(f"--shapes {unknown[0]} is unknown: choose of {', '.join(_SHAPES)}")
    if arguments.repeats < 1 or arguments.processes < 1 or not 1 <= arguments.context <= 1 << 16:
        raise ConfigError("--repeats and --processes must be at least 1, --context must lie in [1, 65536]")
    if arguments.chunk is not None and not 1 <= arguments.chunk <= 1 << 16:
        raise ConfigError("--chunk must lie in [1, 65536]")
    device = device_name(local_devices([] if arguments.gpu is None else [arguments.gpu])[0])
    prompts = arguments.prompts or (_PROMPTS_OF_A_CPU if device.startswith("cpu") else _PROMPTS)
    lengths = numbers(prompts, "--prompts", int, 1, 1 << 20)
    results = []
    for shape in shapes:
        words = ["--shape", shape, "--device", device, "--dtype", arguments.dtype]
        words += ["--context", str(arguments.context), "--generations", str(max(generations))]
        words += ["--longest-prompt", str(max(lengths)), "--chunk", str(arguments.chunk or 0)]
        words += ["--no-graphs"] if arguments.no_graphs else []
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(LineProcess("dsi_workers.benches.device", *words))
            result = await _alone(first, shape, widths, lengths, arguments)
            result["drafts"] = await _drafts(first, arguments.repeats)
            result["decoding"] = [await _decoding(first, number, arguments.repeats) for number in generations]
            others = [
                await stack.enter_async_context(LineProcess("dsi_workers.benches.device", *words))
                for _ in range(arguments.processes - 1)
            ]
            result["together"] = await _together([first, *others])
        results.append(result)
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": results}) + "\n")
        return 0
    console = terminal()
    for result in results:
        _show(console, result)
    return 0


async def _alone(
    process: LineProcess, shape: str, widths: list[int], lengths: list[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    forwards = []
    for width in widths:
        measured = await process.ask(forward=width, repeats=arguments.repeats)
        median_ms = statistics.median(measured["ms"])
        row: dict[str, Any] = {
            "width": width, "ms": median_ms, "worst_ms": max(measured["ms"]), "floor_ms": measured["floor_ms"],
            "over_floor": median_ms / measured["floor_ms"],
        }  # fmt: skip
        row |= {name: measured[name] for name in ("experts_per_layer", "experts_counted") if name in measured}
        forwards.append(row)
    cancels = await process.ask(cancel=_WINDOW, repeats=arguments.repeats)
    return {
        "shape": shape, **process.greeting, "context": arguments.context, "dtype": arguments.dtype,
        "graphs": not arguments.no_graphs, "forwards": forwards,
        "cancel_to_free_ms": statistics.median(cancels["ms"]) if cancels["ms"] else None,
        "worst_cancel_to_free_ms": max(cancels["ms"], default=None),
        "same_bits": await process.ask(agree=_WINDOW),
        "prompts": [await _prompt(process, length, arguments.repeats) for length in lengths],
    }  # fmt: skip


async def _prompt(process: LineProcess, positions: int, repeats: int) -> dict[str, Any]:
    measured = await process.ask(prompt=positions, repeats=repeats)
    cancels = await process.ask(cancel_prompt=positions, repeats=repeats)
    median_ms, peak_tflops = statistics.median(measured["ms"]), process.greeting["peak_tflops"]
    tflops = measured["tflop"] / (median_ms / 1e3)
    return {
        "positions": positions, "ms": median_ms, "worst_ms": max(measured["ms"]), "tokens_per_s": 1e3 * positions / median_ms,
        "tflops": tflops, "of_peak": tflops / peak_tflops if peak_tflops else None,
        "worst_cancel_to_free_ms": max(cancels["ms"], default=None),
    }  # fmt: skip


async def _drafts(process: LineProcess, repeats: int) -> list[dict[str, Any]]:
    """How long a drafted token takes, by how many are drafted at once."""
    measured = [(count, await process.ask(draft=count, repeats=repeats)) for count in _DRAFTS]
    return [{"at_once": count, "token_ms": statistics.median(each["ms"])} for count, each in measured]


async def _decoding(process: LineProcess, generations: int, repeats: int) -> dict[str, Any]:
    measured = await process.ask(generations=generations, repeats=repeats)
    step_ms = statistics.median(measured["ms"])
    return {"generations": generations, "step_ms": step_ms, "tokens_per_s": 1e3 * generations / step_ms}


async def _together(processes: list[LineProcess]) -> dict[str, Any]:
    """The same forward in one process, then in all of them at once."""
    for process in processes:  # what is compiled and recorded at first is none of it
        await process.ask(forward=_WINDOW, repeats=1)
    alone = await processes[0].ask(forward=_WINDOW, seconds=1.0)
    together = await asyncio.gather(*(process.ask(forward=_WINDOW, seconds=2.0) for process in processes))
    alone_ms = statistics.median(alone["ms"])
    each_ms = [statistics.median(measured["ms"]) for measured in together]
    slower = statistics.fmean(each_ms) / alone_ms
    return {"processes": len(processes), "alone_ms": alone_ms, "each_ms": each_ms, "slower": slower}


def _show(console: Console, result: dict[str, Any]) -> None:
    rate = f"moves {result['bytes_per_ms'] / 1e6:.0f} GB/s"
    table = Table(
        title=f"{result['shape']} on {result['device']}, {result['dtype']}, {result['context']} positions, {rate}"
    )
    for title in ("width", "forward ms", "worst", "floor ms", "forward / floor"):
        table.add_column(title, justify="right")
    for row in result["forwards"]:
        numbers = (f"{row[name]:.2f}" for name in ("ms", "worst_ms", "floor_ms", "over_floor"))
        table.add_row(str(row["width"]), *numbers)
    console.print(table)
    if any("experts_per_layer" in row for row in result["forwards"]):
        console.print(_experts_line(result["forwards"]))
    decoding = Table(title="plain decoding")
    for title in ("generations", "step ms", "tokens/s"):
        decoding.add_column(title, justify="right")
    for row in result["decoding"]:
        decoding.add_row(str(row["generations"]), f"{row['step_ms']:.2f}", f"{row['tokens_per_s']:.0f}")
    console.print(decoding)
    drafts = (f"{row['token_ms']:.2f} ms ({row['at_once']} at once)" for row in result["drafts"])
    console.print(f"a drafted token: {', '.join(drafts)}")
    if result["cancel_to_free_ms"] is not None:
        worst = result["worst_cancel_to_free_ms"]
        console.print(f"free after a cancel: {result['cancel_to_free_ms']:.2f} ms at the median, {worst:.2f} at worst")
    console.print(_prompt_table(result))
    bits = result["same_bits"]
    console.print(bits.get("problem") or f"the bits of width {_WINDOW}: widths {', '.join(map(str, bits['widths']))}")
    together = result["together"]
    if together["processes"] > 1:
        console.print(
            f"{together['processes']} processes at once: a forward of {_WINDOW} takes {together['slower']:.2f} times as long"
        )


def _experts_line(forwards: list[dict[str, Any]]) -> str:
    """Which experts the floor counts."""
    of_widths = ", ".join(f"{row['experts_per_layer']:.1f} at width {row['width']}" for row in forwards)
    how = "counted" if forwards[0]["experts_counted"] else "expected for choices that are equally likely"
    return f"experts of a layer in the floor ({how}): {of_widths}"


def _prompt_table(result: dict[str, Any]) -> Table:
    peak_tflops = result["peak_tflops"]
    of = f"of {peak_tflops:.0f} TFLOP/s" if peak_tflops else "whose peak rate is not known"
    table = Table(title=f"prompts, in chunks of {result['prompt_chunk']} positions, on a device {of}")
    for title in ("positions", "ms", "worst", "tokens/s", "TFLOP/s", "of the peak", "free after a cancel, at worst"):
        table.add_column(title, justify="right")
    for row in result["prompts"]:
        share, free_ms = row["of_peak"], row["worst_cancel_to_free_ms"]
        table.add_row(
            str(row["positions"]), f"{row['ms']:.1f}", f"{row['worst_ms']:.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['tflops']:.1f}", "" if share is None else f"{share:.0%}", "" if free_ms is None else f"{free_ms:.2f} ms",
        )  # fmt: skip
    return table
