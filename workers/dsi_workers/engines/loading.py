"""Loads a model from its reference: a ModelEngine on our own torch backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog
import torch

from dsi_protocol import OptionValue
from dsi_workers.backend import PROMPT_CHUNK, Run
from dsi_workers.checkpoints.load import load_model, number_type_of
from dsi_workers.checkpoints.sizes import (
    MARGIN,
    cache_bytes,
    gib,
    loading_bytes,
    read_tensors,
    text_config,
    weight_bytes,
)
from dsi_workers.decoding.device import free_bytes, keep_freed_memory, torch_device
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.torch_backend import TorchBackend
from dsi_workers.decoding.width_cache import widths_tried
from dsi_workers.decoding.widths import Trial, Widths
from dsi_workers.drafting.lookup import Lookup
from dsi_workers.engine import EngineError, Never
from dsi_workers.engines.calibration import guess_costs_us
from dsi_workers.engines.model import ModelEngine
from dsi_workers.models.files import read_json, read_vocabulary_hash
from dsi_workers.models.resolve import resolve_model

log = structlog.get_logger("dsi.engine")

_MOST_SLOTS = 1024


def load_model_engine(model: str, *, device: str, drafter: bool, options: Mapping[str, OptionValue]) -> ModelEngine:
    """Load a model and return its engine, warmed up.

    Options: dtype (auto, float32, bfloat16, float16); quantization (none, int8, or auto, which is int8 for a drafter on a CPU,
    where nothing is faster); window, max_length, slots, threads (whole numbers); graphs (false: a GPU computes with torch's own
    operations, whose bits differ from those of our kernels); calibrate (false: latencies are not measured). For a drafter also:
    lookup (true: it checks guesses of prompt lookup in its forwards); remember (false: prompt lookup does not look at earlier
    generations); target (the model whose vocabulary the drafter must answer in; see translating.py).

    Raises EngineError and ModelError.
    """
    backend = load_backend(model, device=device, exact=not drafter, options=options)
    lookup = None
    if drafter and options.get("lookup"):
        lookup = Lookup(guess_costs_us(backend), remember=options.get("remember", True) is not False)
    return ModelEngine(backend, exact=not drafter, lookup=lookup, calibrate=options.get("calibrate", True) is not False)


def load_backend(model: str, *, device: str, exact: bool, options: Mapping[str, OptionValue]) -> TorchBackend:
    """Load a model and return its backend, warmed up. For a target (`exact`) it computes with widths whose bits agree.

    Raises EngineError and ModelError.
    """
    log.info("imported")
    torch.set_num_threads(_whole(options, "threads", 1))
    on = torch_device(device)
    directory = resolve_model(model)
    vocabulary = read_vocabulary_hash(directory)
    window = _whole(options, "window", 32 if on.type == "cuda" else 8, most=PROMPT_CHUNK)
    slots = _whole(options, "slots", 8, most=_MOST_SLOTS)
    max_length = _whole(options, "max_length", 2048)
    dtype, quantization = str(options.get("dtype", "auto")), _quantization(options, on, exact=exact)
    _refuse_if_too_large(
        directory, on, reference=model, dtype=dtype, quantization=quantization, slots=slots, max_length=max_length,
        window=window,
    )  # fmt: skip
    loaded = load_model(
        directory, on, reference=model, dtype=dtype, quantization=quantization, rows=window, most_positions=max_length,
        graphs=options.get("graphs", True) is not False, exact=exact,
    )  # fmt: skip
    log.info("read", model=model)
    keep_freed_memory()
    forward = Forward(
        loaded.decoder, loaded.config, on, slots=slots, capacity=loaded.positions + max(PROMPT_CHUNK, window)
    )
    words = int(loaded.config.vocab_size)
    widths: Widths | None = None
    if exact:
        trial = Trial(forward, window=window, words=words, name=f"{loaded.config.model_type} on {on}")
        widths = widths_tried(forward, directory, window=window, slots=slots, try_them=lambda: trial.widths(slots))
        forward.cache.release(0)
        log.info("bits tried", widths=sorted(widths.costs_s))
    elif on.type == "cpu":
        forward.read_step = 1
    backend = TorchBackend(
        forward, widths, vocabulary=vocabulary, vocabulary_size=words, max_length=loaded.positions, window=window
    )
    prompt = Run(0, [position % 16 for position in range(PROMPT_CHUNK)], 0, PROMPT_CHUNK, PROMPT_CHUNK - 1)
    backend.compute([prompt], Never())
    backend.warm_up()
    return backend


def _refuse_if_too_large(
    directory: Path, device: torch.device, *, reference: str, dtype: str, quantization: str, slots: int, max_length: int,
    window: int,
) -> None:  # fmt: skip
    """Raise EngineError if weights and KV cache are larger than the device's free memory, before any weight is read.

    On a CPU the KV cache takes memory as it fills: there only weights count, and a cache that could not fill is a warning."""
    free = free_bytes(device)
    if free is None:
        return
    number_bytes, int8 = number_type_of(dtype, quantization, device).itemsize, quantization == "int8"
    tensors, config = read_tensors(directory), read_json(directory / "config.json")
    limit = text_config(config).get("max_position_embeddings")
    positions = min(max_length, limit) if type(limit) is int and limit > 0 else max_length
    cache = cache_bytes(config, slots=slots, positions=positions + max(PROMPT_CHUNK, window), number_bytes=number_bytes)
    weights = weight_bytes(tensors, number_bytes, int8=int8)
    # On a GPU int8 weights are made out of whole ones that lie there; on a CPU those may be mapped from the files.
    peak = loading_bytes(tensors, number_bytes) if device.type == "cuda" else 0
    margin = MARGIN * weights
    needed = max(peak, weights + (cache if device.type == "cuda" else 0)) + margin
    if needed > free:
        raise EngineError(
            f"{reference} does not fit {device}: loading and running it takes {gib(needed)} (weights {gib(weights)}, KV cache "
            f"{gib(cache)}{'' if device.type == 'cuda' else ' when full, not counted'}), and {gib(free)} are free; choose fewer "
            "slots, a shorter max_length, another dtype or quantization, or a larger device (one model cannot be split over "
            "several devices yet)"
        )
    if weights + cache + margin > free:
        log.warning(
            "the KV cache cannot fill up in free memory", cache=gib(cache), weights=gib(weights), free=gib(free)
        )


def _quantization(options: Mapping[str, OptionValue], device: torch.device, *, exact: bool) -> str:
    """int8 or none. `exact`: for a target."""
    name = str(options.get("quantization", "auto"))
    return name if name != "auto" else "int8" if not exact and device.type == "cpu" else "none"


def _whole(options: Mapping[str, OptionValue], name: str, default: int, *, most: int = 1 << 24) -> int:
    """The option `name`, a whole number in [1, most]. Raises EngineError."""
    value = options.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise EngineError(f"option {name} must be a whole number in [1, {most}], not {value!r}")
    return value
