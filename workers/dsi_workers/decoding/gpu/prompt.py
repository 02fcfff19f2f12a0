"""Computes a chunk of a prompt on a GPU, where arithmetic takes the time and not the reading of weights.

The products and attention are the library's: cuBLAS and flash attention. For one shape they sum in one order. The shapes are a
function of the chunk alone, that is, of its first position and its width: a chunk is never computed together with other rows, and
is padded to a multiple of ROW_TILE rows. Everything else is computed row by row. So the bits of a prompt are a function of the
prompt, whatever is computed before, after or in other slots. A worker tries this when it starts (decoding/widths.py).

Each layer takes nine calls. Python makes them ahead of the device, but not far ahead: see `_Queue`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import triton
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, CausalVariant

from dsi_workers.decoding.capacity import ROW_TILE, round_up
from dsi_workers.decoding.decoder import Decoder, DenseMlp, Layer
from dsi_workers.decoding.gpu import MOST_ROWS
from dsi_workers.decoding.gpu.experts import ExpertBuffers, GpuExperts
from dsi_workers.decoding.gpu.linear import GpuLinear
from dsi_workers.decoding.gpu.prompt_kernels import (
    GATE_ROWS,
    ROPE_ROWS,
    apply_rope_and_store_chunk,
    multiply_by_silu,
)
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.decoding.packed import PackedBatch

#: Without cuDNN, which chooses its kernels by heuristics that promise no fixed choice. The last one is for other devices and
#: shapes than the first two know.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
#: The device computes one of these layers while the other is queued: Python needs less time to launch the next.
_UNFINISHED_LAYERS = 2
#: Numbers of a row that one program of `multiply_by_silu` computes.
_GATE_BLOCK = 512


class PromptDecoder:
    """Computes what `decoder` computes, for one run of many positions.

    `head`: the output matrix, for the kernels. `experts`: of each layer; None for a layer with a dense MLP.
    """

    def __init__(self, decoder: Decoder, head: GpuLinear, experts: Sequence[GpuExperts | None]) -> None:
        self._decoder, self._head, self._experts = decoder, head, experts

    def __call__(self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        """Compute one forward pass of one segment. Returns the logits of the rows that are wanted, [rows, vocabulary].

        Also stores keys and values for the padding, at the positions behind the segment.
        """
        decoder = self._decoder
        [segment] = packed.segments
        assert segment.fork is None, "a branch is never as long as a chunk of a prompt"
        padding = [0] * (round_up(segment.width, ROW_TILE) - segment.width)
        ids = _to_device([*packed.ids[: segment.width], *padding], decoder.device)
        chunk = _Chunk(decoder, segment.position, len(ids), cache.capacity)
        mixture = self._mixture_inputs(segment.width, len(ids))
        queue = _Queue(decoder.device)
        x = functional.embedding(ids, decoder.embedding)
        states = x.new_empty(1, decoder.kv_heads, 1, decoder.dim)
        with sdpa_kernel(_ATTENTION):
            for layer, experts, cache_layer in zip(decoder.layers, self._experts, cache.layers, strict=True):
                between_layers()
                keys, values = cache_layer.tensors(states, states)
                self._apply_attention(x, layer, keys[segment.slot], values[segment.slot], chunk)
                if experts is not None and mixture is not None:
                    experts.add_to(x, *mixture, of_prompt=True)
                else:
                    self._apply_dense(x, layer)
                queue.add_layer()
        wanted = [row for row in packed.logits_to_keep if row >= 0]
        return self._logits(x[_to_device(wanted, x.device)]) if wanted else x.new_empty(0, self._head.out_features)

    def _mixture_inputs(self, width: int, rows: int) -> tuple[torch.Tensor, ExpertBuffers] | None:
        """The inputs of mixtures of experts for `rows` rows, of which the first `width` are no padding; None: there are none."""
        experts = [each for each in self._experts if each is not None]
        if not experts:
            return None
        positions = torch.arange(rows, dtype=torch.int32, device=self._decoder.device)
        return positions.masked_fill_(positions >= width, -1), ExpertBuffers(experts, rows, self._decoder.device)

    def _apply_attention(
        self, x: torch.Tensor, layer: Layer, keys: torch.Tensor, values: torch.Tensor, chunk: _Chunk
    ) -> None:
        """Apply the attention of a layer to x [rows, hidden], in place. keys, values: the slot's, [kv_heads, capacity, dim]."""
        qkv = layer.qkv.forward(self._normed(x, layer.input_norm))
        self._apply_rope_and_store(qkv, layer, keys, values, chunk)
        _add_product(x, layer.output, chunk.attend(qkv, layer, keys, values))

    def _apply_dense(self, x: torch.Tensor, layer: Layer) -> None:
        """Apply the dense MLP of a layer to x [rows, hidden], in place."""
        assert isinstance(layer.mlp, DenseMlp)
        gate_up = layer.mlp.gate_up.forward(self._normed(x, layer.mlp_norm))
        inner = gate_up.shape[1] // 2
        gated = gate_up.new_empty(len(x), inner)
        multiply_by_silu[(len(x) // GATE_ROWS, triton.cdiv(inner, _GATE_BLOCK))](
            gate_up, gated, inner, block_rows=GATE_ROWS, block=_GATE_BLOCK, num_warps=4
        )
        _add_product(x, layer.mlp.down, gated)

    def _apply_rope_and_store(
        self, qkv: torch.Tensor, layer: Layer, keys: torch.Tensor, values: torch.Tensor, chunk: _Chunk
    ) -> None:
        decoder = self._decoder
        query_norm = decoder.norm if layer.query_norm is None else layer.query_norm
        key_norm = decoder.norm if layer.key_norm is None else layer.key_norm
        apply_rope_and_store_chunk[(len(qkv) // ROPE_ROWS, decoder.heads + 2 * decoder.kv_heads)](
            qkv, decoder.cos, decoder.sin, keys, values, query_norm, key_norm, decoder.epsilon, chunk.begin, keys.shape[1],
            len(decoder.cos) - 1, heads=decoder.heads, kv_heads=decoder.kv_heads, dim=decoder.dim,
            normed=layer.query_norm is not None, block_rows=ROPE_ROWS, block_half=triton.next_power_of_2(decoder.dim // 2),
            num_warps=4,
        )  # fmt: skip

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """The kernels for few rows compute the output matrix, as they do for later positions: mostly, one row is wanted."""
        return torch.cat([self._head(part) for part in self._normed(x, self._decoder.norm).split(MOST_ROWS)])

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._decoder.epsilon)


class _Chunk:
    """Attention of the positions [begin, begin + rows) to all before them and among one another.

    No mask is made for layers that read all positions: the kernel knows that the rows are the last of the positions. A layer with
    a sliding window needs a mask once the window has left position 0. It covers the window and the chunk only.
    """

    def __init__(self, decoder: Decoder, begin: int, rows: int, capacity: int) -> None:
        assert begin + rows <= capacity
        self.begin, self._end = begin, begin + rows
        self._decoder = decoder
        self._causal = _Causal(CausalVariant.LOWER_RIGHT, rows, self._end)
        self._window = decoder.masks.sliding_window
        self._sliding: torch.Tensor | None = None
        #: The first position that a layer with a sliding window reads, or one before it: shapes stay multiples of a tile.
        self._first = 0
        if self._window and self._window < self._end:
            self._first = max(0, begin + 1 - self._window) // ROW_TILE * ROW_TILE
            places = torch.arange(self._first, self._end, device=decoder.device)
            rows_at = torch.arange(begin, self._end, device=decoder.device)[:, None]
            visible = (places <= rows_at) & (places > rows_at - self._window)
            self._sliding = torch.zeros(visible.shape, dtype=decoder.dtype, device=decoder.device)
            self._sliding.masked_fill_(~visible, -torch.inf)

    def attend(self, qkv: torch.Tensor, layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the attention output [rows, heads * dim].

        Each KV head is an element of a batch, with the query heads that share it. Its keys are read by all of them without a
        copy, by whichever kernel.
        """
        rows, decoder = len(qkv), self._decoder
        group = decoder.heads // decoder.kv_heads
        queries = qkv[:, : decoder.heads * decoder.dim].unflatten(1, (decoder.kv_heads, group, decoder.dim))
        sliding = self._sliding if decoder.masks.sliding_window_of(layer.kind) else None
        first = 0 if sliding is None else self._first
        key, value = (each[:, None, first : self._end].expand(-1, group, -1, -1) for each in (keys, values))
        output = functional.scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3), key, value, attn_mask=self._causal if sliding is None else sliding,
            scale=decoder.scaling,
        )  # fmt: skip
        return output.permute(2, 0, 1, 3).reshape(rows, -1)


class _Causal(CausalBias):
    """Tells scaled_dot_product_attention which positions a row reads, without a mask. torch's own class takes memory for one."""

    def __new__(cls, *arguments: object) -> _Causal:
        return torch.empty(0).as_subclass(cls)


class _Queue:
    """Keeps Python from queueing many layers on the device, where no cancel stops them.

    When the interrupt is checked, at most `_UNFINISHED_LAYERS` layers are unfinished. A cancel that comes just after the check
    finds one more. How long these three take, for an 8B shape in bfloat16 and a chunk of 1,024 positions: a layer has 218
    million weights, so 0.45 TFLOP, and at the end of a text of 32,768 positions another 0.55 TFLOP of attention. At 600 and
    350 TFLOP/s (H100) these are 0.75 and 1.6 ms. So the device is free after 2.3 ms in a short text, and after 7 ms in that
    long one. At 200 and 150 TFLOP/s (A100) it is 7 and 18 ms. A chunk of 512 positions takes half as long.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events = deque[torch.cuda.Event]()

    def add_layer(self) -> None:
        """Call after each layer. Waits until few enough layers are queued."""
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            if len(self._events) > _UNFINISHED_LAYERS:
                self._events.popleft().synchronize()


def _to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Copy the numbers to the device without waiting for what is queued there."""
    made = torch.tensor(numbers, dtype=torch.long)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def _add_product(x: torch.Tensor, linear: nn.Module, inputs: torch.Tensor) -> None:
    """Add the linear layer's output for `inputs` to x, in place."""
    if not isinstance(linear, nn.Linear):
        x.add_(linear.forward(inputs))
        return
    x.addmm_(inputs, linear.weight.t())
    if linear.bias is not None:
        x.add_(linear.bias)
