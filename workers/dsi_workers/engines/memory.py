"""Chooses `slots` and `max_length` by the device's memory, and refuses a model that does not fit, before any weight is read."""

from __future__ import annotations

from pathlib import Path

import structlog
import torch

from dsi_protocol import OptionValue
from dsi_workers.checkpoints.load import number_type_of
from dsi_workers.checkpoints.sizes import (
    MARGIN,
    Needs,
    gib,
    loading_bytes,
    of_first_layers,
    of_first_rank,
    text_config,
    weight_bytes,
)
from dsi_workers.decoding.device import free_bytes, total_bytes
from dsi_workers.decoding.quantization import BITS
from dsi_workers.engine import EngineError
from dsi_workers.models.files import read_json
from dsi_workers.models.headers import read_tensors

log = structlog.get_logger("dsi.engine")


def fit_into_memory(
    directory: Path, device: torch.device, *, reference: str, dtype: str, quantization: str, layers: OptionValue | None,
    slots: int | None, max_length: int | None, branch_slots: int, prompt_chunk: int, share: float, devices: int = 1,
) -> tuple[int, int]:  # fmt: skip
    """Return `slots` and `max_length`, chosen where they are None. Raise EngineError if the model does not fit the device's free
    memory with them.

    On a GPU the whole KV cache is there from the start. What is chosen takes no more than `share` of the GPU's memory. On a CPU
    the KV cache takes memory as it fills. There only the weights must fit, a length that is chosen lets all slots fill up, and a
    cache that could not is a warning.

    `reference`: the model's name in error messages. `layers`: only so many are kept; None: all. `devices`: the model is
    divided among so many, of which each GPU needs its part only; CPUs share their memory. `branch_slots`: those of a
    drafter's branches. `prompt_chunk`: positions of a chunk of a prompt.
    """
    number_bytes, bits = number_type_of(dtype, quantization, device).itemsize, BITS[quantization]
    tensors, config = read_tensors(directory), text_config(read_json(directory / "config.json"))
    if type(layers) is int:
        config = {**config, "num_hidden_layers": min(layers, config.get("num_hidden_layers", layers))}
    if device.type == "cuda":
        tensors, config = of_first_rank(tensors, config, devices)
    weights = weight_bytes(of_first_layers(tensors, layers), number_bytes, bits=bits)
    margin, free, gpu = MARGIN * weights, free_bytes(device), device.type == "cuda"
    needs = Needs(config, weights + margin, number_bytes, branch_slots, prompt_chunk, gpu=gpu, bits=bits)
    if gpu:
        slots, max_length = needs.on_a_gpu(min(free, share * total_bytes(device)), slots, max_length)
    else:
        slots, max_length = needs.on_a_cpu(free, slots, max_length)
    cache, total = needs.cache(slots, max_length), needs.total(slots, max_length)
    prompt, buffers = needs.prompt(max_length), needs.buffers(max_length)
    # On a GPU int8 weights are made out of whole ones that lie there; on a CPU those may be mapped from the files.
    peak = loading_bytes(tensors, number_bytes) + margin if gpu else 0
    needed = max(peak, total if gpu else needs.fixed)
    log.info(
        "memory", slots=slots, max_length=max_length, weights=gib(weights), kv_cache=gib(cache), prompt=gib(prompt),
        margin=gib(margin + buffers), free=gib(free),
    )  # fmt: skip
    if needed > free:
        more = f", a chunk of a prompt {gib(prompt)}" if gpu else " when full, not counted"
        raise EngineError(
            f"{reference} does not fit {device}: loading and running it takes {gib(needed)} (weights {gib(weights)}, KV cache "
            f"{gib(cache)} for slots {slots} and max_length {max_length}{more}), and {gib(free)} are free; choose fewer slots, a "
            "shorter max_length, another dtype or quantization, a larger device, or several together (--gpu 0,1)"
        )
    if total > free:
        log.warning(
            "the KV cache cannot fill up in free memory", cache=gib(cache), weights=gib(weights), free=gib(free)
        )
    return slots, max_length
