"""The text part of models for texts and images, as the model for texts that it is: settings and names of weights.

Each of these models has a text part of the Llama family. Its RoPE turns each pair of numbers by the place of an image's piece in
time, height or width. For texts these are the same number, so that it is the RoPE of a model for texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

#: By `model_type`: the architecture that the text part has, and the `model_type` of the text part. Other text parts are other
#: models: that of Ministral 3 also scales queries by their positions.
_ARCHITECTURES = {
    "mistral3": ("MistralForCausalLM", "mistral"),
    "qwen2_vl": ("Qwen2ForCausalLM", "qwen2_vl_text"),
    "qwen2_5_vl": ("Qwen2ForCausalLM", "qwen2_5_vl_text"),
    "qwen3_vl": ("Qwen3ForCausalLM", "qwen3_vl_text"),
}
#: Beginnings of the names of weights of the text part, and what they are in a model for texts.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
#: What the names of weights of other parts begin with, behind "model." or not.
_OTHER_PARTS = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.")

_Value = TypeVar("_Value")


def settings_of_text_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the text part, from the contents of config.json. Others than those of `has_text_part` are returned
    as they are."""
    if not has_text_part(raw):
        return dict(raw)
    architecture, _ = _ARCHITECTURES[raw["model_type"]]
    inner = raw.get("text_config")
    text = {**raw, **inner} if isinstance(inner, dict) else dict(raw)  # older files have no inner part
    text |= {"architectures": [architecture], "model_type": raw["model_type"]}
    text["tie_word_embeddings"] = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    text.setdefault("hidden_act", "silu")
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(name), dict):
            rope = dict(text[name])
            kind = rope.get("rope_type") or rope.pop("type", None)
            text[name] = {**rope, "rope_type": "default" if kind == "mrope" else kind}
    return text


def names_of_text_part(found: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return what belongs to weights of the text part, under their names in a model for texts."""
    named = {}
    for name, value in found.items():
        if is_of_another_part(name):
            continue
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        named[name if prefix is None else _PREFIXES[prefix] + name.removeprefix(prefix)] = value
    return named


def is_of_another_part(name: str) -> bool:
    """True for the name of a weight with which a model for texts and images reads images."""
    return name.removeprefix("model.").startswith(_OTHER_PARTS)


def has_text_part(raw: Mapping[str, Any]) -> bool:
    """True if config.json is that of a model for texts and images whose text part is a model of the Llama family."""
    kind, inner = str(raw.get("model_type")), raw.get("text_config")
    if kind not in _ARCHITECTURES:
        return False
    _, text_kind = _ARCHITECTURES[kind]
    # Older files have the settings of the text beside the others, or name the whole model in the inner part, too.
    return not isinstance(inner, dict) or inner.get("model_type", kind) in (kind, text_kind)
