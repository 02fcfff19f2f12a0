"""A decoder whose forwards are recorded once and replayed: on a GPU a small kernel ends before Python has started the next.

Each forward is several CUDA graphs, one for a few layers, with at most two of them under way: so a cancel takes effect
within a forward. A graph reads and writes fixed places, so what changes from forward to forward is copied into buffers
first, and keys are written by index. What is computed is what the decoder computes. Without a GPU the same parts are
warmed up and run as they are, which is how tests hold them against the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from dsi_workers.decoder import Decoder, Residual
from dsi_workers.kv_cache import Pieces, Segment, SlotCache, SlotLayer

#: Forwards of more rows are computed as they come: they are prompts, and long enough to hide what launching takes.
_MOST_ROWS = 32
#: Layers of one graph, and runs of a part before it is recorded: libraries choose and allocate at first.
_LAYERS, _WARM_UP = 4, 2

Masks = torch.Tensor | Mapping[str, torch.Tensor] | None
Part = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Key:
    """What is fixed in a recording."""

    slot: int
    rows: int
    readable: int
    kept: int
    kinds: tuple[str, ...]


class _IndexedLayer:
    """A layer of the cache in which `places` says where to write."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, readable: int) -> None:
        self.keys, self.values = keys, values
        self._places, self._readable = places, readable

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Pieces, Pieces]:
        self.keys.index_copy_(2, self._places, key_states)
        self.values.index_copy_(2, self._places, value_states)
        rows = slice(0, len(self._places))
        return [(rows, self.keys[:, :, : self._readable])], [(rows, self.values[:, :, : self._readable])]


class _Recording:
    """The forwards of one key: buffers, and the parts that read them."""

    def __init__(self, decoder: Decoder, key: _Key, cache: SlotCache, masks: Masks, device: torch.device) -> None:
        self._decoder = decoder
        self._ids = torch.zeros(key.rows, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._places = torch.arange(key.rows, device=device)
        self._kept = torch.zeros(key.kept, dtype=torch.long, device=device)
        self._masks = {kind: mask.clone() for kind, mask in _by_kind(masks).items()}
        self._segment = Segment(key.slot, 0, key.rows, key.readable)
        self._layers = [self._indexed(layer, key) for layer in cache.layers]
        self._state: Residual | None = None
        self.logits: torch.Tensor | None = None
        first = range(0, decoder.layers, _LAYERS)
        self._parts = [self._part(begin, min(begin + _LAYERS, decoder.layers)) for begin in first]

    def _indexed(self, layer: SlotLayer, key: _Key) -> _IndexedLayer:
        like = self._decoder.empty_states(key.rows)
        return _IndexedLayer(*layer.of_slot(key.slot, like, like), self._places, key.readable)

    def stands_on(self, cache: SlotCache, slot: int) -> bool:
        """Whether the slot's memory is still that which was recorded."""
        layer = self._layers[0]
        return cache.layers[0].of_slot(slot, layer.keys, layer.values)[0] is layer.keys

    def _part(self, begin: int, end: int) -> Part:
        def part() -> None:
            if begin == 0:
                masks = self._masks.get("") if "" in self._masks else self._masks
                self._state = self._decoder.begin(self._ids, self._positions, masks, [self._segment])
            assert self._state is not None
            # A part leaves what it was given as it is: it may be recorded again, or replayed.
            state = replace(self._state)
            for layer in range(begin, end):
                self._decoder.advance(state, layer, self._layers[layer])
            self._state = state
            if end == self._decoder.layers:
                self.logits = self._decoder.logits(state, self._kept)

        return part

    def record(self, capture: Callable[[Part], Part]) -> None:
        """Replace the parts by what `capture` makes of them. That runs them, and they write keys: fill in before what is to be
        computed, or it writes over what is there."""
        recorded: list[Part] = []
        for part in self._parts:
            given = self._state
            for _ in range(_WARM_UP):
                self._state = given
                part()
            self._state = given
            recorded.append(capture(part))
            recorded[-1]()  # the next part warms up on what this one gives
        self._parts = recorded

    def fill_in(
        self, ids: torch.Tensor, positions: torch.Tensor, masks: Masks, segment: Segment, kept: torch.Tensor
    ) -> None:
        """What the next forward computes."""
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        torch.add(_counting(self._places), segment.position, out=self._places)
        self._kept.copy_(kept)
        for kind, mask in _by_kind(masks).items():
            self._masks[kind].copy_(mask)

    def compute(self, between: Callable[[], None]) -> torch.Tensor:
        """Logits, as of Decoder."""
        under_way: list[torch.cuda.Event] = []
        for part in self._parts:
            between()
            part()
            if self._ids.is_cuda:
                under_way.append(torch.cuda.Event())
                under_way[-1].record()
                if len(under_way) > 1:
                    under_way[-2].synchronize()
        assert self.logits is not None
        return self.logits.clone()


class GraphedDecoder:
    """A Decoder for forwards of one generation of a few rows each, and what it always was for all others."""

    needs_masks = True

    def __init__(self, decoder: Decoder, *, device: torch.device) -> None:
        self._decoder = decoder
        self._device = device
        self._recordings: dict[_Key, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.dtype = decoder.dtype

    def linear_layers(self) -> list[nn.Module]:
        return self._decoder.linear_layers()

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        masks: Masks,
        cache: SlotCache,
        kept: torch.Tensor,
        between_layers: Callable[[], None],
    ) -> torch.Tensor:
        """As of Decoder."""
        if len(cache.segments) != 1 or len(ids) > _MOST_ROWS or cache.segments[0].width != len(ids):
            return self._decoder(ids, positions, masks, cache, kept, between_layers)
        [segment] = cache.segments
        key = _Key(segment.slot, len(ids), segment.readable, len(kept), tuple(_by_kind(masks)))
        recording = self._recordings.get(key)
        if recording is None or not recording.stands_on(cache, segment.slot):
            recording = _Recording(self._decoder, key, cache, masks, self._device)
            recording.fill_in(ids, positions, masks, segment, kept)
            recording.record(self._capture)
            self._recordings[key] = recording
        recording.fill_in(ids, positions, masks, segment, kept)
        return recording.compute(between_layers)

    def _capture(self, part: Part) -> Part:
        """The part as a graph, on a GPU; else as it is."""
        if self._pool is None:
            return part
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            part()
        return graph.replay


def _by_kind(masks: Masks) -> Mapping[str, torch.Tensor]:
    if masks is None:
        return {}
    return {"": masks} if isinstance(masks, torch.Tensor) else masks


def _counting(places: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(places), device=places.device)
