"""Reads models of the Llama family from safetensors, without transformers, whose import takes longer than reading them.

Of models for texts and images it reads the text part, if that is of the Llama family (text_part.py).

`read_checkpoint` returns None for every model with a setting that is not supported here. Then transformers reads the model.
Weights that do not fit the settings are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dsi_workers.checkpoints.slices import narrow, part_of, refuse_degree
from dsi_workers.checkpoints.text_part import has_text_part, names_of_text_part, settings_of_text_part
from dsi_workers.decoding.share import Share
from dsi_workers.models.files import read_json, weight_files
from dsi_workers.models.headers import read_tensors
from dsi_workers.models.misfit import refuse_misfit

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "intermediate_size",
)  # fmt: skip

_WHOLE = Share()


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


def read_checkpoint(
    directory: Path, dtype: torch.dtype, device: torch.device, reference: str, share: Share = _WHOLE
) -> Checkpoint | None:
    """Read the model in `directory`, or a rank's share of it. Returns None for a model that must be read by transformers.

    If the device is the CPU and the file has this dtype, weights are memory-mapped instead of copied. Of a weight that is
    divided among ranks only this rank's part is read or mapped. `reference`: the model's name in error messages.

    Raises ModelError if weights are missing, unknown, or of another shape than config.json says, and EngineError if there are too
    many ranks.
    """
    raw = read_json(directory / "config.json")
    config = _plain_config(settings_of_text_part(raw))
    if config is None:
        return None
    of_the_text = names_of_text_part if has_text_part(raw) else dict
    shapes = of_the_text({name: shape for name, (_, shape) in read_tensors(directory).items()})
    _refuse_misfit(config, shapes, reference)
    refuse_degree(config, share.degree, reference)
    weights = _weights(directory, dtype, device, config, share, of_the_text)
    narrow(config, share)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for name, other in ((head, embedding), (embedding, head)):  # one where they are tied
        if name not in weights:
            weights[name] = weights[other]
    return Checkpoint(config, weights)


def _plain_config(raw: dict[str, Any]) -> Any:
    """The settings that the decoder needs, from the contents of config.json. None if a setting is not supported here."""
    slides = raw.get("sliding_window") and raw.get("use_sliding_window", True)
    kinds = set(raw.get("layer_types") or ())
    architecture = (raw.get("architectures") or [""])[0]
    known = (
        architecture in _ARCHITECTURES
        and raw.get("hidden_act") == "silu"
        and not slides
        and kinds <= {"full_attention"}
        and not any(raw.get(name) for name in ("quantization_config", "auto_map", "partial_rotary_factor"))
    )
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps", "model_type",
        "intermediate_size",
    )  # fmt: skip
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
    config.intermediate_size = raw["intermediate_size"]
    config.biases = _biases(raw, architecture)
    config.normalizes_heads = architecture == "Qwen3ForCausalLM"
    config.tie_word_embeddings = bool(raw.get("tie_word_embeddings", False))
    config.rope_parameters = rope
    config.sliding_window, config.layer_types = None, None
    return config


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _weights(
    directory: Path, dtype: torch.dtype, device: torch.device, config: Any, share: Share,
    renamed: Callable[[dict[str, str]], dict[str, str]],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The rank's share of all weights, by name. `renamed`: from the names in the files to those in a model for texts, of which
    weights of other parts have none."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        with safe_open(directory / file, framework="pt", device="cpu") as opened:
            names = {name: name for name in opened.keys()}  # noqa: SIM118  `opened` is not a dict and has no iterator
            for plain, name in renamed(names).items():
                part = part_of(plain, config, share)
                tensor: torch.Tensor
                if part is None:
                    tensor = opened.get_tensor(name)
                elif not part[1]:
                    continue
                else:
                    rows = slice(part[1].start, part[1].stop)
                    tensor = opened.get_slice(name)[rows if part[0] == 0 else (slice(None), rows)]
                found[plain] = tensor.to(device, dtype) if tensor.is_floating_point() else tensor
    return found


def _refuse_misfit(config: Any, found: Mapping[str, Sequence[int]], reference: str) -> None:
    """Raise ModelError if the tensors, given by name and shape, are not those that the model has by its settings."""
    required: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size), "model.norm.weight": (config.hidden_size,),
    }  # fmt: skip
    head = {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    allowed: dict[str, tuple[int, ...]] = {}
    if not config.tie_word_embeddings:
        required |= head
    elif "model.embed_tokens.weight" in found:
        allowed |= head
    else:  # either of the two names will do
        required = {**head, "model.norm.weight": (config.hidden_size,)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        required |= {prefix + name: shape for name, shape in _layer_shapes(config).items()}
        allowed[f"{prefix}self_attn.rotary_emb.inv_freq"] = (config.head_dim // 2,)
    known = allowed | required
    refuse_misfit(
        reference,
        missing=required.keys() - found.keys(),
        unexpected=found.keys() - known.keys(),
        mismatched=[
            (name, found[name], shape) for name, shape in known.items() if name in found and tuple(found[name]) != shape
        ],
        words=config.vocab_size,
    )


def _layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The weights of each layer, as transformers' classes have them."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    matrices = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {f"{name}.bias": matrices[name][:1] for name in matrices if name.endswith(config.biases)}
    shapes |= {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    if config.normalizes_heads:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def _biases(raw: dict[str, Any], architecture: str) -> tuple[str, ...]:
    """Endings of the names of matrices that have a bias."""
    if architecture == "Qwen2ForCausalLM":
        return ("q_proj", "k_proj", "v_proj")
    names: tuple[str, ...] = ()
    if raw.get("attention_bias") and architecture != "MistralForCausalLM":
        names += ("q_proj", "k_proj", "v_proj", "o_proj")
    if raw.get("mlp_bias") and architecture == "LlamaForCausalLM":
        names += ("gate_proj", "up_proj", "down_proj")
    return names


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
