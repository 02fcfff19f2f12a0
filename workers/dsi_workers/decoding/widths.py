"""Finds out, by trial forward passes, which widths and batches give the same bits as one full window.

A kernel may sum in a different order when its input has a different number of rows. So a target computes each token only in
forward passes whose bits agree with those of a full window alone. Then a token depends neither on how tokens were grouped
into requests, nor on other generations in the batch (docs/exactness.md).

The width of a run is its number of rows. A window is the number of positions of a full verification.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dsi_workers.backend import Run
from dsi_workers.decoding.forward import Forward
from dsi_workers.engine import EngineError

#: Widths to try for one run, if they are below the window.
_NARROW = (1, 2, 3, 4, 6, 8, 12, 16, 24)
#: Numbers of windows to try in one forward pass.
_BATCHES = (2, 4, 8, 16, 32, 64)
#: Windows of one forward that are tried even for one generation: a tree's branches are runs of their own.
_TREE_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class Widths:
    """Numbers of rows of forward passes whose bits agree, with the seconds that each pass took."""

    costs_s: dict[int, float]

    def cheapest(self, rows: int, most: int = 1 << 30) -> int:
        """The fastest width in [rows, most].

        For the run of one generation, `most` must be the window: larger widths were tried only as several runs.
        """
        return min((width for width in self.costs_s if rows <= width <= most), key=lambda width: self.costs_s[width])

    def narrowest(self, rows: int) -> int:
        """The smallest width that has room for `rows` rows."""
        return min(width for width in self.costs_s if width >= rows)

    @property
    def most(self) -> int:
        return max(self.costs_s)


class Trial:
    """Compares the bits of forward passes of one model.

    `window`: positions of a full verification. `words`: size of the model's vocabulary. `name`: the model, for error messages.
    """

    def __init__(self, forward: Forward, *, window: int, words: int, name: str) -> None:
        self._forward = forward
        self._window = window
        self._words = min(97, words)
        self._name = name

    @torch.inference_mode()
    def widths(self, slots: int) -> Widths:
        """Return the widths whose bits agree: of one run up to a window, and of trees and batches of up to `slots` windows.

        Raises EngineError if even full windows, or chunks of a prompt, give different bits for the same tokens.
        """
        self._make_windows_agree()
        self._refuse_unless_prompts_agree()
        window = self._window
        most = min([self._forward.cache.capacity, *self._forward.recorded_rows[-1:]])
        batches = [windows for windows in _BATCHES if windows <= max(slots, _TREE_WINDOWS) and windows * window <= most]
        begin = self._read_boundaries()[0] - window // 2
        length = window * max(batches, default=1)
        begin = max(0, min(begin, self._forward.cache.capacity - length))
        expected, cost_s = self._compute_in_groups(begin, length, window)
        costs_s = {window: cost_s}
        for width in (width for width in _NARROW if width < window):
            logits, cost_s = self._compute_in_groups(begin, window, width)
            if torch.equal(logits, expected[:window]) and self._forward.kernels_agree(width, window):
                costs_s[width] = cost_s
        for windows in batches:
            logits, cost_s = self._compute_as_batch(begin, windows)
            if not (
                torch.equal(logits, expected[: len(logits)]) and self._forward.batches_agree(windows * window, window)
            ):
                break
            costs_s[windows * window] = cost_s
        return Widths(dict(sorted(costs_s.items())))

    def _make_windows_agree(self) -> None:
        """Choose `attends_per_position` and `read_step` of the forward pass so that full windows give the same bits.

        Raises EngineError if no combination does.
        """
        step, capacity = self._forward.read_step, self._forward.cache.capacity
        # Reading all of a long cache takes longer than attention for each position by itself.
        for self._forward.read_step in (step, capacity):
            for self._forward.attends_per_position in (False, True):
                if self._windows_agree():
                    return
        raise self._not_reproducible()

    def _refuse_unless_prompts_agree(self) -> None:
        """Raise EngineError if chunks of a prompt have other bits when they are computed again, and their last tokens have not
        arrived. Tried for the first chunk, and for one with positions before it."""
        chunk, rows = self._forward.prompt_chunk, min(self._window, self._forward.prompt_chunk // 2)
        for begin in range(0, min(2 * chunk, self._forward.cache.capacity - chunk + 1), chunk):
            whole, cut = (
                self._forward(
                    [Run(0, self._tokens(begin, count), begin, chunk, begin + chunk - 2 * rows)],
                    rows=chunk, logit_rows=2 * rows,
                )[0]
                for count in (chunk, chunk - rows)
            )  # fmt: skip
            if not torch.equal(whole[:rows], cut):
                raise self._not_reproducible()

    def _not_reproducible(self) -> EngineError:
        return EngineError(
            f"{self._name} gives different bits when it computes the same tokens again, so the target's output would not "
            "be reproducible: choose another model, dtype or device"
        )

    def _windows_agree(self) -> bool:
        """True if windows that begin at different positions, and so read different lengths of the cache, give the same bits.

        The length of the cache that is read can change the bits: on one processor, reading 256 or 512 positions gave different
        bits for the same token, and 512 or 1024 gave equal ones. The cache is filled with random numbers, because sums over
        zeros would not reveal a difference.
        """
        self._forward.cache.fill_at_random()
        half = self._window // 2
        for boundary in self._read_boundaries():
            beside, _ = self._compute_in_groups(boundary - self._window, 2 * self._window, self._window)
            across, _ = self._compute_in_groups(boundary - half, self._window, self._window)
            if not torch.equal(beside[self._window - half :][: self._window], across):
                return False
        return True

    def _read_boundaries(self) -> list[int]:
        """The first and the last position from which on a longer part of the cache is read."""
        step, capacity = self._forward.read_step, self._forward.cache.capacity
        last = (capacity - self._window) // step * step
        return sorted({step, last}) if last else [capacity // 2]

    def _tokens(self, begin: int, count: int) -> list[int]:
        return [7 * position % self._words for position in range(begin, begin + count)]

    def _compute_in_groups(self, begin: int, count: int, width: int) -> tuple[torch.Tensor, float]:
        """Compute the tokens at positions [begin, begin + count), `width` tokens per forward pass.

        Returns their logits, and the seconds of the fastest pass: disturbances only make a pass slower.
        """
        logits, times_s = [], []
        for first in range(begin, begin + count, width):
            tokens = self._tokens(first, min(width, begin + count - first))
            begun = time.perf_counter()
            logits += self._forward([Run(0, tokens, first, width, first)], rows=width, logit_rows=width)
            self._forward.finish()
            times_s.append(time.perf_counter() - begun)
        return torch.cat(logits), min(times_s)

    def _compute_as_batch(self, begin: int, windows: int) -> tuple[torch.Tensor, float]:
        """Compute `windows` windows from position `begin` on in one forward pass, each window as a run of its own.

        Returns their logits, and the seconds of the faster of two passes.
        """
        starts = range(begin, begin + windows * self._window, self._window)
        runs = [Run(0, self._tokens(first, self._window), first, self._window, first) for first in starts]
        rows = windows * self._window
        times_s = []
        for _ in range(2):
            begun = time.perf_counter()
            logits = self._forward(runs, rows=rows, logit_rows=rows)
            self._forward.finish()
            times_s.append(time.perf_counter() - begun)
        return torch.cat(logits), min(times_s)
