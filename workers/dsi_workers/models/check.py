"""Checks the files in a model's directory: whether they are there, whole, and of a kind that can be read.

Of each file of weights, only the header is read, and compared with the length of the file.
"""

from __future__ import annotations

from pathlib import Path

from dsi_workers.models.files import (
    ADAPTER_CONFIG,
    ModelError,
    first_line,
    missing_weights_error,
    pickle_files,
    read_json,
    some_names,
    weight_files,
)
from dsi_workers.models.headers import FLOAT_BYTES, read_header

#: The last part of the names of tensors that AWQ and GPTQ have in place of a weight.
_PACKED = ("qweight", "qzeros", "g_idx")


def check_model(directory: Path, *, tokenizer_only: bool = False) -> None:
    """Raise ModelError if config.json or the weights are missing, damaged, or of a kind that is not supported."""
    if not (directory / "config.json").is_file():
        if (directory / ADAPTER_CONFIG).is_file():
            raise adapter_error(directory)
        raise ModelError(
            f"{directory} has no config.json, so it is not a transformers model: give the directory of one"
        )
    config = read_json(directory / "config.json")
    if tokenizer_only:
        return
    if pickles := pickle_files(directory):
        for name in pickles:
            _check_there(directory / name)
        return
    if (directory / ADAPTER_CONFIG).is_file() and not any(directory.glob("model*.safetensors*")):
        raise adapter_error(directory)
    quantized: list[str] = []
    for name in weight_files(directory):
        _check_safetensors(directory / name)
        quantized += [
            tensor for tensor, (kind, _) in read_header(directory / name).items() if _is_quantized(tensor, kind)
        ]
    if quantized and not config.get("quantization_config"):
        raise ModelError(
            f"the weights of {directory} are quantized, as by AWQ or GPTQ ({some_names(quantized)}), but its config.json has no "
            "quantization_config that says how: fetch the whole model again, or choose one that is not quantized"
        )


def _is_quantized(tensor: str, kind: str) -> bool:
    """Whether the tensor, with this number type in the header, holds whole numbers that stand for weights."""
    last = tensor.rpartition(".")[2]
    return last in _PACKED or (last == "weight" and kind not in FLOAT_BYTES)


def adapter_error(directory: Path) -> ModelError:
    """The error for an adapter that was given as a model."""
    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    return missing_weights_error(str(directory), [ADAPTER_CONFIG], base if isinstance(base, str) else "")


def _check_there(file: Path) -> None:
    if not file.is_file():
        raise ModelError(f"{file} is missing: fetch the model again")


def _check_safetensors(file: Path) -> None:
    """Raise ModelError if the file is missing or damaged."""
    _check_there(file)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:  # without safetensors, weights are not read on this machine
        return
    try:
        with safe_open(file, framework="np"):
            pass
    except ImportError:
        return
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch the model again") from None
