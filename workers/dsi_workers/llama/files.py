"""The GGUF file that a reference names, as it is or with weights of another kind."""

from __future__ import annotations

from pathlib import Path

import gguf

from dsi_workers.engine import EngineError
from dsi_workers.llama.library import write_quantized
from dsi_workers.models.conversion import identity, kept
from dsi_workers.models.files import ModelError, first_line, unreported
from dsi_workers.models.resolve import resolve_gguf

#: Kinds of files (general.file_type) whose weights have more than 8 bits: float32, float16, bfloat16.
_WIDE = (0, 1, 32)


def gguf_file(reference: str, quantization: str, threads: int) -> Path:
    """Return the GGUF file of the model.

    `quantization`: none leaves the weights as they are; int8 makes wider ones Q8_0 and leaves others; any other is a kind of
    llama.cpp, such as f16, q8_0 or q4_0. What is made is kept in the cache directory. Raises ModelError and EngineError.
    """
    file = resolve_gguf(reference)
    if quantization in ("none", "auto") or (quantization == "int8" and not _is_wide(file)):
        return file
    kind = "Q8_0" if quantization == "int8" else quantization.upper()

    def make(work: Path) -> None:
        try:
            write_quantized(file, work / f"{file.stem}.gguf", kind, threads)
        except EngineError as error:
            raise ModelError(str(error)) from None

    name, what = f"{file.stem}-{kind}", f"writing {file.name} as {kind}"
    return kept(name, [identity(file), kind], file, what, make, unreported) / f"{file.stem}.gguf"


def _is_wide(file: Path) -> bool:
    try:
        field = gguf.GGUFReader(file).fields.get("general.file_type")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch it again") from None
    return field is None or int(field.contents()) in _WIDE
