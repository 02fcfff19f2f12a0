"""Refuses a model that does not fit its device, before any weight is read."""

from __future__ import annotations

from pathlib import Path

import structlog
import torch

from dsi_protocol import OptionValue
from dsi_workers.checkpoints.load import number_type_of
from dsi_workers.checkpoints.sizes import (
    MARGIN,
    cache_bytes,
    gib,
    loading_bytes,
    of_first_layers,
    prompt_bytes,
    read_tensors,
    text_config,
    weight_bytes,
)
from dsi_workers.decoding.capacity import slot_positions
from dsi_workers.decoding.device import free_bytes
from dsi_workers.engine import EngineError
from dsi_workers.models.files import read_json

log = structlog.get_logger("dsi.engine")


def refuse_if_too_large(
    directory: Path, device: torch.device, *, reference: str, dtype: str, quantization: str, layers: OptionValue | None,
    slots: int, max_length: int, prompt_chunk: int,
) -> None:  # fmt: skip
    """Raise EngineError if weights, KV cache and a chunk of a prompt are larger than the device's free memory.

    On a CPU the KV cache takes memory as it fills. There only the weights count, and a cache that could not fill is a warning.
    `reference`: the model's name in error messages. `layers`: only so many are kept; None: all. `slots`: with those for branches.
    `prompt_chunk`: positions of a chunk of a prompt.
    """
    number_bytes, int8 = number_type_of(dtype, quantization, device).itemsize, quantization == "int8"
    tensors, config = read_tensors(directory), text_config(read_json(directory / "config.json"))
    if type(layers) is int:
        config = {**config, "num_hidden_layers": min(layers, config.get("num_hidden_layers", layers))}
    limit = config.get("max_position_embeddings")
    positions = min(max_length, limit) if type(limit) is int and limit > 0 else max_length
    positions = slot_positions(positions, prompt_chunk)
    cache = cache_bytes(config, slots=slots, positions=positions, number_bytes=number_bytes)
    prompt = prompt_bytes(config, rows=prompt_chunk, positions=positions, number_bytes=number_bytes, int8=int8)
    weights = weight_bytes(of_first_layers(tensors, layers), number_bytes, int8=int8)
    # On a GPU int8 weights are made out of whole ones that lie there; on a CPU those may be mapped from the files.
    peak = loading_bytes(tensors, number_bytes) if device.type == "cuda" else 0
    margin = MARGIN * weights
    needed = max(peak, weights + (cache + prompt if device.type == "cuda" else 0)) + margin
    free = free_bytes(device)
    if needed > free:
        raise EngineError(
            f"{reference} does not fit {device}: loading and running it takes {gib(needed)} (weights {gib(weights)}, KV cache "
            f"{gib(cache)}{f', a chunk of a prompt {gib(prompt)}' if device.type == 'cuda' else ' when full, not counted'}), and "
            f"{gib(free)} are free; choose fewer slots, a shorter max_length, another dtype or quantization, or a larger device "
            "(one model cannot be split over several devices yet)"
        )
    if weights + cache + margin > free:
        log.warning(
            "the KV cache cannot fill up in free memory", cache=gib(cache), weights=gib(weights), free=gib(free)
        )
