"""GGUF files: split ones, those that scale RoPE, and those with weights that would be left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dsi_workers.models.files import ModelError
from dsi_workers.models.resolve import resolve_model
from dsi_workers.models.rope_factors import rope_of_factors

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WORDS = 96


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, rope_parameters=settings.pop("rope", LLAMA3), **settings,
    )  # fmt: skip
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model


def factors_of(model: LlamaForCausalLM) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As llama.cpp's conversion computes them: by how much each frequency is divided."""
    plain = 10000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    return (plain / scaled.double()).float().numpy()


def write(
    path: Path, model: LlamaForCausalLM, names: Sequence[str] | None = None, *, factors: Any = None,
    metadata: bool = True, more: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write the model as llama.cpp does. `names`: of the tensors to write; None for all. `more`: metadata."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    if metadata:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads or 1)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(WORDS)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["w", "1", "w1", *(f"w{number}" for number in range(3, WORDS))])
        writer.add_token_merges(["w 1"])
        writer.add_token_types([1] * WORDS)
        writer.add_eos_token_id(1)
    for name, value in (more or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(name, value)
    for name, tensor in tensors_of(model, factors).items():
        if names is None or name in names:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(model: LlamaForCausalLM, factors: Any) -> dict[str, Any]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    found: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        if (count := heads.get(stem.rpartition(".")[2])) and kind == "weight":  # llama.cpp turns neighbours, not halves
            tensor = tensor.reshape(count, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        found[f"{names.get_name(stem)}.{kind}"] = tensor.numpy()
    if factors is not None:
        found["rope_freqs.weight"] = factors
    return found


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
