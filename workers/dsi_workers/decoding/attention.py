"""Grouped-query attention over a part of the KV cache, without copies of the keys.

The query heads that share a KV head become further rows of one head. The bits are the same as with copied keys, and less
memory is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What decides how attention is computed in a layer."""

    #: Numbers of query heads and KV heads.
    heads: int
    kv_heads: int
    #: Sizes of a key and of a value.
    dim: int
    value_dim: int
    dtype: torch.dtype
    #: See `attend`.
    softcap: float | None = None
    has_sinks: bool = False


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    *,
    per_position: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one run of positions: [1, width, heads, dim].

    query: [1, heads, width, dim]. key, value: [1, kv_heads, readable, dim]. `mask` comes from `additive_group_mask`; without
    a mask all rows read all keys.

    With `per_position`, each position is one element of a batch, so its shape does not depend on the other positions. This
    is slower, but some libraries sum in different orders for different rows of one product (MKL for AVX2, in float32).

    `softcap`: scores s become softcap * tanh(s / softcap), as in Gemma 2. `sinks`, [heads]: the score of one more key of each
    head, whose value is zero, as in gpt-oss.
    """
    batch, heads, width, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if softcap is not None or sinks is not None:
        assert mask is not None
        return _attend_with_changed_scores(
            query, key, value, mask, scaling, per_position=per_position, softcap=softcap, sinks=sinks
        )
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


def _attend_with_changed_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    *,
    per_position: bool,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `attend`. torch's function for attention has neither soft caps nor sinks."""
    _, heads, width, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    query = query.reshape(1, kv_heads, group, width, dim)
    mask = mask.view(1, 1, group, width, -1)
    if per_position:  # [width, kv_heads, group, 1, dim]
        query, mask = query.permute(3, 1, 2, 0, 4), mask.permute(3, 1, 2, 0, 4)
    batch, _, _, rows, _ = query.shape
    key, value = (tensor.expand(batch, -1, -1, -1) for tensor in (key, value))
    scores = torch.matmul(query.reshape(batch, kv_heads, group * rows, dim), key.transpose(2, 3))
    scores = scores * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(batch, kv_heads, group, rows, -1) + mask
    if sinks is not None:
        more = sinks.to(scores.dtype).view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, rows, -1)
        scores = torch.cat((scores, more), dim=-1)
    shares = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    output = torch.matmul(shares.reshape(batch, kv_heads, group * rows, -1), value)
    output = output.view(batch, heads, rows, -1)
    return output.permute(2, 0, 1, 3) if per_position else output.transpose(1, 2)


def additive_group_mask(mask: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask [1, 1, group * width, readable] for `group` query heads that share a KV head.

    `mask`: [1, 1, width, readable], True where a row may read.
    """
    return (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf).repeat(1, 1, group, 1)
    )
