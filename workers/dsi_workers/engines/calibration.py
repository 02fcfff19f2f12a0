"""What a backend's forwards cost, measured when a worker starts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from dsi_workers.backend import PROMPT_CHUNK, Backend, Run
from dsi_workers.engine import EngineInfo

#: Of a forward that takes long, one or two measurements are enough: what disturbs it is a small part of it.
_LONG_S = 0.2
_REPETITIONS = 3
#: How often the forwards of a drafter that checks guesses are timed.
_ROUNDS = 4
#: Rows of forwards that check guesses.
_GUESS_ROWS = (1, 2, 4, 8)


def measured(backend: Backend, info: EngineInfo, *, exact: bool) -> EngineInfo:
    """`info` with latencies in µs: of a target, for a verification of one position, of a window, and of windows for all
    slots; of a drafter, for one token and for a token of each slot."""
    one_us = _median_us(backend, 1)
    if not exact:
        return replace(info, latency_us=one_us, batch_latency_us=_median_us(backend, 1, backend.slots))
    return replace(
        info,
        latency_us=one_us,
        window_latency_us=_median_us(backend, backend.window),
        batch_latency_us=_median_us(backend, backend.window, backend.slots),
    )


def guess_costs_us(backend: Backend) -> dict[int, float]:
    """What a forward takes that computes this many rows of one generation: a token and guesses that follow it."""
    costs_us = dict.fromkeys(_GUESS_ROWS, math.inf)
    # In turn, the least of each: what disturbs the machine for a moment must not make one of them dear for ever.
    for _ in range(_ROUNDS):
        for rows, known_us in costs_us.items():
            costs_us[rows] = min(known_us, backend.time_s([_run(rows)]) * 1e6)
    return costs_us


def _median_us(backend: Backend, positions: int, generations: int = 1) -> int:
    """Of a forward for so many generations, or of as many forwards as they need. All use slot 0: what is computed does not
    matter, only how long it takes."""
    run = _run(positions)
    together = min(generations, max(1, backend.most_rows // backend.rows(run)))
    return max(1, round(_median_s(backend, [run] * together) * 1e6)) * generations // together


def _median_s(backend: Backend, runs: Sequence[Run]) -> float:
    times_s = list[float]()
    while len(times_s) < _REPETITIONS and sum(times_s) < _LONG_S:
        times_s.append(backend.time_s(runs))
    return statistics.median(times_s)


def _run(positions: int) -> Run:
    return Run(0, [0] * positions, PROMPT_CHUNK, 0, PROMPT_CHUNK)
