"""Which models the transformers engine is exact for. What it would compute wrongly it refuses, before loading weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dsi_workers.engine import EngineError

#: Models that name a sliding window and do not use it.
_OTHER_MASKS = {"moshi"}


def refuse_if_not_rewindable(config: Any, reference: str) -> None:
    """Raise EngineError for models that keep a running state (SSM, linear attention): rejecting a token cannot be
    undone there, and transformers' own rewind leaves such a state silently wrong (5.23)."""
    layer_types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    try:
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise EngineError(
            f"{reference} is a {config.model_type!r} model: no causal language model in transformers"
        ) from None
    if getattr(model_class, "_is_stateful", False) or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise EngineError(
            f"{reference} ({config.model_type}) keeps a running state that cannot be rewound when a draft is rejected: "
            "choose a model with attention layers only"
        )
    if not layer_types <= {"full_attention", "sliding_attention"} or config.model_type in _OTHER_MASKS:
        raise EngineError(f"{reference} ({config.model_type}) uses attention masks that this engine does not have")


def position_limit(config: Any) -> int:
    """How many positions the model is exact for. Longrope changes the rotation of *all* positions once a sequence is
    longer than the original limit: cached keys would then be wrong."""
    limit = int(getattr(config, "max_position_embeddings", None) or 2048)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in ropes.values() if all(isinstance(value, dict) for value in ropes.values()) else [ropes]:
        if rope.get("rope_type") == "longrope":
            original: Any = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", limit
            )
            limit = min(limit, int(original))
    return limit
