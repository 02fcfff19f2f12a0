"""A linear layer whose weights lie in tiles, in the order in which the kernels read them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dsi_workers.decoding.cpu import LANES, OUTPUTS, multiplies_bfloat16
from dsi_workers.decoding.cpu.arena import Arena, Array
from dsi_workers.decoding.cpu.products import multiply
from dsi_workers.decoding.quantization import EIGHT_BITS, scales_of

#: Of inputs in bfloat16, in int8 layers: with fewer rows, converting the weights takes longer than it saves.
_LEAST_ROWS = 16


class TileLinear(nn.Module):
    """y = x W^T + b. W is in its own number type, or in int8 with a scale for each output. x: [rows, in_features]."""

    def __init__(self, linear: nn.Linear, arena: Arena, *, int8: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        #: float32, [outputs], or empty.
        self.scale = self.bias = np.empty(0, np.float32)
        if int8:
            scale = scales_of(weight.float(), EIGHT_BITS)
            weight = (weight.float() / scale[:, None]).round_().to(torch.int8)
            self.scale = as_array(scale)
        if linear.bias is not None:
            self.bias = as_array(linear.bias.detach().float())
        #: [blocks of OUTPUTS outputs, in_features / LANES, OUTPUTS, LANES].
        self.tiles = arena.keep(as_array(_in_tiles(weight)))
        self.dtype = input_dtype(weight.dtype, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, in float32. x: in `dtype`."""
        y = torch.empty(len(x), self.out_features)
        multiply(as_array(x.contiguous()), self.tiles, self.scale, self.bias, as_array(y))
        return y


def input_dtype(weights: torch.dtype, rows: int) -> torch.dtype:
    """The number type of the inputs of products with such weights, for this number of rows. It depends on the rows for int8 only,
    and so only in drafters."""
    if weights is torch.float32 or not multiplies_bfloat16():
        return torch.float32
    return torch.float32 if weights is torch.int8 and rows < _LEAST_ROWS else torch.bfloat16


def as_array(tensor: torch.Tensor) -> Array:
    """The tensor's memory as a numpy array. Numbers in bfloat16 become their bits, as uint16."""
    found: Array = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return found


def _in_tiles(weight: torch.Tensor) -> torch.Tensor:
    """The weight [outputs, size] in tiles. Outputs that fill the last block have weight 0."""
    outputs, size = weight.shape
    missing = -outputs % OUTPUTS
    if missing:
        weight = torch.cat((weight, weight.new_zeros(missing, size)))
    return weight.view(-1, OUTPUTS, size // LANES, LANES).transpose(1, 2).contiguous()
