"""Finds out, by trial forwards, which numbers of rows give the same bits in llama.cpp, and with which settings.

llama.cpp multiplies one row by another kernel than several, and several rows in tiles whose sums have another order than that
kernel's. Which widths agree depends on the kind of the weights, the processor and the build: so they are tried when a target
starts, as with our own backend (decoding/widths.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dsi_workers.engine import EngineError, Never
from dsi_workers.llama.library import Context, Row

#: Widths to try for one run, if they are below the window. Those of prompts are tried by themselves.
_NARROW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
#: Positions around which windows are tried: there llama.cpp begins to read a longer part of the cache, or in another way.
BOUNDARIES = (256, 512)


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
        window = self._window
        costs_s = {width: math.inf for width in (*_NARROW, window) if width <= window}
        for boundary in BOUNDARIES:
            self._read(boundary - window)
            expected, took_s = self._in_groups(boundary - window, boundary + window, window)
            costs_s[window] = min(costs_s[window], took_s)
            half = window // 2
            across, _ = self._in_groups(boundary - half, boundary - half + window, window)
            if not torch.equal(expected[window - half :][:window], across):
                return None
            for width in [width for width in costs_s if width < window]:
                took_s = self._agrees(width, boundary - window, expected)
                costs_s[width] = min(costs_s[width], took_s)
                if took_s == math.inf:
                    del costs_s[width]
        if not self._prompts_agree():
            return None
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
        begin = self._chunk
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
        """Whether a chunk of a prompt has the same bits again, when its last tokens have not arrived yet."""
        chunk, some = self._chunk, min(self._window, self._chunk // 2)
        for begin in (0, chunk):
            found = []
            for count in (chunk, chunk - some):
                self._context.cut(0, begin)
                rows = self._rows(begin, begin + count, chunk, 0, wanted=chunk)
                found.append(self._context.forward(rows, Never())[chunk - 2 * some : chunk - some])
            if not torch.equal(*found):
                return False
            self._context.cut(0, begin)
            self._context.forward(self._rows(begin, begin + chunk, chunk, 0, wanted=0), Never())
        return True

    def _read(self, end: int) -> None:
        """Let the cache hold positions [0, end), always computed in the same way."""
        self._context.cut(0, 0)
        for begin in range(0, end, self._chunk):
            upto = min(begin + self._chunk, end)
            self._context.forward(self._rows(begin, upto, upto - begin, 0, wanted=0), Never())

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
