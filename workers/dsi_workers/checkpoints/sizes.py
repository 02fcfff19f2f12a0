"""How many bytes a model's weights and KV cache take, and how many generations of which length fit a device, computed before any
weight is read.

`python -m dsi_workers.checkpoints.sizes` prints the tables of docs/sizes.md.
"""

from __future__ import annotations

import math
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dsi_protocol import OptionValue
from dsi_workers.checkpoints.slices import narrow, part_of
from dsi_workers.decoding.capacity import GPU_PROMPT_CHUNK, full_lengths, slot_positions
from dsi_workers.decoding.gpu import MOST_ROWS, SPLIT_POSITIONS
from dsi_workers.decoding.share import Share
from dsi_workers.models.headers import FLOAT_BYTES, Tensors

GIB = 1 << 30
#: For activations of a few rows and the allocator's rounding, as a part of the weights. An estimate.
MARGIN = 0.03
#: Slots of a worker, unless more fit a GPU. A GPU has that many before its texts are longer than LEAST_LENGTH.
SLOTS = 8
#: The most slots that are chosen for a GPU.
MOST_SLOTS = 64
#: Where `max_length` is not given, it is at least this, or the model's own limit.
LEAST_LENGTH = 2048
#: The part of a GPU's memory that a worker takes where `slots` or `max_length` is not given. The rest is for CUDA itself and
#: the recorded graphs.
MEMORY_SHARE = 0.9
#: What cuBLAS takes for itself (torch gives it 32 MiB on Hopper, for each of its two interfaces).
_WORKSPACE_BYTES = 64 << 20
#: The most rows of a chunk of a prompt whose logits are computed: two windows, when a worker tries whether bits agree.
_LOGIT_ROWS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that decide how many bytes a model of the Llama family takes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    words: int
    tied: bool
    #: The longest text of the model.
    positions: int = 131072

    def tensors(self) -> Tensors:
        """The tensors of such a model, in bfloat16."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.words, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.words, self.hidden)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        of_a_layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, self.hidden), "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden), "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden), "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,), "post_attention_layernorm": (self.hidden,),
        }  # fmt: skip
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_a_layer.items()}
        return {name: ("BF16", shape) for name, shape in shapes.items()}

    def config(self) -> Mapping[str, Any]:
        """The sizes by their names in config.json."""
        return {
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.words, "max_position_embeddings": self.positions,
        }  # fmt: skip


#: The models of docs/sizes.md.
SHAPES = {
    "1B (Llama 3.2)": Shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "3B (Llama 3.2)": Shape(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    "8B (Llama 3.1)": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "14B (Qwen3)": Shape(5120, 17408, 40, 40, 8, 128, 151936, tied=False, positions=40960),
    "32B (Qwen3)": Shape(5120, 25600, 64, 64, 8, 128, 151936, tied=False, positions=40960),
    "70B (Llama 3.1)": Shape(8192, 28672, 80, 64, 8, 128, 128256, tied=False),
}


def of_first_layers(tensors: Tensors, layers: OptionValue | None) -> Tensors:
    """`tensors` without those of later layers than the first `layers`; None: all."""
    if type(layers) is not int:
        return tensors
    found = {name: re.search(r"\.layers\.(\d+)\.", name) for name in tensors}
    return {name: tensors[name] for name, layer in found.items() if layer is None or int(layer[1]) < layers}


def of_first_rank(tensors: Tensors, config: Mapping[str, Any], degree: int) -> tuple[Tensors, Mapping[str, Any]]:
    """Tensors and sizes of rank 0 of so many, which has the largest part. `config`: from config.json. The whole where it does not
    say all sizes."""
    heads, kv_heads, head_dim = _heads(config)
    inner, words = _size(config, "intermediate_size"), _size(config, "vocab_size")
    if degree == 1 or not (heads and kv_heads and head_dim and inner and words):
        return tensors, config
    share, found = Share(0, degree), dict(tensors)
    sizes = SimpleNamespace(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=words,
    )
    for name, (kind, shape) in tensors.items():
        if (part := part_of(name, sizes, share)) is not None:
            found[name] = kind, (*shape[: part[0]], len(part[1]), *shape[part[0] + 1 :])
    narrow(sizes, share)
    return found, {**config, **vars(sizes), "intermediate_size": len(share.of(inner))}


def loading_bytes(tensors: Tensors, number_bytes: int) -> int:
    """Bytes of all weights in a number type of `number_bytes` bytes, as they are read: int8 is made out of them."""
    return sum(math.prod(shape) * number_bytes for _, shape in _weights(tensors))


def weight_bytes(tensors: Tensors, number_bytes: int, *, bits: int | None = None) -> int:
    """Bytes of all weights in use. The matrices of products may be quantized, in 8 or 4 `bits` a weight: with 8 there is one
    number a row, and with 4 a byte for each eight weights. Embeddings and norms stay in the number type. A tied output matrix is
    then a copy of its own."""
    if bits is None:
        return loading_bytes(tensors, number_bytes)
    tied = "lm_head.weight" not in tensors
    return sum(_quantized_bytes(name, shape, number_bytes, tied, bits) for name, shape in _weights(tensors))


def _weights(tensors: Tensors) -> Iterator[tuple[str, Sequence[int]]]:
    """Names and shapes of the weights that the model has in use. MXFP4 keeps two in a byte, in blocks."""
    for name, (kind, shape) in tensors.items():
        if kind in FLOAT_BYTES:
            yield name, shape
        elif kind == "U8" and name.endswith("_blocks"):
            yield name, (*shape[:-2], 2 * math.prod(shape[-2:]))


def _quantized_bytes(name: str, shape: Sequence[int], number_bytes: int, tied: bool, bits: int) -> int:
    whole = math.prod(shape) * number_bytes
    # Three dimensions: experts, whose matrices lie either way round.
    rows = shape[0] * (max(shape[1:]) if len(shape) == 3 else 1) if shape else 0
    quantized = math.prod(shape) + rows * number_bytes if bits == 8 else math.prod(shape) * 5 // 8
    if name.endswith("embed_tokens.weight"):
        return whole + quantized if tied else whole
    return quantized if len(shape) in (2, 3) else whole


def cache_bytes(config: Mapping[str, Any], *, slots: int, positions: int, number_bytes: int) -> int:
    """Bytes of keys and values of `slots` generations of up to `positions` positions; 0 if config.json (`config`) does not
    say how large they are."""
    heads, kv_heads, head_dim = _heads(config := text_config(config))
    numbers = 2 * kv_heads * head_dim
    if plain := _size(config, "qk_nope_head_dim"):  # latent attention: keys and values are kept in their expanded form
        numbers = heads * (plain + _size(config, "qk_rope_head_dim") + _size(config, "v_head_dim"))
    return slots * positions * _size(config, "num_hidden_layers") * numbers * number_bytes


def buffer_bytes(config: Mapping[str, Any], *, positions: int, number_bytes: int) -> int:
    """Bytes of what a GPU keeps between the kernels of a forward of MOST_ROWS rows (decoding/gpu/decoder.py), and of RoPE's
    tables. For each part of the KV cache that attention reads there is a partial result of each row and head."""
    heads, kv_heads, head_dim = _heads(config := text_config(config))
    widths = (_size(config, name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    numbers = sum(widths) + (2 * heads + 4 * kv_heads) * head_dim
    partial = 4 * heads * -(-positions // SPLIT_POSITIONS) * (head_dim + 2)
    partial += _mixture_row_bytes(config, number_bytes)
    return MOST_ROWS * (number_bytes * numbers + partial) + 2 * positions * head_dim * number_bytes


def prompt_bytes(config: Mapping[str, Any], *, rows: int, positions: int, number_bytes: int, quantized: bool) -> int:
    """Bytes that a chunk of `rows` positions of a prompt takes on a GPU while it is computed, in a slot of `positions` positions.

    It grows with the slot only where torch's operations compute instead of our kernels: these need masks of all that may be read.
    """
    heads, kv_heads, head_dim = _heads(config := text_config(config))
    hidden, inner, words = (_size(config, f"{name}_size") for name in ("hidden", "intermediate", "vocab"))
    activations = 4 * hidden + (3 * heads + 2 * kv_heads) * head_dim + 3 * inner
    mask = positions * (1 + (heads // kv_heads if kv_heads else 1) * number_bytes) + _mixture_row_bytes(
        config, number_bytes
    )
    # Quantized weights become numbers of the other type for each product, the largest of which is that of gate and up.
    whole = 2 * inner * hidden * number_bytes if quantized else 0
    return rows * (activations * number_bytes + mask) + _LOGIT_ROWS * words * number_bytes + whole + _WORKSPACE_BYTES


def _mixture_row_bytes(config: Mapping[str, Any], number_bytes: int) -> int:
    """Bytes that a row takes between the kernels of a mixture of experts (decoding/gpu/experts.py); 0 for a dense model."""
    experts = _size(config, "num_experts") or _size(config, "num_local_experts")
    top_k, hidden = _size(config, "num_experts_per_tok"), _size(config, "hidden_size")
    inner = _size(config, "moe_intermediate_size") or _size(config, "intermediate_size")
    # Router logits, choices and list of each expert; then factor, inner numbers and output of each choice.
    return (4 + 1 + 4) * experts + top_k * (4 + inner * number_bytes + 4 * hidden) if experts else 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model needs, for a rule that chooses `slots` and `max_length` by the memory that there is."""

    config: Mapping[str, Any]
    #: Bytes of weights and margin.
    fixed: float
    number_bytes: int
    #: Slots beside those of generations, for the branches of a drafter.
    branch_slots: int
    #: Positions of a chunk of a prompt.
    prompt_chunk: int
    #: A GPU also needs buffers and a chunk of a prompt. On a CPU these are part of the margin.
    gpu: bool
    #: Of a quantized weight.
    bits: int | None = None

    @property
    def limit(self) -> int | None:
        """The model's own limit for a text, in positions. None if config.json does not name it."""
        return _size(text_config(self.config), "max_position_embeddings") or None

    def cache(self, slots: int, max_length: int) -> int:
        """Bytes of the KV cache."""
        slots, positions = slots + self.branch_slots, slot_positions(max_length, self.prompt_chunk)
        return cache_bytes(self.config, slots=slots, positions=positions, number_bytes=self.number_bytes)

    def buffers(self, max_length: int) -> int:
        """Bytes of the buffers of forwards of a few rows."""
        positions = slot_positions(max_length, self.prompt_chunk)
        return buffer_bytes(self.config, positions=positions, number_bytes=self.number_bytes) if self.gpu else 0

    def prompt(self, max_length: int) -> int:
        """Bytes of a chunk of a prompt."""
        rows, positions = self.prompt_chunk, slot_positions(max_length, self.prompt_chunk)
        more = {"positions": positions, "number_bytes": self.number_bytes}
        return prompt_bytes(self.config, rows=rows, quantized=self.bits is not None, **more) if self.gpu else 0

    def total(self, slots: int, max_length: int) -> float:
        """Bytes of everything."""
        return self.fixed + self.cache(slots, max_length) + self.buffers(max_length) + self.prompt(max_length)

    def longest(self, slots: int, usable: float) -> int:
        """The longest `max_length` with which so many slots take no more than `usable` bytes: the model's limit, or as many
        positions as whole steps of a slot hold. At least LEAST_LENGTH or the model's limit, whether these fit or not."""
        if (limit := self.limit) is None:
            return LEAST_LENGTH
        lengths = full_lengths(limit)
        fit = bisect_right(lengths, usable, key=lambda length: self.total(slots, length))
        found = limit if self.total(slots, limit) <= usable else lengths[fit - 1] if fit else 0
        return max(found, min(limit, LEAST_LENGTH))

    def most_slots(self, max_length: int, usable: float) -> int:
        """As many slots as take no more than `usable` bytes: at least 1, whether it fits or not, and at most MOST_SLOTS."""
        slots = range(1, MOST_SLOTS + 1)
        return max(1, bisect_right(slots, usable, key=lambda number: self.total(number, max_length)))

    def on_a_gpu(self, usable: float, slots: int | None = None, max_length: int | None = None) -> tuple[int, int]:
        """`slots` and `max_length` for a GPU; None: to be chosen. Texts are as long as SLOTS generations fit, then there are as
        many slots as fit."""
        if self.cache(1, 1) == 0:  # config.json does not say how large it is
            return slots or SLOTS, self.within_limit(max_length or LEAST_LENGTH)
        length = self.within_limit(max_length or self.longest(slots or SLOTS, usable))
        return slots or self.most_slots(length, usable), length

    def on_a_cpu(self, usable: float, slots: int | None = None, max_length: int | None = None) -> tuple[int, int]:
        """`slots` and `max_length` for a CPU; None: to be chosen. Texts are as long as the model allows, or a half, a quarter and
        so on of that, until all slots can fill up. In such steps small changes of free memory seldom change the length."""
        slots = slots or SLOTS
        if max_length is not None or self.limit is None:
            return slots, self.within_limit(max_length or LEAST_LENGTH)
        length = self.limit
        while length > LEAST_LENGTH and self.total(slots, length) > usable:
            length = max(length // 2, LEAST_LENGTH)
        return slots, length

    def within_limit(self, max_length: int) -> int:
        return max_length if self.limit is None else min(max_length, self.limit)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, KV heads, and the size of a head. 0 if config.json does not say it."""
    heads = _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim") or (_size(config, "hidden_size") // heads if heads else 0)
    return heads, _size(config, "num_key_value_heads") or heads, head_dim


def _size(config: Mapping[str, Any], name: str) -> int:
    """0 if it is missing or no size."""
    value = config.get(name)
    return value if type(value) is int and value > 0 else 0


def gib(count: float) -> str:
    """Bytes as GiB with one digit."""
    return f"{count / GIB:.1f} GiB"


def table() -> Iterator[str]:
    """The lines of the table of bytes of docs/sizes.md."""
    yield (
        "| shape | weights, bfloat16 | weights, int8 | KV cache, 8 × 2048 | KV cache, 8 × 32768 "
        "| bfloat16 and 8 × 2048 | bfloat16 and 8 × 32768 |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name, shape in SHAPES.items():
        needs, weights = _target_on_a_gpu(shape)
        int8 = weight_bytes(shape.tensors(), 2, bits=8)
        found = [needs.cache(8, length) for length in (2048, 32768)]
        found_total = [needs.total(8, length) for length in (2048, 32768)]
        yield f"| {name} | {' | '.join(map(gib, (weights, int8, *found, *found_total)))} |"


def table_of_choices() -> Iterator[str]:
    """The lines of the table of docs/sizes.md that shows `slots` × `max_length` as a target on a GPU of its own chooses them."""
    devices = (24, 40, 80, 141)
    yield f"| shape | {' | '.join(f'{size} GB' for size in devices)} |"
    yield "|---|---|---|---|---|"
    for name, shape in SHAPES.items():
        needs, found = _target_on_a_gpu(shape)[0], list[str]()
        for usable in (MEMORY_SHARE * size * 1e9 for size in devices):
            slots, length = needs.on_a_gpu(usable)
            found.append(f"{slots} × {length}" if needs.total(slots, length) <= usable else "no")
        yield f"| {name} | {' | '.join(found)} |"


def _target_on_a_gpu(shape: Shape) -> tuple[Needs, int]:
    """What such a model needs in bfloat16, and the bytes of its weights."""
    weights = weight_bytes(shape.tensors(), 2)
    return Needs(shape.config(), weights * (1 + MARGIN), 2, 0, GPU_PROMPT_CHUNK, gpu=True), weights


if __name__ == "__main__":
    sys.stdout.write("\n".join((*table(), "", *table_of_choices(), "")))
