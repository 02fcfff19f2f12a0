"""transformers' interfaces for caches and attention functions, on our own KV cache and our own attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface

from dsi_workers.decoding.attention import AttentionShape, additive_group_mask, attend
from dsi_workers.decoding.kv_cache import SegmentTensors, SlotCache, SlotLayer

#: The name of our attention function in transformers.
ATTENTION = "dsi"

#: Expands latent keys and values, [1, 1, rows, size], to those of all heads, [1, heads, rows, size].
Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class StoredStates:
    """New keys and values of a layer. To iterate stores them and gives the segments to read, as often as layers want them."""

    def __init__(self, layer: SlotLayer, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._layer = layer
        self._states = key_states, value_states

    def __iter__(self) -> SegmentTensors:
        return self._layer.update(*self._states)


class _CacheLayer(CacheLayerMixin):
    """One layer of our KV cache, behind transformers' interface of a cache layer."""

    is_compileable = False
    is_sliding = False

    def __init__(self, layer: SlotLayer, cache: SlotsAsCache, expand: Expand | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer = layer
        self._cache = cache
        self._expand = expand

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(  # type: ignore[override]  # our attention function takes StoredStates
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StoredStates, StoredStates]:
        if self._expand is not None:
            key_states, value_states = self._expand(key_states, value_states)
        stored = StoredStates(self._layer, key_states, value_states)
        return stored, stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(segment.readable for segment in self._cache.slots.segments), 0

    def get_seq_length(self) -> Any:
        return self._cache.seq_length

    def get_max_length(self) -> int:
        return self._cache.slots.capacity


class SlotsAsCache(Cache):
    """Our KV cache, behind transformers' interface of a cache.

    `expand`: for layers with latent attention, by their number. Such a layer's keys and values are stored in their expanded form:
    each is expanded once, in the forward pass that computes it, instead of in each pass that reads it.
    """

    def __init__(self, slots: SlotCache, expand: Mapping[int, Expand]) -> None:
        self.slots = slots
        #: What transformers takes for the number of positions in the cache. A tensor of a number for each row where a layer adds
        #: the row's place to it to get the row's position.
        self.seq_length: int | torch.Tensor = 0
        super().__init__(
            layers=[_CacheLayer(layer, self, expand.get(number)) for number, layer in enumerate(slots.layers)]
        )


class AttentionFunction:
    """The attention function that transformers' layers call: `attend` for each segment, instead of SDPA with repeat_kv.

    query: [1, heads, rows, dim]. key, which is value, too: the segments of SlotLayer.update, [1, kv_heads, readable, dim] each.
    attention_mask: [1, 1, rows, readable], for the longest segment. Padding rows get zeros.
    """

    def __init__(self) -> None:
        #: Calls so far. `TransformersDecoder.check_attention` compares it with the number of layers.
        self.calls = 0
        #: The kinds of attention of these calls, where somebody wants to know them.
        self.shapes: set[AttentionShape] | None = None
        #: Compute attention for each position by itself (see `attend`).
        self.per_position = False

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: StoredStates,
        value: StoredStates,
        attention_mask: torch.Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        self.calls += 1
        batch, heads, width, dim = query.shape
        outputs, begin = list[torch.Tensor](), 0
        for rows, keys, values in key:
            kv_heads = keys.shape[1]
            mask = additive_group_mask(attention_mask[:, :, rows, : keys.shape[2]], heads // kv_heads, query.dtype)
            outputs.append(
                attend(
                    query[:, :, rows],
                    keys,
                    values,
                    mask,
                    scaling,
                    per_position=self.per_position,
                    softcap=softcap,
                    sinks=s_aux,
                )
            )
            begin = rows.stop
            if self.shapes is not None:
                self.shapes.add(
                    AttentionShape(heads, kv_heads, dim, values.shape[-1], query.dtype, softcap, s_aux is not None)
                )
        if begin < width:
            outputs.append(outputs[0].new_zeros(batch, width - begin, *outputs[0].shape[2:]))
        return torch.cat(outputs, dim=1), None


attention = AttentionFunction()
AttentionInterface.register(ATTENTION, attention)
