"""Finds out, by trial forwards, which numbers of rows give the same bits in llama.cpp, and with which settings.

llama.cpp multiplies one row by another kernel than several, and several rows in tiles whose sums have another order than that
kernel's. Which widths agree depends on the kind of the weights, the processor and the build: so they are tried when a target
starts, as with our own backend (decoding/widths.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsi_workers.engine import EngineError, Never
from dsi_workers.llama.library import Context, Row

#: Widths to try for one run, if they are below the window. Those of prompts are tried by themselves.
_NARROW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
#: The position around which windows are tried: from here on llama.cpp reads 512 positions of the cache instead of 256, and flash
#: attention of one row goes along them in another way.
BOUNDARY = 256
#: Positions before the runs of a batch that is tried.
_BEFORE_BATCH = 16


@dataclass(frozen=True, slots=True)
class Agreement:
    """Widths whose forwards gave the same bits, with the seconds that each took, and batches of windows."""

    costs_s: dict[int, float]
    #: The most windows of different generations in one forward.
    together: int
    #: The widths that each run of such a forward may have.
    together_widths: tuple[int, ...]

    @property
    def most(self) -> int:
        return max(self.costs_s)

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> tuple[Agreement, bool] | None:
        """What was kept of an earlier trial, and whether it was with flash attention. None: nothing that can be used."""
        try:
            costs_s = {int(width): float(cost_s) for width, cost_s in kept["costs_s"].items()}
            widths = tuple(map(int, kept["together_widths"]))
            return cls(costs_s, int(kept["together"]), widths), bool(kept["flash_attention"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def cheapest(self, rows: int, most: int) -> int:
        """The fastest width in [rows, most]."""
        return min((width for width in self.costs_s if rows <= width <= most), key=lambda width: self.costs_s[width])

    def narrowest(self, rows: int) -> int:
        """The smallest width that has room for `rows` rows."""
        return min(width for width in self.costs_s if width >= rows)

    def together_width(self, rows: int) -> int:
        """The smallest width for each run of a batch that has room for `rows` rows."""
        return min(width for width in self.together_widths if width >= rows)


class Trial:
    """Compares the bits of forwards of one context. `words`: size of the model's vocabulary. Leaves the cache empty."""

    def __init__(self, context: Context, *, window: int, slots: int, words: int, chunk: int) -> None:
        self._context = context
        self._window = window
        self._slots = slots
        self._words = words
        self._chunk = chunk

    def agreement(self) -> Agreement | None:
        """Return the widths that agree with a full window. None if full windows themselves give different bits for the same
        tokens, or chunks of a prompt do."""
        window, half = self._window, self._window // 2
        begin = BOUNDARY - window
        self._read(0, self._chunk)
        if not self._prompts_agree():
            return None
        self._read(self._chunk, begin)
        expected, cost_s = self._in_groups(begin, BOUNDARY + window, window)
        across = expected[window - half :][:window]
        found, _ = self._in_groups(BOUNDARY - half, BOUNDARY - half + window, window)
        if not torch.equal(found, across):
            return None
        costs_s = {window: cost_s}
        for width in (width for width in _NARROW if width < window):
            if (took_s := self._agrees(width, BOUNDARY - half, across)) < math.inf:
                costs_s[width] = took_s
        together, widths = self._batches(sorted({min(costs_s), window}))
        return Agreement(dict(sorted(costs_s.items())), together, widths)

    def _agrees(self, width: int, begin: int, expected: torch.Tensor) -> float:
        """The seconds of a forward of this width; infinity if its bits are not those of a window."""
        cost_s = math.inf
        for at, found, took_s in self._groups(begin, begin + len(expected), width):
            cost_s = min(cost_s, took_s)
            if not torch.equal(found, expected[at - begin :][: len(found)]):
                return math.inf
        return cost_s

    def _batches(self, widths: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """The most generations that can share a forward, each with a run of one of `widths`, and these widths."""
        begin = _BEFORE_BATCH
        for slot in range(self._slots):
            self._context.cut(slot, 0)
            self._context.forward(self._rows(0, begin, begin, slot, wanted=0), Never())
        window = self._context.forward(self._rows(begin, begin + self._window, self._window, 0), Never())
        together = 1
        while together < self._slots and all(self._shares(begin, together + 1, width, window) for width in widths):
            together += 1
        for slot in range(self._slots):
            self._context.cut(slot, 0)
        return together, tuple(widths)

    def _shares(self, begin: int, slots: int, width: int, expected: torch.Tensor) -> bool:
        """Whether runs of `width` rows of so many slots give the bits of a window alone."""
        for slot in range(self._slots):
            self._context.cut(slot, begin)
        rows = [row for slot in range(slots) for row in self._rows(begin, begin + width, width, slot)]
        found = self._context.forward(rows, Never()).reshape(slots, width, -1)
        return all(torch.equal(each, expected[:width]) for each in found)

    def _prompts_agree(self) -> bool:
        """Whether the second chunk of a prompt has the same bits again, when its last tokens have not arrived yet."""
        chunk, some, found = self._chunk, min(self._window, self._chunk // 2), list[torch.Tensor]()
        for count in (chunk, chunk - some):
            self._context.cut(0, chunk)
            rows = self._rows(chunk, chunk + count, chunk, 0)
            rows = [row._replace(wanted=chunk - 2 * some <= at < chunk - some) for at, row in enumerate(rows)]
            found.append(self._context.forward(rows, Never()))
        return torch.equal(*found)

    def _read(self, begin: int, end: int) -> None:
        """Let the cache hold positions [0, end), of which it holds [0, begin)."""
        self._context.cut(0, begin)
        for first in range(begin, end, self._chunk):
            upto = min(first + self._chunk, end)
            self._context.forward(self._rows(first, upto, upto - first, 0, wanted=0), Never())

    def _in_groups(self, begin: int, end: int, width: int) -> tuple[torch.Tensor, float]:
        groups = list(self._groups(begin, end, width))
        return torch.cat([logits for _, logits, _ in groups]), min(took_s for _, _, took_s in groups)

    def _groups(self, begin: int, end: int, width: int) -> Iterator[tuple[int, torch.Tensor, float]]:
        """Compute positions [begin, end), `width` in a forward. Yields each one's first position, logits and seconds."""
        for first in range(begin, end, width):
            upto = min(first + width, end)
            self._context.cut(0, first)
            begun_s = time.perf_counter()
            logits = self._context.forward(self._rows(first, upto, width, 0), Never())
            yield first, logits[: upto - first], time.perf_counter() - begun_s

    def _rows(self, begin: int, end: int, width: int, slot: int, *, wanted: int | None = None) -> list[Row]:
        """Rows for positions [begin, end) of a fixed text, padded to `width`. Logits after the first `wanted`; None: all."""
        tokens = [self._token(position) if position < end else 0 for position in range(begin, begin + width)]
        wanted = width if wanted is None else wanted
        return [Row(token, begin + at, slot, at < wanted) for at, token in enumerate(tokens)]

    def _token(self, position: int) -> int:
        return (position * 2654435761 >> 7) % self._words


def best_agreement(
    context_with: Callable[[bool], Context], trial: Callable[[Context], Agreement | None], choices: Sequence[bool], name: str
) -> tuple[Context, Agreement, bool]:  # fmt: skip
    """Try with flash attention and without, as far as `choices` say. Return the context of the one that gives the same bits down
    to the narrowest width, among equals the first one; its widths; and whether it has flash attention.

    Times do not matter here: on another server, or after a restart, they could choose the other one, whose bits differ. `name`:
    of the model. Raises EngineError.
    """
    best: tuple[Context, Agreement, bool] | None = None
    for flash_attention in choices:
        context = context_with(flash_attention)
        agreement = trial(context)
        if agreement is None or (best is not None and best[1].narrowest(1) <= agreement.narrowest(1)):
            context.close()
            continue
        if best is not None:
            best[0].close()
        best = context, agreement, flash_attention
        if agreement.narrowest(1) == 1:
            break
    if best is None:
        raise EngineError(
            f"{name} in llama.cpp gives different bits when it computes the same tokens again, so the target's output would not "
            "be reproducible: choose another kind of quantization, or the engine transformers"
        )
    return best
