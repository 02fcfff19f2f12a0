"""Weights that do not fit their model are refused by name, by our own reader and where transformers reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dsi_workers.engines import EngineError, load_engine
from support.engines import make_tiny_model

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read by our own reader."""
    return make_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read by transformers, because of its sliding window."""
    return make_tiny_model(tmp_path_factory.mktemp("mistral"), sliding_window=16)


@pytest.fixture(params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model"))


def change(model: Path, how: Callable[[Weights], None]) -> None:
    weights = load_file(model / "model.safetensors")
    how(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def dropping(name: str) -> Callable[[Weights], None]:
    def drop(weights: Weights) -> None:
        del weights[name]

    return drop


def configure(model: Path, **settings: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def problem_of(model: Path, **options: Any) -> str:
    with pytest.raises(EngineError) as caught:
        load(model, **options)
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)
    return str(caught.value)


def load(model: Path, *, role: str = "target", **options: Any) -> Any:
    options = {"calibrate": False, "slots": 1, "max_length": 64, **options}
    return load_engine("transformers", role=role, model=str(model), device="cpu:0", options=options)


def test_missing_weights_are_named(model: Path) -> None:
    def drop(weights: Weights) -> None:
        for name in list(weights):
            if "layers.1" in name and "_proj" in name:
                del weights[name]

    change(model, drop)
    problem = problem_of(model)
    assert "(missing: model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight" in problem
    assert "and 4 more)" in problem
    assert "fetch the model again, or choose another" in problem


def test_an_untied_output_matrix_that_is_missing(model: Path) -> None:
    change(model, dropping("lm_head.weight"))
    assert "(missing: lm_head.weight)" in problem_of(model)


def test_weights_that_the_model_does_not_know_are_named(model: Path) -> None:
    change(model, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    assert "(unknown: model.layers.0.self_attn.q_proj.bias)" in problem_of(model)


def test_a_vocabulary_of_another_size_than_the_tensors(model: Path) -> None:
    configure(model, vocab_size=100)
    assert "says vocab_size 100, but lm_head.weight has 96 rows" in problem_of(model)


def test_another_shape_is_named(model: Path) -> None:
    configure(model, intermediate_size=72)
    problem = problem_of(model)
    assert "model.layers.0.mlp.down_proj.weight is [32, 64] and should be [32, 72] (and 8 more)" in problem


def test_more_layers_than_config_json_says(model: Path) -> None:
    """With the option `layers` they are left out, but not where nobody asked for that."""
    assert load(model, role="drafter", layers=2)
    configure(model, num_hidden_layers=2)
    assert "unknown: model.layers.2." in problem_of(model)


def test_tied_weights_and_old_buffers_are_no_fault(model: Path) -> None:
    def tie(weights: Weights) -> None:
        del weights["lm_head.weight"]
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    configure(model, tie_word_embeddings=True)
    change(model, tie)
    assert load(model).info.vocabulary_size == 96


def test_a_tied_matrix_under_its_other_name(model: Path) -> None:
    configure(model, tie_word_embeddings=True)
    change(model, dropping("model.embed_tokens.weight"))
    assert load(model).info.vocabulary_size == 96


@pytest.mark.parametrize(("kind", "missing"), [("qwen2", "q_proj.bias"), ("qwen3", "q_norm.weight")])
def test_what_every_model_of_a_kind_has(kind: str, missing: str, tmp_path: Path, llama: Path) -> None:
    shape = {name: json.loads((llama / "config.json").read_text())[name] for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    )}  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, head_dim=8)).save_pretrained(tmp_path)
    shutil.copy(llama / "tokenizer.json", tmp_path)

    def drop(weights: Weights) -> None:
        for name in [name for name in weights if any(part in name for part in ("_proj.bias", "q_norm", "k_norm"))]:
            del weights[name]

    assert load(tmp_path)
    change(tmp_path, drop)
    assert f"missing: model.layers.0.self_attn.{missing.replace('q_', 'k_')}" in problem_of(tmp_path)


def test_buffers_of_gpt2_are_no_fault(tmp_path: Path, llama: Path) -> None:
    """The files of GPT-2 hold masks that the model computes itself."""
    config = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shutil.copy(llama / "tokenizer.json", tmp_path)
    change(tmp_path, lambda weights: weights.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256)}))
    assert load(tmp_path)
    change(tmp_path, dropping("transformer.h.1.mlp.c_fc.weight"))
    assert "(missing: transformer.h.1.mlp.c_fc.weight)" in problem_of(tmp_path)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "g_idx"])
def test_quantized_weights_without_a_word_of_how(model: Path, name: str) -> None:
    change(model, lambda weights: weights.update({f"model.layers.0.mlp.up_proj.{name}": torch.ones(8, 8).int()}))
    problem = problem_of(model)
    assert f"quantized, as by AWQ or GPTQ (model.layers.0.mlp.up_proj.{name})" in problem
    assert "no quantization_config" in problem


def test_weights_in_whole_numbers(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(model, lambda weights: weights.update({name: weights[name].to(torch.int8)}))
    assert f"quantized, as by AWQ or GPTQ ({name})" in problem_of(model)


ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True}


def compressed(**group: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, **group}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (compressed(input_activations=ACTIVATIONS), "quantizes the inputs of its layers"),
        (compressed(output_activations=ACTIVATIONS), "quantizes the inputs of its layers"),
        ({**compressed(), "config_groups": {"FP8_DYNAMIC": ["Linear"]}}, "quantizes the inputs of its layers"),
        ({**compressed(), "kv_cache_scheme": ACTIVATIONS}, "quantizes its KV cache"),
    ],
)
def test_quantized_activations_are_refused(model: Path, settings: dict[str, Any], reason: str) -> None:
    configure(model, quantization_config=settings)
    problem = problem_of(model)
    assert f"{model} {reason} (compressed-tensors" in problem
    assert "choose the model without quantization" in problem


def test_a_layer_that_stays_quantized_is_refused(model: Path) -> None:
    from dsi_workers.checkpoints.quantized import refuse_if_quantized

    class Other(torch.nn.Linear):
        pass

    wrapped = torch.nn.Linear(4, 4)
    wrapped.forward = lambda x: x  # type: ignore[method-assign,assignment]
    refuse_if_quantized(torch.nn.Sequential(torch.nn.Linear(4, 4)), "some", "model")
    for layer in (Other(4, 4), wrapped):
        with pytest.raises(EngineError, match=r"quantized \(some\), and 0 stays so"):
            refuse_if_quantized(torch.nn.Sequential(layer), "some", "model")
