"""`dsi-actors bench ...`: what measures speed, exactness and endurance, one benchmark in each module."""

from __future__ import annotations

from dsi_actors.benches import (
    acceptance,
    exact,
    exact_cost,
    flood,
    gpu,
    heatmap,
    http,
    load,
    never_slower,
    overhead,
    real,
    soak,
    start,
    table2,
    timed,
)
from dsi_actors.console.options import SubParsers, add_group

_ALL = (
    overhead, real, gpu, exact, exact_cost, acceptance, timed, table2, never_slower, heatmap, flood, load, http, soak, start
)  # fmt: skip


def add_parser(commands: SubParsers) -> None:
    bench = commands.add_parser("bench", help="measure this machine")
    benches = add_group(bench, "benchmarks", "BENCHMARK")
    for benchmark in _ALL:
        benchmark.add_parser(benches)
