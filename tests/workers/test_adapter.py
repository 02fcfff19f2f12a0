"""LoRA adapters: merged once, by the content of the adapter, and refused in one sentence where they do not fit."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dsi_workers.engines import load_engine
from dsi_workers.models.files import ModelError
from dsi_workers.models.resolve import resolve_model
from support.adapters import make_adapter
from support.engines import NoInterrupt, make_tiny_model, session_of

#: peft asks transformers for what that has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers."),
]

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))


def problem_of(base: Path, adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(base), adapter=str(adapter))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def answer_of(model: Path, adapter: Path | None = None) -> list[int]:
    """Greedy text after PROMPT."""
    options: dict[str, Any] = {"calibrate": False, "slots": 1, "max_length": 64}
    options |= {} if adapter is None else {"adapter": str(adapter)}
    engine = load_engine("transformers", role="target", model=str(model), device="cpu:0", options=options)
    tokens = list(PROMPT)
    for _ in range(12):
        tokens += engine.verify(session_of(tokens, generation=len(tokens)), len(tokens), NoInterrupt()).tokens
    return tokens


def test_the_text_is_that_of_a_model_merged_by_hand(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = make_adapter(tmp_path / "adapter", base)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged = model.merge_and_unload().eval()
    expected = merged.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()  # fmt: skip
    assert answer_of(base, adapter) == expected != answer_of(base)
    found = load_file(resolve_model(str(base), adapter=str(adapter)) / "model.safetensors")
    for name, weight in merged.state_dict().items():
        assert torch.equal(found[name], weight), name


def test_another_adapter_at_the_same_place_is_another_model(base: Path, tmp_path: Path) -> None:
    first = resolve_model(str(base), adapter=str(make_adapter(tmp_path / "adapter", base)))
    assert resolve_model(str(base), adapter=str(tmp_path / "adapter")) == first
    make_adapter(tmp_path / "adapter", base, seed=2)
    second = resolve_model(str(base), adapter=str(tmp_path / "adapter"))
    assert second != first
    assert (second / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_without_peft_one_sentence_names_the_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert problem_of(base, adapter) == f"merging the adapter {adapter} needs peft: pip install 'dsi-actors[lora]'"


def test_what_is_no_adapter(base: Path, tmp_path: Path) -> None:
    assert "there is no directory" in problem_of(base, tmp_path / "nowhere")
    assert "has no adapter_config.json" in problem_of(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "has no weights (adapter_model.safetensors is missing)" in problem_of(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"gibberish")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    assert "is an adapter of the kind PROMPT_TUNING: only LoRA is supported" in problem_of(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "is damaged" in problem_of(base, tmp_path)


def test_weights_of_an_adapter_that_do_not_fit_are_named(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    file = adapter / "adapter_model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    save_file({other: weights[other] for other in weights if other != name}, file)
    assert f"do not fit {base} (missing: {name})" in problem_of(base, adapter)
    save_file({**weights, "base_model.model.surprise": torch.ones(1)}, file)
    assert "(unknown: base_model.model.surprise)" in problem_of(base, adapter)


def test_an_adapter_of_the_output_matrix(base: Path, tmp_path: Path) -> None:
    """peft saves the matrix itself with it."""
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["lm_head", "q_proj"])
    assert any("lora_" not in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert answer_of(base, adapter) != answer_of(base)


def test_an_adapter_of_another_model(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    vocabulary = (other / "tokenizer.json").read_text().replace('"w95"', '"x95"')
    (adapter / "tokenizer.json").write_text(vocabulary)
    assert f"{adapter} has another vocabulary than {base}" in problem_of(base, adapter)


@pytest.mark.parametrize("settings", [{"quantization_config": {"quant_method": "fp8"}}, {"tie_word_embeddings": True}])
def test_models_into_which_nothing_can_be_merged(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["lm_head", "q_proj"])
    model = Path(shutil.copytree(base, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **settings}))
    assert "merged" in problem_of(model, adapter)


def test_an_adapter_in_place_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        resolve_model(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path} is an adapter (LoRA), not a model: give its base model (org/base) as the model, and the directory of the "
        "adapter with --adapter DIR"
    )
