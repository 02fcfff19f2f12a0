"""Grouped-query attention over a part of the KV cache, without copies of the keys.

The query heads that share a KV head become further rows of one head. The bits are the same as with copied keys, and less
memory is needed.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    *,
    per_position: bool = False,
) -> torch.Tensor:
    """Attention of one run of positions: [1, width, heads, dim].

    query: [1, heads, width, dim]. key, value: [1, kv_heads, readable, dim]. `mask` comes from `additive_group_mask`; without
    a mask all rows read all keys.

    With `per_position`, each position is one element of a batch, so its shape does not depend on the other positions. This
    is slower, but some libraries sum in different orders for different rows of one product (MKL for AVX2, in float32).
    """
    batch, heads, width, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if per_position and mask is not None:
        query = query.reshape(kv_heads, group, width, dim).permute(2, 0, 1, 3)
        mask = mask.view(group, width, -1).transpose(0, 1)[:, None]
        key, value = (tensor.expand(width, -1, -1, -1) for tensor in (key, value))
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return output.reshape(1, width, heads, -1)
    query = query.reshape(batch, kv_heads, group * width, dim)
    if mask is None and query.device.type == "cpu":  # for a few rows, plain products are faster
        scores = torch.bmm(query[0] * (dim**-0.5 if scaling is None else scaling), key[0].transpose(1, 2))
        output = torch.bmm(scores.softmax(dim=-1), value[0])
    else:
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, heads, width, -1).transpose(1, 2)


def additive_group_mask(mask: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask [1, 1, group * width, readable] for `group` query heads that share a KV head.

    `mask`: [1, 1, width, readable], True where a row may read.
    """
    return (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf).repeat(1, 1, group, 1)
    )
