"""Loads a model from its reference: a ModelEngine on our own torch backend."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog
import torch

from dsi_protocol import OptionValue
from dsi_workers.backend import Run
from dsi_workers.checkpoints.load import Loaded
from dsi_workers.checkpoints.sizes import MEMORY_SHARE
from dsi_workers.decoding.capacity import MOST_RUN_ROWS, prompt_chunk_of
from dsi_workers.decoding.cpu.parts import MOST_THREADS
from dsi_workers.decoding.device import keep_freed_memory, torch_device
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.torch_backend import TorchBackend
from dsi_workers.decoding.width_cache import widths_tried
from dsi_workers.decoding.widths import Trial, Widths
from dsi_workers.drafting.lookup import Lookup
from dsi_workers.engine import EngineError, Never
from dsi_workers.engines.calibration import guess_costs_us
from dsi_workers.engines.memory import fit_into_memory
from dsi_workers.engines.model import ModelEngine
from dsi_workers.engines.options import whole_option
from dsi_workers.group.commands import Setup
from dsi_workers.group.loading import load_group, load_whole
from dsi_workers.models.files import read_vocabulary_hash
from dsi_workers.models.resolve import resolve_model

log = structlog.get_logger("dsi.engine")

_MOST_SLOTS = 1024
#: A drafting step has at most 8 rows of one generation: on a CPU each costs nearly as much as the first, and everywhere a branch
#: has a slot of its own. There is room for the branches of two generations: more take turns.
_BRANCH_SLOTS = 2 * 7


def load_model_engine(model: str, *, device: str, drafter: bool, options: Mapping[str, OptionValue]) -> ModelEngine:
    """Load a model and return its engine, warmed up.

    Options: dtype (auto, float32, bfloat16, float16); quantization (none, int8, int4, or auto, which is int8 for a drafter on a
    CPU); window, max_length, slots, threads (whole numbers); prompt_threads (how many threads compute a prompt by our kernels for
    CPUs; by default two, if there are two cores); memory_share (of a GPU's memory, the part that
    is used where slots or max_length is missing: see memory.py); kernels (false: passes are computed by torch's own
    operations, whose bits differ from those of our kernels); calibrate (false: latencies are not measured); adapter (the
    directory of a LoRA adapter to merge into the model). For a drafter also: lookup (true: it checks guesses of prompt lookup
    in its forwards); remember (false: prompt lookup does not look at earlier generations); target (the model whose vocabulary
    the drafter must answer in; see translating.py); layers (keep only so many of the model's layers, the first ones: a faster
    and weaker drafter).

    Raises EngineError and ModelError.
    """
    backend = load_backend(model, device=device, exact=not drafter, options=options)
    lookup = None
    if drafter and options.get("lookup"):
        lookup = Lookup(guess_costs_us(backend), remember=options.get("remember", True) is not False)
    return ModelEngine(
        backend, exact=not drafter, lookup=lookup, calibrate=options.get("calibrate", True) is not False,
        tokenizer=backend.tokenizer,
    )  # fmt: skip


def load_backend(model: str, *, device: str, exact: bool, options: Mapping[str, OptionValue]) -> TorchBackend:
    """Load a model and return its backend, warmed up. For a target (`exact`) it computes with widths whose bits agree. `device`:
    one, or several that compute together, such as "cuda:0,cuda:1".

    Raises EngineError and ModelError.
    """
    log.info("imported")
    devices = device.split(",")
    on = torch_device(devices[0])
    _refuse_mixed(devices, on)
    directory = resolve_model(model, adapter=str(options.get("adapter", "")))
    vocabulary = read_vocabulary_hash(directory)
    if exact and "layers" in options:
        raise EngineError("option layers is for a drafter: a target with fewer layers would give another text")
    window = whole_option(options, "window", 32 if on.type == "cuda" else 8, most=MOST_RUN_ROWS)
    wanted_slots = whole_option(options, "slots", most=_MOST_SLOTS) if "slots" in options else None
    wanted_length = whole_option(options, "max_length") if "max_length" in options else None
    layers = options.get("layers")
    dtype, quantization = str(options.get("dtype", "auto")), _quantization(options, on, exact=exact)
    branch_slots = 0 if exact or options.get("lookup") else _BRANCH_SLOTS
    slots, max_length = fit_into_memory(
        directory, on, reference=model, dtype=dtype, quantization=quantization, layers=layers,
        devices=len(devices), slots=wanted_slots, max_length=wanted_length, branch_slots=branch_slots,
        prompt_chunk=prompt_chunk_of(on.type), share=_share(options),
    )  # fmt: skip
    setup = Setup(
        device=devices[0], threads=whole_option(options, "threads", 1), directory=str(directory), reference=model, dtype=dtype,
        quantization=quantization, rows=window, most_positions=max_length, kernels=options.get("kernels", True) is not False,
        exact=exact, layers=layers, slots=slots + branch_slots,
        prompt_threads=whole_option(options, "prompt_threads", prompt_threads(), most=MOST_THREADS),
    )  # fmt: skip
    loaded, forward = load_group(devices, setup) if len(devices) > 1 else load_whole(setup)
    with ExitStack() as on_error:
        on_error.callback(forward.close)
        log.info("read", model=model)
        keep_freed_memory()
        backend = _backend_of(forward, loaded, setup, exact=exact, branch_slots=branch_slots, vocabulary=vocabulary)
        on_error.pop_all()
    return backend


def _backend_of(
    forward: Forward, loaded: Loaded, setup: Setup, *, exact: bool, branch_slots: int, vocabulary: str
) -> TorchBackend:
    """The backend of a loaded model, warmed up."""
    words, chunk = int(loaded.config.vocab_size), loaded.decoder.prompt_chunk
    slots, window = setup.slots - branch_slots, setup.rows
    widths: Widths | None = None
    if exact:
        trial = Trial(forward, window=window, words=words, name=f"{loaded.config.model_type} on {forward.device}")
        widths = widths_tried(
            forward, Path(setup.directory), window=window, slots=slots, try_them=lambda: trial.widths(slots)
        )
        forward.cache.release(0)
        log.info("bits tried", widths=sorted(widths.costs_s))
    elif forward.device.type == "cpu":
        forward.read_step = 1
    backend = TorchBackend(
        forward, widths, vocabulary=vocabulary, vocabulary_size=words, max_length=loaded.positions, window=window,
        branch_slots=branch_slots, tokenizer=Path(setup.directory) / "tokenizer.json",
    )  # fmt: skip
    prompt = Run(0, [position % 16 for position in range(chunk)], 0, chunk, chunk - 1)
    backend.compute([prompt], Never())
    backend.warm_up()
    return backend


def prompt_threads() -> int:
    """How many threads compute a prompt by our kernels for CPUs, if nobody says. The other cores are for other workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)


def _refuse_mixed(devices: Sequence[str], on: torch.device) -> None:
    """Raise EngineError if the devices of a group are not of one kind, or if a GPU is named twice."""
    if any(not device.startswith(on.type) for device in devices):
        raise EngineError(f"the devices of a group must be of one kind, CPUs or GPUs, not {', '.join(devices)}")
    if on.type == "cuda" and len(set(devices)) < len(devices):
        raise EngineError(f"a group computes on a GPU of its own for each rank, not on {', '.join(devices)}")


def _quantization(options: Mapping[str, OptionValue], device: torch.device, *, exact: bool) -> str:
    """none, int8 or int4. `exact`: for a target."""
    name = str(options.get("quantization", "auto"))
    return name if name != "auto" else "int8" if not exact and device.type == "cpu" else "none"


def _share(options: Mapping[str, OptionValue]) -> float:
    """The option memory_share. Raises EngineError."""
    value = options.get("memory_share", MEMORY_SHARE)
    if type(value) not in (int, float) or not 0 < float(value) <= 1:
        raise EngineError(f"option memory_share must be above 0 and at most 1, not {value!r}")
    return float(value)
