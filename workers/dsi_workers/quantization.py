"""A drafter out of the target's own weights: weight-only int8, so that there is nothing to download.

Each output row of a linear layer gets one scale; activations stay in bfloat16, so that no token's result depends on the
range of its neighbours' activations.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

#: Up to here the packed kernel beats converting the weights back and using the matrix units.
_NARROW_ROWS = 8


class Int8Linear(nn.Module):
    """y = x W^T + b with W as int8 [out, in] and one scale per output row. x: [..., in] in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(1e-8) / 127
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= _NARROW_ROWS and rows.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = functional.linear(rows, self.weight.to(rows.dtype)) * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def quantize_int8(model: nn.Module) -> None:
    """Replace every linear layer of `model`, the output head included, by its int8 version."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
