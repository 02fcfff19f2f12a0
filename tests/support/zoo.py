"""Tiny random models of the architectures that people use, made on the spot.

`PYTHONPATH=tests python -m support.zoo` prints the table of docs/models.md.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsi_workers.engine import EngineError

WORDS, POSITIONS = 128, 1024
_SHAPE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
#: Positions that a row reads in layers with a sliding window or in chunks: prompts of tests are longer.
_WINDOW = 48


@dataclass(frozen=True)
class Kind:
    """An architecture: what is particular about it, and the configuration of a tiny model beside _SHAPE."""

    model_type: str
    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    #: Settings of _SHAPE that the configuration does not have.
    without: tuple[str, ...] = ()
    #: Of a model for texts and images: the settings of the part that reads images, and others outside of the text part.
    images: dict[str, Any] | None = None


def _experts(**more: Any) -> dict[str, Any]:
    return {"num_experts_per_tok": 2, "moe_intermediate_size": 24, **more}


_SLIDING = {"sliding_window": _WINDOW}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, **_SLIDING}
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}  # fmt: skip
_DEEPSEEK = _experts(
    **_LATENT, n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
_CHUNKS = {
    "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": _WINDOW,
    "no_rope_layers": [1, 1, 0, 1], "attn_temperature_tuning": True, "floor_scale": 16, "interleave_moe_layer_step": 2,
}  # fmt: skip
_EYE = {"hidden_size": 16, "intermediate_size": 16}
_PIECES = {**_EYE, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
_TOWER = {**_EYE, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
_GPT = {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 4, "n_head": 4}

#: Architectures that work, by model type.
KINDS = {
    kind.model_type: kind
    for kind in (
        Kind("llama", "Llama, SmolLM2"),
        Kind("mistral", "Mistral, also with a sliding window", _SLIDING),
        Kind("qwen2", "Qwen2, Qwen2.5"),
        Kind("qwen3", "Qwen3"),
        Kind("qwen3_moe", "Qwen3-30B-A3B: experts", _experts(num_experts=8, norm_topk_prob=True)),
        Kind("qwen2_moe", "Qwen1.5-MoE: experts", _experts(num_experts=8, shared_expert_intermediate_size=24)),
        Kind("mixtral", "Mixtral: experts", _experts(num_local_experts=4)),
        Kind("gpt_oss", "gpt-oss: experts, sinks, sliding window", _experts(num_local_experts=4, **_ALTERNATING)),
        Kind("glm4_moe", "GLM-4.5: experts", _experts(n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1)),
        Kind("minimax_m2", "MiniMax-M2: experts", _experts(num_local_experts=8)),
        Kind("olmoe", "OLMoE: experts", _experts(num_experts=8)),
        Kind("phimoe", "Phi-3.5-MoE: experts", _experts(num_local_experts=4)),
        Kind("granitemoe", "Granite 3 MoE: experts", _experts(num_local_experts=4)),
        Kind(
            "ernie4_5_moe", "ERNIE 4.5 MoE: experts",
            {"moe_k": 2, "moe_num_experts": 8, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
        ),
        Kind("hunyuan_v1_moe", "Hunyuan-A13B: experts", {"num_experts": 4, "moe_topk": 2}),
        Kind("deepseek_v2", "DeepSeek-V2: experts, latent attention", _DEEPSEEK),
        Kind("deepseek_v3", "DeepSeek-V3, R1: experts, latent attention", _DEEPSEEK, ("head_dim",)),
        Kind("llama4_text", "Llama 4: experts, attention in chunks", _CHUNKS),
        Kind(
            "llama4", "Llama 4, its text part", _CHUNKS,
            images={
                "vision_config": {
                    **_TOWER, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16
                }
            },
        ),
        Kind("gemma", "Gemma"),
        Kind(
            "gemma2", "Gemma 2: soft cap, sliding window",
            {**_ALTERNATING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
        ),
        Kind("gemma3_text", "Gemma 3: sliding window", {**_ALTERNATING, "query_pre_attn_scalar": 8}),
        Kind(
            "gemma3", "Gemma 3 for texts and images, its text part", {**_ALTERNATING, "query_pre_attn_scalar": 8},
            images={"vision_config": _TOWER, "mm_tokens_per_image": 4},
        ),
        Kind(
            "gemma3n_text", "Gemma 3n: layers that share keys and values",
            {
                **_ALTERNATING, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": WORDS,
                "laurel_rank": 4, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
                "altup_num_inputs": 2,
            },
        ),
        Kind(
            "gemma4_text", "Gemma 4: layers that share keys and values, heads of two sizes",
            {
                **_ALTERNATING, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": WORDS,
                "global_head_dim": 16,
            },
        ),
        Kind("granite", "Granite 3"),
        Kind(
            "granitemoehybrid", "Granite 4 with attention layers only: experts",
            {
                "layer_types": ["full_attention"] * 4, "num_local_experts": 4, "num_experts_per_tok": 2,
                "shared_intermediate_size": 24, "mamba_n_heads": 8,
            },
        ),
        Kind("phi3", "Phi-3, Phi-4", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        Kind("gpt2", "GPT-2", _GPT, tuple(_SHAPE)[1:8]),
        Kind("olmo2", "OLMo 2"),
        Kind("cohere2", "Command R7B", _ALTERNATING, ("head_dim",)),
        Kind("glm4", "GLM-4"),
        Kind("stablelm", "StableLM", {}, ("head_dim",)),
        Kind(
            "mistral3", "Mistral Small 3.1 and 3.2, their text part", {"model_type": "mistral", "sliding_window": None},
            images={"vision_config": {**_EYE, "model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2}},
        ),
        Kind(
            "qwen2_5_vl", "Qwen2.5-VL, its text part",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
            images={"vision_config": {**_PIECES, "fullatt_block_indexes": [0]}},
        ),
        Kind(
            "qwen3_vl", "Qwen3-VL, its text part", {}, images={"vision_config": {**_PIECES, "deepstack_visual_indexes": [0]}}
        ),
    )
}  # fmt: skip
#: Architectures that are refused.
REFUSED = {
    kind.model_type: kind
    for kind in (
        Kind("falcon", "Falcon", {}, ("head_dim", "num_key_value_heads", "intermediate_size")),
        Kind("gptj", "GPT-J", {**_GPT, "rotary_dim": 8}, tuple(_SHAPE)[1:8]),
        Kind(
            "gpt_neo", "GPT-Neo",
            {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": _WINDOW},
            ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        ),
        Kind("bloom", "BLOOM", {"n_layer": 4, "n_head": 4}, tuple(_SHAPE)[2:8]),
        Kind("codegen", "CodeGen", {**_GPT, "rotary_dim": 8}, tuple(_SHAPE)[1:8]),
        Kind(
            "qwen3_vl_moe", "Qwen3-VL with experts", _experts(num_local_experts=4),
            images={"vision_config": {**_PIECES, "deepstack_visual_indexes": [0]}},
        ),
        Kind(
            "deepseek_v32", "DeepSeek-V3.2: an indexer chooses the tokens to read",
            {**_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}, ("head_dim",),
        ),
        Kind("bert", "BERT: tokens read later ones", {}, ("num_key_value_heads", "head_dim")),
        Kind("roberta", "RoBERTa: positions begin at another number", {"is_decoder": True}, ("num_key_value_heads", "head_dim")),
        Kind("mamba", "Mamba", {"state_size": 8}, tuple(_SHAPE)[2:8]),
        Kind("qwen3_next", "Qwen3-Next", _experts(num_experts=8)),
        Kind("lfm2", "LFM2", {"layer_types": ["conv", "full_attention"] * 2}, ("head_dim",)),
    )
}  # fmt: skip


def make(directory: Path, kind: Kind) -> Any:
    """Save a tiny random model of this kind with a tokenizer. Returns the model of transformers, in float32."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    shape = {name: value for name, value in _SHAPE.items() if name not in kind.without}
    settings = copy.deepcopy({**shape, **kind.settings})
    torch.manual_seed(3)
    if kind.images is None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.model_type, **settings))
    else:
        images = copy.deepcopy(kind.images)
        config = AutoConfig.for_model(kind.model_type, text_config=settings, tie_word_embeddings=False, **images)
        model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():  # wide logits: no two are nearly equal
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.3)
        else:
            parameter.data.uniform_(0.5, 1.5)
    model.eval().save_pretrained(directory)
    Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0")).save(str(directory / "tokenizer.json"))
    return model


def table() -> Iterator[str]:
    """The lines of the table of docs/models.md."""
    import torch

    from dsi_workers.checkpoints.load import load_model
    from dsi_workers.decoding.decoder import Decoder

    yield "| `model_type` | models | runs with |"
    yield "|---|---|---|"
    for kind in (*KINDS.values(), *REFUSED.values()):
        with tempfile.TemporaryDirectory() as directory:
            make(Path(directory), kind)
            try:
                found = load_model(
                    Path(directory), torch.device("cpu"), reference="the model", dtype="float32", quantization="none", rows=8,
                    most_positions=512, kernels=False,
                )  # fmt: skip
                runs = "own layers" if isinstance(found.decoder, Decoder) else "transformers' layers"
            except EngineError as error:
                runs = f"refused: {str(error).rpartition(': choose')[0]}"
        yield f"| `{kind.model_type}` | {kind.about} | {runs} |"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in table())
