"""Keeps what is made out of a model's files, such as the safetensors of a GGUF file, in the user's cache directory.

It is made once. If several processes need it, one of them works and the others wait.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsi_workers.models.files import ModelError, Report, cache_directory, exclusive_lock, first_line

_COMPLETE = "complete"
#: Part of each key. Increased when a conversion gives other files than it did.
_VERSION = "2"


def kept(name: str, key: Iterable[str], source: Path, what: str, make: Callable[[Path], None], report: Report) -> Path:
    """Return the directory that `make` fills. Calls `make`, with an empty directory, only if this has not been done yet.

    `name`: the beginning of the directory's name. `key`: texts that identify all that goes into the result (see `identity`).
    `source` and `what`: what is read and the work, as in "converting x.gguf", for messages. Raises ModelError.
    """
    directory = _place(name, key)
    if (directory / _COMPLETE).exists():
        return directory
    with exclusive_lock(directory.parent / f"{directory.name}.lock", what, report):
        if not (directory / _COMPLETE).exists():
            _fill(directory, source, what, make)
    return directory


def is_kept(name: str, key: Iterable[str]) -> bool:
    """Whether `kept` has made this already. Raises ModelError."""
    return (_place(name, key) / _COMPLETE).exists()


def _place(name: str, key: Iterable[str]) -> Path:
    digest = hashlib.sha256("\0".join((_VERSION, *key)).encode()).hexdigest()[:12]
    return cache_directory() / "models" / f"{name}-{digest}"


def identity(*files: Path) -> str:
    """A text that is another one if the place, the size or the time of a file changes."""
    stats = [(file.resolve(), file.stat()) for file in sorted(files)]
    return "\0".join(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}" for path, stat in stats)


def link_others(source: Path, directory: Path, leave_out: Iterable[str] = ()) -> None:
    """Make links in `directory` to the files of `source`, but not to those of the names in `leave_out` and not in place of files
    that `directory` has."""
    for file in source.iterdir():
        if file.is_file() and file.name not in {*leave_out, _COMPLETE} and not (directory / file.name).exists():
            os.symlink(file.resolve(), directory / file.name)


def _fill(directory: Path, source: Path, what: str, make: Callable[[Path], None]) -> None:
    _remove_leftovers(directory)
    try:
        work = Path(tempfile.mkdtemp(prefix=directory.name, dir=directory.parent))
        try:
            make(work)
            (work / _COMPLETE).touch()
            work.chmod(0o755)
            work.rename(directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except ModelError:
        raise
    except Exception as error:  # the libraries raise any kind of error for a damaged file or a full disk
        raise ModelError(
            f"{what} failed in {directory.parent} ({type(error).__name__}: {first_line(error)}): {source} is damaged, or of a "
            "kind that transformers does not support, or the disk is full"
        ) from error


def _remove_leftovers(directory: Path) -> None:
    """Remove the files of conversions that were killed. The caller must hold the lock."""
    for leftover in directory.parent.glob(f"{directory.name}*/"):
        shutil.rmtree(leftover)


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
