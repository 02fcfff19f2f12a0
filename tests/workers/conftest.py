"""Kernels for a GPU run in Triton's interpreter where there is none. It is chosen when they are first imported."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _multiply_in_one_order(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, most_imprecise: Any) -> Any:
    """a @ b + d, each element summed in the same order, as on a GPU. The interpreter would leave the sum to a BLAS, which has
    an order of its own for each processor, and on some of them another for other rows."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.einsum("mk,kn->mn", a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


with contextlib.suppress(ImportError):  # Triton comes with torch for CUDA, and is a dependency of the tests
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = _multiply_in_one_order

    if not torch.cuda.is_available():
        from dsi_workers.decoding.gpu import experts, prompt_kernels

        # The interpreter takes as long as there are programs. A row is computed alike in a program of any number of rows.
        prompt_kernels.ROPE_ROWS = prompt_kernels.GATE_ROWS = 128
        experts._BLOCK_ROWS = 16
