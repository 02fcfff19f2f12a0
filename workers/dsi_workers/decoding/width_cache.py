"""Caches the widths that agree (widths.py).

The cache key covers everything that the result depends on: the model's configuration, the libraries, the processor, the
settings, and this package's code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.trial_cache import keep_trial, read_trial
from dsi_workers.decoding.widths import Widths

#: Prefixes of environment variables that influence which kernels the libraries choose.
_KERNEL_VARIABLES = (
    "ATEN_",
    "CUBLAS_",
    "CUDA_",
    "DNNL_",
    "FBGEMM_",
    "KMP_",
    "MKL_",
    "NUMBA_",
    "OMP_",
    "ONEDNN_",
    "TORCH_",
)


def widths_tried(
    forward: Forward, directory: Path, *, window: int, slots: int, try_them: Callable[[], Widths]
) -> Widths:
    """Return the widths of the model in `directory` from the cache, or else from `try_them`, whose result is then cached.

    Also sets `read_step` and `attends_per_position` of `forward`. Exceptions of `try_them` are raised, and nothing is cached.
    """
    facts = _facts(forward, directory, window, slots)
    kept = read_trial(facts)
    try:
        costs_s = {int(width): float(cost_s) for width, cost_s in kept["costs_s"].items()}
        read_step, attends_per_position = int(kept["read_step"]), bool(kept["attends_per_position"])
    except (ValueError, KeyError, TypeError, AttributeError):
        costs_s, read_step, attends_per_position = {}, 0, False
    if window in costs_s and read_step > 0:
        forward.read_step, forward.attends_per_position = read_step, attends_per_position
        return Widths(costs_s)
    widths = try_them()
    found = {
        "costs_s": widths.costs_s,
        "read_step": forward.read_step,
        "attends_per_position": forward.attends_per_position,
    }
    keep_trial(facts, found)
    return widths


def _facts(forward: Forward, directory: Path, window: int, slots: int) -> list[str]:
    device = forward.device
    return [
        (directory / "config.json").read_text(encoding="utf-8"),
        f"{forward.decoder_kind} {forward.attention_shapes}",
        str([(type(layer).__name__, layer.in_features, layer.out_features) for layer in forward.linear_layers()]),
        f"{window} {slots} {forward.cache.capacity} {forward.read_step} {torch.get_num_threads()}",
        torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        torch.__config__.show(),
        str(sorted(item for item in os.environ.items() if item[0].startswith(_KERNEL_VARIABLES))),
    ]
