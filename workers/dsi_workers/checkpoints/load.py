"""From a model's directory to what computes its logits, with weights as this machine multiplies by them fastest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn

from dsi_workers.backend import Run
from dsi_workers.checkpoints.checkpoint import read_checkpoint
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.forward import ComputesLogits, Forward
from dsi_workers.decoding.packing import pack, replace_linear_layers
from dsi_workers.decoding.quantization import int8_dtype, quantize_int8
from dsi_workers.engine import EngineError
from dsi_workers.models.files import first_line

log = structlog.get_logger("dsi.engine")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Logits are the library's if they are as near: sums in another order, and roundings in between.
_NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_TRIAL = 8


@dataclass(frozen=True, slots=True)
class Loaded:
    """`config` has the library's names. No generation is longer than `positions`."""

    decoder: ComputesLogits
    config: Any
    positions: int


@contextmanager
def _one_sentence(reference: str) -> Iterator[None]:
    """Whatever is wrong with a model's files becomes an EngineError: they come from anywhere, and there is no end of it."""
    try:
        yield
    except (EngineError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log.debug("the model cannot be read", exc_info=True)
        raise EngineError(
            f"the model {reference} cannot be read ({type(error).__name__}: {first_line(error)}): its files are damaged, or of a "
            "kind that is not known here"
        ) from error


def load_model(
    directory: Path,
    device: torch.device,
    *,
    reference: str,
    dtype: str,
    quantization: str,
    rows: int,
    most_positions: int,
    graphs: bool = True,
    exact: bool = True,
) -> Loaded:
    """For products of about `rows` rows; `exact`: its bits matter. On a GPU forwards are recorded as `graphs`.
    Raises EngineError."""
    int8 = quantization == "int8"
    number_type = number_type_of(dtype, quantization, device)

    def lay_out(linear: nn.Linear) -> nn.Module:
        return quantize_int8(linear) if int8 else pack(linear, rows)

    with _one_sentence(reference):
        checkpoint = read_checkpoint(directory, number_type, device)
        if checkpoint is None:
            loaded = _load_by_library(directory, device, reference, number_type, most_positions, lay_out)
        else:
            positions = min(most_positions, int(checkpoint.config.max_position_embeddings))
            with torch.inference_mode():
                decoder = Decoder(checkpoint.weights, checkpoint.config, *checkpoint.rope(positions, number_type))
                decoder.lay_out(lay_out)
            loaded = Loaded(decoder, checkpoint.config, positions)
    if graphs and device.type == "cuda" and isinstance(loaded.decoder, Decoder):
        return replace(loaded, decoder=on_a_gpu(loaded.decoder, exact=exact))
    return loaded


def on_a_gpu(decoder: Decoder, *, exact: bool = True) -> ComputesLogits:
    """By kernels of our own, where they can be compiled and run: Triton comes with torch for CUDA, and wants a C compiler."""
    try:
        from dsi_workers.decoding.gpu.decoder import GpuDecoder

        by_kernels = GpuDecoder(decoder)
        by_kernels.try_out()
    except Exception as error:  # of a compiler, a driver, a GPU: whatever it is, there is another way
        if exact and isinstance(error, torch.OutOfMemoryError):
            raise  # by torch's operations it would have other bits than servers that had room
        reason = f"{type(error).__name__}: {error}"[:300]
        log.warning("our kernels cannot be used here: forwards take nearly twice as long", reason=reason)
        return decoder
    return by_kernels


def _load_by_library(
    directory: Path, device: torch.device, reference: str, dtype: torch.dtype, most_positions: int, lay_out: Any
) -> Loaded:
    # Importing the library takes seconds: only for who needs it.
    from dsi_workers.checkpoints.compatibility import position_limit, refuse_if_not_rewindable
    from dsi_workers.checkpoints.library import LibraryDecoder, as_decoder, read_config, read_model

    whole = read_config(directory, reference)
    refuse_if_not_rewindable(whole, reference)
    config = whole.get_text_config(decoder=True)
    positions = min(most_positions, position_limit(config))
    model = read_model(directory, dtype, device)
    library = LibraryDecoder(model, config, positions - 1)

    def logits(decoder: ComputesLogits) -> torch.Tensor:
        forward = Forward(decoder, config, device, slots=1, capacity=_TRIAL)
        return forward([Run(0, range(_TRIAL), 0, _TRIAL, 0)], rows=_TRIAL, logit_rows=_TRIAL)[0].float()

    library.check_attention(lambda: logits(library))
    decoder = as_decoder(model, config, positions)
    if decoder is not None:
        expected = logits(library)
        if (logits(decoder) - expected).norm() <= _NEAR[dtype] * expected.norm():
            decoder.lay_out(lay_out)
            return Loaded(decoder, config, positions)
    replace_linear_layers(model, lay_out)
    return Loaded(library, config, positions)


def number_type_of(dtype: str, quantization: str, device: torch.device) -> torch.dtype:
    """The number type of weights that are not quantized, of keys and of values. Raises EngineError."""
    if quantization not in ("none", "int8"):
        raise EngineError(f"unknown quantization {quantization!r}: choose auto, none, int8")
    return int8_dtype(device) if quantization == "int8" else _dtype(dtype, device)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise EngineError(f"unknown dtype {name!r}: choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
