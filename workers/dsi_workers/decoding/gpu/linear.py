"""Linear layers on a GPU, with plain or int8 weights, computed by the Triton kernel `multiply`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import nn

from dsi_workers.decoding.gpu.kernels import LEAST_ROWS, multiply
from dsi_workers.decoding.quantization import Int8Linear

#: The most rows of one program. More rows take more programs, each of which computes as it would alone: so the bits of a row do
#: not depend on the number of rows.
_BLOCK_ROWS = 64
#: Launch settings by (int8, gated): outputs per program, inputs per step, warps, and the most pipeline stages. These were the
#: fastest on an H100 with 16 rows, for layers of 1B and 8B shapes in bfloat16. Products are summed step by step, so a
#: different number of inputs per step changes the bits.
_PLANS = {
    (False, False): (64, 256, 4, 4), (False, True): (64, 128, 8, 4),
    (True, False): (32, 256, 4, 5), (True, True): (64, 128, 4, 3),
}  # fmt: skip
#: Cache lines (128 bytes each) of each row of the weight that a kernel prefetches before the kernel before it has ended.
_LINES_AHEAD = 4


def rows_for(rows: int) -> int:
    """The number of rows that the kernels compute for `rows` rows: the next power of two, at least LEAST_ROWS."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())


def supports_pdl(device: torch.device) -> bool:
    """True if the device has programmatic dependent launch (Hopper and later; see kernels.py)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class GpuLinear:
    """A linear layer y = x W^T + b, from an nn.Linear or an Int8Linear.

    `gated`: W is two matrices of equal shape, one below the other, and y is silu of the first product times the second.
    """

    def __init__(self, linear: nn.Module, *, gated: bool = False, block_n: int | None = None) -> None:
        """`block_n`: outputs per program; None: as many as suit a large layer."""
        if isinstance(linear, Int8Linear):
            self._weight, self._bias = linear.weight, linear.bias
            self._scales: torch.Tensor | None = linear.scale
        else:
            assert isinstance(linear, nn.Linear)
            self._weight, self._bias, self._scales = linear.weight.data, linear.bias, None
        self._gated, self._block_n = gated, block_n
        rows, self.in_features = self._weight.shape
        self.out_features = rows // 2 if gated else rows
        #: Number type of x and y.
        self.dtype = torch.bfloat16 if self._scales is not None else self._weight.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [rows, out] for x [rows, in], with any number of rows."""
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
        """Write the result for x [rows, in] to y [rows, out]. `rows` must be a value of `rows_for`.

        With `norm` [in], x gets an RMSNorm first. `residual` [rows, out] is added to the result, and may be y itself.
        """
        rows, pdl = len(x), supports_pdl(x.device)
        block_rows = min(rows, _BLOCK_ROWS)
        block_n, block_k, warps, stages = self._plan(x.device)
        stages = max(2, min(stages, shared_bytes(x.device) // self._step_bytes(block_n, block_k, block_rows)))
        options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
        multiply[(rows // block_rows, triton.cdiv(self.out_features, block_n))](
            x, self._weight, y, _or(self._scales, y), _or(self._bias, y), _or(residual, y), _or(norm, y), epsilon,
            self.out_features, inputs=self.in_features, gated=self._gated, scaled=self._scales is not None,
            biased=self._bias is not None, added=residual is not None, normed=norm is not None, block_rows=block_rows,
            block_n=block_n, block_k=block_k, pdl=pdl, prefetched_lines=_LINES_AHEAD, num_stages=stages, num_warps=warps,
            **options,
        )  # fmt: skip

    def _plan(self, device: torch.device) -> tuple[int, int, int, int]:
        """Launch settings for this GPU. They do not depend on the number of rows, because the bits must not."""
        block_n, block_k, warps, stages = _PLANS[self._scales is not None, self._gated]
        block_n = self._block_n or block_n
        while 2 * self._step_bytes(block_n, block_k, _BLOCK_ROWS) > shared_bytes(device):  # small GPUs
            block_k //= 2
        return block_n, block_k, warps, stages

    def _step_bytes(self, block_n: int, block_k: int, rows: int) -> int:
        """Shared memory for the inputs of one step, in bytes."""
        weights = block_n * self._weight.element_size() * (2 if self._gated else 1)
        return block_k * (weights + rows * self.dtype.itemsize)


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """`tensor`, or `other` as a placeholder: Triton needs a pointer even where the kernel reads nothing."""
    return other if tensor is None else tensor


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU. For a CPU, where the interpreter runs one program after another, few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory of one program in bytes, less a reserve for the compiler."""
    if device.type != "cuda":
        return 1 << 17
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"]) - 4096
