"""A forward pass for a fixed number of rows, recorded once as CUDA graphs and replayed.

A forward pass is several CUDA graphs, one for every few layers. At most two graphs are queued at a time, so that a cancel takes
effect within a forward pass.

The positions of rows, their slots, where a branch leaves the slot, and which rows attend together are numbers in device memory.
So one recording serves all generations, positions, trees and batches with the same number of rows. The keys and values of
branches stand beside the cache, in memory for the rows of one layer, and are forgotten after that layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import triton
from torch.nn import functional

from dsi_workers.decoding.decoder import Decoder, Layer
from dsi_workers.decoding.experts import Mixture
from dsi_workers.decoding.gpu import MOST_ROWS
from dsi_workers.decoding.gpu.experts import ExpertBuffers, GpuExperts
from dsi_workers.decoding.gpu.kernels import (
    MOST_GROUP_ROWS,
    SPLIT,
    apply_rope_and_store_kv,
    attend_to_splits,
    combine_splits,
)
from dsi_workers.decoding.gpu.linear import GpuLinear, processors, supports_pdl
from dsi_workers.decoding.kv_cache import SlotCache, SlotLayer
from dsi_workers.decoding.packed import PackedBatch

#: Beyond all positions: where the path of a row without a branch leaves the cache.
_NO_FORK = 1 << 30
#: Beyond all units of work.
_NO_UNIT = 1 << 30
#: Programs of attention for each multiprocessor of the device: as many run side by side.
_PROGRAMS = 4
#: Layers in one CUDA graph.
_LAYERS = 4
#: How often a part runs before it is recorded. The first run compiles its kernels.
_WARM_UP = 2

#: Runs a few consecutive layers of the model: either by launching kernels, or by replaying their CUDA graph.
Part = Callable[[], None]


class LayerLinears:
    """The linear layers of one decoder layer. Its MLP is either `dense` (gate and up, down) or a mixture of `experts`."""

    def __init__(self, layer: Layer, epsilon: float) -> None:
        self.qkv, self.output = GpuLinear(layer.qkv), GpuLinear(layer.output)
        self.dense: tuple[GpuLinear, GpuLinear] | None = None
        self.experts: GpuExperts | None = None
        if isinstance(layer.mlp, Mixture):
            self.experts = GpuExperts(layer.mlp, layer.mlp_norm, epsilon)
        else:
            self.dense = GpuLinear(layer.mlp.gate_up, gated=True), GpuLinear(layer.mlp.down)


def mlps(layers: Sequence[LayerLinears]) -> list[GpuLinear | GpuExperts]:
    """The parts of the first dense MLP, and the first mixture of experts. All of a kind have the same shapes."""
    dense = [layer.dense for layer in layers if layer.dense is not None]
    experts = [layer.experts for layer in layers if layer.experts is not None]
    return [*(part for parts in dense[:1] for part in parts), *experts[:1]]


class Buffers:
    """Intermediate results of a forward pass, for MOST_ROWS rows. All recordings share them and use the first rows."""

    def __init__(self, decoder: Decoder, layers: Sequence[LayerLinears], head: GpuLinear, cache: SlotCache) -> None:
        self.cache, first = cache, layers[0]
        heads, dim, device = decoder.heads, decoder.dim, decoder.device

        def rows_of(width: int) -> torch.Tensor:
            return torch.zeros(MOST_ROWS, width, dtype=decoder.dtype, device=device)

        self.x, self.qkv = rows_of(first.qkv.in_features), rows_of(first.qkv.out_features)
        self.attended = rows_of(heads * dim)
        self.gated = rows_of(
            max((layer.dense[1].in_features for layer in layers if layer.dense is not None), default=0)
        )
        experts = [layer.experts for layer in layers if layer.experts is not None]
        self.experts = ExpertBuffers(experts, MOST_ROWS, device) if experts else None
        self.logits = rows_of(head.out_features)
        self.branches = torch.zeros(2, decoder.kv_heads, MOST_ROWS, dim, dtype=decoder.dtype, device=device)
        self.splits = triton.cdiv(cache.capacity, SPLIT.value)
        self.partial_outputs = torch.zeros(MOST_ROWS, heads, self.splits, dim, device=device)
        self.maxima, self.exp_sums = torch.zeros(2, MOST_ROWS, heads, self.splits, device=device)


class Recording:
    """The recorded forward pass for `rows` rows: its inputs in device memory, and its parts."""

    def __init__(
        self, decoder: Decoder, linear_layers: list[LayerLinears], head: GpuLinear, buffers: Buffers, rows: int
    ) -> None:
        self.cache = buffers.cache
        self._decoder, self._linear_layers, self._head = decoder, linear_layers, head
        device = decoder.device
        self._pdl = supports_pdl(device)
        #: Of each row: token id, position (-1: padding), slot, and where its branch begins. Then the groups in which rows attend.
        #: The kernel of attention is the same in all recordings: it looks through MOST_ROWS groups, of which a recording has at
        #: most `rows`.
        sizes = (*[rows] * 5, 1, rows + 1, rows, MOST_ROWS - rows)
        buffer = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        *of_rows, self.units, self._begins, self.ends, no_groups = buffer.split(sizes)
        self._inputs = buffer[: buffer.numel() - no_groups.numel()]
        self.ids, self.positions, self._slots, self._forks, self._firsts = of_rows
        self.positions.fill_(-1)
        no_groups.fill_(_NO_UNIT)
        #: Of the part that was queued last.
        self._under_way: torch.cuda.Event | None = None
        self._programs = max(1, min(rows * buffers.splits, _PROGRAMS * processors(device) // decoder.kv_heads))

        self._x, self._qkv, self.logits = buffers.x[:rows], buffers.qkv[:rows], buffers.logits[:rows]
        self._attended, self._gated, self._experts = buffers.attended[:rows], buffers.gated[:rows], buffers.experts
        self._partial_outputs, self._maxima, self._exp_sums, self._splits = (
            buffers.partial_outputs,
            buffers.maxima,
            buffers.exp_sums,
            buffers.splits,
        )
        self._branch_keys, self._branch_values = buffers.branches
        self._parts = [
            self._part(begin, min(begin + _LAYERS, len(linear_layers)))
            for begin in range(0, len(linear_layers), _LAYERS)
        ]

    def record(self, capture: Callable[[Part], Part]) -> None:
        """Run each part, then replace it by `capture(part)`. All rows are padding then, so the KV cache does not change."""
        for part in self._parts * _WARM_UP:
            part()
        self._parts = [capture(part) for part in self._parts]

    def set_inputs(self, packed: PackedBatch) -> None:
        """Copy the rows of the next forward pass, and the groups in which they attend, to the device."""
        rows = len(self.ids)
        padding = [0] * (rows - sum(segment.width for segment in packed.segments))
        slots, forks, firsts = list[int](), list[int](), list[int]()
        begins, ends, first, units = list[int](), list[int](), 0, 0
        for segment in packed.segments:
            begin = len(slots)
            if segment.fork == segment.position:
                first = begin
            slots += [segment.slot] * segment.width
            forks += [_NO_FORK if segment.fork is None else segment.fork] * segment.width
            firsts += [first] * segment.width
            for row in range(0, segment.width, MOST_GROUP_ROWS):
                begins.append(begin + row)
                units += triton.cdiv(segment.position + min(row + MOST_GROUP_ROWS, segment.width), SPLIT.value)
                ends.append(units)
        used = len(slots)
        positions = [*packed.positions[:used], *[-1] * len(padding)]
        begins += [used] * (rows + 1 - len(begins))
        ends += [units] * (rows - len(ends))
        inputs = (
            *(packed.ids[:used], padding, positions, slots, padding, forks, padding, firsts, padding),
            *([units], begins, ends),
        )
        self._inputs.copy_(torch.tensor([*itertools.chain.from_iterable(inputs)], dtype=torch.int32))

    def disable(self) -> None:
        """Make all rows padding, until the next inputs."""
        self.positions.fill_(-1)

    def compute(self, between: Callable[[], None], packed: PackedBatch) -> torch.Tensor:
        """Run with these inputs. Returns logits as `Decoder` does."""
        self.set_inputs(packed)
        self.run(between)
        return self.logits[torch.tensor(packed.logits_to_keep, device=self._inputs.device)]

    def run(self, between: Callable[[], None]) -> None:
        """Run the parts, with a call of `between` before each. The last part may be unfinished then: so the device computes
        while the next forward pass is queued."""
        for part in self._parts:
            between()
            part()
            if self._inputs.is_cuda:
                if self._under_way is not None:
                    self._under_way.synchronize()
                self._under_way = torch.cuda.Event()
                self._under_way.record()

    def _part(self, begin: int, end: int) -> Part:
        decoder = self._decoder

        def part() -> None:
            if begin == 0:
                self._x.copy_(functional.embedding(self.ids, decoder.embedding))
            for number in range(begin, end):
                self._apply_layer(decoder.layers[number], self._linear_layers[number], self.cache.layers[number])
            if end == len(decoder.layers):
                self._head.multiply(self._x, self.logits, norm=decoder.norm, epsilon=decoder.epsilon)

        return part

    def _apply_layer(self, layer: Layer, linear_layers: LayerLinears, cache_layer: SlotLayer) -> None:
        """Apply one decoder layer to x, in place."""
        x, epsilon = self._x, self._decoder.epsilon
        linear_layers.qkv.multiply(x, self._qkv, norm=layer.input_norm, epsilon=epsilon)
        self._attend(layer, cache_layer)
        linear_layers.output.multiply(self._attended, x, residual=x)
        if linear_layers.dense is not None:
            gate_up, down = linear_layers.dense
            gate_up.multiply(x, self._gated, norm=layer.mlp_norm, epsilon=epsilon)
            down.multiply(self._gated, x, residual=x)
        if linear_layers.experts is not None and self._experts is not None:
            linear_layers.experts.add_to(x, self.positions, self._experts)

    def _attend(self, layer: Layer, cache_layer: SlotLayer) -> None:
        decoder, rows, splits = self._decoder, len(self.ids), self._splits
        heads, kv_heads, dim, capacity = decoder.heads, decoder.kv_heads, decoder.dim, self.cache.capacity
        states = decoder.embedding.new_empty(1, kv_heads, rows, dim)
        keys, values = cache_layer.tensors(states, states)
        sliding_window = decoder.masks.sliding_window_of(layer.kind)
        block_d = max(16, triton.next_power_of_2(dim))
        block_m = max(16, triton.next_power_of_2(MOST_GROUP_ROWS * (heads // kv_heads)))
        query_norm = decoder.norm if layer.query_norm is None else layer.query_norm
        key_norm = decoder.norm if layer.key_norm is None else layer.key_norm
        pdl = {"pdl": self._pdl, **({"launch_pdl": True} if self._pdl else {})}
        apply_rope_and_store_kv[(rows, heads + 2 * kv_heads)](
            self._qkv, self.positions, self._slots, self._forks, self._firsts, decoder.cos, decoder.sin, keys, values,
            self._branch_keys, self._branch_values, query_norm, key_norm, decoder.epsilon, capacity,
            len(decoder.cos) - 1, MOST_ROWS, heads=heads, kv_heads=kv_heads, dim=dim,
            normed=layer.query_norm is not None, block_half=triton.next_power_of_2(dim // 2), num_warps=1, **pdl,
        )  # fmt: skip
        attend_to_splits[(self._programs, kv_heads)](
            self._qkv, self.positions, self._slots, self._forks, self._firsts, self.units, self._begins, self.ends,
            keys, values, self._branch_keys, self._branch_values, self._partial_outputs, self._maxima, self._exp_sums, capacity,
            MOST_ROWS, decoder.scaling, splits, heads=heads, kv_heads=kv_heads, dim=dim, sliding_window=sliding_window,
            most_groups=MOST_ROWS, block_m=block_m, block_d=block_d, num_warps=4, **pdl,
        )  # fmt: skip
        combine_splits[(rows, heads)](
            self._partial_outputs, self._maxima, self._exp_sums, self.positions, self._attended, splits, heads=heads, dim=dim,
            sliding_window=sliding_window, block_d=block_d, block_splits=triton.next_power_of_2(splits), num_warps=1, **pdl,
        )  # fmt: skip
