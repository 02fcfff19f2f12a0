"""`dsi-actors`: the command line. Results go to standard output, logs and progress to standard error."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable

from dsi_actors.cli import (
    bench_acceptance,
    bench_exact,
    bench_exact_cost,
    bench_flood,
    bench_gpu,
    bench_heatmap,
    bench_http,
    bench_load,
    bench_never_slower,
    bench_overhead,
    bench_real,
    bench_soak,
    bench_start,
    bench_table2,
    bench_timed,
    chaos,
    conformance,
    download,
    generate,
    keys,
    plan,
    serve,
    simulate,
    status,
    trace,
)
from dsi_actors.errors import DsiError
from dsi_actors.logs import show_logs

Command = Callable[[argparse.Namespace], Awaitable[int]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="dsi-actors", description="Distributed speculative inference.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    generate.add_parser(commands)
    serve.add_parser(commands)
    download.add_parser(commands)
    status.add_parser(commands)
    plan.add_parser(commands)
    simulate.add_parser(commands)
    trace.add_parser(commands)
    keys.add_parser(commands)
    chaos.add_parser(commands)
    conformance.add_parser(commands)
    bench = commands.add_parser("bench", help="measure this machine")
    benches = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    bench_overhead.add_parser(benches)
    bench_real.add_parser(benches)
    bench_gpu.add_parser(benches)
    bench_exact.add_parser(benches)
    bench_exact_cost.add_parser(benches)
    bench_acceptance.add_parser(benches)
    bench_timed.add_parser(benches)
    bench_table2.add_parser(benches)
    bench_never_slower.add_parser(benches)
    bench_heatmap.add_parser(benches)
    bench_flood.add_parser(benches)
    bench_load.add_parser(benches)
    bench_http.add_parser(benches)
    bench_soak.add_parser(benches)
    bench_start.add_parser(benches)
    arguments = parser.parse_args()
    show_logs(arguments.log_level, arguments.log_format)
    try:
        return _run(arguments.command(arguments))
    except DsiError as error:
        sys.stderr.write(f"dsi-actors: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ndsi-actors: interrupted\n")
        return 130


def _run(work: Awaitable[int]) -> int:
    async def awaited() -> int:
        return await work

    if sys.platform == "win32":
        return asyncio.run(awaited())
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(awaited())


if __name__ == "__main__":
    sys.exit(main())
