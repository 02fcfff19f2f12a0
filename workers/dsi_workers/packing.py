"""Weights laid out once for the kernel that multiplies by them, instead of at every forward.

torch's own linear layer on a CPU rearranges its weight inside the multiplication; for a few positions that costs more than the
multiplication. oneDNN takes a weight that was rearranged before: several positions then cost what one costs, which is
what verification lives on (docs/measured.md). Where torch has no such kernel the layers stay as they are.
"""

from __future__ import annotations

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def pack_linear_layers(model: nn.Module, rows: int) -> None:
    """Replace the linear layers of a model on the CPU, one after the other, so that few weights are there twice."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype in _DTYPES:
                setattr(module, name, PackedLinear(child, rows))
