"""Shapes of models for measurements of devices, and random weights for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dsi_workers.decoding.experts import Blocks, Expert, Mixture


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model of the Llama 3 family, or of one whose MLPs are mixtures of experts.

    `intermediate`: of a dense MLP, or of one expert. `words`: size of the vocabulary. A row is computed by `top_k` of `experts`.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    words: int = 128_256
    experts: int = 0
    top_k: int = 0

    @property
    def expert_weights(self) -> int:
        """Weights of one expert of one layer."""
        return 3 * self.hidden * self.intermediate

    def expected_experts(self, rows: int) -> float:
        """How many experts of a layer so many rows choose, if every choice is as likely as any other."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** rows) if self.experts else 0.0

    def prompt_flop(self, positions: int) -> int:
        """Floating-point operations of a prompt: products with weights, causal attention, logits after the last position."""
        queries, states = self.heads * self.dim, (self.heads + 2 * self.kv_heads) * self.dim
        mlp = self.experts * self.hidden + self.top_k * self.expert_weights if self.experts else self.expert_weights
        weights = self.hidden * (states + queries) + mlp
        attention = 4 * queries * (positions * (positions + 1) // 2)
        return self.layers * (2 * weights * positions + attention) + 2 * self.hidden * self.words


SHAPES = {
    "tiny": Shape(64, 128, 5, 4, 2, 16, 256),
    "1b": Shape(2048, 8192, 16, 32, 8, 64),
    "3b": Shape(3072, 8192, 28, 24, 8, 128),
    "8b": Shape(4096, 14336, 32, 32, 8, 128),
    # Qwen3-30B-A3B
    "30b-a3b": Shape(2048, 768, 48, 32, 4, 128, 151_936, experts=128, top_k=8),
    "tiny-moe": Shape(64, 32, 3, 4, 2, 16, 256, experts=8, top_k=2),
}


def random_weights(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of the shape by transformers' names, without those of experts."""
    generator = torch.Generator(device=device).manual_seed(7)

    def random(rows: int, columns: int) -> torch.Tensor:
        made = torch.empty(rows, columns, dtype=dtype, device=device)
        return made.normal_(0, columns**-0.5, generator=generator)

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden, dtype=dtype, device=device)

    heads, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
    weights = {"model.embed_tokens.weight": random(shape.words, shape.hidden), "model.norm.weight": ones()}
    weights["lm_head.weight"] = random(shape.words, shape.hidden)
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        weights[f"{name}.input_layernorm.weight"] = ones()
        weights[f"{name}.post_attention_layernorm.weight"] = ones()
        for part, size in (("q", heads), ("k", kv), ("v", kv)):
            weights[f"{name}.self_attn.{part}_proj.weight"] = random(size, shape.hidden)
        weights[f"{name}.self_attn.o_proj.weight"] = random(shape.hidden, heads)
        if shape.experts:
            continue
        for part in ("gate", "up"):
            weights[f"{name}.mlp.{part}_proj.weight"] = random(shape.intermediate, shape.hidden)
        weights[f"{name}.mlp.down_proj.weight"] = random(shape.hidden, shape.intermediate)
    return weights


def random_mixtures(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[int, Mixture]:
    """By layer: a mixture of experts with random weights, if the shape has any."""
    generator, blocks = torch.Generator(device=device).manual_seed(8), Blocks()

    def linears(count: int, rows: int, columns: int) -> list[nn.Linear]:
        weights = torch.empty(count, rows, columns, dtype=dtype, device=device)
        weights.normal_(0, columns**-0.5, generator=generator)
        made = [nn.Linear(columns, rows, bias=False, device="meta") for _ in range(count)]
        for linear, weight in zip(made, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
        return made

    def mixture() -> Mixture:
        [router] = linears(1, shape.experts, shape.hidden)
        up = linears(shape.experts, 2 * shape.intermediate, shape.hidden)
        down = linears(shape.experts, shape.hidden, shape.intermediate)
        experts = [Expert(first, second, _multiply_by_silu, None) for first, second in zip(up, down, strict=True)]
        return Mixture(router, experts, top_k=shape.top_k, renormalizes=True, blocks=blocks)

    return {layer: mixture() for layer in range(shape.layers)} if shape.experts else {}


def _multiply_by_silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up
