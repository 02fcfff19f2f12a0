"""Refuses checkpoints whose quantization would be computed in another way than it was meant.

Where the library turns quantized weights back into plain ones while it reads them, the model computes with those. Everything
else about quantization, such as numbers by which inputs are rounded, would be left out without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dsi_workers.engine import EngineError

COMPRESSED_TENSORS = "compressed-tensors"
#: The experts of gpt-oss are stored in it. They are turned back into plain weights.
MXFP4 = "mxfp4"
_ADVICE = "choose the model without quantization, or one whose weights alone are quantized"


def refuse_quantized_activations(config: Mapping[str, Any], reference: str) -> None:
    """Raise EngineError if the model rounds the inputs of its layers, or its KV cache, by compressed-tensors.

    `config`: quantization_config of config.json.
    """
    if config.get("quant_method") != COMPRESSED_TENSORS:
        return
    groups = config.get("config_groups") or {}
    for name, group in groups.items():
        # A scheme of the library is given by its name, such as FP8_DYNAMIC or W4A16: those that end in A16 round no inputs.
        rounds = (
            any(group.get(side) for side in ("input_activations", "output_activations"))
            if isinstance(group, Mapping)
            else not name.upper().removesuffix("_ASYM").endswith("A16")
        )
        if rounds:
            raise EngineError(
                f"{reference} quantizes the inputs of its layers ({COMPRESSED_TENSORS}, {name}), which this engine does not "
                f"compute: {_ADVICE}"
            )
    if config.get("kv_cache_scheme"):
        raise EngineError(
            f"{reference} quantizes its KV cache ({COMPRESSED_TENSORS}), which this engine does not compute: {_ADVICE}"
        )


def refuse_if_quantized(model: Any, method: str, reference: str) -> None:
    """Raise EngineError if a linear layer of the loaded model is more than a plain product with its weights."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not _is_plain(module):
            raise EngineError(
                f"the weights of {reference} are quantized ({method}), and {name} stays so, which this engine does not "
                f"compute: {_ADVICE}"
            )


def _is_plain(layer: nn.Linear) -> bool:
    own_forward = "forward" in vars(layer)  # what a library puts around the layer's own
    return (
        type(layer) is nn.Linear
        and not own_forward
        and layer.weight.dtype.is_floating_point
        and layer.weight.itemsize > 1
    )
