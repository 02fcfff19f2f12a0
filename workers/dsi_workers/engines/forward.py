"""One forward of a model over runs of positions of one or several generations, packed one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dsi_workers.engines.base import Interrupt
from dsi_workers.kv_cache import Segment, SlotCache

#: The readable part of the cache grows in steps of so many positions, if that keeps the bits: shorter reads, few shapes.
READ_STEP = 512


class Never:
    """The interrupt of warm-up: nothing interrupts it."""

    def check(self) -> None:
        pass

    def wait_until(self, deadline_s: float) -> None:
        time.sleep(max(0.0, deadline_s - time.perf_counter()))


@dataclass(frozen=True, slots=True)
class Run:
    """Inputs [begin, begin + len(tokens)) of the generation in `slot`, computed as `width` rows, padding included."""

    slot: int
    tokens: Sequence[int]
    begin: int
    width: int
    #: Logits are wanted after each input from this position on.
    first_logits: int

    @property
    def wanted(self) -> range:
        end = self.begin + len(self.tokens)
        return range(min(max(self.first_logits, self.begin), end), end)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype


class ComputesLogits(Protocol):
    """A Decoder or a LibraryDecoder."""

    dtype: torch.dtype
    needs_masks: bool

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        masks: torch.Tensor | Mapping[str, torch.Tensor] | None,
        cache: SlotCache,
        kept: torch.Tensor,
        between_layers: Callable[[], None],
    ) -> torch.Tensor:
        """Logits [len(kept), vocabulary] of the rows in `kept`, of ids and positions [rows]. Masks [1, 1, rows, readable] are
        True where a row may read; None: each may read all."""

    def linear_layers(self) -> list[nn.Module]: ...


class Forward:
    """A loaded model as a function of runs. Interrupted between layers; then no run has been computed."""

    def __init__(
        self,
        decoder: ComputesLogits,
        config: Any,
        device: torch.device,
        *,
        slots: int,
        capacity: int,
        last_position: int,
    ) -> None:
        self._decoder = decoder
        self._config = config
        self.device = device
        #: Padding may lie beyond the last position that the model knows, or where its rope would change for all.
        self._last_position = last_position
        self.interrupt: Interrupt = Never()
        #: Forwards so far.
        self.count = 0
        #: The cache is read up to the next multiple of this.
        self.read_step = READ_STEP
        self.cache = SlotCache(int(config.num_hidden_layers), slots=slots, capacity=_round_up(capacity, READ_STEP))

    @torch.inference_mode()
    def __call__(self, runs: Sequence[Run], *, rows: int, logit_rows: int) -> list[torch.Tensor]:
        """For each run the logits [n, vocabulary] after the inputs that it wants them for.

        The forward has `rows` rows, at least as many as the runs together, and computes logits for at least
        `logit_rows` of them: the bits of a matrix product may depend on how many rows it has.
        """
        self.interrupt.check()
        self.count += 1
        ids = torch.zeros(rows, dtype=torch.long)
        positions = torch.zeros(rows, dtype=torch.long)
        segments, wanted, row = [], [], 0
        for run in runs:
            readable = min(_round_up(run.begin + run.width, self.read_step), self.cache.capacity)
            segments.append(Segment(run.slot, run.begin, run.width, readable))
            ids[row : row + len(run.tokens)] = torch.tensor(run.tokens)
            positions[row : row + run.width] = torch.arange(run.begin, run.begin + run.width)
            wanted += [row + position - run.begin for position in run.wanted]
            row += run.width
        kept = wanted + [0] * max(logit_rows - len(wanted), not wanted)
        self.cache.segments = segments
        positions = positions.to(self.device)
        logits = self._decoder(
            ids.to(self.device),
            positions.clamp(max=self._last_position),
            self._masks(positions, segments),
            self.cache,
            torch.tensor(kept, device=self.device),
            self.interrupt.check,
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

    def linear_layers(self) -> list[Any]:
        """One of each shape."""
        layers: list[Any] = list(self._decoder.linear_layers())
        return list({(layer.in_features, layer.out_features): layer for layer in layers}.values())

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

    def _masks(
        self, positions: torch.Tensor, segments: Sequence[Segment]
    ) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """Boolean masks [1, 1, rows, readable]: input at position p reads positions [0, p], or the last `window`. None where
        each may read all that is read for it."""
        window: int = getattr(self._config, "sliding_window", None) or 0
        kinds = set(getattr(self._config, "layer_types", None) or ())
        slides = window > 0 and (not kinds or "sliding_attention" in kinds)
        last_ones = all(segment.width == 1 and segment.readable == segment.position + 1 for segment in segments)
        if last_ones and not slides and not self._decoder.needs_masks:
            return None
        slots = torch.arange(max(segment.readable for segment in segments), device=self.device)
        full: torch.Tensor = slots[None, :] <= positions[:, None]
        if not slides:
            return full[None, None]
        sliding: torch.Tensor = (full & (slots[None, :] > positions[:, None] - window))[None, None]
        if not kinds:
            return sliding
        return {"full_attention": full[None, None], "sliding_attention": sliding}


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
