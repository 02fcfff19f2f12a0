"""Linear layers with int8 weights, for drafters. The drafter may be the target's own model, so nothing is downloaded.

Weights of 8 and of 4 bits that are computed by the kernels for CPUs are laid out elsewhere (cpu/linear.py).

Each output row of a weight has one scale. On a CPU with fbgemm, inputs are rounded to int8 as well, in each call. That makes
products faster and less precise. Elsewhere inputs stay in bfloat16.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional

#: How weights may be quantized, and the bits of a weight; None: as they are.
BITS = {"none": None, "int8": 8, "int4": 4}
#: The most rows of a drafting step: the next token, and guesses that are checked with it. Prompts have more rows.
_FEW_ROWS = 8
#: Avoids a division by zero.
_TINY = 1e-30
#: The largest absolute value of a weight, with 8 bits and with 7. The sum of two products of an input (at most 255) and a weight
#: of 7 bits fits in 16 bits.
EIGHT_BITS, _SEVEN_BITS = 127, 64


class DynamicInt8Linear(nn.Module):
    """y = x W^T + b with weights and inputs in int8, and sums in int32. x: [..., in] in float32.

    The kernel rounds all rows of its input with one scale. Inside an MLP, the first tokens of a text are a thousand times as
    large as the others, so one scale would round the others to zero. Therefore each row is divided by its largest value
    before the product, and multiplied by it afterwards. That takes time, so it is omitted for one row, and for a few rows of a
    layer with at least as many outputs as inputs. Only the down projection of an MLP has fewer outputs than inputs; the rows
    of the other layers are of similar size, because most were normed just before.

    Processors without VNNI add two products in 16 bits, and saturate a sum that does not fit. On these, weights have 7 bits,
    so that every sum fits. Of the options with equal cost, this one agrees most often with the target (docs/exactness.md).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        torch.backends.quantized.engine = "fbgemm"  # for one row, faster than torch's automatic choice
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = scales_of(weight, _SEVEN_BITS if _int16_sums_saturate() else EIGHT_BITS).double()
        with warnings.catch_warnings():
            # Quantized tensors are deprecated in torch, but this kernel takes its weights as one.
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(
                weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8
            )
        self._bias = None if linear.bias is None else linear.bias.detach().float()
        self._weight: Any = torch.ops.quantized.linear_prepack(quantized, None)
        self._multiply = torch.ops.quantized.linear_dynamic.default
        #: Only the old weight's shape and number type: some layers of transformers ask for these.
        self.weight = linear.weight.detach().to("meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if rows == 1 or (rows <= _FEW_ROWS and self.in_features <= self.out_features):
            y: torch.Tensor = self._multiply(x, self._weight)
        else:
            largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True).clamp_min_(_TINY)
            y = self._multiply(x / largest, self._weight).mul_(largest)
        return y if self._bias is None else y + self._bias


class Int8Linear(nn.Module):
    """y = x W^T + b with W in int8 [out, in] and one scale per output row. x: [..., in] in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = scales_of(weight, EIGHT_BITS)
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def scales_of(weight: torch.Tensor, largest: int) -> torch.Tensor:
    """The scale of each row [out]: the row's largest weight becomes `largest` in int8.

    abs() is avoided: it would copy all weights, which takes half a second when a small model starts.
    """
    return torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).clamp_min(1e-8) / largest


@functools.cache
def _int16_sums_saturate() -> bool:
    """True if the int8 kernel saturates sums of two large products, as processors without VNNI do.

    A trial product decides, because the kernel itself chooses which instructions to use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ones = torch.quantize_per_tensor(torch.ones(16, 64), 1 / EIGHT_BITS, 0, torch.qint8)
    weight = torch.ops.quantized.linear_prepack(ones, None)
    sums = torch.ops.quantized.linear_dynamic.default(torch.ones(1, 64), weight)
    return bool((sums < 0.9 * 64).any())


def quantized_dtype(device: torch.device) -> torch.dtype:
    """The number type of inputs of quantized layers on this device."""
    return torch.float32 if _rounds_inputs(device) else torch.bfloat16


def quantize_int8(linear: nn.Linear) -> nn.Module:
    """Return the layer in int8, in the form for the device that holds its weight."""
    return DynamicInt8Linear(linear) if _rounds_inputs(linear.weight.device) else Int8Linear(linear)


def _rounds_inputs(device: torch.device) -> bool:
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
