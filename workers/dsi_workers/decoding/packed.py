"""What one forward computes: runs of positions of one or several generations, one after another in one row of inputs.

What multiplies by weights sees one long row; only attention must know where each run begins and which slot it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Boolean, [1, 1, rows, readable], True where a row may read; one for each kind of layer if they differ.
MaskTensors = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of positions of one generation in a forward."""

    slot: int
    #: It writes [position, position + width) and reads [0, readable), as far as its mask allows.
    position: int
    width: int
    readable: int
    #: Of a branch: where it leaves the slot's own path (`Run.fork`).
    fork: int | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """ids and positions: one for each row, in the order of the segments. Rows beyond them are padding."""

    ids: Sequence[int]
    positions: Sequence[int]
    segments: Sequence[Segment]
    #: Rows after which logits are wanted.
    kept: Sequence[int]
    #: Attention of each position is computed by itself.
    apart: bool = False


class Masks:
    """Who may read what: the input at position p reads positions [0, p], or the last `window` of them."""

    def __init__(self, config: Any) -> None:
        """The configuration has the library's names."""
        self._kinds = set(getattr(config, "layer_types", None) or ())
        window: int = getattr(config, "sliding_window", None) or 0
        slides = window > 0 and (not self._kinds or "sliding_attention" in self._kinds)
        #: Positions that a row of a layer that slides reads at most; 0 where none slides.
        self.window = window if slides else 0

    def window_of(self, kind: str) -> int:
        """Of a layer of this kind; 0: it reads all."""
        return self.window if kind == "sliding_attention" or not self._kinds else 0

    def hide_nothing(self, packed: Packed) -> bool:
        """Whether each row may read all that is read for it."""
        return not self.window and all(
            segment.width == 1 and segment.readable == segment.position + 1 for segment in packed.segments
        )

    def of(self, packed: Packed, device: torch.device) -> MaskTensors:
        positions = torch.tensor(packed.positions, device=device)
        places = torch.arange(max(segment.readable for segment in packed.segments), device=device)
        full: torch.Tensor = places[None, :] <= positions[:, None]
        if not self.window:
            return full[None, None]
        sliding: torch.Tensor = (full & (places[None, :] > positions[:, None] - self.window))[None, None]
        if not self._kinds:
            return sliding
        return {"full_attention": full[None, None], "sliding_attention": sliding}
