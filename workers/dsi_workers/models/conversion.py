"""Converts a GGUF file, once, to a directory with safetensors and tokenizer.json in the user's cache directory."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsi_workers.models.files import ModelError, Report, cache_directory, exclusive_lock, first_line

_COMPLETE = "complete"
_MAGIC = b"GGUF"


def convert_gguf(gguf: Path, report: Report) -> Path:
    """Return the directory of the converted model. Converts it if this has not been done yet. Raises ModelError."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    directory = cache_directory() / "models" / f"{gguf.stem}-{key}"
    if (directory / _COMPLETE).exists():
        return directory
    with exclusive_lock(directory.with_suffix(".lock"), f"converting {gguf.name}", report):
        if not (directory / _COMPLETE).exists():
            _convert(gguf, directory, report)
    return directory


def _convert(gguf: Path, directory: Path, report: Report) -> None:
    with gguf.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{gguf} is not a GGUF file, or it is damaged: fetch it again")
    what = f"converting {gguf.name}, once"
    report(what, 0.0, "importing transformers")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"converting {gguf.name} needs torch: pip install 'dsi-actors[torch]' ({error})") from None
    _remove_leftovers(directory)
    source, name = str(gguf.parent), gguf.name
    try:
        work = Path(tempfile.mkdtemp(prefix=directory.name, dir=directory.parent))
        try:
            with _quiet_transformers():
                # transformers does not report its progress. The shares of the steps below are measured constants.
                report(what, 0.1, "reading weights")
                model = AutoModelForCausalLM.from_pretrained(
                    source, gguf_file=name, dtype=torch.float32, trust_remote_code=False
                )
                report(what, 0.7, "reading the vocabulary")
                AutoTokenizer.from_pretrained(source, gguf_file=name, trust_remote_code=False).save_pretrained(work)
                report(what, 0.9, "writing safetensors")
                # The weights are not quantized any more, but with these settings transformers would refuse to save them.
                setattr(model, "hf_quantizer", None)  # noqa: B010
                del model.config.quantization_config
                model.save_pretrained(work)
                report(what, 1.0, "")
            (work / _COMPLETE).write_text(json.dumps({"source": name}))
            work.chmod(0o755)
            work.rename(directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except Exception as error:  # the libraries raise any kind of error for a damaged file or a full disk
        raise ModelError(
            f"{gguf} cannot be converted into {directory.parent} ({type(error).__name__}: {first_line(error)}): the file is "
            "damaged, or transformers does not support its kind, or the disk is full"
        ) from error


def _remove_leftovers(directory: Path) -> None:
    """Remove the files of conversions that were killed. The caller must hold the lock."""
    for leftover in directory.parent.glob(f"{directory.name}*/"):
        shutil.rmtree(leftover)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress the log messages and progress bars of transformers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
