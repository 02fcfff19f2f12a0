"""A decoder for a GPU: few kernels for each layer, recorded once as graphs and replayed.

A forward of a few rows reads every weight once and computes next to nothing: what it could lose is the time between kernels.
So there are seven for each layer (kernels.py), and Python starts none of them: each forward is several CUDA graphs, one for a
few layers, with at most two of them under way, so that a cancel takes effect within a forward.

Rows come in groups, each of one generation; where they stand, which slot they read and where their branch leaves it are numbers
in device memory. So one recording serves all generations, positions, trees and batches of as many rows. The keys and values of
branches stand beside the cache, in memory for the rows of one layer, and are forgotten after that layer. A run of more rows than
any recording has, as of a prompt, is computed by the decoder that this one stands on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch.nn import functional

from dsi_workers.decoding.decoder import Decoder, Layer
from dsi_workers.decoding.gpu.kernels import LEAST_ROWS, SPLIT, attend_in_parts, join_parts, turn_and_keep
from dsi_workers.decoding.gpu.product import MOST_ROWS, Product, chains, rows_for
from dsi_workers.decoding.kv_cache import SlotCache, SlotLayer
from dsi_workers.decoding.packed import Packed

#: Rows that read the cache together.
GROUP = 8
#: Beyond all positions: where the path of a group without a branch leaves the cache.
_NO_FORK = 1 << 30
#: Layers of one graph, and runs of a part before it is recorded: kernels are compiled in the first.
_LAYERS, _WARM_UP = 4, 2

Part = Callable[[], None]


class GpuDecoder:
    """Stands for the decoder: same weights, same cache."""

    recorded_rows: Sequence[int] = (16, 32, MOST_ROWS)
    group_rows, sums_in_one_order = GROUP, True

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._products = [_LayerProducts(layer) for layer in decoder.layers]
        self._head = Product(decoder.head)
        self._recordings: dict[int, _Recording] = {}
        self._memory: _Memory | None = None
        self._pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None
        self.dtype = decoder.dtype

    def products(self) -> list[Any]:
        first = self._products[0]
        return [first.qkv, first.output, first.gate_up, first.down, self._head]

    def __call__(self, packed: Packed, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        """Logits [len(packed.kept), vocabulary]."""
        groups = sum(triton.cdiv(segment.width, GROUP) for segment in packed.segments)
        if groups * GROUP > MOST_ROWS:
            assert len(packed.segments) == 1, (
                "what several generations share would have other bits than what each has alone"
            )
            return self._decoder(packed, cache, between_layers)
        rows = rows_for(groups * GROUP)
        recording = self._recordings.get(rows)
        if recording is None or recording.cache is not cache:
            if self._memory is None or self._memory.cache is not cache:
                self._memory = _Memory(self._decoder, self._products[0], self._head, cache)
            recording = _Recording(self._decoder, self._products, self._head, self._memory, rows)
            recording.record(self._capture)
            self._recordings[rows] = recording
        recording.fill_in(packed)
        return recording.compute(between_layers, packed)

    @torch.inference_mode()
    def try_out(self) -> None:
        """Compile and run every kernel once. Raises whatever keeps one from it: there may be no compiler, or too little memory
        in this GPU's processors."""
        cache = SlotCache(len(self._products), slots=1, capacity=SPLIT.value)
        memory = _Memory(self._decoder, self._products[0], self._head, cache)
        _Recording(self._decoder, self._products, self._head, memory, LEAST_ROWS).record(lambda part: part)
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize()

    def _capture(self, part: Part) -> Part:
        """The part as a graph, on a GPU; else as it is."""
        if self._pool is None:
            return part
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            part()
        return graph.replay


class _LayerProducts:
    def __init__(self, layer: Layer) -> None:
        self.qkv, self.output = Product(layer.qkv), Product(layer.output)
        self.gate_up, self.down = Product(layer.gate_up, gated=True), Product(layer.down)


class _Memory:
    """What forwards compute in, one at a time: of MOST_ROWS rows, of which a recording uses the first."""

    def __init__(self, decoder: Decoder, first: _LayerProducts, head: Product, cache: SlotCache) -> None:
        self.cache = cache
        heads, dim, device = decoder.heads, decoder.dim, decoder.device

        def rows_of(width: int) -> torch.Tensor:
            return torch.zeros(MOST_ROWS, width, dtype=decoder.dtype, device=device)

        self.x, self.qkv = rows_of(first.qkv.in_features), rows_of(first.qkv.out_features)
        self.attended, self.gated = rows_of(heads * dim), rows_of(first.down.in_features)
        self.logits = rows_of(head.out_features)
        self.branches = torch.zeros(2, decoder.kv_heads, MOST_ROWS, dim, dtype=decoder.dtype, device=device)
        self.splits = triton.cdiv(cache.capacity, SPLIT.value)
        self.sums = torch.zeros(MOST_ROWS, heads, self.splits, dim, device=device)
        self.peaks, self.totals = torch.zeros(2, MOST_ROWS, heads, self.splits, device=device)


class _Recording:
    """Forwards of so many rows: where they stand, and the parts that compute."""

    def __init__(
        self, decoder: Decoder, products: list[_LayerProducts], head: Product, memory: _Memory, rows: int
    ) -> None:
        self.cache = memory.cache
        self._decoder, self._products, self._head = decoder, products, head
        groups, device = rows // GROUP, decoder.device
        self._chained = chains(device)
        self._fixed = torch.zeros(2 * rows + 3 * groups, dtype=torch.int32, device=device)
        self._ids, self._positions, *of_groups = self._fixed.split((rows, rows, groups, groups, groups))
        self._slots, self._forks, self._firsts = of_groups
        self._positions.fill_(-1)
        #: Of the rows of the forward, one after another: where they are among ours.
        self._places: list[int] = []

        self._x, self._qkv, self._logits = memory.x[:rows], memory.qkv[:rows], memory.logits[:rows]
        self._attended, self._gated = memory.attended[:rows], memory.gated[:rows]
        self._sums, self._peaks, self._totals, self._splits = memory.sums, memory.peaks, memory.totals, memory.splits
        self._branch_keys, self._branch_values = memory.branches
        self._parts = [
            self._part(begin, min(begin + _LAYERS, len(products))) for begin in range(0, len(products), _LAYERS)
        ]

    def record(self, capture: Callable[[Part], Part]) -> None:
        """Replace the parts by what `capture` makes of them. All rows are padding meanwhile: the cache stays as it is."""
        for part in self._parts * _WARM_UP:
            part()
        self._parts = [capture(part) for part in self._parts]

    def fill_in(self, packed: Packed) -> None:
        """What the next forward computes."""
        rows, begin, group, first, all_groups = len(self._ids), 0, 0, 0, len(self._slots)
        ids, positions = [0] * rows, [-1] * rows
        slots, forks, firsts = [0] * all_groups, [_NO_FORK] * all_groups, [0] * all_groups
        self._places = list[int]()
        for segment in packed.segments:
            own = slice(group * GROUP, group * GROUP + segment.width)
            ids[own] = packed.ids[begin : begin + segment.width]
            positions[own] = packed.positions[begin : begin + segment.width]
            self._places += range(own.start, own.stop)
            groups = triton.cdiv(segment.width, GROUP)
            slots[group : group + groups] = [segment.slot] * groups
            if segment.fork is not None:
                if segment.fork == segment.position:
                    first = own.start
                forks[group : group + groups] = [segment.fork] * groups
                firsts[group : group + groups] = [first] * groups
            begin, group = begin + segment.width, group + groups
        self._fixed.copy_(torch.tensor([*ids, *positions, *slots, *forks, *firsts], dtype=torch.int32))

    def compute(self, between: Callable[[], None], packed: Packed) -> torch.Tensor:
        """Logits, as of Decoder."""
        under_way: list[torch.cuda.Event] = []
        for part in self._parts:
            between()
            part()
            if self._fixed.is_cuda:
                under_way.append(torch.cuda.Event())
                under_way[-1].record()
                if len(under_way) > 1:
                    under_way[-2].synchronize()
        # What is kept of padding is nobody's.
        kept = [self._places[row] if row < len(self._places) else 0 for row in packed.kept]
        return self._logits[torch.tensor(kept, device=self._fixed.device)]

    def _part(self, begin: int, end: int) -> Part:
        decoder = self._decoder

        def part() -> None:
            if begin == 0:
                self._x.copy_(functional.embedding(self._ids, decoder.embedding))
            for number in range(begin, end):
                self._advance(decoder.layers[number], self._products[number], self.cache.layers[number])
            if end == len(decoder.layers):
                self._head.multiply(self._x, self._logits, norm=decoder.norm, epsilon=decoder.epsilon)

        return part

    def _advance(self, layer: Layer, products: _LayerProducts, stored: SlotLayer) -> None:
        """x by one layer, in place."""
        x, epsilon = self._x, self._decoder.epsilon
        products.qkv.multiply(x, self._qkv, norm=layer.input_norm, epsilon=epsilon)
        self._attend(layer, stored)
        products.output.multiply(self._attended, x, residual=x)
        products.gate_up.multiply(x, self._gated, norm=layer.mlp_norm, epsilon=epsilon)
        products.down.multiply(self._gated, x, residual=x)

    def _attend(self, layer: Layer, stored: SlotLayer) -> None:
        decoder, rows, splits = self._decoder, len(self._ids), self._splits
        heads, kv_heads, dim, capacity = decoder.heads, decoder.kv_heads, decoder.dim, self.cache.capacity
        states = decoder.embedding.new_empty(1, kv_heads, rows, dim)
        keys, values = stored.tensors(states, states)
        slides = decoder.masks.window_of(layer.kind)
        block_d = max(16, triton.next_power_of_2(dim))
        block_m = max(16, triton.next_power_of_2(GROUP * (heads // kv_heads)))
        query_norm = decoder.norm if layer.query_norm is None else layer.query_norm
        key_norm = decoder.norm if layer.key_norm is None else layer.key_norm
        chained = {"chained": self._chained, **({"launch_pdl": True} if self._chained else {})}
        turn_and_keep[(rows, heads + 2 * kv_heads)](
            self._qkv, self._positions, self._slots, self._forks, self._firsts, decoder.cos, decoder.sin, keys, values,
            self._branch_keys, self._branch_values, query_norm, key_norm, decoder.epsilon, capacity,
            len(decoder.cos) - 1, MOST_ROWS, heads=heads, kv_heads=kv_heads, dim=dim, group_rows=GROUP,
            normed=layer.query_norm is not None, block_half=triton.next_power_of_2(dim // 2), num_warps=1, **chained,
        )  # fmt: skip
        attend_in_parts[(len(self._slots), kv_heads, splits)](
            self._qkv, self._positions, self._slots, self._forks, self._firsts, keys, values, self._branch_keys,
            self._branch_values, self._sums, self._peaks, self._totals, capacity, MOST_ROWS, decoder.scaling, splits,
            heads=heads, kv_heads=kv_heads, dim=dim, group_rows=GROUP, slides=slides, block_m=block_m, block_d=block_d,
            num_warps=4, **chained,
        )  # fmt: skip
        join_parts[(rows, heads)](
            self._sums, self._peaks, self._totals, self._positions, self._attended, splits, heads=heads, dim=dim,
            slides=slides, block_d=block_d, block_splits=triton.next_power_of_2(splits), num_warps=1, **chained,
        )  # fmt: skip
