"""A drafter out of the target's own weights in int8, so that there is nothing to download.

Each output row of a weight has one scale. On a CPU with fbgemm inputs are rounded to int8, too, as they come: that makes a
product faster and its result coarser (docs/measured.md). Elsewhere inputs stay in bfloat16.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional

#: Rows: about as many tokens are drafted or checked at once. A prompt has more.
_FEW = 8
_TINY = 1e-30
#: The largest weight in int8, of 8 bits and of 7. Two products of an input (at most 255) and a weight of 7 bits fit 16 bits.
_EIGHT_BITS, _SEVEN_BITS = 127, 64


class DynamicInt8Linear(nn.Module):
    """y = x W^T + b with weights and inputs in int8, sums in int32. x: [..., in] in float32.

    The kernel rounds all inputs of a product by one scale. Inside an MLP the first tokens of a text are a thousand times as
    large as the others, which would all be rounded to nothing: so rows are brought to one size before and back after. That
    takes time, and is left out for a few rows of what was normed just before, which is all but where an MLP narrows again.

    Processors without VNNI add two products in 16 bits, and a sum that does not fit is cut. There weights have 7 bits, so that
    every sum fits: of what costs the same that agrees most with the target (docs/exactness.md).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        torch.backends.quantized.engine = "fbgemm"  # for one row faster than torch's own choice between it and oneDNN
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = _scales(weight, _SEVEN_BITS if _cuts_sums() else _EIGHT_BITS).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are to go, but this kernel takes its weights from one
            quantized = torch.quantize_per_channel(
                weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8
            )
        self._bias = None if linear.bias is None else linear.bias.detach().float()
        self._weight: Any = torch.ops.quantized.linear_prepack(quantized, None)
        self._multiply = torch.ops.quantized.linear_dynamic.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if rows == 1 or (rows <= _FEW and self.in_features <= self.out_features):
            y: torch.Tensor = self._multiply(x, self._weight)
        else:
            sizes = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True).clamp_min_(_TINY)
            y = self._multiply(x / sizes, self._weight).mul_(sizes)
        return y if self._bias is None else y + self._bias


class Int8Linear(nn.Module):
    """y = x W^T + b with W as int8 [out, in] and one scale per output row. x: [..., in] in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = _scales(weight, _EIGHT_BITS)
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def _scales(weight: torch.Tensor, largest: int) -> torch.Tensor:
    """Of each row [out], whose largest weight becomes `largest`. Without abs(): a copy of all weights would take half a second of
    a small model's start."""
    return torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).clamp_min(1e-8) / largest


@functools.cache
def _cuts_sums() -> bool:
    """Whether the kernel gives less than the sum of the largest products. Found by trying: which instructions it uses is its own
    choice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ones = torch.quantize_per_tensor(torch.ones(16, 64), 1 / _EIGHT_BITS, 0, torch.qint8)
    weight = torch.ops.quantized.linear_prepack(ones, None)
    sums = torch.ops.quantized.linear_dynamic.default(torch.ones(1, 64), weight)
    return bool((sums < 0.9 * 64).any())


def int8_dtype(device: torch.device) -> torch.dtype:
    """What inputs of the int8 layers of this device have."""
    return torch.float32 if _rounds_inputs(device) else torch.bfloat16


def quantize_int8(linear: nn.Linear) -> nn.Module:
    """The layer in int8, for the device that it is on."""
    return DynamicInt8Linear(linear) if _rounds_inputs(linear.weight.device) else Int8Linear(linear)


def _rounds_inputs(device: torch.device) -> bool:
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
