"""A decoder for one thread of a CPU: three kernels per layer.

In a forward pass of a few rows, each of torch's operations takes some microseconds, whatever it computes, and a layer needs about
forty of them. Its matrix products read weights at two thirds of the speed that a core can read at. So all is computed by kernels
of our own (kernels.py, products.py), except where torch may use several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dsi_workers.decoding.attention import AttentionShape
from dsi_workers.decoding.cpu import GROUP, LANES, POSITIONS_TOGETHER, ROWS_TOGETHER
from dsi_workers.decoding.cpu.arena import Arena, Array
from dsi_workers.decoding.cpu.kernels import after_attention, attention_of, before_attention, logits_of
from dsi_workers.decoding.cpu.linear import TileLinear, as_array, input_dtype
from dsi_workers.decoding.decoder import Decoder, DenseMlp, Layer
from dsi_workers.decoding.kv_cache import SlotCache, SlotLayer
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

    def __init__(self, decoder: Decoder, *, bits: int | None = None) -> None:
        """The weights of the decoder's linear layers are laid out anew, in whole numbers of 8 or 4 bits or as they are."""
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
        #: What `_room_for` gives parts of, with the most rows of any pass so far. Empty before the first pass.
        self._room: list[Array] = []
        self._cache: SlotCache | None = None
        #: Of each layer, the keys and values of each slot: [kv_heads, capacity, dim].
        self._slots: list[list[tuple[Array, Array]]] = []
        queries = ROWS_TOGETHER * decoder.heads // decoder.kv_heads
        self._queries, self._sums = (np.empty((queries, decoder.dim), np.float32) for _ in range(2))
        self._scores: Array = np.empty((queries, 0), np.float32)
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
        x, added, normed, qkv, read, gate_up, activated = self._room_for(len(packed.ids))
        epsilon = self._epsilon
        x[:] = 0
        added[:] = as_array(self._decoder.embedding[torch.tensor(packed.ids)].float())
        for layer, cache_layer, slots in zip(self._layers, cache.layers, self._slots, strict=True):
            between_layers()
            before_attention(x, added, layer.input_norm, epsilon, normed, layer.qkv, qkv)
            self._attend(qkv, layer, cache_layer, slots, read)
            after_attention(
                x,
                read,
                layer.output,
                layer.mlp_norm,
                epsilon,
                normed,
                layer.gate_up,
                gate_up,
                activated,
                layer.down,
                added,
            )
        rows = np.array(packed.logits_to_keep)
        logits: Array = np.empty((len(rows), self._words), np.float32)
        kept = np.empty((len(rows), x.shape[1]), normed.dtype)
        logits_of(x, added, self._norm, epsilon, normed, rows, kept, self._head, logits)
        return torch.from_numpy(logits)

    def _attend(
        self, qkv: Array, layer: _Layer, cache_layer: SlotLayer, slots: Sequence[tuple[Array, Array]], read: Array
    ) -> None:
        """Attention of each segment to its own slot. Padding rows of `read` keep what they had."""
        for rows, segment in cache_layer.segments():
            keys, values = slots[segment.slot]
            assert segment.position + segment.width <= keys.shape[1], "the kernel would write behind the slot"
            self._attention(
                qkv[rows], layer.query_norm, layer.key_norm, self._epsilon, self._cos, self._sin, keys, values,
                segment.position, layer.sliding_window, layer.chunk, self._scaling, self._queries, self._scores, self._sums,
                read[rows],
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
        self._scores = np.empty((len(self._queries), cache.capacity), np.float32)

    def _room_for(self, rows: int) -> list[Array]:
        """Where a pass of so many rows keeps what is between its products: x, added, normed, qkv, read, gate_up, activated."""
        if not self._room or rows > len(self._room[0]):
            dtype = self._input_dtype
            qkv, output, gate_up, down, _ = self._decoder.linear_layers()
            self._room = [
                as_array(torch.zeros(rows, size, dtype=kind))
                for size, kind in (
                    (qkv.in_features, torch.float32), (qkv.in_features, torch.float32), (qkv.in_features, dtype),
                    (qkv.out_features, torch.float32), (output.in_features, dtype), (gate_up.out_features, torch.float32),
                    (down.in_features, dtype),
                )
            ]  # fmt: skip
        return [array[:rows] for array in self._room]


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
