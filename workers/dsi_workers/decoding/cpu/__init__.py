"""The decoder for CPUs. What its kernels need to know before they are compiled stands here."""

from __future__ import annotations

import functools
from collections.abc import Mapping

#: Numbers in one vector. The number of inputs of a product is a multiple of it.
LANES = 16
#: A tile has the weights of 32 outputs. Two vectors have a lane for each of these outputs.
OUTPUTS, VECTORS = 32, 2
#: The products of 192 inputs are added up to one sum, and then these sums are added: one long sum would be less exact. The
#: weights of a tile for 192 inputs fit into the L1 cache.
INPUTS_PER_SUM = 192
#: Attention computes the scores of this number of positions together.
POSITIONS_TOGETHER = 4
#: Inputs that have one scale where they are rounded to 8 bits, as weights of 4 bits do.
GROUP = 32
#: Products of whole numbers that become one sum of 32 bits.
SUMMED = 4
#: Rows that attention computes together: it reads keys and values once for all of them.
ROWS_TOGETHER = 8


@functools.cache
def kernel_cache() -> bool:
    """Tell Numba to keep compiled kernels in the user's cache directory. Returns False if nothing can be kept there.

    Numba compiles a kernel again when its own file has changed, but not when a file has that it calls. So each version of these
    files has a directory of its own.
    """
    import hashlib
    from pathlib import Path

    import numba

    from dsi_workers.decoding.trial_cache import directory_for

    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    directory = directory_for(f"kernels/{digest.hexdigest()[:16]}")
    if directory is not None:
        numba.config.CACHE_DIR = str(directory)  # type: ignore[attr-defined, unused-ignore]
    return directory is not None


def has_feature(name: str) -> bool:
    """Whether the processor for which Numba compiles has this feature, as LLVM names it."""
    import numba

    chosen = numba.config.CPU_FEATURES  # type: ignore[attr-defined, unused-ignore]
    if chosen is not None:
        return f"+{name}" in chosen.split(",")
    return _host_features().get(name, False)


@functools.cache
def _host_features() -> Mapping[str, bool]:
    import llvmlite.binding

    features: Mapping[str, bool] = llvmlite.binding.get_host_cpu_features()
    return features


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 (AVX512_BF16)."""
    return has_feature("avx512bf16")
