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
    """One layer: keys and values are [1, kv_heads, capacity, head_dim] for each slot, allocated when it is first used."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Zeros, not garbage: a masked position counts zero times its value, and zero times infinity is not zero."""
        capacity = self._cache.capacity
        self._slots[self._cache.slot] = (
            key_states.new_zeros(1, key_states.shape[1], capacity, key_states.shape[-1]),
            value_states.new_zeros(1, value_states.shape[1], capacity, value_states.shape[-1]),
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, kv_heads, width, dim] at the cache's slot and position; return the slot's readable part."""
        cache = self._cache
        if cache.slot not in self._slots:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._slots[cache.slot]
        end = cache.position + key_states.shape[2]
        keys[:, :, cache.position : end] = key_states
        values[:, :, cache.position : end] = value_states
        return keys[:, :, : cache.readable], values[:, :, : cache.readable]

    def fill_at_random(self) -> None:
        for tensor in self._slots[self._cache.slot]:
            generator = torch.Generator(device=tensor.device).manual_seed(0)
            tensor.normal_(generator=generator)

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

    def fill_at_random(self) -> None:
        """The aimed slot, which was written to before: where a test must see what a full cache does."""
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            layer.fill_at_random()
