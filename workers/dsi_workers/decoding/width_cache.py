"""Caches the widths that agree (widths.py) in the user's cache directory, because finding them takes seconds.

The cache key covers everything that the result depends on: the model's configuration, the libraries, the processor, the
settings, and this package's code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.widths import Widths
from dsi_workers.models.files import ModelError, cache_directory

#: Prefixes of environment variables that influence which kernels the libraries choose.
_KERNEL_VARIABLES = ("ATEN_", "CUBLAS_", "CUDA_", "DNNL_", "FBGEMM_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "TORCH_")


def widths_tried(
    forward: Forward, directory: Path, *, window: int, slots: int, try_them: Callable[[], Widths]
) -> Widths:
    """Return the widths of the model in `directory` from the cache, or else from `try_them`, whose result is then cached.

    Also sets `read_step` and `attends_per_position` of `forward`. Exceptions of `try_them` are raised, and nothing is cached.
    """
    try:
        cache = cache_directory()
    except ModelError:  # the user has no home directory
        return try_them()
    file = cache / "trials" / f"{_key(forward, directory, window, slots)}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        costs_s = {int(width): float(cost_s) for width, cost_s in kept["costs_s"].items()}
        read_step, attends_per_position = int(kept["read_step"]), bool(kept["attends_per_position"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        costs_s, read_step, attends_per_position = {}, 0, False
    if window in costs_s and read_step > 0:
        forward.read_step, forward.attends_per_position = read_step, attends_per_position
        return Widths(costs_s)
    widths = try_them()
    with contextlib.suppress(OSError):  # a cache that cannot be written to costs only time
        found = {
            "costs_s": widths.costs_s,
            "read_step": forward.read_step,
            "attends_per_position": forward.attends_per_position,
        }
        _store(file, found)
    return widths


def _store(file: Path, found: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as written:
        json.dump(found, written)
    Path(written.name).replace(file)


def _key(forward: Forward, directory: Path, window: int, slots: int) -> str:
    device = forward.device
    facts = [
        (directory / "config.json").read_text(encoding="utf-8"),
        f"{forward.decoder_kind} {forward.attention_shapes}",
        str([(type(layer).__name__, layer.in_features, layer.out_features) for layer in forward.linear_layers()]),
        f"{window} {slots} {forward.cache.capacity} {forward.read_step} {torch.get_num_threads()}",
        torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        torch.__config__.show(),
        str(sorted(item for item in os.environ.items() if item[0].startswith(_KERNEL_VARIABLES))),
        _code_digest(),
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Model and features of this machine's processor."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor()
    kinds = ("model name", "stepping", "microcode", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in file.read_text().splitlines() if line.startswith(kinds)}))


@functools.cache
def _code_digest() -> str:
    """A hash of this package's code, and the version of transformers, whose layers a model may use."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    from importlib import metadata

    return digest.hexdigest() + metadata.version("transformers")
