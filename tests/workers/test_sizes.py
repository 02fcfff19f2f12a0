"""Bytes of weights and KV caches, and the refusal of a model that does not fit its device."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file

from dsi_workers.checkpoints import sizes
from dsi_workers.decoding.capacity import slot_positions
from dsi_workers.decoding.cpu import OUTPUTS
from dsi_workers.decoding.cpu.arena import Arena
from dsi_workers.decoding.cpu.linear import TileLinear
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.decoding.quantization import Int8Linear
from dsi_workers.engine import EngineError
from dsi_workers.engines import load_engine, loading, memory
from dsi_workers.models.files import ModelError
from dsi_workers.models.headers import read_tensors
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
    tensors = read_tensors(tiny_model)
    assert sizes.weight_bytes(tensors, 4) == bytes_of(weights)
    assert sizes.weight_bytes(tensors, 2) == bytes_of({name: each.bfloat16() for name, each in weights.items()})


def test_layers_that_are_left_out_do_not_count(tiny_model: Path) -> None:
    tensors = read_tensors(tiny_model)
    one = sizes.weight_bytes(sizes.of_first_layers(tensors, 1), 4)
    whole, layer = (
        sizes.weight_bytes(tensors, 4),
        4 * sum(math.prod(shape) for name, (_, shape) in tensors.items() if ".1." in name),
    )
    assert one == whole - 2 * layer


def test_a_shape_with_grouped_queries_has_the_tensors_of_the_files(tiny_model: Path) -> None:
    of_files = {name: shape for name, (_, shape) in read_tensors(tiny_model).items()}
    assert {name: shape for name, (_, shape) in TINY.tensors().items()} == of_files


def test_tied_embeddings_count_once(tmp_path: Path, tiny_model: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    assert sizes.weight_bytes(read_tensors(tmp_path), 4) == bytes_of(weights)


def held_bytes(weights: dict[str, torch.Tensor], of_layer: Callable[[torch.nn.Linear], int]) -> int:
    """Of all weights, where the matrices of products are in layers that hold so many."""
    total = 0
    for name, weight in weights.items():
        if weight.dim() < 2 or "embed_tokens" in name:
            total += weight.bfloat16().nbytes
        else:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight
            total += of_layer(linear)
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_int8_counts_what_its_layers_hold(tiny_model: Path, tied: bool) -> None:
    weights, tensors = load_file(tiny_model / "model.safetensors"), dict(read_tensors(tiny_model))
    if tied:
        del tensors["lm_head.weight"]  # the product by the embedding has a copy in int8
    held = held_bytes(weights, lambda linear: sum(buffer.nbytes for buffer in Int8Linear(linear).buffers()))
    assert sizes.weight_bytes(tensors, 2, bits=8) == held


@pytest.mark.usefixtures("one_torch_thread")
def test_int4_counts_what_its_layers_hold(tiny_model: Path) -> None:
    def of_layer(linear: torch.nn.Linear) -> int:
        layer = TileLinear(linear, Arena(), bits=4)
        filled = linear.out_features / (OUTPUTS * len(layer.tiles))  # the last tile may have fewer outputs
        return int((layer.tiles.nbytes + layer.scale.nbytes) * filled)

    held = held_bytes(load_file(tiny_model / "model.safetensors"), of_layer)
    assert sizes.weight_bytes(dict(read_tensors(tiny_model)), 2, bits=4) == held


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
        read_tensors(tmp_path)


def test_a_model_that_does_not_fit_is_refused_before_weights_are_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(loading, "load_whole", read)
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


def fit(directory: Path, device: str, **more: Any) -> tuple[int, int]:
    arguments: dict[str, Any] = {
        "reference": "tiny", "dtype": "float32", "quantization": "none", "layers": None, "slots": None, "max_length": None,
        "branch_slots": 0, "prompt_chunk": 128, "share": 1.0,
    }  # fmt: skip
    return memory.fit_into_memory(directory, torch.device(device), **{**arguments, **more})


def has_free(monkeypatch: pytest.MonkeyPatch, count: float, total: float | None = None) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: math.ceil(count))
    monkeypatch.setattr(memory, "total_bytes", lambda device: math.ceil(total or count))


@pytest.mark.parametrize(("device", "fits"), [("cpu", True), ("cuda", False)])
def test_only_a_gpu_needs_room_for_the_whole_cache(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, device: str, fits: bool
) -> None:
    has_free(monkeypatch, sizes.weight_bytes(read_tensors(tiny_model), 4) * 1.1)
    if fits:
        assert fit(tiny_model, device, slots=8, max_length=512) == (8, 512)
        return
    with pytest.raises(EngineError, match=r"tiny does not fit cuda: .* for slots 8 and max_length 512"):
        fit(tiny_model, device, slots=8, max_length=512)


def needs_of(directory: Path, *, gpu: bool = True) -> sizes.Needs:
    weights = sizes.weight_bytes(read_tensors(directory), 4) * (1 + sizes.MARGIN)
    config = json.loads((directory / "config.json").read_text())
    return sizes.Needs(config, weights, 4, 0, 128, gpu=gpu)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("long"), positions=20_000)


def test_a_gpu_has_as_many_slots_as_fit(long_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_of(long_model)
    for slots, length in ((3, 1000), (40, 5000)):
        has_free(monkeypatch, needs.total(slots, length) + 1)
        assert fit(long_model, "cuda", max_length=length) == (slots, length)
        assert fit(long_model, "cuda", max_length=length, slots=2) == (2, length)
    has_free(monkeypatch, needs.total(70, 20_000))
    assert fit(long_model, "cuda") == (64, 20_000), "no more than 64"


def test_a_gpu_has_eight_slots_before_texts_get_longer(long_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_of(long_model)
    for length in (8192 - 128, 4096 - 128):  # what whole parts of the cache hold
        has_free(monkeypatch, needs.total(8, length) + 1)
        assert fit(long_model, "cuda") == (8, length)
    has_free(monkeypatch, needs.total(5, 2048) + 1)
    assert fit(long_model, "cuda") == (5, 2048), "but no texts shorter than 2,048 for more slots"
    has_free(monkeypatch, needs.total(20, 4608 - 128) + 1)
    assert fit(long_model, "cuda", slots=20) == (20, 4608 - 128)


def test_what_is_chosen_leaves_the_rest_of_a_gpu_to_others(long_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = needs_of(long_model).total(16, 20_000)
    has_free(monkeypatch, total, total)
    alone, shared = fit(long_model, "cuda"), fit(long_model, "cuda", share=0.5)
    assert alone[0] == 16
    assert needs_of(long_model).total(*shared) <= total / 2
    assert fit(long_model, "cuda", slots=16, share=0.5)[0] == 16, "what is asked for must only fit free memory"


def test_a_gpu_refuses_what_cannot_fit(long_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_of(long_model)
    has_free(monkeypatch, needs.total(5, 2048) + 1)
    for wrong in ({"slots": 6}, {"max_length": 15_000, "slots": 5}, {"max_length": 19_000}):
        with pytest.raises(EngineError, match="choose fewer slots, a shorter max_length"):
            fit(long_model, "cuda", **wrong)
    assert fit(long_model, "cuda", slots=6, max_length=1000) == (6, 1000)


def test_a_drafter_has_slots_for_branches_too(long_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(monkeypatch, needs_of(long_model).total(30, 2048) + 1)
    assert fit(long_model, "cuda", max_length=2048, branch_slots=14) == (16, 2048)


def test_a_cpu_takes_the_models_own_length_if_all_slots_can_fill_up(
    long_model: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = needs_of(long_model, gpu=False)
    has_free(monkeypatch, needs.total(8, 20_000) + 1)
    assert fit(long_model, "cpu") == (8, 20_000)
    assert fit(tiny_model, "cpu") == (8, 512)
    has_free(monkeypatch, needs.total(8, 10_000) + 1)
    assert fit(long_model, "cpu") == (8, 10_000)
    has_free(monkeypatch, needs.total(8, 10_000) - 1)
    assert fit(long_model, "cpu") == (8, 5000)
    has_free(monkeypatch, needs.fixed * 1.01)
    assert fit(long_model, "cpu") == (8, 2048)
    assert fit(long_model, "cpu", max_length=9000) == (8, 9000)


def test_an_unknown_configuration_gets_eight_slots(tiny_model: Path, tmp_path: Path) -> None:
    """Its cache cannot be counted."""
    needs = sizes.Needs({"n_layer": 3, "n_positions": 4096}, 1000, 2, 0, 128, gpu=True)
    assert needs.on_a_gpu(1e9) == (8, 2048)
    assert needs.on_a_gpu(1e9, 3, 3000) == (3, 3000)


def test_what_a_worker_takes_is_logged_before_weights_are_read(tiny_model: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        fit(tiny_model, "cpu")
    [entry] = [entry for entry in logs if entry["event"] == "memory"]
    assert {"weights", "kv_cache", "prompt", "margin", "free", "slots", "max_length"} <= entry.keys()


@pytest.mark.parametrize(
    ("name", "value"), [("slots", 0), ("slots", "many"), ("max_length", 0), ("memory_share", 0.0), ("memory_share", 2)]
)
def test_options_that_mean_nothing_are_refused(tiny_model: Path, name: str, value: Any) -> None:
    with pytest.raises(EngineError, match=f"option {name} must be"):
        load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options={name: value})


def test_a_long_context_counts_the_chunk_of_a_prompt(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU needs beside weights and KV cache: activations, and masks where torch's operations compute."""
    config = json.loads((tiny_model / "config.json").read_text())
    more: dict[str, Any] = {"number_bytes": 2, "quantized": False}
    short, long = (sizes.prompt_bytes(config, rows=512, positions=count, **more) for count in (2560, 33280))
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    assert long - short == 512 * (33280 - 2560) * (1 + 2 * group)
    whole = sizes.prompt_bytes(config, rows=512, positions=2560, number_bytes=2, quantized=True) - short
    assert whole == 2 * 2 * config["intermediate_size"] * config["hidden_size"], "gate and up as bfloat16"
    weights = sizes.weight_bytes(read_tensors(tiny_model), 2)
    positions = slot_positions(512, 512)
    cache = sizes.cache_bytes(config, slots=8, positions=positions, number_bytes=2)
    buffers = sizes.buffer_bytes(config, positions=positions, number_bytes=2)
    prompt = sizes.prompt_bytes(config, rows=512, positions=positions, **more)
    needed = weights * (1 + sizes.MARGIN) + cache + buffers + prompt
    asked: dict[str, Any] = {"dtype": "bfloat16", "slots": 8, "max_length": 512, "prompt_chunk": 512}
    has_free(monkeypatch, needed)
    assert fit(tiny_model, "cuda", **asked) == (8, 512)
    has_free(monkeypatch, needed - 2)
    with pytest.raises(EngineError, match=r"a chunk of a prompt 0\.1 GiB"):
        fit(tiny_model, "cuda", **asked)


def test_the_page_holds_the_tables() -> None:
    page = (ROOT / "docs/sizes.md").read_text(encoding="utf-8")
    assert "\n".join(sizes.table()) in page
    assert "\n".join(sizes.table_of_choices()) in page


def test_a_gpu_of_a_group_needs_its_own_part_only() -> None:
    shape = sizes.SHAPES["70B (Llama 3.1)"]
    whole = sizes.weight_bytes(shape.tensors(), 2)
    tensors, config = sizes.of_first_rank(shape.tensors(), shape.config(), 4)
    assert sizes.weight_bytes(tensors, 2) == pytest.approx(whole / 4, rel=0.001)
    where = {"slots": 8, "positions": 2048, "number_bytes": 2}
    assert 4 * sizes.cache_bytes(config, **where) == sizes.cache_bytes(shape.config(), **where)
    assert sizes.of_first_rank(shape.tensors(), shape.config(), 1)[0] == shape.tensors()
