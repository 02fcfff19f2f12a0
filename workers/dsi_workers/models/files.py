"""The files of a model in its directory: that they are all there and can be read, and where models of our own making are kept."""

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

#: Told what is being done, the part of it that is done (0 to 1; None: not known), and details for people.
Report: TypeAlias = Callable[[str, float | None, str], None]

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
#: Reading one of these can run any code that was put into it.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_OTHER_PLACE = (
    "set DSI_CACHE (for converted models) or HF_HOME (for those of the hub) to a directory that can be written to"
)


class ModelError(Exception):
    """The reference names no model that can be used here: one sentence that says why and what to do."""


def unreported(what: str, done: float | None, detail: str) -> None:
    """The Report of those who do not want one."""


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
    """Raises ModelError if config.json or the weights are missing, damaged, or of a kind that is not read here.

    Of a file of weights its header is read, and compared with the length of the file."""
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json: it holds no transformers model")
    read_json(directory / "config.json")
    if not tokenizer_only:
        for name in weight_files(directory):
            _check_safetensors(directory / name)


def weight_files(directory: Path) -> list[str]:
    """The names of the safetensors files that hold the weights of the model in `directory`. Raises ModelError."""
    if (directory / INDEX_FILE).is_file():
        parts = read_json(directory / INDEX_FILE).get("weight_map")
        names = set(parts.values()) if isinstance(parts, dict) else set()
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ModelError(
                f"{directory / INDEX_FILE} is damaged: it names no files of weights. Fetch the model again"
            )
        return sorted(names)
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    raise why_no_weights(str(directory), [path.name for path in directory.iterdir()])


def why_no_weights(model: str, files: list[str]) -> ModelError:
    """What to say of a model whose files are these, none of which is model.safetensors."""
    pickles = sorted(name for name in files if name.endswith(PICKLES))
    if pickles:
        return ModelError(
            f"the weights of {model} are a pickle ({pickles[0]}), which can run code when it is read: "
            "choose a model with safetensors"
        )
    if any(name.endswith(".gguf") for name in files):
        return ModelError(f"{model} holds GGUF files and no safetensors: give the path of one .gguf file instead")
    return ModelError(f"{model} has no weights ({SINGLE_FILE} is missing): fetch the model again, or choose another")


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of the model in `directory`. Raises ModelError."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{directory} has no tokenizer.json: use a model that has one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing that is more specific
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch the model again") from None


def read_vocabulary_hash(directory: Path) -> str:
    """The hash that tells whether two models share a vocabulary (dsi_protocol.vocabulary_hash of tokenizer.json).
    Raises ModelError."""
    return vocabulary_hash(read_tokenizer(directory).get_vocab(with_added_tokens=True))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises ModelError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} is damaged (it holds no JSON object): fetch the model again")
    return content


def first_line(error: BaseException) -> str:
    """What an exception of a library says, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def only_one(lock_file: Path, what: str, report: Report) -> Iterator[None]:
    """Let no other process in at the same time. The lock ends with its process. Raises ModelError if it cannot be had."""
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
            f"{what} needs a directory to write to, and {lock_file.parent} is none ({reason}): {_OTHER_PLACE}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _check_safetensors(file: Path) -> None:
    if not file.is_file():
        raise ModelError(f"{file} is missing: fetch the model again")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:  # nobody reads weights here
        return
    try:
        with safe_open(file, framework="np"):
            pass
    except ImportError:
        return
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch the model again") from None
