"""Names and reads the files in a model's directory, and the cache directory for converted models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
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
#: PyTorch's files of weights. They are pickles: only tensors are read from them (completion.py).
PICKLE_INDEX_FILE, SINGLE_PICKLE_FILE = "pytorch_model.bin.index.json", "pytorch_model.bin"
#: What makes a directory an adapter of peft.
ADAPTER_CONFIG = "adapter_config.json"
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


def is_ready(directory: Path) -> bool:
    """Whether `directory` is a model with all that is loaded, so that nothing must be fetched or converted first. Its files may
    be damaged."""
    names = ("config.json", "tokenizer.json")
    weights = (INDEX_FILE, SINGLE_FILE)
    return all((directory / name).is_file() for name in names) and any((directory / name).is_file() for name in weights)


def weight_files(directory: Path) -> list[str]:
    """Return the names of the safetensors files with the weights of the model in `directory`. Raises ModelError."""
    if (directory / INDEX_FILE).is_file():
        return _files_of_index(directory / INDEX_FILE)
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    raise missing_weights_error(str(directory), [path.name for path in directory.iterdir()])


def pickle_files(directory: Path) -> list[str]:
    """Return the names of the PyTorch files (.bin) with the weights of a model that has no safetensors. Empty for a model that
    has safetensors, or no weights at all. Raises ModelError."""
    names = {path.name for path in directory.iterdir()}
    if names & {INDEX_FILE, SINGLE_FILE}:
        return []
    if PICKLE_INDEX_FILE in names:
        return _files_of_index(directory / PICKLE_INDEX_FILE)
    return [SINGLE_PICKLE_FILE] if SINGLE_PICKLE_FILE in names else []


def _files_of_index(index: Path) -> list[str]:
    parts = read_json(index).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) else set()
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ModelError(f"{index} is damaged (it does not name the files of weights): fetch the model again")
    return sorted(names)


def missing_weights_error(model: str, files: list[str], base: str = "") -> ModelError:
    """The error for a model without weights that can be read. `files`: the names of the files that it has. `base`: the model
    that an adapter names as its base."""
    if ADAPTER_CONFIG in files:
        named = f" ({base})" if base else ""
        return ModelError(
            f"{model} is an adapter (LoRA), not a model: give its base model{named} as the model, and the directory of the "
            "adapter with --adapter DIR"
        )
    pickles = sorted(name for name in files if name.endswith(PICKLES))
    if pickles:
        return ModelError(
            f"the weights of {model} are a pickle of an unknown kind ({pickles[0]}), which can run code when it is read: "
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


def some_names(names: Iterable[str], most: int = 3) -> str:
    """A few of the names, in order, and how many more there are: "a, b, c and 12 more"."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


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
