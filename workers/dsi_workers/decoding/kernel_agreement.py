"""Whether each kind of kernel gives the same bits for different numbers of rows, tried with random inputs.

The logits of a few positions do not reveal every difference (widths.py), so the kernels are also compared by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from dsi_workers.decoding.attention import AttentionShape, additive_group_mask, attend
from dsi_workers.decoding.decoder import rms_norm

if TYPE_CHECKING:
    from dsi_workers.decoding.forward import Forward

#: For each shape of linear layer, and for attention, at least this many output values are compared.
_LEAST_VALUES = 20_000
#: At least this many rows are compared for norms.
_NORM_ROWS = 64
#: Those that torch computes in ways that may differ in their bits.
_ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    functional.silu, partial(functional.gelu, approximate="tanh"), torch.sigmoid,
)  # fmt: skip


def kernels_agree(forward: Forward, width: int, window: int) -> bool:
    """True if each kind of kernel, given random inputs of this many rows, has the bits of a full window."""
    if not batches_agree(forward, width, window):
        return False
    if forward.batch_invariant:
        return True
    attention_agrees = all(_attention_agrees(forward, width, window, shape) for shape in forward.attention_shapes)
    return attention_agrees and _norms_agree(forward, width, window)


def batches_agree(forward: Forward, rows: int, window: int) -> bool:
    """True if what computes each row by itself, whoever's it is, gives `rows` rows the bits of full windows."""
    return _linear_layers_agree(forward, rows, window) and (
        forward.batch_invariant or _activations_agree(forward, rows, window)
    )


def _norms_agree(forward: Forward, width: int, window: int) -> bool:
    """True if RMSNorm of `width` rows has the bits of a full window. Compared in float32, before rounding hides them."""
    count = math.lcm(width, window)
    size = max(layer.in_features for layer in forward.linear_layers())
    inputs = torch.randn(count * -(-_NORM_ROWS // count), size, generator=torch.Generator().manual_seed(width))
    inputs, epsilon = inputs.to(forward.device), torch.zeros((), device=forward.device)
    groups, windows = (
        torch.cat([rms_norm(part, part.new_ones(size), epsilon) for part in inputs.split(rows)])
        for rows in (width, window)
    )
    return torch.equal(groups, windows)


def _activations_agree(forward: Forward, rows: int, window: int) -> bool:
    """True if activation functions of `rows` rows have the bits of full windows.

    On a CPU, torch computes the numbers of a tensor in vectors, and those that do not fill a vector one by one. Some
    functions give other bits one by one. Where a row does not fill vectors, the number of rows decides which numbers
    these are.
    """
    layers, count = forward.linear_layers(), math.lcm(rows, window)
    most = max(layer.in_features for layer in layers)
    sizes = {size for layer in layers for size in (layer.in_features, layer.out_features) if size <= most}
    for size in sorted(sizes):
        generator = torch.Generator().manual_seed(size)
        inputs = torch.randn(count * -(-_LEAST_VALUES // (count * size)), size, generator=generator)
        inputs = inputs.to(forward.device, forward.dtype)
        for function in _ACTIVATIONS:
            groups, windows = (torch.cat([function(part) for part in inputs.split(width)]) for width in (rows, window))
            if not torch.equal(groups, windows):
                return False
    return True


def _attention_agrees(forward: Forward, width: int, window: int, shape: AttentionShape) -> bool:
    """True if attention of `width` rows of one generation has the bits of a full window."""
    group = shape.heads // shape.kv_heads
    readable, per_position = forward.read_step, forward.attends_per_position
    positions = readable - math.lcm(width, window)
    generator = torch.Generator().manual_seed(width)

    def random(heads: int, length: int, dim: int = shape.dim) -> torch.Tensor:
        made = torch.randn(1, heads, length, dim, generator=generator)
        return made.to(forward.device, shape.dtype)

    sinks = random(1, 1, shape.heads).flatten() if shape.has_sinks else None
    for _ in range(max(1, _LEAST_VALUES // (shape.heads * shape.dim * math.lcm(width, window)))):
        query = random(shape.heads, readable - positions)
        keys = random(shape.kv_heads, readable)
        values = random(shape.kv_heads, readable, shape.value_dim)
        mask = torch.ones(readable - positions, readable, dtype=torch.bool, device=forward.device)
        mask = mask.tril(diagonal=positions)[None, None]
        groups, windows = (
            torch.cat(
                [
                    attend(
                        part,
                        keys,
                        values,
                        additive_group_mask(part_mask, group, shape.dtype),
                        None,
                        per_position=per_position,
                        softcap=shape.softcap,
                        sinks=sinks,
                    )
                    for part, part_mask in zip(query.split(size, 2), mask.split(size, 2), strict=True)
                ],
                dim=1,
            )
            for size in (width, window)
        )
        if not torch.equal(groups, windows):
            return False
    return True


def _linear_layers_agree(forward: Forward, rows: int, window: int) -> bool:
    """True if linear layers give `rows` rows the bits of a full window.

    In half precision, rounding hides most differences in summation order, so a few logits do not reveal them. Therefore
    many random products are compared.
    """
    for layer in forward.linear_layers():
        dtype = layer.weight.dtype if isinstance(layer, nn.Linear) else layer.dtype
        count = max(rows, window) * max(1, -(-_LEAST_VALUES // (max(rows, window) * layer.out_features)))
        count = -(-count // math.lcm(rows, window)) * math.lcm(rows, window)
        inputs = torch.randn(count, layer.in_features, generator=torch.Generator().manual_seed(count))
        inputs = inputs.to(forward.device, dtype)
        groups, windows = (torch.cat([layer(part) for part in inputs.split(size)]) for size in (rows, window))
        if not torch.equal(groups, windows):
            return False
    return True
