"""From the factors by which llama.cpp scales RoPE to the settings by which transformers does.

llama.cpp divides each frequency of RoPE by a factor, and stores the factors [head_dim / 2] as the tensor rope_freqs.weight. For
Llama 3.1 and later they come from four numbers, which config.json has under rope type llama3. These are found again here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

#: Factors are stored in float32. Relative: how near they must come, and what is certainly not the least or the largest one.
_TOLERANCE, _BESIDE = 1e-5, 1e-3


def rope_of_factors(factors: Sequence[float], theta: float, positions: int) -> dict[str, Any]:
    """The rope_parameters of config.json that divide the frequencies of base `theta` by `factors`.

    `positions`: max_position_embeddings.
    """
    if all(factor == 1 for factor in factors):
        return {"rope_type": "default", "rope_theta": theta}
    dim = 2 * len(factors)
    per_position = [theta ** (-2 * index / dim) / (2 * math.pi) for index in range(len(factors))]  # 1 / wavelength
    found = _llama3(factors, per_position)
    if found is not None and _agrees(found, factors, per_position):
        return {"rope_type": "llama3", "rope_theta": theta, **found}
    # Rope type longrope divides by any factors. With the same ones for short and long texts, nothing changes with the length.
    return {
        "rope_type": "longrope", "rope_theta": theta, "short_factor": list(factors), "long_factor": list(factors),
        "factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": positions,
    }  # fmt: skip


def _llama3(factors: Sequence[float], per_position: Sequence[float]) -> dict[str, float] | None:
    """The numbers of rope type llama3 that may have given these factors. None: there are none.

    Between short and long wavelengths, 1 / factor grows in a straight line with 1 / wavelength, from 1 / `factor` to 1. Two
    points of the line give the line. Only the ratios of the other three numbers matter, so that low_freq_factor is 1.
    """
    most = max(factors)
    points = [
        (x, 1 / factor)
        for x, factor in zip(per_position, factors, strict=True)
        if 1 + _BESIDE < factor < most * (1 - _BESIDE)
    ]
    if len(points) < 2:
        return None
    (right, high), (left, low) = points[0], points[-1]
    slope = (high - low) / (right - left)
    if slope <= 0:
        return None
    begin, end = (left + (value - low) / slope for value in (1 / most, 1.0))
    if begin <= 0:
        return None
    original, high_freq_factor = 1 / begin, end / begin
    nearest = {"factor": float(round(most, 4)), "low_freq_factor": 1.0, "high_freq_factor": round(high_freq_factor, 3)}
    exact = {"factor": most, "low_freq_factor": 1.0, "high_freq_factor": high_freq_factor}
    rounded = {**nearest, "original_max_position_embeddings": round(original)}
    return (
        rounded if _agrees(rounded, factors, per_position) else {**exact, "original_max_position_embeddings": original}
    )


def _agrees(rope: dict[str, float], factors: Sequence[float], per_position: Sequence[float]) -> bool:
    """Whether these numbers give the factors."""
    low, high, most = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    for x, factor in zip(per_position, factors, strict=True):
        smooth = (rope["original_max_position_embeddings"] * x - low) / (high - low)
        part = min(max(smooth, 0.0), 1.0)
        if not math.isclose(1 / ((1 - part) / most + part), factor, rel_tol=_TOLERANCE):
            return False
    return True
