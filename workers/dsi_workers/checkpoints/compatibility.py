"""Refuses models that the engine would compute wrongly, before their weights are loaded."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from dsi_workers.engine import EngineError

#: Kinds of attention whose masks this engine has, as `layer_types` in config.json names them.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
#: Layers of transformers' cache by name, since older versions do not have them all. A DummyLayer stands for a layer that reads
#: the keys and values of an earlier one.
_CACHES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
#: Model types whose configuration names a sliding window that their attention does not use.
_OTHER_MASKS = {"moshi"}
#: Model types that have a running state only if a layer is no attention layer.
_STATE_BY_LAYER = {"granitemoehybrid"}


def refuse_if_not_rewindable(config: Any, reference: str) -> None:
    """Raise EngineError for a model that cannot go back after a rejected draft, or whose attention masks are not supported.

    Models with a running state (SSM, linear attention) cannot remove a token from it. transformers' own rewind leaves such a
    state wrong without an error (version 5.23).
    """
    layer_types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    try:
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        if type(config) in AutoModelForImageTextToText._model_mapping:
            raise EngineError(
                f"{reference} ({config.model_type}) is a model for texts and images whose text part this engine "
                "cannot run alone: choose a model for texts, or one that docs/models.md lists"
            ) from None
        raise EngineError(
            f"{reference} is a {config.model_type!r} model, which is not a causal language model in transformers: "
            "choose another model"
        ) from None
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    state = getattr(model_class, "_is_stateful", False) and not (
        config.model_type in _STATE_BY_LAYER and layer_types <= _ATTENTION
    )
    if state or any(issubclass(kind, LinearAttentionCacheLayerMixin) for kind in kinds):
        raise EngineError(
            f"{reference} ({config.model_type}) keeps a running state that cannot be rewound when a draft is rejected: "
            "choose a model with attention layers only"
        )
    known = {kind.__name__ for kind in kinds} <= _CACHES and layer_types <= _ATTENTION
    if not known or config.model_type in _OTHER_MASKS:
        raise EngineError(
            f"{reference} ({config.model_type}) has layers that choose in a way of their own which earlier tokens they read, and "
            "this engine does not have that way: choose a model of another architecture"
        )


def position_limit(config: Any) -> int:
    """The most positions of a text that the model computes exactly.

    With rope type longrope, a text longer than the original limit changes the rotation of *all* positions. Keys in the
    cache would then be wrong, so the original limit applies.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or 2048)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in ropes.values() if all(isinstance(value, dict) for value in ropes.values()) else [ropes]:
        if rope.get("rope_type") == "longrope":
            original: Any = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", limit
            )
            limit = min(limit, int(original))
    return limit
