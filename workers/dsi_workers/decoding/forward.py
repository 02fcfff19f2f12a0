"""One forward of a model over runs of positions of one or several generations, packed one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dsi_workers.backend import Run
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.decoding.packed import Packed, Segment
from dsi_workers.engine import Interrupt, Never

#: The readable part of the cache grows in steps of so many positions, if that keeps the bits: shorter reads, few shapes.
READ_STEP = 512


@dataclass(frozen=True, slots=True)
class AttentionShape:
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype


class ComputesLogits(Protocol):
    """A Decoder, a LibraryDecoder or a GpuDecoder."""

    dtype: torch.dtype
    #: Forwards of so many rows are recorded when they are first computed, others are widened to these; more rows are computed
    #: in another way, as prompts are. Empty: none is recorded.
    recorded_rows: Sequence[int]
    #: A run takes a multiple of so many rows.
    group_rows: int
    #: Whether attention and norms do not depend on the number of rows: kernels of our own are made so.
    sums_in_one_order: bool

    def __call__(self, packed: Packed, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        """Logits [len(packed.kept), vocabulary]."""

    def products(self) -> list[Any]:
        """What multiplies by weights: called with [rows, in_features] of its dtype."""


class Forward:
    """A loaded model as a function of runs. Interrupted between layers; then no run has been computed."""

    def __init__(
        self, decoder: ComputesLogits, config: Any, device: torch.device, *, slots: int, capacity: int
    ) -> None:
        self._decoder = decoder
        self._config = config
        self.device = device
        self.interrupt: Interrupt = Never()
        #: Forwards so far.
        self.count = 0
        #: The cache is read up to the next multiple of this.
        self.read_step = READ_STEP
        #: Attention of each position is computed by itself: where the bits depend on what is beside it.
        self.attends_apart = False
        self.cache = SlotCache(int(config.num_hidden_layers), slots=slots, capacity=_round_up(capacity, READ_STEP))

    @torch.inference_mode()
    def __call__(self, runs: Sequence[Run], *, rows: int, logit_rows: int) -> list[torch.Tensor]:
        """For each run the logits [n, vocabulary] after the inputs that it wants them for.

        The forward has `rows` rows, at least as many as the runs together, and computes logits for at least
        `logit_rows` of them: the bits of a matrix product may depend on how many rows it has.
        """
        self.interrupt.check()
        self.count += 1
        ids, positions, segments, wanted = list[int](), list[int](), list[Segment](), list[int]()
        for run in runs:
            readable = min(_round_up(run.begin + run.width, self.read_step), self.cache.capacity)
            segments.append(Segment(run.slot, run.begin, run.width, readable, run.fork))
            wanted += [len(ids) + position - run.begin for position in run.wanted]
            ids += [*run.tokens, *[0] * (run.width - len(run.tokens))]
            positions += range(run.begin, run.begin + run.width)
        padding = [0] * (rows - len(ids))
        ids, positions = ids + padding, positions + padding
        kept = wanted + [0] * max(logit_rows - len(wanted), not wanted)
        self.cache.segments = segments
        logits = self._decoder(
            Packed(ids, positions, segments, kept, self.attends_apart), self.cache, self.interrupt.check
        )
        return list(logits[: len(wanted)].split([len(run.wanted) for run in runs]))

    def timed_s(self, runs: Sequence[Run], *, rows: int, logit_rows: int) -> float:
        """How long a forward takes, to the end: on a GPU a call returns before."""
        begun = time.perf_counter()
        self(runs, rows=rows, logit_rows=logit_rows)
        self.finish()
        return time.perf_counter() - begun

    def finish(self) -> None:
        """Wait until what was launched is computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def products(self) -> list[Any]:
        """One of each shape."""
        return list({(layer.in_features, layer.out_features): layer for layer in self._decoder.products()}.values())

    @property
    def recorded_rows(self) -> Sequence[int]:
        return self._decoder.recorded_rows

    def rows_of(self, run: Run) -> int:
        """What it takes of the most rows that a forward may have."""
        return _round_up(run.width, self._decoder.group_rows)

    @property
    def sums_in_one_order(self) -> bool:
        return self._decoder.sums_in_one_order

    @property
    def decoder_kind(self) -> str:
        return type(self._decoder).__name__

    @property
    def attention_shape(self) -> AttentionShape:
        config = self._config
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return AttentionShape(heads, kv_heads, dim, self._decoder.dtype)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
