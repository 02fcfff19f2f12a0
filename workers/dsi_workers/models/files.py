"""Checks and reads the files in a model's directory, and names the cache directory for converted models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import platformdirs
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from dsi_protocol import vocabulary_hash

#: Called with the current step, the share of the step that is done (0 to 1, or None if unknown), and details for people.
Report: TypeAlias = Callable[[str, float | None, str], None]

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
#: File name endings of pickles. Reading a pickle can run any code that is in it.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_OTHER_PLACE = (
    "set DSI_CACHE (for converted models) or HF_HOME (for models of the hub) to a directory that can be written to"
)


class ModelError(Exception):
    """The model reference cannot be used. The message is one sentence that says why and what to do."""


def unreported(what: str, done: float | None, detail: str) -> None:
    """A Report that does nothing."""


def cache_directory() -> Path:
    """Where converted models are kept: $DSI_CACHE, else the user's cache directory, which is ~/.cache/dsi-actors on Linux
    (or below $XDG_CACHE_HOME) and ~/Library/Caches/dsi-actors on macOS. Raises ModelError."""
    if explicit := os.environ.get("DSI_CACHE"):
        return Path(explicit)
    try:
        return platformdirs.user_cache_path("dsi-actors", appauthor=False)
    except RuntimeError:
        raise ModelError("this user has no home directory to keep models in: set DSI_CACHE to a directory") from None


def check_model(directory: Path, *, tokenizer_only: bool = False) -> None:
    """Raise ModelError if config.json or the weights are missing, damaged, or of a kind that is not supported.

    Of each file of weights, only the header is read, and compared with the length of the file.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} has no config.json, so it is not a transformers model: give the directory of one"
        )
    read_json(directory / "config.json")
    if not tokenizer_only:
        for name in weight_files(directory):
            _check_safetensors(directory / name)


def weight_files(directory: Path) -> list[str]:
    """Return the names of the safetensors files with the weights of the model in `directory`. Raises ModelError."""
    if (directory / INDEX_FILE).is_file():
        parts = read_json(directory / INDEX_FILE).get("weight_map")
        names = set(parts.values()) if isinstance(parts, dict) else set()
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ModelError(
                f"{directory / INDEX_FILE} is damaged (it does not name the files of weights): fetch the model again"
            )
        return sorted(names)
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    raise missing_weights_error(str(directory), [path.name for path in directory.iterdir()])


def missing_weights_error(model: str, files: list[str]) -> ModelError:
    """The error for a model without safetensors. `files`: the names of the files that it has."""
    pickles = sorted(name for name in files if name.endswith(PICKLES))
    if pickles:
        return ModelError(
            f"the weights of {model} are a pickle ({pickles[0]}), which can run code when it is read: "
            "choose a model with safetensors"
        )
    if any(name.endswith(".gguf") for name in files):
        return ModelError(f"{model} has GGUF files and no safetensors: give the path of one .gguf file instead")
    return ModelError(f"{model} has no weights ({SINGLE_FILE} is missing): fetch the model again, or choose another")


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of the model in `directory`. Raises ModelError."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{directory} has no tokenizer.json: use a model that has one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no more specific type
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch the model again") from None


def read_vocabulary_hash(directory: Path) -> str:
    """Return the hash of the model's vocabulary. Models that share a vocabulary have the same hash. Raises ModelError.

    The hash is dsi_protocol.vocabulary_hash of tokenizer.json.
    """
    return vocabulary_hash(read_tokenizer(directory).get_vocab(with_added_tokens=True))


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in `file`. Raises ModelError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}): check the file and its permissions") from None
    except ValueError as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} is damaged (it is not a JSON object): fetch the model again")
    return content


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, cut to 200 characters. The exception's type name if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def exclusive_lock(lock_file: Path, what: str, report: Report) -> Iterator[None]:
    """Hold a lock file that only one process can hold at a time. The lock is released when the process ends.

    `what`: the work that needs the lock, for progress and error messages. Raises ModelError if the file cannot be created.
    """
    lock, wait_s = FileLock(lock_file), 0.0
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=wait_s)
            except Timeout:
                report(f"waiting for another process: {what}", None, "")
                wait_s = 1.0
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ModelError(
            f"{what} needs to write to {lock_file.parent}, which is not possible ({reason}): {_OTHER_PLACE}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _check_safetensors(file: Path) -> None:
    """Raise ModelError if the file is missing or damaged."""
    if not file.is_file():
        raise ModelError(f"{file} is missing: fetch the model again")
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
