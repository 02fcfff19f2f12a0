"""The GGUF file that a reference names, as it is or with weights of another kind."""

from __future__ import annotations

from pathlib import Path

import gguf

from dsi_workers.engine import EngineError
from dsi_workers.llama.library import write_quantized
from dsi_workers.models.conversion import identity, kept
from dsi_workers.models.files import ModelError, first_line, unreported
from dsi_workers.models.resolve import resolve_gguf

#: Kinds of files (general.file_type; None: unknown) whose weights have more bits than these: float32, float16 and bfloat16, and
#: Q8_0.
_WIDER_THAN = {"int8": (None, 0, 1, 32), "int4": (None, 0, 1, 32, 7)}


def gguf_file(reference: str, quantization: str, threads: int) -> Path:
    """Return the GGUF file of the model.

    `quantization`: none leaves the weights as they are; int8 and int4 make wider ones Q8_0 and Q4_1 and leave others; any other
    is a kind of llama.cpp, such as f16, q8_0 or q4_0. What is made is kept in the cache directory. Raises ModelError and
    EngineError.
    """
    file = resolve_gguf(reference)
    own = _file_type(file)
    if quantization in ("none", "auto") or (quantization in _WIDER_THAN and own not in _WIDER_THAN[quantization]):
        return file
    kind = {"int8": "Q8_0", "int4": "Q4_1"}.get(quantization, quantization.upper())

    def make(work: Path) -> None:
        try:
            write_quantized(file, work / f"{file.stem}.gguf", kind, threads)
        except EngineError as error:
            raise ModelError(str(error)) from None

    name, what = f"{file.stem}-{kind}", f"writing {file.name} as {kind}"
    return kept(name, [identity(file), kind], file, what, make, unreported) / f"{file.stem}.gguf"


def _file_type(file: Path) -> int | None:
    try:
        field = gguf.GGUFReader(file).fields.get("general.file_type")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch it again") from None
    return None if field is None else int(field.contents())
