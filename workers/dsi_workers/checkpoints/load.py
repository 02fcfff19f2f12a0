"""Loads a model from a directory, with its weights in the form that this machine multiplies fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch import nn

from dsi_protocol import OptionValue
from dsi_workers.backend import Run
from dsi_workers.checkpoints.checkpoint import read_checkpoint
from dsi_workers.checkpoints.experts import choose_rows
from dsi_workers.decoding.capacity import GPU_PROMPT_CHUNK
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.forward import ComputesLogits, Forward
from dsi_workers.decoding.packing import pack
from dsi_workers.decoding.quantization import BITS, quantize_int8, quantized_dtype
from dsi_workers.decoding.ranks import Ranks
from dsi_workers.decoding.share import Share
from dsi_workers.engine import EngineError
from dsi_workers.models.files import ModelError, first_line

if TYPE_CHECKING:
    from dsi_workers.decoding.cpu.decoder import CpuDecoder

log = structlog.get_logger("dsi.engine")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Relative tolerance between our decoder's logits and those of transformers. Sums in a different order and intermediate
#: rounding cause smaller differences.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
#: The same between transformers' layers with our attention and cache, and with their own. Experts may be others where two are
#: nearly as good, so small differences say nothing in half precision.
_OTHER_TEXT = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
#: Positions of the forward passes that compare these logits.
_TRIAL = 8


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model. `config` uses transformers' names. `positions` is the maximum length of a generation."""

    decoder: ComputesLogits
    config: Any
    positions: int


@contextmanager
def _as_engine_error(reference: str) -> Iterator[None]:
    """Turn any error into an EngineError with one sentence, except for a lack of memory and for what has a sentence already.

    A model's files come from anywhere, so reading them can fail in any way.
    """
    try:
        yield
    except (EngineError, ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:  # as for a quantization that needs a package of its own
        log.debug("the model cannot be read", exc_info=True)
        raise EngineError(
            f"the model {reference} needs a package that is not installed here ({first_line(error)}): install it where the "
            "worker runs, or choose another model"
        ) from error
    except Exception as error:
        log.debug("the model cannot be read", exc_info=True)
        raise EngineError(
            f"the model {reference} cannot be read ({type(error).__name__}: {first_line(error)}): its files are damaged, or of a "
            "kind that is not supported: download it again, or choose another model"
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
    kernels: bool = True,
    exact: bool = True,
    layers: OptionValue | None = None,
    prompt_threads: int = 1,
    ranks: Ranks | None = None,
) -> Loaded:
    """Load the model in `directory`.

    `reference`: the model's name in error messages. `rows`: the usual number of rows of a product, for packing weights.
    `most_positions`: an upper limit for the length of a generation. `kernels`: use our own kernels, for a GPU or a CPU.
    `exact`: the bits of the logits matter, as for a target. `layers`: keep only so many of the model's layers, the first
    ones. `prompt_threads`: how many threads compute a prompt where our kernels for CPUs do. `ranks`: the group among which the
    weights are divided; None: this process has all of them.

    Raises EngineError and ModelError.
    """
    number_type = number_type_of(dtype, quantization, device)
    bits = BITS[quantization]

    def convert(linear: nn.Linear) -> nn.Module:
        if bits == 4:
            raise EngineError(
                f"{reference} cannot be computed in int4 here: only the kernels for CPUs do, for dense models on one thread: "
                "choose int8"
            )
        return quantize_int8(linear) if bits else pack(linear, rows)

    def finish(decoder: Decoder) -> ComputesLogits:
        """Lay out the weights of our own layers for the kernels that shall compute with them."""
        for_cpu = _kernels_for_cpu(decoder, bits) if kernels else None
        if for_cpu is not None:
            return for_cpu(decoder, bits=bits, prompt_threads=prompt_threads)
        decoder.replace_linear_layers(convert)
        if exact:
            _choose_block_rows(decoder)
        on_gpu = kernels and decoder.is_whole and device.type == "cuda"
        return with_gpu_kernels(decoder, exact=exact) if on_gpu else decoder

    with _as_engine_error(reference):
        share = Share() if ranks is None else ranks.share
        checkpoint = read_checkpoint(directory, number_type, device, reference, share)
        if checkpoint is None and share.degree > 1:
            raise EngineError(
                f"{reference} is computed by transformers' layers, which cannot be divided among {share.degree} devices: give "
                "it one device, or choose a model of the Llama family"
            )
        if checkpoint is None:
            loaded = _load_with_transformers(
                directory, device, reference, number_type, most_positions, convert, finish, layers, exact
            )
        else:
            keep_layers(checkpoint.config, layers, reference)
            positions = min(most_positions, int(checkpoint.config.max_position_embeddings))
            with torch.inference_mode():
                decoder = Decoder(
                    checkpoint.weights, checkpoint.config, *checkpoint.rope(positions, number_type), ranks
                )
                loaded = Loaded(finish(decoder), checkpoint.config, positions)
    return loaded


def _kernels_for_cpu(decoder: Decoder, bits: int | None) -> type[CpuDecoder] | None:
    """The class of decoders with our own CPU kernels, or None where they do not work or would not pay."""
    try:
        from dsi_workers.decoding.cpu.decoder import CpuDecoder, can_compute
        from dsi_workers.decoding.cpu.products import check_products

        if not can_compute(decoder, bits):
            return None
        check_products(bits)
    except Exception as error:  # Numba is missing, or cannot compile for this processor
        reason = f"{type(error).__name__}: {error}"[:300]
        log.warning("the CPU kernels do not work here: forward passes take twice as long", reason=reason)
        return None
    return CpuDecoder


def with_gpu_kernels(decoder: Decoder, *, exact: bool = True, prompt_chunk: int = GPU_PROMPT_CHUNK) -> ComputesLogits:
    """Return the decoder with our own GPU kernels, or `decoder` itself where they do not work.

    The kernels are written in Triton, which comes with torch for CUDA and needs a C compiler.
    """
    try:
        from dsi_workers.decoding.gpu.decoder import GpuDecoder

        by_kernels = GpuDecoder(decoder, prompt_chunk=prompt_chunk)
        by_kernels.check_kernels()
    except Exception as error:  # of the compiler, the driver or the GPU: torch's operations may still work
        if exact and isinstance(error, torch.OutOfMemoryError):
            raise  # torch's operations would give this target different bits than target servers with enough memory
        reason = f"{type(error).__name__}: {error}"[:300]
        log.warning("the GPU kernels do not work here: forward passes take nearly twice as long", reason=reason)
        return decoder
    return by_kernels


def _load_with_transformers(
    directory: Path, device: torch.device, reference: str, dtype: torch.dtype, most_positions: int, convert: Any,
    finish: Callable[[Decoder], ComputesLogits], layers: OptionValue | None, exact: bool,
) -> Loaded:  # fmt: skip
    # Importing transformers takes seconds, so only models that need it import it.
    from dsi_workers.checkpoints.compatibility import position_limit, refuse_if_not_rewindable
    from dsi_workers.checkpoints.library import TransformersDecoder, as_decoder, logits_of, read_config, read_model

    whole = read_config(directory, reference)
    refuse_if_not_rewindable(whole, reference)
    config = whole.get_text_config(decoder=True)
    positions = min(most_positions, position_limit(config))
    keep_layers(config, layers, reference)
    model = read_model(directory, dtype, device, whole, reference, first_layers=layers is not None)
    # Not the first ones of the vocabulary: some models give those that stand for padding a position of their own.
    tokens = range(_TRIAL, 2 * _TRIAL)
    theirs = logits_of(model, tokens)
    library = TransformersDecoder(model, config, positions - 1)

    def logits(decoder: ComputesLogits) -> torch.Tensor:
        forward = Forward(decoder, config, device, slots=1, capacity=_TRIAL)
        return forward([Run(0, tokens, 0, _TRIAL, 0)], rows=_TRIAL, logit_rows=_TRIAL)[0].float()

    library.check_attention(lambda: logits(library))
    ours = logits(library)
    if theirs is not None and (ours - theirs).norm() > _OTHER_TEXT[dtype] * theirs.norm():
        raise EngineError(
            f"this engine computes {reference} ({whole.model_type}) otherwise than transformers does, and so would write another "
            "text: choose a model of another architecture"
        )
    decoder = as_decoder(model, config, positions, library.blocks)
    tolerance = (_TOLERANCE if library.blocks is None else _OTHER_TEXT)[dtype]
    if decoder is not None and (logits(decoder) - ours).norm() <= tolerance * ours.norm():
        return Loaded(finish(decoder), config, positions)
    library.replace_linear_layers(convert, exact=exact)
    return Loaded(library, config, positions)


def _choose_block_rows(decoder: Decoder) -> None:
    """Set in which blocks of rows the decoder's mixtures of experts are exact, if it has any."""
    mixtures = list(decoder.mixtures.values())
    if mixtures:
        experts = [expert for mixture in mixtures for expert in mixture.experts.each]
        choose_rows(mixtures[0].blocks, experts, [mixtures[0].route], decoder.device, decoder.dtype)


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


def number_type_of(dtype: str, quantization: str, device: torch.device) -> torch.dtype:
    """The number type of weights that are not quantized, of keys and of values. Raises EngineError."""
    if quantization not in BITS:
        raise EngineError(f"unknown quantization {quantization!r}: choose auto, none, int8 or int4")
    return _dtype(dtype, device) if BITS[quantization] is None else quantized_dtype(device)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise EngineError(f"unknown dtype {name!r}: choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
