"""Attention over a part of the cache, with the query heads of a group as further rows of one head: no copies of keys, the
same bits, less memory."""

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
    apart: bool = False,
) -> torch.Tensor:
    """[1, width, heads, dim]. The mask is one of `mask_of_group`; without one all rows read all keys.

    `apart`: each position is an element of a batch, with the same shape whatever is beside it. Slower; but some libraries sum
    in another order for other rows of one product (MKL for AVX2 does, in float32)."""
    batch, heads, width, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if apart and mask is not None:
        query = query.reshape(kv_heads, group, width, dim).permute(2, 0, 1, 3)
        mask = mask.view(group, width, -1).transpose(0, 1)[:, None]
        key, value = (tensor.expand(width, -1, -1, -1) for tensor in (key, value))
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return output.reshape(1, width, heads, -1)
    query = query.reshape(batch, kv_heads, group * width, dim)
    if mask is None and query.device.type == "cpu":  # of a few rows: plain products take less time
        scores = torch.bmm(query[0] * (dim**-0.5 if scaling is None else scaling), key[0].transpose(1, 2))
        output = torch.bmm(scores.softmax(dim=-1), value[0])
    else:
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, heads, width, -1).transpose(1, 2)


def mask_of_group(mask: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores [1, 1, group * width, readable], from a mask [1, 1, width, readable] that is True where rows
    may read."""
    return (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf).repeat(1, 1, group, 1)
    )
