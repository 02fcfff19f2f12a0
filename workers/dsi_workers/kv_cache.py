"""A KV cache addressed by position: rejecting, rewinding and aborting need no operation on it.

DynamicCache appends, StaticCache counts: after a rejected token or an aborted forward each must be repaired, or it
gives wrong logits without an exception. Here the worker says where to write (`position`), the mask says what may be
read, and a slot that holds something stale is overwritten before any mask shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """One layer: keys and values are [slots, kv_heads, capacity, head_dim], allocated at the first write."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        slots, capacity = self._cache.slots, self._cache.capacity
        _, heads, _, key_dim = key_states.shape
        value_dim = value_states.shape[-1]
        self.keys = key_states.new_zeros(slots, heads, capacity, key_dim)
        self.values = value_states.new_zeros(slots, heads, capacity, value_dim)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, kv_heads, width, dim] at the cache's slot and position; return the slot's readable part."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        assert self.keys is not None
        assert self.values is not None
        end = cache.position + key_states.shape[2]
        slot = slice(cache.slot, cache.slot + 1)
        self.keys[slot, :, cache.position : end] = key_states
        self.values[slot, :, cache.position : end] = value_states
        return self.keys[slot, :, : cache.readable], self.values[slot, :, : cache.readable]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.readable, 0

    def get_seq_length(self) -> int:
        return self._cache.position

    def get_max_length(self) -> int:
        return self._cache.capacity


class SlotCache(Cache):
    """`slots` generations of up to `capacity` positions. Aim with `slot`, `position` and `readable` before a forward."""

    def __init__(self, layers: int, *, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.slot = 0
        self.position = 0  # the forward writes [position, position + width)
        self.readable = capacity  # the forward reads [0, readable), as far as its mask allows
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])
