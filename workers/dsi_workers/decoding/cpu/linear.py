"""A linear layer whose weights lie in tiles, in the order in which the kernels read them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dsi_workers.decoding.cpu import GROUP, OUTPUTS, SUMMED, multiplies_bfloat16
from dsi_workers.decoding.cpu.arena import Arena, Array
from dsi_workers.decoding.cpu.products import multiply
from dsi_workers.decoding.quantization import EIGHT_BITS, scales_of

_MOST_OF_FOUR_BITS = 15


class TileLinear(nn.Module):
    """y = x W^T + b. x: [rows, in_features]. W is in its own number type, or in whole numbers of 8 or 4 bits (`bits`)."""

    def __init__(self, linear: nn.Linear, arena: Arena, *, bits: int | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        #: Of 8 bits: float32, [outputs]. Of 4 bits: [tiles, in_features / GROUP, 2, OUTPUTS], the bits of bfloat16: what the
        #: numbers of a group are multiplied by, and what is added to each. Else empty.
        self.scale = np.empty(0, np.float32)
        #: float32, [outputs], or empty.
        self.bias = self.scale if linear.bias is None else as_array(linear.bias.detach().float())
        if bits == 4:
            weight, scales = in_four_bits(weight.float())
            self.scale = arena.keep(as_array(_in_tiles(scales, 1).view(-1, self.in_features // GROUP, 2, OUTPUTS)))
            halves = weight.view(len(weight), -1, 2, GROUP // 2)
            weight = (halves[:, :, 0] + 16 * halves[:, :, 1]).flatten(1)
        elif bits == 8:
            scale = scales_of(weight.float(), EIGHT_BITS)
            weight = (weight.float() / scale[:, None]).round_().to(torch.int8)
            self.scale = as_array(scale)
        #: [tiles of OUTPUTS outputs, in_features / n, OUTPUTS, n]: the weights of n inputs lie beside each other. n is 1 for
        #: float32, 2 for bfloat16 and SUMMED for whole numbers. Of 4 bits there are half as many, each with a weight of the first
        #: half of a group in its lower bits, and one of the second half in the higher ones.
        self.tiles = arena.keep(
            as_array(_in_tiles(weight, {torch.float32: 1, torch.bfloat16: 2}.get(weight.dtype, SUMMED)))
        )
        self.dtype = input_dtype(weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, in float32. x: in `dtype`."""
        y = torch.empty(len(x), self.out_features)
        multiply(as_array(x.contiguous()), self.tiles, self.scale, self.bias, as_array(y))
        return y


def input_dtype(weights: torch.dtype) -> torch.dtype:
    """The number type of the inputs of products with such weights."""
    return torch.bfloat16 if weights is torch.bfloat16 and multiplies_bfloat16() else torch.float32


def in_four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight [outputs, inputs] as whole numbers of 4 bits, as uint8, and [outputs, 2 groups]: for each GROUP of inputs what
    they are multiplied by, and what is added to each, in bfloat16.

    The least and the largest weight of a group become 0 and 15. So if the weights had 4 bits in such groups (Q4_1 of llama.cpp),
    the numbers of a group that has both are found again. Only its scales are rounded, to bfloat16.
    """
    groups = weight.view(len(weight), -1, GROUP)
    low = groups.amin(2).to(torch.bfloat16)
    scale = ((groups.amax(2) - low) / _MOST_OF_FOUR_BITS).to(torch.bfloat16)
    numbers = ((groups - low[:, :, None]) / scale.clamp_min(1e-20)[:, :, None]).round_().clamp_(0, _MOST_OF_FOUR_BITS)
    return numbers.to(torch.uint8).flatten(1), torch.stack((scale, low), dim=2).flatten(1)


def as_array(tensor: torch.Tensor) -> Array:
    """The tensor's memory as a numpy array. Numbers in bfloat16 become their bits, as uint16."""
    found: Array = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return found


def _in_tiles(numbers: torch.Tensor, beside: int) -> torch.Tensor:
    """[outputs, size] as [tiles, size / beside, OUTPUTS, beside]. Outputs that fill the last tile have zeros."""
    outputs, size = numbers.shape
    missing = -outputs % OUTPUTS
    if missing:
        numbers = torch.cat((numbers, numbers.new_zeros(missing, size)))
    return numbers.view(-1, OUTPUTS, size // beside, beside).transpose(1, 2).contiguous()
