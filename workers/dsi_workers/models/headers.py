"""Reads the headers of safetensors files: names, number types and shapes of tensors, but no weights. Needs no library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from dsi_workers.models.files import ModelError, weight_files

#: Bytes of each number type of safetensors that stands for numbers with fractions, and is loaded in another one.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_HEADER_LIMIT_BYTES = 100_000_000

#: For each tensor its name in safetensors' header ("F32", "BF16", ...) of the number type, and its shape.
Tensors: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]


def read_tensors(directory: Path) -> Tensors:
    """Number types and shapes of all weights of the model in `directory`. Raises ModelError."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in weight_files(directory):
        found |= read_header(directory / name)
    return found


def read_header(file: Path) -> Tensors:
    """Number types and shapes of the tensors in one file. Raises ModelError."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(min(length, _HEADER_LIMIT_BYTES)))
        return {
            tensor: (str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for tensor, entry in header.items()
            if tensor != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"the header of {file} is damaged: fetch the model again") from None
