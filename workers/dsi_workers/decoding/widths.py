"""Which forwards give the very same bits, found by trying: kernels may sum in another order for another number of rows.

An exact engine computes each token in forwards whose bits agree with those of a full window by itself, so that a token
does not depend on how tokens were grouped into requests, nor on who else is in the batch (docs/exactness.md).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from dsi_workers.backend import Run
from dsi_workers.decoding.attention import attend, mask_of_group
from dsi_workers.decoding.decoder import root_mean_square_normed
from dsi_workers.decoding.forward import Forward
from dsi_workers.engine import EngineError

_NARROW = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_BATCHES = (2, 4, 8, 16, 32, 64)
#: Windows of one forward that are tried even for one generation: a tree's branches are runs of their own.
_TREE_WINDOWS = 4
#: Of each shape of layer at least so many numbers are compared.
_PRODUCTS = 20_000
#: So many rows are normed.
_NORMS = 64


@dataclass(frozen=True, slots=True)
class Widths:
    """Rows of forwards whose bits agree, and the seconds that each took."""

    costs_s: dict[int, float]

    def cheapest(self, rows: int, most: int = 1 << 30) -> int:
        """For a forward of at least so many rows. A run of one generation has at most a window: wider ones were tried as
        several runs."""
        return min((width for width in self.costs_s if rows <= width <= most), key=lambda width: self.costs_s[width])

    def narrowest(self, rows: int) -> int:
        return min(width for width in self.costs_s if width >= rows)

    @property
    def most(self) -> int:
        return max(self.costs_s)


class Trial:
    """Tries forwards of one model. `words`: token ids below it are known to the model."""

    def __init__(self, forward: Forward, *, window: int, words: int, name: str) -> None:
        self._forward = forward
        self._window = window
        self._words = min(97, words)
        self._name = name

    @torch.inference_mode()
    def widths(self, slots: int) -> Widths:
        """Of one generation, up to a window, and of trees and batches of up to `slots`. Raises EngineError if not even windows
        agree with themselves."""
        self._make_windows_agree()
        window = self._window
        most = min([self._forward.cache.capacity, *self._forward.recorded_rows[-1:]])
        each = self._forward.rows_of(Run(0, (), 0, window, 0))
        batches = [rows for rows in _BATCHES if rows <= max(slots, _TREE_WINDOWS) and rows * each <= most]
        begin = self._edges()[0] - window // 2
        length = window * max(batches, default=1)
        begin = max(0, min(begin, self._forward.cache.capacity - length))
        expected, cost_s = self._in_groups(begin, length, window)
        costs_s = {window: cost_s}
        for width in (width for width in _NARROW if width < window):
            logits, cost_s = self._in_groups(begin, window, width)
            if torch.equal(logits, expected[:window]) and self._kernels_agree(width):
                costs_s[width] = cost_s
        for rows in batches:
            logits, cost_s = self._together(begin, rows)
            if not (torch.equal(logits, expected[: len(logits)]) and self._products_agree(rows * window)):
                break
            costs_s[rows * window] = cost_s
        return Widths(dict(sorted(costs_s.items())))

    def _make_windows_agree(self) -> None:
        """By the first way of attention in which they do. Raises EngineError if there is none."""
        step, capacity = self._forward.read_step, self._forward.cache.capacity
        for self._forward.attends_apart in (False, True):
            for self._forward.read_step in (step, capacity):
                if self._windows_agree():
                    return
        raise EngineError(
            f"{self._name} gives other bits when it computes the same tokens again: what a target server says "
            "would depend on chance, choose another model, dtype or device"
        )

    def _kernels_agree(self, width: int) -> bool:
        if self._forward.sums_in_one_order:
            return self._products_agree(width)
        return self._products_agree(width) and self._attention_agrees(width) and self._norms_agree(width)

    def _norms_agree(self, width: int) -> bool:
        """The same of norms, before they are rounded."""
        count = math.lcm(width, self._window)
        size = max(layer.in_features for layer in self._forward.products())
        inputs = torch.randn(count * -(-_NORMS // count), size, generator=torch.Generator().manual_seed(width))
        inputs, epsilon = inputs.to(self._forward.device), torch.zeros((), device=self._forward.device)
        groups, windows = (
            torch.cat([root_mean_square_normed(part, part.new_ones(size), epsilon) for part in inputs.split(rows)])
            for rows in (width, self._window)
        )
        return torch.equal(groups, windows)

    def _attention_agrees(self, width: int) -> bool:
        """The same of attention, whose rows are those of one generation."""
        shape, window = self._forward.attention_shape, self._window
        group = shape.heads // shape.kv_heads
        readable, apart = self._forward.read_step, self._forward.attends_apart
        positions = readable - math.lcm(width, window)
        generator = torch.Generator().manual_seed(width)

        def random(heads: int, length: int) -> torch.Tensor:
            made = torch.randn(1, heads, length, shape.dim, generator=generator)
            return made.to(self._forward.device, shape.dtype)

        for _ in range(max(1, _PRODUCTS // (shape.heads * shape.dim * math.lcm(width, window)))):
            query = random(shape.heads, readable - positions)
            keys, values = random(shape.kv_heads, readable), random(shape.kv_heads, readable)
            mask = torch.ones(readable - positions, readable, dtype=torch.bool, device=self._forward.device)
            mask = mask.tril(diagonal=positions)[None, None]
            groups, windows = (
                torch.cat(
                    [
                        attend(part, keys, values, mask_of_group(part_mask, group, shape.dtype), None, apart=apart)
                        for part, part_mask in zip(query.split(size, 2), mask.split(size, 2), strict=True)
                    ],
                    dim=1,
                )
                for size in (width, window)
            )
            if not torch.equal(groups, windows):
                return False
        return True

    def _products_agree(self, rows: int) -> bool:
        """Whether products of so many rows have the bits of products of a window. In half precision most sums are rounded to
        the same number whatever their order, and a few logits do not show it: many random products do."""
        window = self._window
        for layer in self._forward.products():
            dtype = layer.weight.dtype if isinstance(layer, nn.Linear) else layer.dtype
            count = max(rows, window) * max(1, -(-_PRODUCTS // (max(rows, window) * layer.out_features)))
            count = -(-count // math.lcm(rows, window)) * math.lcm(rows, window)
            inputs = torch.randn(count, layer.in_features, generator=torch.Generator().manual_seed(count))
            inputs = inputs.to(self._forward.device, dtype)
            groups, windows = (torch.cat([layer(part) for part in inputs.split(size)]) for size in (rows, window))
            if not torch.equal(groups, windows):
                return False
        return True

    def _windows_agree(self) -> bool:
        """Whether windows that begin elsewhere, and so read another length of the cache, give the same bits.

        On one processor reading 256 or 512 positions gave other bits for the same token, 512 or 1024 the same. Sums
        over zeros would not show it: the cache is filled with random numbers.
        """
        self._forward.cache.fill_at_random()
        half = self._window // 2
        for edge in self._edges():
            apart, _ = self._in_groups(edge - self._window, 2 * self._window, self._window)
            across, _ = self._in_groups(edge - half, self._window, self._window)
            if not torch.equal(apart[self._window - half :][: self._window], across):
                return False
        return True

    def _edges(self) -> list[int]:
        """Where a longer part of the cache is read from: the first and the last."""
        step, capacity = self._forward.read_step, self._forward.cache.capacity
        last = (capacity - self._window) // step * step
        return sorted({step, last}) if last else [capacity // 2]

    def _tokens(self, begin: int, count: int) -> list[int]:
        return [7 * position % self._words for position in range(begin, begin + count)]

    def _in_groups(self, begin: int, count: int, width: int) -> tuple[torch.Tensor, float]:
        """Logits after `count` tokens from position `begin` on, read `width` at a time (keys and values, too), and the
        shortest time that a group took: what disturbs a forward makes it longer."""
        logits, times_s = [], []
        for first in range(begin, begin + count, width):
            tokens = self._tokens(first, min(width, begin + count - first))
            begun = time.perf_counter()
            logits += self._forward([Run(0, tokens, first, width, first)], rows=width, logit_rows=width)
            self._forward.finish()
            times_s.append(time.perf_counter() - begun)
        return torch.cat(logits), min(times_s)

    def _together(self, begin: int, windows: int) -> tuple[torch.Tensor, float]:
        """The same in one forward, in which each window is a run of its own."""
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
