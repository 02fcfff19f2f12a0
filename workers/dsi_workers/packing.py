"""Weights laid out once for the kernel that multiplies by them, instead of at every forward.

torch's own linear layer on a CPU rearranges its weight inside the multiplication; for a few positions that costs more than the
multiplication. oneDNN takes a weight that was rearranged before: several positions then cost what one costs, which is
what verification lives on (docs/exactness.md). Where torch has no such kernel the layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """y = x W^T + b with W [out, in] packed for products of about `rows` rows. x: [..., in]."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        # Neither parameter nor buffer: a packed tensor can be neither moved nor saved.
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")
        return y


def pack(linear: nn.Linear, rows: int) -> nn.Module:
    """The layer packed, or as it is where that cannot be."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return linear
    if linear.weight.device.type != "cpu" or linear.weight.dtype not in _DTYPES:
        return linear
    return PackedLinear(linear, rows)


def replace_linear_layers(model: nn.Module, lay_out: Callable[[nn.Linear], nn.Module]) -> None:
    """Of the library's own model, one after the other, so that few weights are there twice."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, lay_out(child))
