"""What a model's directory lacks is made of what it has: safetensors of PyTorch's files, tokenizer.json of older files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dsi_workers.engines import load_engine
from dsi_workers.models.files import ModelError
from dsi_workers.models.resolve import resolve_model
from support.engines import NoInterrupt, make_tiny_model, session_of
from support.tokenizers import byte_level

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy without safetensors."""
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(whole, tmp_path / "model"))
    (copy / "model.safetensors").unlink()
    return copy


def answer_of(model: Path) -> list[int]:
    options = {"calibrate": False, "slots": 1, "max_length": 64}
    engine = load_engine("transformers", role="target", model=str(model), device="cpu:0", options=options)
    return engine.verify(session_of(PROMPT), 1, NoInterrupt()).tokens


def problem_of(model: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "the format before it"])
def test_pytorch_files_are_read(model: Path, whole: Path, zipped: bool) -> None:
    weights = load_file(whole / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    directory = resolve_model(str(model))
    assert directory != model
    assert resolve_model(str(model)) == directory
    assert not (directory / "pytorch_model.bin").exists()
    assert answer_of(model) == answer_of(whole)


def test_pytorch_files_in_parts(model: Path, whole: Path) -> None:
    weights = load_file(whole / "model.safetensors")
    names = sorted(weights)
    place = {name: f"pytorch_model-0000{1 + (name > names[9])}-of-00002.bin" for name in names}
    for part in set(place.values()):
        torch.save({name: weights[name] for name in names if place[name] == part}, model / part)
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
    assert answer_of(model) == answer_of(whole)
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    assert problem_of(model) == f"{model / 'pytorch_model-00002-of-00002.bin'} is missing: fetch the model again"


def test_tensors_that_share_their_memory(model: Path, whole: Path) -> None:
    weights = load_file(whole / "model.safetensors")
    both = torch.cat((weights["model.embed_tokens.weight"], weights["lm_head.weight"]))
    weights["model.embed_tokens.weight"], weights["lm_head.weight"] = both[:96], both[96:]
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].T.contiguous().T
    torch.save(weights, model / "pytorch_model.bin")
    assert answer_of(model) == answer_of(whole)


class Surprise:
    """What a pickle can do: run anything."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/nothing-of-this-runs"),))


def test_nothing_in_a_pickle_is_run(model: Path) -> None:
    torch.save({"model.norm.weight": Surprise()}, model / "pytorch_model.bin")
    problem = problem_of(model)
    assert f"{model / 'pytorch_model.bin'} holds more than tensors" in problem
    assert not Path("/tmp/nothing-of-this-runs").exists()


@pytest.mark.parametrize("content", [b"", b"gibberish", b"PK\x03\x04 but no more"])
def test_a_damaged_pytorch_file(model: Path, content: bytes) -> None:
    (model / "pytorch_model.bin").write_bytes(content)
    problem = problem_of(model)
    assert str(model / "pytorch_model.bin") in problem
    assert "damaged" in problem


def test_a_pytorch_file_without_names(model: Path) -> None:
    torch.save([torch.ones(1)], model / "pytorch_model.bin")
    assert "is no list of weights by name" in problem_of(model)


def test_pickles_of_other_kinds_are_not_read(model: Path) -> None:
    (model / "model.pt").write_bytes(b"")
    assert "a pickle of an unknown kind (model.pt), which can run code" in problem_of(model)


# Tokenizers


def test_a_vocabulary_and_merges_become_a_tokenizer(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    trained = byte_level()
    trained.model.save(str(model))  # vocab.json and merges.txt
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    text = "The weather of thermodynamics, 日本語."
    expected = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    for tokenizer_only in (True, False):
        directory = resolve_model(str(model), tokenizer_only=tokenizer_only)
        assert Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids == expected
        assert (directory / "config.json").read_bytes() == (model / "config.json").read_bytes()
        assert (directory / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "packages"),
    [(b"\n\x0e\n\x05<unk>", "sentencepiece and protobuf"), (b"IQ== 0\nIg== 1\n", "tiktoken")],
    ids=["sentencepiece", "tiktoken"],
)
def test_packages_that_a_tokenizer_needs_are_named(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, packages: str
) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    find = importlib.util.find_spec

    def find_others(name: str) -> Any:
        if name == "google.protobuf":
            raise ModuleNotFoundError(name)  # as where no package of Google's is installed
        return None if name in ("sentencepiece", "tiktoken") else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(content)
    problem = problem_of(model)
    assert problem.startswith(
        f"{model} has tokenizer.model and no tokenizer.json, and converting needs {packages}: pip install"
    )


def test_a_model_without_any_tokenizer(whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    assert resolve_model(str(model)) == model  # whoever needs the tokenizer says that there is none
