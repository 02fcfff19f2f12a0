"""A forward pass of a model over runs of positions, of one or several generations, packed one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from dsi_protocol import SamplingParameters
from dsi_workers.backend import Run
from dsi_workers.decoding.attention import AttentionShape
from dsi_workers.decoding.capacity import READ_STEP, round_up
from dsi_workers.decoding.kernel_agreement import batches_agree, kernels_agree
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.decoding.packed import PackedBatch, Segment
from dsi_workers.engine import Interrupt, Never


class ComputesLogits(Protocol):
    """Computes logits from packed rows: a Decoder, a TransformersDecoder or a GpuDecoder."""

    dtype: torch.dtype
    #: Numbers of rows for which CUDA graphs are recorded, at first use. Fewer rows are padded to the next of these numbers.
    #: More rows, as of a prompt, are computed without graphs. Empty: there are no graphs.
    recorded_rows: Sequence[int]
    #: Positions of a chunk of a prompt (capacity.py).
    prompt_chunk: int
    #: True if the bits of attention and norms do not depend on the number of rows. Our GPU kernels guarantee this.
    batch_invariant: bool

    @property
    def attention_shapes(self) -> Sequence[AttentionShape]:
        """The kinds of attention in the model."""

    def __call__(self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        """Compute one forward pass. Returns logits [len(packed.logits_to_keep), vocabulary], or only those of rows >= 0.

        `between_layers` is called repeatedly during the pass. An exception that it raises ends the pass.
        """

    def linear_layers(self) -> list[Any]:
        """Linear layers of every shape in the model, and other layers whose bits must not depend on the number of rows. Each maps
        [rows, in_features] to [rows, out_features]."""


@runtime_checkable
class DraftsTokens(Protocol):
    """A decoder that also chooses tokens, on its device."""

    #: The most tokens that `draft` chooses in one call.
    most_drafts: int

    def draft(
        self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None],
        parameters: Sequence[SamplingParameters], *, count: int, words: int,
    ) -> list[list[int]] | None:  # fmt: skip
        """See `Forward.draft`."""


class Forward:
    """Runs forward passes of a loaded model. An interrupt takes effect between layers; then no run counts as computed."""

    def __init__(
        self, decoder: ComputesLogits, config: Any, device: torch.device, *, slots: int, capacity: int
    ) -> None:
        self._decoder = decoder
        self.device = device
        self.interrupt: Interrupt = Never()
        #: Devices that compute a pass together.
        self.devices = 1
        #: Forward passes so far.
        self.count = 0
        #: The cache is read up to the next multiple of this many positions.
        self.read_step = READ_STEP
        #: Compute attention for each position by itself. Needed where its bits would depend on the other rows.
        self.attends_per_position = False
        self.cache = SlotCache(int(config.num_hidden_layers), slots=slots, capacity=round_up(capacity, READ_STEP))

    @torch.inference_mode()
    def __call__(self, runs: Sequence[Run], *, rows: int, logit_rows: int) -> list[torch.Tensor]:
        """Compute one forward pass. Returns logits [len(run.wanted), vocabulary] for each run.

        The pass has `rows` rows, at least as many as the runs together. It computes logits for at least `logit_rows` rows.
        The caller chooses both numbers, because the bits of a matrix product may depend on its number of rows.
        """
        self.interrupt.check()
        self.count += 1
        packed = self._pack(runs, rows, logit_rows)
        logits = self._decoder(packed, self.cache, self.interrupt.check)
        lengths = [len(run.wanted) for run in runs]
        return list(logits[: sum(lengths)].split(lengths))

    @torch.inference_mode()
    def draft(
        self, runs: Sequence[Run], parameters: Sequence[SamplingParameters], *, count: int, words: int
    ) -> list[list[int]] | None:
        """Compute `count` forward passes, each from the tokens that were chosen after the one before.

        `runs` have one row each. Returns `count` tokens below `words` for each of them, chosen by its parameters, most of them as
        `Sampler` chooses: guesses for a target. At most `most_drafts` tokens. None: these parameters need the logits.
        """
        self.interrupt.check()
        assert isinstance(self._decoder, DraftsTokens)
        packed = self._pack(runs, len(runs), len(runs))
        drafted = self._decoder.draft(packed, self.cache, self.interrupt.check, parameters, count=count, words=words)
        self.count += 0 if drafted is None else count
        return drafted

    @property
    def most_drafts(self) -> int:
        """The most tokens that `draft` chooses in one call. 1: the decoder has no `draft`."""
        return self._decoder.most_drafts if isinstance(self._decoder, DraftsTokens) else 1

    def _pack(self, runs: Sequence[Run], rows: int, logit_rows: int) -> PackedBatch:
        ids, positions, segments, wanted = list[int](), list[int](), list[Segment](), list[int]()
        used = list[int]()
        for run in runs:
            readable = min(round_up(run.begin + run.width, self.read_step), self.cache.capacity)
            segments.append(Segment(run.slot, run.begin, run.width, readable, run.fork))
            wanted += [len(ids) + position - run.begin for position in run.wanted]
            used += range(len(ids), len(ids) + len(run.tokens))
            ids += [*run.tokens, *[0] * (run.width - len(run.tokens))]
            positions += range(run.begin, run.begin + run.width)
        padding = [0] * (rows - len(ids))
        ids, positions = ids + padding, positions + padding
        kept = wanted + [-1] * max(logit_rows - len(wanted), not wanted)
        self.cache.segments = segments
        return PackedBatch(ids, positions, segments, kept, used, self.attends_per_position)

    def timed_s(self, runs: Sequence[Run], *, rows: int, logit_rows: int) -> float:
        """Seconds of one forward pass, until the device has finished it. On a GPU, the call itself returns earlier."""
        begun = time.perf_counter()
        self(runs, rows=rows, logit_rows=logit_rows)
        self.finish()
        return time.perf_counter() - begun

    def finish(self) -> None:
        """Wait until the device has finished all launched work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """End what computes beside this process."""
        return None

    def linear_layers(self) -> list[Any]:
        """One linear layer of each kind and shape in the model."""
        layers = self._decoder.linear_layers()
        return list({(type(layer), layer.in_features, layer.out_features): layer for layer in layers}.values())

    def kernels_agree(self, rows: int, window: int) -> bool:
        """True if each kind of kernel, given random inputs of this many rows, has the bits of a full window."""
        return kernels_agree(self, rows, window)

    def batches_agree(self, rows: int, window: int) -> bool:
        """True if what computes each row by itself gives `rows` rows the bits of full windows."""
        return batches_agree(self, rows, window)

    @property
    def recorded_rows(self) -> Sequence[int]:
        return self._decoder.recorded_rows

    @property
    def prompt_chunk(self) -> int:
        return self._decoder.prompt_chunk

    @property
    def batch_invariant(self) -> bool:
        return self._decoder.batch_invariant

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.dtype

    @property
    def decoder_kind(self) -> str:
        return type(self._decoder).__name__

    @property
    def attention_shapes(self) -> Sequence[AttentionShape]:
        return self._decoder.attention_shapes
