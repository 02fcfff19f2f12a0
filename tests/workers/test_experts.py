"""Mixtures of experts: a row has the same bits whatever the rows beside it are, and padding has no expert read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dsi_workers.backend import Run
from dsi_workers.checkpoints import sizes
from dsi_workers.checkpoints.experts import choose_block_rows, replace_experts
from dsi_workers.checkpoints.library import TransformersDecoder
from dsi_workers.checkpoints.load import load_model
from dsi_workers.decoding import kernel_agreement
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.experts import Blocks, Expert, route_in_blocks
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.widths import Trial
from dsi_workers.models.files import read_json
from dsi_workers.models.headers import read_tensors
from support.zoo import KINDS, WORDS, make

#: Models with experts that our own decoder computes.
OWN_LAYERS = ("qwen3_moe", "mixtral")


def blocks_of(decoder: TransformersDecoder | Decoder) -> Blocks:
    found = decoder.mixtures[0].blocks if isinstance(decoder, Decoder) else decoder.blocks
    assert found is not None
    return found


def loaded(directory: Path, name: str, **options: str) -> tuple[TransformersDecoder | Decoder, Forward]:
    make(directory, KINDS[name])
    wanted: dict[str, Any] = {"dtype": "float32", "quantization": "none", **options}
    found = load_model(directory, torch.device("cpu"), reference="made", rows=8, most_positions=256, **wanted)
    assert isinstance(found.decoder, TransformersDecoder if name not in OWN_LAYERS else Decoder)
    return found.decoder, Forward(found.decoder, found.config, torch.device("cpu"), slots=2, capacity=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN_LAYERS)
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_group_in_our_own_layers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder, _ = loaded(tmp_path, name, dtype=str(dtype).removeprefix("torch."))
    assert isinstance(decoder, Decoder)
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    decoder.mixtures[0].blocks.used = None
    whole = decoder.mixtures[0].forward(rows)
    for size in (1, 2, 3, 7, 8, 13):
        assert torch.equal(torch.cat([decoder.mixtures[0].forward(part) for part in rows.split(size)]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.zoo)])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "phimoe"])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_group(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(tmp_path, KINDS[name]).to(dtype)
    layer = next(module for module in model.modules() if hasattr(module, "experts"))
    rows = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)

    def outputs(x: torch.Tensor) -> torch.Tensor:
        found = layer(x)
        found = found if isinstance(found, torch.Tensor) else found[0]
        return found.reshape(-1, 32)

    plain = outputs(rows)
    blocks = replace_experts(model)
    assert blocks is not None
    choose_block_rows(model, blocks)
    whole = outputs(rows)
    assert (whole - plain).norm() <= (1e-5 if dtype is torch.float32 else 0.02) * plain.norm()
    for size in (1, 2, 3, 7, 8, 13):
        assert torch.equal(torch.cat([outputs(part) for part in rows.split(size, 1)]), whole)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_padding_has_no_expert_computed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, forward = loaded(tmp_path, name)
    calls, plain = list[object](), Expert.forward

    def counted(self: Expert, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return plain(self, x)

    monkeypatch.setattr(Expert, "forward", counted)
    forward([Run(0, [3], 0, 8, 0)], rows=16, logit_rows=1)
    assert len(calls) == 4 * 2, "four layers, two experts of a token"


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe"])
def test_where_bits_depend_on_the_place_in_a_block_rows_are_computed_one_by_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, multiply = functional.linear, Expert.forward

    def scaled(y: torch.Tensor) -> torch.Tensor:
        return y * (1 + torch.arange(y.shape[-2])[:, None] / 1e4)

    monkeypatch.setattr(functional, "linear", lambda *arguments: scaled(linear(*arguments)))
    decoder, _ = loaded(tmp_path / "router", name)
    assert blocks_of(decoder).router_rows == 1
    monkeypatch.setattr(Expert, "forward", lambda self, x: scaled(multiply(self, x)))
    decoder, _ = loaded(tmp_path / "experts", name)
    assert (blocks_of(decoder).rows, blocks_of(decoder).router_rows) == (1, 1)


@torch.inference_mode()
def test_widths_at_which_an_activation_has_other_bits_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a shared expert may be shorter than the vectors of a CPU, and the rest of a vector is computed otherwise. Here
    a function stands for that whose bits depend on the number of rows."""

    def by_fours(numbers: torch.Tensor) -> torch.Tensor:
        return numbers if len(numbers) % 4 == 0 else numbers.nextafter(numbers + 1)

    _, forward = loaded(tmp_path, "deepseek_v3")
    monkeypatch.setattr(kernel_agreement, "_LEAST_VALUES", 2000)  # else seconds: the layers are small
    monkeypatch.setattr(kernel_agreement, "_ACTIVATIONS", (by_fours,))
    assert kernel_agreement._activations_agree(forward, 4, 8)
    assert not kernel_agreement._activations_agree(forward, 2, 8)
    monkeypatch.setattr(kernel_agreement, "_linear_layers_agree", lambda forward, rows, window: True)
    assert kernel_agreement.batches_agree(forward, 4, 8)
    assert not kernel_agreement.batches_agree(forward, 2, 8)
    assert not any(width % 4 for width in Trial(forward, window=8, words=WORDS, name="made").widths(1).costs_s)


def test_a_router_may_return_one_tensor() -> None:
    router, x = nn.Linear(4, 3), torch.randn(11, 4)
    expected = router(x)
    route_in_blocks(router, Blocks())
    assert torch.allclose(router(x), expected)


@torch.inference_mode()
def test_int8_reaches_the_experts(tmp_path: Path) -> None:
    decoder, forward = loaded(tmp_path, "gpt_oss", quantization="int8")
    assert isinstance(decoder, TransformersDecoder)
    experts = [module for module in decoder._model.modules() if isinstance(module, Expert)]
    assert experts
    assert not any(isinstance(layer, nn.Linear) for expert in experts for layer in expert.modules())
    weights = {"model.layers.0.mlp.experts.gate_up_proj": ("BF16", (4, 32, 96))}
    assert sizes.weight_bytes(weights, 2, bits=8) == 4 * 32 * 96 + 4 * 96 * 2
    forward([Run(0, [3, 1, 4], 0, 3, 0)], rows=3, logit_rows=3)


def test_the_cache_of_latent_attention_is_what_is_allocated(tmp_path: Path) -> None:
    _, forward = loaded(tmp_path, "deepseek_v3")
    forward([Run(0, [3, 1, 4], 0, 3, 0)], rows=3, logit_rows=3)
    allocated = sum(
        tensor.tensor.nbytes
        for layer in forward.cache.layers
        if layer._storage is not None
        for tensor in layer._storage
    )
    config = read_json(tmp_path / "config.json")
    capacity = forward.cache.capacity
    assert sizes.cache_bytes(config, slots=2, positions=capacity, number_bytes=4) == allocated


@torch.inference_mode()
def test_experts_in_mxfp4_become_plain_weights(tmp_path: Path) -> None:
    """As in the files of gpt-oss: two weights in a byte, and an exponent for each 32 of them."""
    kind = KINDS["gpt_oss"]
    make(tmp_path, replace(kind, settings={**kind.settings, "intermediate_size": 64}))
    file, generator = tmp_path / "model.safetensors", torch.Generator().manual_seed(1)
    weights = load_file(file)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, size, rows = weights.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, size // 32, 16), generator=generator, dtype=torch.uint8)
        weights[f"{name}_blocks"] = blocks
        weights[f"{name}_scales"] = torch.full((experts, rows, size // 32), 124, dtype=torch.uint8)
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted: dict[str, Any] = {"dtype": "float32", "quantization": "none", "rows": 8, "most_positions": 256}
    found = load_model(tmp_path, torch.device("cpu"), reference="made", **wanted)
    forward = Forward(found.decoder, found.config, torch.device("cpu"), slots=1, capacity=256)
    tokens = [7 * place % 90 for place in range(40)]
    [logits] = forward([Run(0, tokens, 0, 40, 0)], rows=40, logit_rows=40)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    assert (logits - expected).norm() <= 1e-3 * expected.norm()
    plain = make(tmp_path / "plain", replace(kind, settings={**kind.settings, "intermediate_size": 64}))
    assert sizes.loading_bytes(read_tensors(tmp_path), 4) == 4 * plain.num_parameters()
