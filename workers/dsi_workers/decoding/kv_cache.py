"""A KV cache addressed by slot and position. Rejected drafts, rewinds and aborted forward passes need no repair.

transformers' DynamicCache appends, and its StaticCache counts. Both must be repaired after a rejected token or an aborted
forward pass; without repair they give wrong logits and no error. Here each segment names the position to write to
(`Segment.position`), and the mask says which positions may be read. Stale entries do no harm: each is overwritten before
a mask lets a row read it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence

import torch

from dsi_workers.decoding.packed import Segment

#: For each segment of a forward pass: its rows, and the keys and values that these rows read. They are right until the next
#: segment is asked for.
SegmentTensors = Iterator[tuple[slice, torch.Tensor, torch.Tensor]]


#: Positions after which `fill_at_random` repeats itself: a prime number.
_RANDOM_POSITIONS = 509


class SlotLayer:
    """One layer of the cache. Keys and values are [slots, kv_heads, capacity, head_dim], allocated at first use."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._storage: tuple[_SlotTensor, _SlotTensor] | None = None
        #: Views of the keys and values of each slot, [1, kv_heads, capacity, head_dim], made once for speed.
        self._of_slot: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> SegmentTensors:
        """Store the new keys and values, one segment after another, and yield what each segment reads.

        key_states, value_states: [1, kv_heads, rows, dim]. `SlotCache.segments` says where each row is stored.
        """
        if self._storage is None:
            self.tensors(key_states, value_states)
        for rows, segment in self.segments():
            written = slice(segment.position, segment.position + segment.width)
            keys, values = self._of_slot[segment.slot]
            keys[:, :, written].copy_(key_states[:, :, rows])
            values[:, :, written].copy_(value_states[:, :, rows])
            yield rows, keys[:, :, : segment.readable], values[:, :, : segment.readable]

    def segments(self) -> Iterator[tuple[slice, Segment]]:
        """Yield each segment with its rows. Store its keys and values before you ask for the next one.

        A branch is written over the slot's own path, so that attention reads one tensor as for a chain. What the branch
        overwrites is put back after the branch's last segment.
        """
        begin, overwritten = 0, list[tuple[torch.Tensor, torch.Tensor]]()
        for segment in self._cache.segments:
            if segment.fork is None or segment.fork == segment.position:
                _put_back(overwritten)
            if segment.fork is not None:
                written = slice(segment.position, segment.position + segment.width)
                places = [tensor[:, :, written] for tensor in self._of_slot[segment.slot]]
                overwritten += [(place, place.clone()) for place in places]
            yield slice(begin, begin := begin + segment.width), segment
        _put_back(overwritten)

    def tensors(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of all slots, [slots, kv_heads, capacity, head_dim].

        The first call allocates them. It takes number of heads, head size, number type and device from the states
        [1, kv_heads, rows, dim].
        """
        if self._storage is None:
            slots, capacity = self._cache.slots, self._cache.capacity
            keys, values = self._storage = (
                _SlotTensor(key_states, slots, capacity),
                _SlotTensor(value_states, slots, capacity),
            )
            self._of_slot = list(zip(keys.tensor.split(1), values.tensor.split(1), strict=True))
        keys, values = self._storage
        return keys.tensor, values.tensor

    def copy(self, source: int, destination: int, positions: slice) -> None:
        for stored in self._storage or ():
            stored.tensor[destination, :, positions] = stored.tensor[source, :, positions]

    def release(self, slot: int) -> None:
        for stored in self._storage or ():
            stored.release(slot)

    def fill_at_random(self) -> None:
        for stored in self._storage or ():
            slot = stored.tensor[0]
            generator = torch.Generator(device=slot.device).manual_seed(0)
            # Copies are faster than random numbers. Blocks of positions differ all the same: no block is as long as the period.
            first = slot[:, :_RANDOM_POSITIONS].normal_(generator=generator)
            for copy in slot.split(_RANDOM_POSITIONS, dim=1)[1:]:
                copy.copy_(first[:, : copy.shape[1]])


def _put_back(overwritten: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Empty the list of (part of the cache, what it held), the last first."""
    while overwritten:
        place, held = overwritten.pop()
        place.copy_(held)


class SlotCache:
    """Keys and values of `slots` generations, of up to `capacity` positions each. Set `segments` before a forward pass."""

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
        """Return the slot's memory to the system. Only on a CPU, where memory is taken page by page."""
        for layer in self.layers:
            layer.release(slot)

    def fill_at_random(self) -> None:
        """Fill slot 0 with random numbers, so that a trial sees the effect of a full cache."""
        for layer in self.layers:
            layer.fill_at_random()


class _SlotTensor:
    """A zeroed tensor [slots, kv_heads, capacity, head_dim].

    It must start as zeros: a masked position has weight zero, but zero times an infinity in uninitialized memory is NaN. On a
    CPU the system provides each page of memory when the page is first written.
    """

    def __init__(self, states: torch.Tensor, slots: int, capacity: int) -> None:
        shape = (slots, states.shape[1], capacity, states.shape[-1])
        self._memory: mmap.mmap | None = None
        if states.device.type != "cpu":
            self.tensor = states.new_zeros(shape)
            return
        self._slot_bytes = math.prod(shape[1:]) * states.element_size()
        self._memory = mmap.mmap(-1, slots * self._slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._memory, dtype=states.dtype).view(shape)

    def release(self, slot: int) -> None:
        """Return the whole pages of the slot to the system. They read as zeros afterwards."""
        if self._memory is not None:
            begin = -(-slot * self._slot_bytes // mmap.PAGESIZE)
            end = (slot + 1) * self._slot_bytes // mmap.PAGESIZE
            if begin < end:
                self._memory.madvise(mmap.MADV_DONTNEED, begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE)
