"""A linear layer, or an int8 one, as the kernel multiplies by it: x [rows, in] in 16, 32 or 64 rows, weight [out, in]."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import nn

from dsi_workers.decoding.gpu.kernels import LEAST_ROWS, multiply
from dsi_workers.decoding.quantization import Int8Linear

MOST_ROWS = 64
#: For int8 or not, gated or not: outputs of one program, inputs of one step, warps, and the most steps under way. What was
#: fastest on an H100 at 16 rows, for layers of 1B and 8B shapes (bfloat16). Sums are made step by step, so other inputs of a
#: step would give other bits.
_PLANS = {
    (False, False): (64, 256, 4, 4), (False, True): (64, 128, 8, 4),
    (True, False): (32, 256, 4, 5), (True, True): (64, 128, 4, 3),
}  # fmt: skip
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
        block_n, block_k, warps, stages = self._plan(x.device)
        stages = max(2, min(stages, _shared_bytes(x.device) // self._step_bytes(block_n, block_k, rows)))
        options: dict[str, Any] = {"launch_pdl": True} if chained else {}
        multiply[(triton.cdiv(self.out_features, block_n),)](
            x, self._weight, y, _or(self._scales, y), _or(self._bias, y), _or(residual, y), _or(norm, y), epsilon,
            self.out_features, inputs=self.in_features, gated=self._gated, scaled=self._scales is not None,
            biased=self._bias is not None, added=residual is not None, normed=norm is not None, rows=rows,
            block_n=block_n, block_k=block_k, chained=chained, fetched=_LINES_AHEAD, num_stages=stages, num_warps=warps,
            **options,
        )  # fmt: skip

    def _plan(self, device: torch.device) -> tuple[int, int, int, int]:
        """The same for any number of rows: their bits shall agree."""
        block_n, block_k, warps, stages = _PLANS[self._scales is not None, self._gated]
        while 2 * self._step_bytes(block_n, block_k, MOST_ROWS) > _shared_bytes(device):  # not on every GPU
            block_k //= 2
        return block_n, block_k, warps, stages

    def _step_bytes(self, block_n: int, block_k: int, rows: int) -> int:
        weights = block_n * self._weight.element_size() * (2 if self._gated else 1)
        return block_k * (weights + rows * self.dtype.itemsize)


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
