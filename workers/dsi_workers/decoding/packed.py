"""The inputs of one forward pass: runs of positions of one or several generations, packed one after another.

Linear layers see one batch of rows. Only attention needs to know where each run begins and which slot it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Boolean mask [1, 1, rows, readable], True where a row may read. If kinds of layers differ, one mask for each kind.
MaskTensors = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of positions of one generation in a forward pass.

    It writes positions [position, position + width) of the slot. It reads positions [0, readable), as far as its mask allows.
    """

    slot: int
    position: int
    width: int
    readable: int
    #: Of a branch: where it leaves the slot's own path (`Run.fork`).
    fork: int | None = None


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The rows of one forward pass, in the order of the segments. Rows after the last segment are padding."""

    #: Token id and position of each row.
    ids: Sequence[int]
    positions: Sequence[int]
    segments: Sequence[Segment]
    #: Rows whose logits are wanted, then -1 as often as a product needs rows: any logits stand in for those.
    logits_to_keep: Sequence[int]
    #: Rows that are no padding.
    used: Sequence[int]
    #: Compute attention for each position by itself (see `attend`).
    per_position: bool = False


class Masks:
    """Makes attention masks. The input at position p reads positions [0, p], or the last `sliding_window` of them, or those of
    them that are in its chunk of positions."""

    def __init__(self, config: Any) -> None:
        """`config` uses transformers' names."""
        self._kinds = set(getattr(config, "layer_types", None) or ())
        window: int = getattr(config, "sliding_window", None) or 0
        slides = window > 0 and (not self._kinds or "sliding_attention" in self._kinds)
        #: The most positions that a row reads in a layer with sliding attention. 0 if the model has no such layer.
        self.sliding_window = window if slides else 0
        #: Positions of a chunk, in layers whose rows read only their own chunk. 0 if the model has no such layer.
        self.chunk = (
            int(getattr(config, "attention_chunk_size", None) or 0) if "chunked_attention" in self._kinds else 0
        )

    def sliding_window_of(self, kind: str) -> int:
        """The sliding window of a layer of this kind, in positions. 0 if the layer reads all positions."""
        return self.sliding_window if kind == "sliding_attention" or not self._kinds else 0

    def chunk_of(self, kind: str) -> int:
        """The chunk of a layer of this kind, in positions. 0 if the layer reads other chunks, too."""
        return self.chunk if kind == "chunked_attention" else 0

    def needs_no_mask(self, packed: PackedBatch) -> bool:
        """True if every segment is one row, and that row may read all positions in [0, readable)."""
        return not (self.sliding_window or self.chunk) and all(
            segment.width == 1 and segment.readable == segment.position + 1 for segment in packed.segments
        )

    def of(self, packed: PackedBatch, device: torch.device) -> MaskTensors:
        """Return the masks of all rows, as wide as the longest readable part."""
        positions = torch.tensor(packed.positions, device=device)
        places = torch.arange(max(segment.readable for segment in packed.segments), device=device)
        full: torch.Tensor = places[None, :] <= positions[:, None]
        if self.chunk:
            own_chunk = places[None, :] // self.chunk == positions[:, None] // self.chunk
            return {"full_attention": full[None, None], "chunked_attention": (full & own_chunk)[None, None]}
        if not self.sliding_window:
            return full[None, None]
        sliding: torch.Tensor = (full & (places[None, :] > positions[:, None] - self.sliding_window))[None, None]
        if not self._kinds:
            return sliding
        return {"full_attention": full[None, None], "sliding_attention": sliding}
