"""Makes what a model's directory lacks out of what it has: safetensors out of PyTorch's files, tokenizer.json out of older ones.

The result is a directory in the cache, with links to the model's other files.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsi_workers.models.conversion import identity, kept, link_others, quiet_transformers
from dsi_workers.models.files import (
    INDEX_FILE,
    PICKLE_INDEX_FILE,
    SINGLE_FILE,
    ModelError,
    Report,
    first_line,
    pickle_files,
)

_TOKENIZER = "tokenizer.json"
#: Files out of which transformers makes a tokenizer, by the packages that it needs for that.
_SENTENCEPIECE, _WORDS = "tokenizer.model", (("vocab.json", "merges.txt"), ("vocab.txt",))


def completed(directory: Path, *, tokenizer_only: bool, report: Report) -> Path:
    """Return `directory` if it has tokenizer.json and safetensors, else one in the cache that has. With `tokenizer_only` the
    weights do not matter.

    A directory that has nothing to make them of is returned as it is. Raises ModelError.
    """
    pickles = [] if tokenizer_only else pickle_files(directory)
    vocabulary = _vocabulary_files(directory)
    if not pickles and not vocabulary:
        return directory
    files = [directory / name for name in pickles]
    if absent := [file for file in files if not file.is_file()]:
        raise ModelError(f"{absent[0]} is missing: fetch the model again")
    kinds = (["the tokenizer"] if vocabulary else []) + (["weights"] if pickles else [])
    what = f"converting {' and '.join(kinds)} of {directory.name}"
    present = [path for path in directory.iterdir() if path.is_file()]

    def make(work: Path) -> None:
        if vocabulary:
            report(f"{what}, once", 0.0, "reading the vocabulary")
            _make_tokenizer(directory, vocabulary, work)
        if pickles:
            _make_safetensors(files, work, f"{what}, once", report)
        link_others(directory, work, leave_out=[*pickles, PICKLE_INDEX_FILE])

    return kept(directory.name, [identity(*present), str(tokenizer_only)], directory, what, make, report)


def _vocabulary_files(directory: Path) -> Sequence[str]:
    """The files to make tokenizer.json of. Empty: it is there, or there are none."""
    if (directory / _TOKENIZER).exists():
        return ()
    if (directory / _SENTENCEPIECE).is_file():
        return (_SENTENCEPIECE,)
    return next((names for names in _WORDS if all((directory / name).is_file() for name in names)), ())


def _make_tokenizer(directory: Path, files: Sequence[str], work: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json if the model has none."""
    about = f"{directory} has {' and '.join(files)} and no {_TOKENIZER}"
    needed = ["transformers"]
    if _SENTENCEPIECE in files:  # a protocol buffer, or a list of words in base64, as tiktoken has it
        with (directory / _SENTENCEPIECE).open("rb") as file:
            needed += ["sentencepiece", "protobuf"] if file.read(1) == b"\n" else ["tiktoken"]
    lacking = [package for package in needed if not _is_installed(package)]
    if lacking:
        raise ModelError(
            f"{about}, and converting needs {' and '.join(lacking)}: pip install {' '.join(lacking)}, or use a model that "
            f"has {_TOKENIZER}"
        )
    from transformers import AutoTokenizer

    made = work / "tokenizer"
    try:
        with quiet_transformers():
            AutoTokenizer.from_pretrained(directory, trust_remote_code=False).save_pretrained(made)
        (made / _TOKENIZER).replace(work / _TOKENIZER)
    except Exception as error:  # the library raises any kind of error
        raise ModelError(
            f"{about}, and cannot be converted ({type(error).__name__}: {first_line(error)}): use a model that has {_TOKENIZER}"
        ) from None
    if not (directory / "tokenizer_config.json").exists() and (made / "tokenizer_config.json").exists():
        (made / "tokenizer_config.json").replace(work / "tokenizer_config.json")
    shutil.rmtree(made)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec("google.protobuf" if package == "protobuf" else package) is not None
    except ModuleNotFoundError:  # there is no package `google` at all
        return False


def _make_safetensors(files: Sequence[Path], work: Path, what: str, report: Report) -> None:
    """Write the tensors of PyTorch's files under the same names."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ModelError(f"converting weights needs torch: pip install 'dsi-actors[torch]' ({error})") from None
    place: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files):
        report(what, number / len(files), file.name)
        tensors = read_pickle(file)
        name = SINGLE_FILE if len(files) == 1 else f"{file.stem}.safetensors"
        save_file(_without_sharing(tensors), work / name, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        (work / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": place}))
    report(what, 1.0, "")


def read_pickle(file: Path) -> Mapping[str, Any]:
    """The tensors in a file of torch.save. Reads tensors only, so that nothing in the file is run. Raises ModelError."""
    import torch

    try:
        mapped = zipfile.is_zipfile(file)  # files of old versions of PyTorch cannot be mapped into memory
        found: object = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file} holds more than tensors, or is damaged: nothing else is read, because it could run code; choose a model "
            "with safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}): fetch the model again") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ModelError(f"{file} is no list of weights by name: choose a model with safetensors")
    return found


def _without_sharing(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of tensors that are views, or share their memory with another one: safetensors has neither."""
    seen: set[int] = set()
    whole: dict[str, Any] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        seen.add(storage.data_ptr())
        whole[name] = tensor if alone else tensor.contiguous().clone()
    return whole
