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

from dsi_protocol import OptionValue
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
    layers: OptionValue | None = None,
) -> Loaded:
    """For products of about `rows` rows; `exact`: its bits matter. On a GPU forwards are recorded as `graphs`. `layers`: keep
    only so many of the model's layers, the first ones. Raises EngineError."""
    if quantization not in ("none", "int8"):
        raise EngineError(f"unknown quantization {quantization!r}: choose auto, none, int8")
    int8 = quantization == "int8"
    number_type = int8_dtype(device) if int8 else _dtype(dtype, device)

    def lay_out(linear: nn.Linear) -> nn.Module:
        return quantize_int8(linear) if int8 else pack(linear, rows)

    with _one_sentence(reference):
        checkpoint = read_checkpoint(directory, number_type, device)
        if checkpoint is None:
            loaded = _load_by_library(directory, device, reference, number_type, most_positions, lay_out, layers)
        else:
            keep_layers(checkpoint.config, layers, reference)
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
    directory: Path, device: torch.device, reference: str, dtype: torch.dtype, most_positions: int, lay_out: Any,
    layers: OptionValue | None,
) -> Loaded:  # fmt: skip
    # Importing the library takes seconds: only for who needs it.
    from dsi_workers.checkpoints.compatibility import position_limit, refuse_if_not_rewindable
    from dsi_workers.checkpoints.library import LibraryDecoder, as_decoder, read_config, read_model

    whole = read_config(directory, reference)
    refuse_if_not_rewindable(whole, reference)
    config = whole.get_text_config(decoder=True)
    positions = min(most_positions, position_limit(config))
    keep_layers(config, layers, reference)
    model = read_model(directory, dtype, device, whole)
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


def keep_layers(config: Any, layers: OptionValue | None, reference: str) -> None:
    """Change the configuration to one of the model's first `layers` layers; None: all. The weights of the others are not read
    then, or not used."""
    if layers is None:
        return
    number = int(config.num_hidden_layers)
    if type(layers) is not int or not 1 <= layers <= number:
        raise EngineError(
            f"option layers must be a whole number in [1, {number}], the layers of {reference}, not {layers!r}"
        )
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise EngineError(f"unknown dtype {name!r}: choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
