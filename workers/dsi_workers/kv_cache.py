"""A KV cache addressed by position: rejecting, rewinding and aborting need no operation on it.

DynamicCache appends, StaticCache counts: after a rejected token or an aborted forward each must be repaired, or it
gives wrong logits without an exception. Here the worker says where to write (`Segment.position`), the mask says what may
be read, and a slot that holds something stale is overwritten before any mask shows it.

A forward is packed: runs of positions of several generations lie one after another in one row of inputs. What multiplies
by weights sees one long row; only attention must know where each run begins and which slot it reads.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of positions of one generation in a forward."""

    slot: int
    #: It writes [position, position + width) and reads [0, readable), as far as its mask allows.
    position: int
    width: int
    readable: int


#: For each segment of a forward: the rows that are its own, and what attention of these rows reads.
Pieces = list[tuple[slice, torch.Tensor]]


class SlotLayer:
    """One layer: keys and values are [1, kv_heads, capacity, head_dim] for each slot, allocated when it is first used."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Pieces, Pieces]:
        """Write [1, kv_heads, rows, dim] where the cache's segments say; return what each of them reads."""
        begin, readable_keys, readable_values = 0, Pieces(), Pieces()
        for segment in self._cache.segments:
            keys, values = self.of_slot(segment.slot, key_states, value_states)
            rows = slice(begin, begin := begin + segment.width)
            written = slice(segment.position, segment.position + segment.width)
            keys[:, :, written] = key_states[:, :, rows]
            values[:, :, written] = value_states[:, :, rows]
            readable_keys.append((rows, keys[:, :, : segment.readable]))
            readable_values.append((rows, values[:, :, : segment.readable]))
        return readable_keys, readable_values

    def of_slot(
        self, slot: int, like_keys: torch.Tensor, like_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slot, made if they are not there: for states [1, kv_heads, rows, dim] like these."""
        if slot not in self._slots:
            capacity = self._cache.capacity
            self._slots[slot] = _zeros(like_keys, capacity), _zeros(like_values, capacity)
        return self._slots[slot]

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def fill_at_random(self) -> None:
        for tensors in self._slots.values():
            for tensor in tensors:
                generator = torch.Generator(device=tensor.device).manual_seed(0)
                tensor.normal_(generator=generator)


class SlotCache:
    """`slots` generations of up to `capacity` positions. Set `segments` before a forward."""

    def __init__(self, layers: int, *, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.segments: Sequence[Segment] = ()
        self.layers = [SlotLayer(self) for _ in range(layers)]

    def release(self, slot: int) -> None:
        """Give back the slot's memory."""
        for layer in self.layers:
            layer.release(slot)

    def fill_at_random(self) -> None:
        """What was written to before: where a test must see what a full cache does."""
        for layer in self.layers:
            layer.fill_at_random()


def _zeros(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """[1, kv_heads, capacity, head_dim]. Zeros, not garbage: a masked position counts zero times its value, and zero times
    infinity is not zero. On a CPU memory is taken page by page, when it is first written to."""
    shape = (1, states.shape[1], capacity, states.shape[-1])
    if states.device.type != "cpu":
        return states.new_zeros(shape)
    size_bytes = math.prod(shape) * states.element_size()
    return torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=states.dtype).view(shape)
