"""A decoder for a GPU: seven kernels per layer, recorded once as CUDA graphs and replayed.

In a forward pass of a few rows, reading the weights takes nearly all of the time; gaps between kernels would waste it. So
there are only seven kernels per layer (kernels.py), or eleven with a mixture of experts (experts.py). Python launches none of
them (recording.py). A drafter's tokens are chosen on the device, too (drafts.py). A single run of more than MOST_RUN_ROWS rows,
as of a prompt, is computed by library calls (prompt.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsi_protocol import SamplingParameters
from dsi_workers.decoding.attention import AttentionShape
from dsi_workers.decoding.capacity import GPU_PROMPT_CHUNK, MOST_RUN_ROWS, ROW_TILE
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.gpu import MOST_ROWS
from dsi_workers.decoding.gpu.drafts import MOST_DRAFTS, Drafts, can_draft
from dsi_workers.decoding.gpu.kernels import LEAST_ROWS, SPLIT
from dsi_workers.decoding.gpu.linear import GpuLinear, rows_for
from dsi_workers.decoding.gpu.prompt import PromptDecoder
from dsi_workers.decoding.gpu.recording import Buffers, LayerLinears, Part, Recording, mlps
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.decoding.packed import PackedBatch, Segment


class GpuDecoder:
    """Computes what `decoder` computes, from the same weights and the same KV cache, with our own GPU kernels."""

    recorded_rows: Sequence[int] = (16, 32, 64, 128, MOST_ROWS)
    batch_invariant = True
    most_drafts = MOST_DRAFTS

    def __init__(self, decoder: Decoder, *, prompt_chunk: int = GPU_PROMPT_CHUNK) -> None:
        self._decoder, self.prompt_chunk = decoder, prompt_chunk
        self._linear_layers = [LayerLinears(layer, decoder.epsilon) for layer in decoder.layers]
        self._head = GpuLinear(decoder.head)
        self._prompt_decoder = PromptDecoder(decoder, self._head, [layer.experts for layer in self._linear_layers])
        self._recordings: dict[int, Recording] = {}
        self._drafts: dict[Recording, Drafts] = {}
        self._buffers: Buffers | None = None
        self._pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None
        self.dtype = decoder.dtype

    @property
    def attention_shapes(self) -> Sequence[AttentionShape]:
        return self._decoder.attention_shapes

    def linear_layers(self) -> list[Any]:
        first = self._linear_layers[0]
        return [first.qkv, first.output, *mlps(self._linear_layers), self._head]

    def experts_read(self) -> list[int]:
        """How many experts the last forward read in each layer that is a mixture. Waits for the device."""
        return [int((layer.experts.counts > 0).sum()) for layer in self._linear_layers if layer.experts is not None]

    def __call__(self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        """Compute one forward pass. Returns logits [len(packed.logits_to_keep), vocabulary], or only those of rows >= 0."""
        used = sum(segment.width for segment in packed.segments)
        if len(packed.segments) == 1 and used > MOST_RUN_ROWS:
            return self._prompt_decoder(packed, cache, between_layers)
        assert used <= MOST_ROWS, (
            "a batch that is too wide for the kernels would have different bits than its runs have alone"
        )
        return self._recording(rows_for(used), cache).compute(between_layers, packed)

    def draft(
        self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None],
        parameters: Sequence[SamplingParameters], *, count: int, words: int,
    ) -> list[list[int]] | None:  # fmt: skip
        """See `Forward.draft`."""
        if len(packed.segments) > MOST_ROWS or not can_draft(parameters):
            return None
        recording = self._recording(rows_for(len(packed.segments)), cache)
        drafts = self._drafts.get(recording)
        if drafts is None:
            drafts = self._drafts[recording] = Drafts(recording, self._capture)
        return drafts.draft(packed, parameters, count=count, words=words, between=between_layers)

    def _recording(self, rows: int, cache: SlotCache) -> Recording:
        recording = self._recordings.get(rows)
        if recording is None or recording.cache is not cache:
            if self._buffers is None or self._buffers.cache is not cache:
                self._buffers = Buffers(self._decoder, self._linear_layers, self._head, cache)
            if recording is not None:
                self._drafts.pop(recording, None)
            recording = self._recordings[rows] = Recording(
                self._decoder, self._linear_layers, self._head, self._buffers, rows
            )
            recording.record(self._capture)
        return recording

    @torch.inference_mode()
    def check_kernels(self) -> None:
        """Compile and run every kernel once.

        Raises the error of Triton or CUDA if that fails: for example, there is no C compiler, or too little shared memory.
        """
        cache = SlotCache(len(self._linear_layers), slots=1, capacity=SPLIT.value)
        buffers = Buffers(self._decoder, self._linear_layers, self._head, cache)
        Recording(self._decoder, self._linear_layers, self._head, buffers, LEAST_ROWS).record(lambda part: part)
        ids = [0] * ROW_TILE
        segments = cache.segments = [Segment(0, 0, len(ids), len(ids))]
        rows = range(len(ids))
        self._prompt_decoder(PackedBatch(ids, rows, segments, [0], rows), cache, lambda: None)
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize()

    def _capture(self, part: Part) -> Part:
        """Return the part as a CUDA graph. Without a GPU, return it unchanged."""
        if self._pool is None:
            return part
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            part()
        return graph.replay
