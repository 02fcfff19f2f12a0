"""Loads the engine `llama-cpp`: a ModelEngine on llama.cpp, for GGUF files on a CPU. Their weights stay quantized."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict

import psutil
import structlog

from dsi_protocol import OptionValue
from dsi_workers.decoding.trial_cache import keep_trial, read_trial
from dsi_workers.drafting.lookup import Lookup
from dsi_workers.engine import EngineError
from dsi_workers.engines.calibration import guess_costs_us
from dsi_workers.engines.model import ModelEngine
from dsi_workers.engines.options import whole_option
from dsi_workers.llama.backend import LlamaBackend
from dsi_workers.llama.files import gguf_file
from dsi_workers.llama.library import Context, Model, Settings, build
from dsi_workers.llama.widths import BOUNDARY, Agreement, Trial, best_agreement
from dsi_workers.models.conversion import identity
from dsi_workers.models.files import read_vocabulary_hash
from dsi_workers.models.resolve import resolve_model

log = structlog.get_logger("dsi.engine")

_SLOTS, _MOST_SLOTS = 4, 64
_WINDOW, _MOST_WINDOW = 8, 64
#: llama.cpp gives each sequence a multiple of this many positions.
_STEP = 256
#: What is chosen of the free memory for the KV cache, which llama.cpp takes at once.
_CACHE_SHARE = 0.25


def load_llama_engine(model: str, *, device: str, drafter: bool, options: Mapping[str, OptionValue]) -> ModelEngine:
    """Load a GGUF file and return its engine, warmed up.

    Options: quantization (none; f16, q8_0, q4_0 or another kind of llama.cpp; int8, which is q8_0 for wider weights);
    flash_attention (true or false; by default the faster one that keeps the bits); window, max_length, slots, threads, calibrate,
    lookup, remember and target as for the engine transformers (loading.py).

    Raises EngineError and ModelError.
    """
    if not device.startswith("cpu"):
        raise EngineError(
            f"the engine llama-cpp computes on a CPU, not on {device}: give --gpu cpu, or the engine transformers"
        )
    threads = whole_option(options, "threads", 1)
    window = whole_option(options, "window", _WINDOW, most=_MOST_WINDOW)
    slots = whole_option(options, "slots", _SLOTS, most=_MOST_SLOTS)
    directory = resolve_model(model, tokenizer_only=True)
    file = gguf_file(model, str(options.get("quantization", "none")), threads)
    with ExitStack() as on_error:
        weights = Model(file)
        on_error.callback(weights.close)
        if weights.keeps_a_state:
            raise EngineError(
                f"{file.name} has a recurrent state, from which rejected drafts cannot be removed: choose another model"
            )
        log.info("read", model=model)
        max_length, chunk = _max_length(options, weights, slots), LlamaBackend.prompt_chunk
        positions = -(-(max(max_length, BOUNDARY) + max(chunk, 2 * window)) // _STEP) * _STEP

        def context_with(flash_attention: bool) -> Context:
            settings = Settings(threads, flash_attention)
            return Context(weights, settings, sequences=slots, positions=positions, rows=max(chunk, slots * window))

        def trial(context: Context) -> Agreement | None:
            return Trial(context, window=window, slots=slots, words=weights.vocabulary_size, chunk=chunk).agreement()

        wished = options.get("flash_attention")
        flash = wished is not False
        agreement: Agreement | None = None
        if drafter:
            context = context_with(flash)
        else:
            choices = (True, False) if wished is None else (flash,)
            facts = [identity(file), build(), f"{window} {slots} {positions} {threads} {choices}"]
            if (kept := Agreement.read(read_trial(facts))) is not None:
                agreement, flash = kept
                context = context_with(flash)
            else:
                context, agreement, flash = best_agreement(context_with, trial, choices, file.name)
                keep_trial(facts, {**asdict(agreement), "flash_attention": flash})
            log.info("bits tried", widths=sorted(agreement.costs_s), together=agreement.together, flash_attention=flash)
        on_error.callback(context.close)
        backend = LlamaBackend(
            context, agreement, slots=slots, window=window, max_length=max_length,
            vocabulary=read_vocabulary_hash(directory), vocabulary_size=weights.vocabulary_size,
            build=f"{build()}; threads {threads}, flash attention {flash}",
        )  # fmt: skip
        lookup = None
        if drafter and options.get("lookup"):
            lookup = Lookup(guess_costs_us(backend), remember=options.get("remember", True) is not False)
        engine = ModelEngine(
            backend, exact=not drafter, lookup=lookup, calibrate=options.get("calibrate", True) is not False,
            tokenizer=directory / "tokenizer.json",
        )  # fmt: skip
        on_error.pop_all()
    return engine


def _max_length(options: Mapping[str, OptionValue], model: Model, slots: int) -> int:
    """The positions of a generation: those asked for, else as many as a part of the free memory holds; at most those that the
    model was trained with. Raises EngineError."""
    if "max_length" in options:
        return min(whole_option(options, "max_length"), model.trained_length)
    held = int(_CACHE_SHARE * psutil.virtual_memory().available) // (model.position_bytes * slots)
    return max(_STEP, min(model.trained_length, held))
