"""Measures how long a backend's forwards take when a worker starts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from dsi_protocol.sampling import GREEDY
from dsi_workers.backend import Backend, Run
from dsi_workers.engine import EngineInfo, Never

#: No further repetition after so many seconds: disturbances are a small part of a forward that takes long.
_LONG_S = 0.2
_REPETITIONS = 3
#: How often each forward of `guess_costs_us` is timed.
_ROUNDS = 4
#: Tokens that `_drafted_us` drafts at once, as in a usual block of drafts.
_AT_ONCE = 4
#: Rows of the forwards that `guess_costs_us` times.
_GUESS_ROWS = (1, 2, 4, 8)


def measured(backend: Backend, info: EngineInfo, *, exact: bool) -> EngineInfo:
    """Return `info` with measured latencies in µs.

    For a target (`exact`): of a verification of one position, of a full window, and of full windows for all slots. For a
    drafter: of one token, of a token on each of as many branches as a step may have, and of one token for each slot.
    """
    if not exact:
        several = backend.most_drafts > 1
        return replace(
            info,
            latency_us=_drafted_us(backend, 1) if several else _median_us(backend, 1),
            window_latency_us=_median_us(backend, 1, info.rows) if info.rows > 1 else 0,
            batch_latency_us=_drafted_us(backend, backend.slots) if several else _median_us(backend, 1, backend.slots),
        )
    one_us = _median_us(backend, 1)
    return replace(
        info,
        latency_us=one_us,
        window_latency_us=_median_us(backend, backend.window),
        batch_latency_us=_median_us(backend, backend.window, backend.slots),
    )


def guess_costs_us(backend: Backend) -> dict[int, float]:
    """The time in µs of a drafter's forward for one generation, by its rows: the last token and the guesses that it checks."""
    costs_us = dict.fromkeys(_GUESS_ROWS, math.inf)
    # All in turn, and the least of each: a short disturbance must not make one number of rows look slow for ever.
    for _ in range(_ROUNDS):
        for rows, known_us in costs_us.items():
            costs_us[rows] = min(known_us, backend.time_s([_run(backend, rows)]) * 1e6)
    return costs_us


def _median_us(backend: Backend, positions: int, generations: int = 1) -> int:
    """The median time in µs for `positions` positions of each of so many generations, in as many forwards as they need.

    All runs use slot 0: only the time is of interest.
    """
    run = _run(backend, positions)
    together = min(generations, max(1, backend.most_rows // backend.rows(run)))
    return max(1, round(_median_s(backend, [run] * together) * 1e6)) * generations // together


def _drafted_us(backend: Backend, generations: int) -> int:
    """The median time in µs of a token of each of so many generations, where several tokens are drafted at once."""
    together = min(generations, backend.most_rows)
    runs, times_s = [_run(backend, 1)] * together, list[float]()
    while len(times_s) < 1 + _REPETITIONS:  # the first one may record graphs
        begun = time.perf_counter()
        backend.draft(runs, [GREEDY] * together, count=_AT_ONCE, words=backend.vocabulary_size, interrupt=Never())
        times_s.append((time.perf_counter() - begun) / _AT_ONCE)
    return max(1, round(statistics.median(times_s[1:]) * 1e6)) * generations // together


def _median_s(backend: Backend, runs: Sequence[Run]) -> float:
    times_s = list[float]()
    while len(times_s) < _REPETITIONS and sum(times_s) < _LONG_S:
        times_s.append(backend.time_s(runs))
    return statistics.median(times_s)


def _run(backend: Backend, positions: int) -> Run:
    return Run(0, [0] * positions, backend.prompt_chunk, 0, backend.prompt_chunk)
