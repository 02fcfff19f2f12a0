"""Test support: GGUF files of small random models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WORDS = 96


def made(**settings: Any) -> LlamaForCausalLM:
    """A random Llama of two layers, with RoPE as in Llama 3."""
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
