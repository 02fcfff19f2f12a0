"""Weights laid out once for the kernel that multiplies by them, instead of at every forward.

torch's own linear layer on a CPU rearranges its weight inside the multiplication; for a few positions that costs more than the
multiplication. oneDNN takes a weight that was rearranged before: several positions then cost what one costs, which is
what verification lives on (docs/exactness.md). Where torch has no such kernel the layers stay as they are.

Half precision needs instructions that many processors lack. There weights are laid out in float32: a product of several rows
then takes a half to a quarter of the time of one in bfloat16, and every processor has the kernel. Inputs and results stay in
half precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Any of these instructions multiplies bfloat16, as torch.cpu.get_capabilities() names them.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")
#: Of the norm of a small product: what bfloat16 rounds, and more.
_NEAR = 0.02


class PackedLinear(nn.Module):
    """y = x W^T + b with W [out, in] packed for products of about `rows` rows, in the number type `arithmetic`. x: [..., in]."""

    def __init__(self, linear: nn.Linear, rows: int, arithmetic: torch.dtype) -> None:
        super().__init__()
        # Neither parameter nor buffer: a packed tensor can be neither moved nor saved.
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(arithmetic), rows)
        self._bias = None if linear.bias is None else linear.bias.detach().to(arithmetic)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        #: Of x and y.
        self.dtype = linear.weight.dtype
        self.arithmetic = arithmetic

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x.to(self.arithmetic), self._weight, self._bias, "none", [], ""
        )
        return y.to(self.dtype)


def pack(linear: nn.Linear, rows: int) -> nn.Module:
    """The layer packed, or as it is where that cannot be."""
    if linear.weight.device.type != "cpu" or linear.weight.dtype not in _DTYPES:
        return linear
    arithmetic = _arithmetic_of(linear.weight.dtype)
    return linear if arithmetic is None else PackedLinear(linear, rows, arithmetic)


@functools.cache
def _arithmetic_of(dtype: torch.dtype) -> torch.dtype | None:
    """The number type in which weights of type `dtype` are multiplied on this processor; None if oneDNN multiplies in none."""
    own = dtype is torch.float32 or (dtype is torch.bfloat16 and _has_bfloat16_instructions())
    if own and _multiplies(dtype):
        return dtype
    return torch.float32 if _multiplies(torch.float32) else None


def _has_bfloat16_instructions() -> bool:
    found = torch.cpu.get_capabilities()
    if not str(found.get("architecture", "")).startswith("x86"):
        return True  # not known: the trial product decides
    return any(found.get(name) for name in _BFLOAT16_INSTRUCTIONS)


@torch.inference_mode()
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether a small product by a packed weight can be computed, and comes out right."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48, device="meta", dtype=dtype)
    weight, bias, x = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((48, 64), (48,), (4, 64)))
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    try:
        found = PackedLinear(linear, len(x), dtype)(x)
    except RuntimeError:  # oneDNN has no kernel for it, or may use none: ONEDNN_MAX_CPU_ISA
        return False
    return bool((found - expected).norm() <= _NEAR * expected.norm())


def replace_linear_layers(model: nn.Module, lay_out: Callable[[nn.Linear], nn.Module]) -> None:
    """Of the library's own model, one after the other, so that few weights are there twice."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, lay_out(child))
