"""Percentiles of measurements, computed in the same way by every command that prints some."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: int) -> float:
    """The `percent`-th percentile (1 to 99) of `values`, interpolated between the two nearest of them.

    A single value is each of its percentiles. No values: 0.
    """
    if len(values) < 2:
        return sum(values)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
