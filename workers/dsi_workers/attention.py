"""The attention function that every layer of a loaded model is made to use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from dsi_workers.engines.base import EngineError


class _Attention:
    """SDPA with the query heads of a group as further rows of one head: no repeat_kv, the same bits, less memory.

    query: [1, heads, width, dim]; key, value: [1, kv_heads, readable, dim]; attention_mask: [1, 1, width, readable].
    """

    def __init__(self) -> None:
        #: Warm-up looks whether every layer comes by here.
        self.calls = 0

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        self.calls += 1
        for unsupported in ("softcap", "s_aux"):
            if kwargs.get(unsupported) is not None:
                raise EngineError(f"this model's attention needs {unsupported}, which this engine does not have")
        batch, heads, width, dim = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        output = functional.scaled_dot_product_attention(
            query.reshape(batch, kv_heads, group * width, dim),
            key,
            value,
            attn_mask=attention_mask.repeat(1, 1, group, 1),
            scale=scaling,
        )
        return output.reshape(batch, heads, width, -1).transpose(1, 2).contiguous(), None


ATTENTION = "dsi"
attention = _Attention()
AttentionInterface.register(ATTENTION, attention)
