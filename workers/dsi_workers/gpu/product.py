"""A linear layer, or an int8 one, as the kernel multiplies by it: x [rows, in] in 16, 32 or 64 rows, weight [out, in]."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import nn

from dsi_workers.gpu.kernels import LEAST_ROWS, multiply
from dsi_workers.quantization import Int8Linear

MOST_ROWS = 64
#: A program multiplies by so many outputs at a time, reads so many of their inputs in one step, and has so many steps under way,
#: if they fit into a processor's memory. Sums are made step by step: no other number but `_BLOCK_K` changes their bits.
_BLOCK_N, _BLOCK_K, _STAGES = 64, 128, 6
#: Narrow layers are cut finer, so that there are programs enough for all processors.
_LEAST_PROGRAMS = 48
#: Lines of 128 bytes of each row of the weight that are on their way before the kernel before has ended.
_LINES_AHEAD = 4


def rows_for(rows: int) -> int:
    """So many are computed for `rows`."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())


def chains(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before ends, up to where it needs its results (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Product:
    """y = x W^T + b. `gated`: W is two matrices one below the other, and y is silu of the first product times the second."""

    def __init__(self, linear: nn.Module, *, gated: bool = False) -> None:
        if isinstance(linear, Int8Linear):
            self._weight, self._bias = linear.weight, linear.bias
            self._scales: torch.Tensor | None = linear.scale
        else:
            assert isinstance(linear, nn.Linear)
            self._weight, self._bias, self._scales = linear.weight.data, linear.bias, None
        self._gated = gated
        rows, self.in_features = self._weight.shape
        self.out_features = rows // 2 if gated else rows
        #: Of x and y.
        self.dtype = torch.bfloat16 if self._scales is not None else self._weight.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of any number of rows up to MOST_ROWS."""
        padded = x.new_zeros(rows_for(len(x)), self.in_features)
        padded[: len(x)] = x
        y = x.new_empty(len(padded), self.out_features)
        self.multiply(padded, y)
        return y[: len(x)]

    def multiply(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        epsilon: float = 0.0,
        residual: torch.Tensor | None = None,
    ) -> None:
        """y [rows, out] of x [rows, in], normed before if there is a `norm`; `residual` is added, and may be y itself."""
        rows, chained = len(x), chains(x.device)
        block_n = next(
            (n for n in (_BLOCK_N, _BLOCK_N // 2) if self.out_features >= n * _LEAST_PROGRAMS), _BLOCK_N // 4
        )
        step_bytes = _BLOCK_K * (
            block_n * self._weight.element_size() * (2 if self._gated else 1) + rows * x.element_size()
        )
        stages = max(2, min(_STAGES, _shared_bytes(x.device) // step_bytes))
        options: dict[str, Any] = {"launch_pdl": True} if chained else {}
        multiply[(triton.cdiv(self.out_features, block_n),)](
            x, self._weight, y, _or(self._scales, y), _or(self._bias, y), _or(residual, y), _or(norm, y), epsilon,
            self.out_features, inputs=self.in_features, gated=self._gated, scaled=self._scales is not None,
            biased=self._bias is not None, added=residual is not None, normed=norm is not None, rows=rows,
            block_n=block_n, block_k=_BLOCK_K, chained=chained, fetched=_LINES_AHEAD, num_stages=stages,
            num_warps=8 if block_n == _BLOCK_N and (self._gated or norm is not None) else 4, **options,
        )  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel wants a pointer where it reads nothing."""
    return other if tensor is None else tensor


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """What a program may have, less what the compiler wants for itself."""
    if device.type != "cuda":
        return 1 << 17
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"]) - 4096
