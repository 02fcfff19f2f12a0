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
    long,
    never_slower,
    overhead,
    real,
    scale,
    schemas,
    soak,
    start,
    structure,
    table2,
    timed,
)
from dsi_actors.console.options import SubParsers, add_group

#: What tells a user how fast this machine is with real models; and what developers hold the project to.
_FOR_USERS = (real, gpu, overhead, load, start)
_FOR_DEVELOPERS = (
    exact,
    exact_cost,
    structure,
    acceptance,
    timed,
    table2,
    never_slower,
    heatmap,
    long,
    scale,
    schemas,
    http,
    flood,
    soak,
)
_DESCRIPTION = """For users: real, gpu, overhead, load and start measure this machine.
For developers: the others hold the project to its promises of exactness, speed and endurance."""


def add_parser(commands: SubParsers) -> None:
    bench = commands.add_parser("bench", help="measure this machine, or the project", description=_DESCRIPTION)
    benches = add_group(bench, "benchmarks", "BENCHMARK")
    for benchmark in (*_FOR_USERS, *_FOR_DEVELOPERS):
        benchmark.add_parser(benches)
