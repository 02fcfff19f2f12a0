"""A KV cache addressed by position: rejecting, rewinding and aborting need no operation on it.

DynamicCache appends, StaticCache counts: after a rejected token or an aborted forward each must be repaired, or it
gives wrong logits without an exception. Here the worker says where to write (`Segment.position`), the mask says what may
be read, and a slot that holds something stale is overwritten before any mask shows it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from dsi_workers.decoding.packed import Segment

#: For each segment of a forward: the rows that are its own, and what attention of these rows reads.
Pieces = list[tuple[slice, torch.Tensor]]


class SlotLayer:
    """One layer: keys and values are [slots, kv_heads, capacity, head_dim], allocated when they are first used."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._kept: tuple[_Kept, _Kept] | None = None
        #: [1, kv_heads, capacity, head_dim]: looked up in every forward.
        self._of_slot: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Pieces, Pieces]:
        """Write [1, kv_heads, rows, dim] where the cache's segments say; return what each of them reads."""
        begin, readable_keys, readable_values = 0, Pieces(), Pieces()
        if self._kept is None:
            self.tensors(key_states, value_states)
        for segment in self._cache.segments:
            rows = slice(begin, begin := begin + segment.width)
            written = slice(segment.position, segment.position + segment.width)
            keys, values = self._of_slot[segment.slot]
            keys[:, :, written] = key_states[:, :, rows]
            values[:, :, written] = value_states[:, :, rows]
            readable_keys.append((rows, keys[:, :, : segment.readable]))
            readable_values.append((rows, values[:, :, : segment.readable]))
        return readable_keys, readable_values

    def tensors(self, like_keys: torch.Tensor, like_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots: for states [1, kv_heads, rows, dim] like these."""
        if self._kept is None:
            slots, capacity = self._cache.slots, self._cache.capacity
            keys, values = self._kept = _Kept(like_keys, slots, capacity), _Kept(like_values, slots, capacity)
            self._of_slot = list(zip(keys.tensor.split(1), values.tensor.split(1), strict=True))
        keys, values = self._kept
        return keys.tensor, values.tensor

    def copy(self, source: int, destination: int, positions: slice) -> None:
        for kept in self._kept or ():
            kept.tensor[destination, :, positions] = kept.tensor[source, :, positions]

    def release(self, slot: int) -> None:
        for kept in self._kept or ():
            kept.release(slot)

    def fill_at_random(self) -> None:
        for kept in self._kept or ():
            generator = torch.Generator(device=kept.tensor.device).manual_seed(0)
            kept.tensor[0].normal_(generator=generator)


class SlotCache:
    """`slots` generations of up to `capacity` positions. Set `segments` before a forward."""

    def __init__(self, layers: int, *, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.segments: Sequence[Segment] = ()
        self.layers = [SlotLayer(self) for _ in range(layers)]

    def copy(self, source: int, destination: int, begin: int, end: int) -> None:
        """Copy the keys and values of the positions [begin, end) from one slot to another."""
        for layer in self.layers:
            layer.copy(source, destination, slice(begin, end))

    def release(self, slot: int) -> None:
        """Give back the slot's memory, where memory is taken as it is used."""
        for layer in self.layers:
            layer.release(slot)

    def fill_at_random(self) -> None:
        """The first slot: where a test must see what a full cache does."""
        for layer in self.layers:
            layer.fill_at_random()


class _Kept:
    """[slots, kv_heads, capacity, head_dim]. Zeros, not garbage: a masked position counts zero times its value, and zero
    times infinity is not zero. On a CPU memory is taken page by page, when it is first written to."""

    def __init__(self, like: torch.Tensor, slots: int, capacity: int) -> None:
        shape = (slots, like.shape[1], capacity, like.shape[-1])
        self._memory: mmap.mmap | None = None
        if like.device.type != "cpu":
            self.tensor = like.new_zeros(shape)
            return
        self._slot_bytes = math.prod(shape[1:]) * like.element_size()
        self._memory = mmap.mmap(-1, slots * self._slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._memory, dtype=like.dtype).view(shape)

    def release(self, slot: int) -> None:
        """Whole pages of the slot are zeros again."""
        if self._memory is not None:
            begin = -(-slot * self._slot_bytes // mmap.PAGESIZE)
            end = (slot + 1) * self._slot_bytes // mmap.PAGESIZE
            if begin < end:
                self._memory.madvise(mmap.MADV_DONTNEED, begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE)
