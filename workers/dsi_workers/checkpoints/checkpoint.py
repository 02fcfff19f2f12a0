"""Reads models of the Llama family from safetensors, without transformers, whose import takes longer than reading them.

`read_checkpoint` returns None for every model with a setting that is not supported here. Then transformers reads the model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_LAYER_WEIGHTS = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_OPTIONAL = ("self_attn.q_norm", "self_attn.k_norm")
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The settings of config.json under their own names, and the weights by name."""

    config: Any
    weights: dict[str, torch.Tensor]

    def rope(self, positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of RoPE, [positions, head_dim] each, computed as in transformers."""
        angles = torch.arange(positions).float()[:, None] * _inverse_frequencies(self.config)[None]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def read_checkpoint(directory: Path, dtype: torch.dtype, device: torch.device) -> Checkpoint | None:
    """Read the model in `directory`. Returns None for a model that must be read by transformers.

    If the device is the CPU and the file has this dtype, weights are memory-mapped instead of copied.
    """
    try:
        raw: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = _plain_config(raw)
    if config is None:
        return None
    weights = _weights(directory, dtype, device)
    if weights is None or not _complete(weights, config):
        return None
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return Checkpoint(config, weights)


def _plain_config(raw: dict[str, Any]) -> Any:
    """The settings that the decoder needs, from the contents of config.json. None if a setting is not supported here."""
    slides = raw.get("sliding_window") and raw.get("use_sliding_window", True)
    kinds = set(raw.get("layer_types") or ())
    known = (
        (raw.get("architectures") or [""])[0] in _ARCHITECTURES
        and raw.get("hidden_act") == "silu"
        and not slides
        and kinds <= {"full_attention"}
        and not any(raw.get(name) for name in ("quantization_config", "auto_map", "partial_rotary_factor"))
    )
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps", "model_type")
    if not known or any(name not in raw for name in (*names, "max_position_embeddings")):
        return None
    if not all(_is_size(raw[name]) for name in _SIZES if raw.get(name) is not None):
        return None
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope.setdefault("rope_theta", raw.get("rope_theta"))
    if rope["rope_type"] not in ("default", "llama3") or not rope["rope_theta"] or rope.get("partial_rotary_factor"):
        return None
    config = SimpleNamespace(**{name: raw[name] for name in names})
    config.max_position_embeddings = raw["max_position_embeddings"]
    config.num_key_value_heads = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    config.head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    config.tie_word_embeddings = bool(raw.get("tie_word_embeddings", False))
    config.rope_parameters = rope
    config.sliding_window, config.layer_types = None, None
    return config


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _weights(directory: Path, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor] | None:
    """All weights by name, or None if they cannot be read."""
    from safetensors import SafetensorError, safe_open

    files = [_SINGLE]
    try:
        if (directory / _INDEX).is_file():
            files = sorted(set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        found: dict[str, torch.Tensor] = {}
        for file in files:
            with safe_open(directory / file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118  `opened` is not a dict and has no iterator
                    tensor: torch.Tensor = opened.get_tensor(name)
                    found[name] = tensor.to(device, dtype) if tensor.is_floating_point() else tensor
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return found


def _complete(weights: dict[str, torch.Tensor], config: Any) -> bool:
    """True if every weight that the model needs is present, and no unknown one."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not config.tie_word_embeddings:
        names.add("lm_head.weight")
    allowed = {*names, "lm_head.weight"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{part}.weight" for part in _LAYER_WEIGHTS}
        allowed |= {f"model.layers.{layer}.{part}.weight" for part in _OPTIONAL}
        allowed |= {f"model.layers.{layer}.{part}.bias" for part in _LAYER_WEIGHTS if part.endswith("_proj")}
        allowed.add(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq")
    # Layers that are computed in one product must all have biases, or none. Likewise for the norms of queries and keys.
    together = [("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
                ("mlp.gate_proj.bias", "mlp.up_proj.bias"), ("self_attn.q_norm.weight", "self_attn.k_norm.weight")]  # fmt: skip
    whole = all(
        sum(f"model.layers.{layer}.{part}" in weights for part in parts) in (0, len(parts))
        for layer in range(config.num_hidden_layers) for parts in together
    )  # fmt: skip
    return whole and names <= weights.keys() <= names | allowed


def _inverse_frequencies(config: Any) -> torch.Tensor:
    """The RoPE frequencies [head_dim / 2].

    With rope type llama3, long wavelengths are stretched by `factor`, short ones are kept, and those between are interpolated.
    """
    rope, dim = config.rope_parameters, config.head_dim
    plain: torch.Tensor = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if rope["rope_type"] == "default":
        return plain
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi / plain
    stretched = torch.where(wavelengths > original / low, plain / factor, plain)
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    in_between = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(in_between, between, stretched)
