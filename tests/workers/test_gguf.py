"""GGUF files: split ones, those that scale RoPE, and those with weights that would be left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dsi_workers.models.files import ModelError
from dsi_workers.models.resolve import resolve_model
from dsi_workers.models.rope_factors import rope_of_factors
from support.gguf_files import LLAMA3, WORDS, factors_of, made, tensors_of, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(torch.arange(200)[None] * 7 % WORDS).logits[0]
    return logits


def test_rope_factors_are_those_of_llama_3(tmp_path: Path) -> None:
    model = made()
    directory = resolve_model(str(write(tmp_path / "tiny.gguf", model, factors=factors_of(model))))
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    assert rope == LLAMA3
    found = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(logits_of(found), logits_of(model))
    other = made(rope={"rope_type": "default", "rope_theta": 10000.0})
    assert (logits_of(other) - logits_of(model)).norm() > 0.01 * logits_of(model).norm()  # it matters


def test_any_factors_will_do(tmp_path: Path) -> None:
    model = made(rope={"rope_type": "default", "rope_theta": 10000.0})
    factors = np.linspace(1, 5, 16, dtype=np.float32) ** 2
    directory = resolve_model(str(write(tmp_path / "tiny.gguf", model, factors=factors)))
    model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    found = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("factor", "original", "high"), [(8.0, 8192, 4.0), (32.0, 8192, 4.0), (16.0, 4096, 8.0)])
def test_the_numbers_of_published_models_are_found(factor: float, original: int, high: float) -> None:
    rope = {**LLAMA3, "rope_theta": 500000.0, "factor": factor, "original_max_position_embeddings": original,
            "high_freq_factor": high}  # fmt: skip
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, rope_parameters=rope, max_position_embeddings=131072)
    plain = 500000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert rope_of_factors((plain / scaled.double()).float().tolist(), 500000.0, 131072) == rope


def test_factors_of_one_change_nothing() -> None:
    assert rope_of_factors([1.0] * 16, 10000.0, 512) == {"rope_type": "default", "rope_theta": 10000.0}


def problem_of(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def split(directory: Path, model: LlamaForCausalLM, count: int = 3) -> list[Path]:
    names = list(tensors_of(model, None))
    paths = []
    for number in range(count):
        more = {"split.no": number, "split.count": count}
        path = directory / f"tiny-{number + 1:05d}-of-{count:05d}.gguf"
        write(path, model, names[number::count], metadata=number == 0, more=more)
        paths.append(path)
    return paths


def test_all_parts_of_a_split_model_are_read(tmp_path: Path) -> None:
    model = made(rope={"rope_type": "default", "rope_theta": 10000.0})
    parts = split(tmp_path, model)
    directories = {resolve_model(str(part)) for part in parts}
    assert len(directories) == 1
    [directory] = directories
    assert not list(directory.glob("*.gguf"))
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(directory)), logits_of(model))


def test_a_part_without_the_others(tmp_path: Path) -> None:
    first, second, third = split(tmp_path, made())
    third.unlink()
    assert problem_of(second) == (
        f"{second} is one of 3 parts of a model, and others are not beside it ({third.name}): put all parts into one directory"
    )
    alone = first.rename(tmp_path / "alone.gguf")
    assert f"{alone} is one of 3 parts of a model, under another name" in problem_of(alone)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    model = made()
    names = [name for name in tensors_of(model, None) if "blk.1.ffn" not in name]
    problem = problem_of(write(tmp_path / "tiny.gguf", model, names))
    assert "missing: model.layers.1.mlp.down_proj.weight" in problem


def test_weights_that_would_be_left_out_are_named(tmp_path: Path) -> None:
    """Nothing in a GGUF of the kind llama says that its layers have biases."""
    problem = problem_of(write(tmp_path / "tiny.gguf", made(attention_bias=True)))
    assert "unknown: blk.0.attn_k.bias, blk.0.attn_output.bias, blk.0.attn_q.bias and 5 more" in problem


def test_another_scaling_of_rope(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", made(), more={"llama.rope.scaling.type": "yarn"})
    assert f"{path} scales RoPE (yarn) in a way that is not supported" in problem_of(path)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.98])
def test_a_file_that_ends_too_early(tmp_path: Path, part: float) -> None:
    path = write(tmp_path / "tiny.gguf", made())
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    problem = problem_of(path)
    assert str(path) in problem
    assert "damaged" in problem
