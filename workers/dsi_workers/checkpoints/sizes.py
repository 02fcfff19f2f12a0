"""How many bytes a model's weights and KV cache take, computed before any weight is read.

`python -m dsi_workers.checkpoints.sizes` prints the table of docs/sizes.md.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dsi_protocol import OptionValue
from dsi_workers.decoding.capacity import GPU_PROMPT_CHUNK, slot_positions
from dsi_workers.models.files import ModelError, weight_files

GIB = 1 << 30
#: For activations of a few rows and the allocator's rounding, as a part of the weights. An estimate.
MARGIN = 0.03
#: What cuBLAS takes for itself (torch gives it 32 MiB on Hopper, for each of its two interfaces).
_WORKSPACE_BYTES = 64 << 20
#: The most rows whose logits are computed at a time.
_LOGIT_ROWS = 64
_HEADER_LIMIT_BYTES = 100_000_000
#: Bytes of each number type that safetensors names and that is loaded in another one.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

#: For each tensor its name in safetensors' header ("F32", "BF16", ...) of the number type, and its shape.
Tensors: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]


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


#: The models of docs/sizes.md.
SHAPES = {
    "1B (Llama 3.2)": Shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "3B (Llama 3.2)": Shape(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    "8B (Llama 3.1)": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "14B (Qwen3)": Shape(5120, 17408, 40, 40, 8, 128, 151936, tied=False),
    "32B (Qwen3)": Shape(5120, 25600, 64, 64, 8, 128, 151936, tied=False),
    "70B (Llama 3.1)": Shape(8192, 28672, 80, 64, 8, 128, 128256, tied=False),
}


def read_tensors(directory: Path) -> Tensors:
    """Number types and shapes of all weights of the model in `directory`: only headers are read. Raises ModelError."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in weight_files(directory):
        try:
            with (directory / name).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(min(length, _HEADER_LIMIT_BYTES)))
            found |= {
                tensor: (str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for tensor, entry in header.items()
                if tensor != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"the header of {directory / name} is damaged: fetch the model again") from None
    return found


def of_first_layers(tensors: Tensors, layers: OptionValue | None) -> Tensors:
    """`tensors` without those of later layers than the first `layers`; None: all."""
    if type(layers) is not int:
        return tensors
    found = {name: re.search(r"\.layers\.(\d+)\.", name) for name in tensors}
    return {name: tensors[name] for name, layer in found.items() if layer is None or int(layer[1]) < layers}


def loading_bytes(tensors: Tensors, number_bytes: int) -> int:
    """Bytes of all weights in a number type of `number_bytes` bytes, as they are read: int8 is made out of them."""
    return sum(math.prod(shape) * number_bytes for kind, shape in tensors.values() if kind in _FLOATS)


def weight_bytes(tensors: Tensors, number_bytes: int, *, int8: bool = False) -> int:
    """Bytes of all weights in use. With `int8` the matrices of products take a byte a weight and one number a row;
    embeddings and norms stay in the number type. A tied output matrix is then a copy of its own, in int8."""
    if not int8:
        return loading_bytes(tensors, number_bytes)
    tied = "lm_head.weight" not in tensors
    return sum(
        _int8_bytes(name, shape, number_bytes, tied) for name, (kind, shape) in tensors.items() if kind in _FLOATS
    )


def _int8_bytes(name: str, shape: tuple[int, ...], number_bytes: int, tied: bool) -> int:
    whole = math.prod(shape) * number_bytes
    quantized = math.prod(shape) + shape[0] * number_bytes if shape else 0
    if name.endswith("embed_tokens.weight"):
        return whole + quantized if tied else whole
    return quantized if len(shape) == 2 else whole


def cache_bytes(config: Mapping[str, Any], *, slots: int, positions: int, number_bytes: int) -> int:
    """Bytes of keys and values of `slots` generations of up to `positions` positions; 0 if config.json (`config`) does not
    say how large they are."""
    config = text_config(config)
    _, kv_heads, head_dim = _heads(config)
    return slots * positions * _size(config, "num_hidden_layers") * 2 * kv_heads * head_dim * number_bytes


def prompt_bytes(config: Mapping[str, Any], *, rows: int, positions: int, number_bytes: int, int8: bool) -> int:
    """Bytes that a chunk of `rows` positions of a prompt takes on a GPU while it is computed, in a slot of `positions` positions.

    It grows with the slot only where torch's operations compute instead of our kernels: these need masks of all that may be read.
    """
    config = text_config(config)
    hidden, inner, words = (_size(config, f"{name}_size") for name in ("hidden", "intermediate", "vocab"))
    heads, kv_heads, head_dim = _heads(config)
    activations = 4 * hidden + (3 * heads + 2 * kv_heads) * head_dim + 3 * inner
    mask = positions * (1 + (heads // kv_heads if kv_heads else 1) * number_bytes)
    # Weights in int8 become numbers of the other type for each product, the largest of which is that of gate and up.
    whole = 2 * inner * hidden * number_bytes if int8 else 0
    return rows * (activations * number_bytes + mask) + _LOGIT_ROWS * words * number_bytes + whole + _WORKSPACE_BYTES


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, KV heads and the size of a head; 0 for what config.json does not say."""
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    head_dim = _size(config, "head_dim") or (hidden // heads if heads else 0)
    return heads, _size(config, "num_key_value_heads") or heads, head_dim


def _size(config: Mapping[str, Any], name: str) -> int:
    """0 if it is missing or no size."""
    value = config.get(name)
    return value if type(value) is int and value > 0 else 0


def gib(count: float) -> str:
    """Bytes as GiB with one digit."""
    return f"{count / GIB:.1f} GiB"


def table() -> Iterator[str]:
    """The lines of the table of docs/sizes.md."""
    yield (
        "| shape | weights, bfloat16 | weights, int8 | KV cache, 8 × 2048 | KV cache, 8 × 32768 "
        "| bfloat16 and 8 × 2048 | bfloat16 and 8 × 32768 |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name, shape in SHAPES.items():
        weights, int8 = (weight_bytes(shape.tensors(), 2, int8=int8) for int8 in (False, True))
        config = {
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
            "vocab_size": shape.words,
        }  # fmt: skip
        lengths = [slot_positions(length, GPU_PROMPT_CHUNK) for length in (2048, 32768)]
        short, long = (cache_bytes(config, slots=8, positions=length, number_bytes=2) for length in lengths)
        prompts = (
            prompt_bytes(config, rows=GPU_PROMPT_CHUNK, positions=length, number_bytes=2, int8=False)
            for length in lengths
        )
        needs = (weights * (1 + MARGIN) + cache + prompt for cache, prompt in zip((short, long), prompts, strict=True))
        yield f"| {name} | {' | '.join(map(gib, (weights, int8, short, long, *needs)))} |"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in table())
