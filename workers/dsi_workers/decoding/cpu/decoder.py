"""A decoder for CPUs: three kernels per layer.

In a forward pass of a few rows, each of torch's operations takes some microseconds, whatever it computes, and a layer needs about
forty of them. Its matrix products read weights at two thirds of the speed that a core can read at. So all is computed by kernels
of our own (kernels.py, products.py), except where torch may use several threads. One thread computes a pass of a few rows, and
several compute a prompt (parts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from dsi_workers.decoding.attention import AttentionShape
from dsi_workers.decoding.cpu import GROUP, LANES, POSITIONS_TOGETHER, ROWS_TOGETHER
from dsi_workers.decoding.cpu.arena import Arena, Array
from dsi_workers.decoding.cpu.kernels import after_attention, attention_of, before_attention, logits_of
from dsi_workers.decoding.cpu.linear import TileLinear, as_array, input_dtype
from dsi_workers.decoding.cpu.parts import Part, PartThreads, parts_of
from dsi_workers.decoding.decoder import Decoder, DenseMlp, Layer
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.decoding.packed import PackedBatch, Segment

_DTYPES = (torch.float32, torch.bfloat16)


def can_compute(decoder: Decoder, bits: int | None = None) -> bool:
    """Whether a CpuDecoder can compute what this decoder computes, with weights of so many bits."""
    inputs = GROUP if bits else LANES
    return (
        decoder.device.type == "cpu"
        and decoder.dtype in _DTYPES
        and decoder.is_whole
        and all(isinstance(layer.mlp, DenseMlp) for layer in decoder.layers)
        and all(linear.in_features % inputs == 0 for linear in decoder.linear_layers())
        and decoder.dim % LANES == 0
        and torch.get_num_threads() == 1
    )


class CpuDecoder:
    """Computes what `decoder` computes, from the same weights and the same KV cache, with our own CPU kernels."""

    recorded_rows: Sequence[int] = ()
    batch_invariant = True

    def __init__(self, decoder: Decoder, *, bits: int | None = None, prompt_threads: int = 1) -> None:
        """The weights of the decoder's linear layers are laid out anew, in whole numbers of 8 or 4 bits or as they are.
        `prompt_threads`: how many threads compute a pass of many rows."""
        arena = Arena()
        decoder.replace_linear_layers(lambda linear: TileLinear(linear, arena, bits=bits))
        self._decoder = decoder
        self.dtype, self.prompt_chunk = decoder.dtype, decoder.prompt_chunk
        self._layers = [_Layer(layer, decoder) for layer in decoder.layers]
        self._norm, self._head = as_array(decoder.norm), _arrays(decoder.head)
        self._words = int(decoder.linear_layers()[-1].out_features)
        normed = decoder.layers[0].query_norm is not None
        self._attention = attention_of(decoder.heads, decoder.kv_heads, decoder.dim, normed)
        #: [positions, dim] in float32.
        self._cos, self._sin = (as_array(table.float()) for table in (decoder.cos, decoder.sin))
        self._epsilon, self._scaling = np.float32(decoder.epsilon), np.float32(decoder.scaling)
        self._input_dtype = input_dtype(decoder.dtype if bits is None else torch.int8)
        self._threads = PartThreads(prompt_threads)
        #: Room for the most rows of any pass so far.
        self._room: _Rows | None = None
        self._cache: SlotCache | None = None
        #: Of each layer, the keys and values of each slot: [kv_heads, capacity, dim].
        self._slots: list[list[tuple[Array, Array]]] = []
        #: Of each thread, room for attention.
        self._attention_rooms: list[_AttentionRoom] = []
        self._compile()

    @property
    def attention_shapes(self) -> Sequence[AttentionShape]:
        return self._decoder.attention_shapes

    def linear_layers(self) -> list[Any]:
        return self._decoder.linear_layers()

    def __call__(self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        """Compute one forward pass. Returns logits [len(packed.logits_to_keep), vocabulary]."""
        if self._cache is not cache:
            self._use(cache)
        rows = self._room_for(len(packed.ids))
        rows.x[:] = 0
        rows.added[:] = as_array(self._decoder.embedding[torch.tensor(packed.ids)].float())
        parts = parts_of(packed, self._threads.most)
        if len(parts) > 1:
            self._compute_in_parts(parts, rows, between_layers)
        else:
            room = self._attention_rooms[0]
            for layer, cache_layer, slots in zip(self._layers, cache.layers, self._slots, strict=True):
                between_layers()
                self._before_attention(layer, rows)
                for part, segment in cache_layer.segments():
                    self._attend(layer, slots, segment, rows.part(part), room)
                self._after_attention(layer, rows)
        wanted = np.array(packed.logits_to_keep)
        logits: Array = np.empty((len(wanted), self._words), np.float32)
        kept = np.empty((len(wanted), rows.x.shape[1]), rows.normed.dtype)
        logits_of(rows.x, rows.added, self._norm, self._epsilon, rows.normed, wanted, kept, self._head, logits)
        return torch.from_numpy(logits)

    def _compute_in_parts(self, parts: Sequence[Part], rows: _Rows, between_layers: Callable[[], None]) -> None:
        """All layers, with a thread for each part."""

        def compute(number: int, may_read: Callable[[], bool], has_stored: Callable[[], None]) -> None:
            part, segment = parts[number]
            own, room = rows.part(part), self._attention_rooms[number]
            for layer, slots in zip(self._layers, self._slots, strict=True):
                self._before_attention(layer, own)
                if not may_read():
                    return
                self._attend(layer, slots, segment, own, room)
                has_stored()
                self._after_attention(layer, own)

        self._threads.compute(len(parts), compute, between_layers)

    def _before_attention(self, layer: _Layer, rows: _Rows) -> None:
        before_attention(rows.x, rows.added, layer.input_norm, self._epsilon, rows.normed, layer.qkv, rows.qkv)

    def _attend(
        self, layer: _Layer, slots: Sequence[tuple[Array, Array]], segment: Segment, rows: _Rows, room: _AttentionRoom
    ) -> None:
        """Store the keys and values of a segment's rows in its slot, and read the slot. Padding rows keep what they had read."""
        keys, values = slots[segment.slot]
        assert segment.position + segment.width <= keys.shape[1], "the kernel would write behind the slot"
        self._attention(
            rows.qkv, layer.query_norm, layer.key_norm, self._epsilon, self._cos, self._sin, keys, values,
            segment.position, layer.sliding_window, layer.chunk, self._scaling, room.queries, room.scores, room.sums,
            rows.read,
        )  # fmt: skip

    def _after_attention(self, layer: _Layer, rows: _Rows) -> None:
        after_attention(
            rows.x, rows.read, layer.output, layer.mlp_norm, self._epsilon, rows.normed, layer.gate_up, rows.gate_up,
            rows.activated, layer.down, rows.added,
        )  # fmt: skip

    def _compile(self) -> None:
        """Compute a pass of each kind, so that no user waits until kernels are compiled."""
        cache = SlotCache(len(self._layers), slots=1, capacity=4 * POSITIONS_TOGETHER)
        for rows in (1, 4 * POSITIONS_TOGETHER):
            cache.segments = [Segment(0, 0, rows, rows)]
            self(PackedBatch([0] * rows, range(rows), cache.segments, [0], range(rows)), cache, lambda: None)

    def _use(self, cache: SlotCache) -> None:
        """Take views of this cache's tensors."""
        decoder, self._cache = self._decoder, cache
        state = torch.empty(1, decoder.kv_heads, 1, decoder.dim, dtype=self.dtype)
        tensors = [layer.tensors(state, state) for layer in cache.layers]
        self._slots = [list(zip(as_array(keys), as_array(values), strict=True)) for keys, values in tensors]
        queries = ROWS_TOGETHER * decoder.heads // decoder.kv_heads
        self._attention_rooms = [
            _AttentionRoom.of(queries, decoder.dim, cache.capacity) for _ in range(self._threads.most)
        ]

    def _room_for(self, rows: int) -> _Rows:
        if self._room is None or rows > len(self._room.x):
            qkv, output, gate_up, down, _ = self._decoder.linear_layers()

            def room(size: int, dtype: torch.dtype) -> Array:
                return as_array(torch.zeros(rows, size, dtype=dtype))

            self._room = _Rows(
                x=room(qkv.in_features, torch.float32), added=room(qkv.in_features, torch.float32),
                normed=room(qkv.in_features, self._input_dtype), qkv=room(qkv.out_features, torch.float32),
                read=room(output.in_features, self._input_dtype), gate_up=room(gate_up.out_features, torch.float32),
                activated=room(down.in_features, self._input_dtype),
            )  # fmt: skip
        return self._room.part(slice(rows))


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is between the products of some rows. Each array is [rows, size]."""

    x: Array
    added: Array
    normed: Array
    qkv: Array
    read: Array
    gate_up: Array
    activated: Array

    def part(self, rows: slice) -> _Rows:
        """Views of some of the rows."""
        return _Rows(*(getattr(self, name)[rows] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class _AttentionRoom:
    """What attention needs room for, in one thread: see kernels.py."""

    queries: Array
    scores: Array
    sums: Array

    @classmethod
    def of(cls, queries: int, dim: int, capacity: int) -> Self:
        def room(size: int) -> Array:
            return np.empty((queries, size), np.float32)

        return cls(room(dim), room(capacity), room(dim))


class _Layer:
    """What the kernels take of one layer."""

    def __init__(self, layer: Layer, decoder: Decoder) -> None:
        assert isinstance(layer.mlp, DenseMlp)
        self.qkv, self.output = _arrays(layer.qkv), _arrays(layer.output)
        self.gate_up, self.down = _arrays(layer.mlp.gate_up), _arrays(layer.mlp.down)
        self.input_norm, self.mlp_norm = as_array(layer.input_norm), as_array(layer.mlp_norm)
        none = layer.input_norm.new_empty(0)
        self.query_norm = as_array(none if layer.query_norm is None else layer.query_norm)
        self.key_norm = as_array(none if layer.key_norm is None else layer.key_norm)
        #: In positions. 0: a row reads all of them.
        self.sliding_window = decoder.masks.sliding_window_of(layer.kind)
        self.chunk = decoder.masks.chunk_of(layer.kind)


def _arrays(linear: nn.Module) -> tuple[Array, Array, Array]:
    """A linear layer as the kernels take it: tiles, scale and bias."""
    assert isinstance(linear, TileLinear)
    return linear.tiles, linear.scale, linear.bias
