"""Percentiles lie between the values that they are taken from, however few there are."""

from __future__ import annotations

import pytest

from dsi_actors.percentiles import percentile


def test_percentiles_are_interpolated_whatever_the_order() -> None:
    values = [float(number) for number in range(100, -1, -1)]
    assert [percentile(values, percent) for percent in (1, 50, 95, 99)] == pytest.approx([1.0, 50.0, 95.0, 99.0])
    assert percentile([10.0, 20.0], 95) == pytest.approx(19.5)


def test_few_values_are_enough() -> None:
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) == 0.0
