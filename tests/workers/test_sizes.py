"""Bytes of weights and KV caches, and the refusal of a model that does not fit its device."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsi_workers.checkpoints import sizes
from dsi_workers.decoding.capacity import slot_positions
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.decoding.quantization import Int8Linear
from dsi_workers.engine import EngineError
from dsi_workers.engines import load_engine, loading, memory
from dsi_workers.models.files import ModelError
from support.engines import make_tiny_model

ROOT = Path(__file__).parent.parent.parent
TINY = sizes.Shape(32, 64, 3, 4, 2, 8, 96, tied=False)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def bytes_of(weights: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def test_weights_are_the_bytes_of_the_tensors(tiny_model: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    tensors = sizes.read_tensors(tiny_model)
    assert sizes.weight_bytes(tensors, 4) == bytes_of(weights)
    assert sizes.weight_bytes(tensors, 2) == bytes_of({name: each.bfloat16() for name, each in weights.items()})


def test_layers_that_are_left_out_do_not_count(tiny_model: Path) -> None:
    tensors = sizes.read_tensors(tiny_model)
    one = sizes.weight_bytes(sizes.of_first_layers(tensors, 1), 4)
    whole, layer = (
        sizes.weight_bytes(tensors, 4),
        4 * sum(math.prod(shape) for name, (_, shape) in tensors.items() if ".1." in name),
    )
    assert one == whole - 2 * layer


def test_a_shape_with_grouped_queries_has_the_tensors_of_the_files(tiny_model: Path) -> None:
    of_files = {name: shape for name, (_, shape) in sizes.read_tensors(tiny_model).items()}
    assert {name: shape for name, (_, shape) in TINY.tensors().items()} == of_files


def test_tied_embeddings_count_once(tmp_path: Path, tiny_model: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    assert sizes.weight_bytes(sizes.read_tensors(tmp_path), 4) == bytes_of(weights)


@pytest.mark.parametrize("tied", [False, True])
def test_int8_counts_what_its_layers_hold(tiny_model: Path, tied: bool) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    tensors = dict(sizes.read_tensors(tiny_model))
    if tied:
        del tensors["lm_head.weight"]  # the product by the embedding has a copy in int8
    expected = 0
    for name, weight in weights.items():
        if weight.dim() < 2 or "embed_tokens" in name:
            expected += weight.bfloat16().nbytes
        else:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight
            expected += sum(buffer.nbytes for buffer in Int8Linear(linear).buffers())
    assert sizes.weight_bytes(tensors, 2, int8=True) == expected


def test_the_cache_is_what_is_allocated(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    cache = SlotCache(3, slots=2, capacity=40)
    states = torch.zeros(1, 2, 1, 8)
    allocated = sum(tensor.nbytes for layer in cache.layers for tensor in layer.tensors(states, states))
    assert sizes.cache_bytes(config, slots=2, positions=40, number_bytes=4) == allocated


@pytest.mark.parametrize("config", [{"n_layer": 3}, {"num_attention_heads": "4", "hidden_size": [32]}])
def test_an_unknown_configuration_counts_no_cache(config: dict[str, Any]) -> None:
    assert sizes.cache_bytes(config, slots=2, positions=40, number_bytes=4) == 0


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x09" + bytes(7) + b"no header")
    with pytest.raises(ModelError, match=r"header of .*model\.safetensors is damaged"):
        sizes.read_tensors(tmp_path)


def test_a_model_that_does_not_fit_is_refused_before_weights_are_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(loading, "load_model", read)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(
        EngineError, match=r"does not fit cpu: .* takes 0\.0 GiB \(weights .*0\.0 GiB are free; choose fewer"
    ):
        load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options={})


def test_a_file_larger_than_any_memory_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """Four TiB of weights in a file with a hole: nothing is faked, and no weight could be read."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_model / name, tmp_path)
    size = 1 << 42
    header = json.dumps({"huge": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("this file system has no files of that size")
    with pytest.raises(EngineError, match=r"does not fit cpu: .*weights 4096\.0 GiB"):
        load_engine("transformers", role="target", model=str(tmp_path), device="cpu:0", options={})


@pytest.mark.parametrize(("device", "fits"), [("cpu", True), ("cuda", False)])
def test_only_a_gpu_needs_room_for_the_whole_cache(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, device: str, fits: bool
) -> None:
    weights = sizes.weight_bytes(sizes.read_tensors(tiny_model), 4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: math.ceil(weights * 1.1))
    arguments: dict[str, Any] = {
        "reference": "tiny", "dtype": "float32", "quantization": "none", "layers": None, "slots": 8, "max_length": 512,
        "prompt_chunk": 128,
    }  # fmt: skip
    if fits:
        memory.refuse_if_too_large(tiny_model, torch.device(device), **arguments)
        return
    with pytest.raises(EngineError, match="tiny does not fit cuda"):
        memory.refuse_if_too_large(tiny_model, torch.device(device), **arguments)


def test_a_long_context_counts_the_chunk_of_a_prompt(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU needs beside weights and KV cache: activations, and masks where torch's operations compute."""
    config = json.loads((tiny_model / "config.json").read_text())
    more: dict[str, Any] = {"number_bytes": 2, "int8": False}
    short, long = (sizes.prompt_bytes(config, rows=512, positions=count, **more) for count in (2560, 33280))
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    assert long - short == 512 * (33280 - 2560) * (1 + 2 * group)
    whole = sizes.prompt_bytes(config, rows=512, positions=2560, number_bytes=2, int8=True) - short
    assert whole == 2 * 2 * config["intermediate_size"] * config["hidden_size"], "gate and up as bfloat16"
    weights = sizes.weight_bytes(sizes.read_tensors(tiny_model), 2)
    positions = slot_positions(512, 512)
    cache = sizes.cache_bytes(config, slots=8, positions=positions, number_bytes=2)
    needed = weights * (1 + sizes.MARGIN) + cache + sizes.prompt_bytes(config, rows=512, positions=positions, **more)
    arguments: dict[str, Any] = {
        "reference": "tiny", "dtype": "bfloat16", "quantization": "none", "layers": None, "slots": 8, "max_length": 512,
        "prompt_chunk": 512,
    }  # fmt: skip
    monkeypatch.setattr(memory, "free_bytes", lambda device: math.ceil(needed))
    memory.refuse_if_too_large(tiny_model, torch.device("cuda"), **arguments)
    monkeypatch.setattr(memory, "free_bytes", lambda device: math.floor(needed) - 1)
    with pytest.raises(EngineError, match=r"a chunk of a prompt 0\.1 GiB"):
        memory.refuse_if_too_large(tiny_model, torch.device("cuda"), **arguments)


def test_the_page_holds_the_table() -> None:
    assert "\n".join(sizes.table()) in (ROOT / "docs/sizes.md").read_text(encoding="utf-8")
