"""Llama and its kin as few operations for each layer: the library's own take longer than what they compute, for a few rows.

The projections of queries, keys and values are one product, those of gate and up another; query heads that share keys are
rows of one head. What is computed is what the library's layers compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dsi_workers.decoding.attention import attend, mask_of_group
from dsi_workers.decoding.kv_cache import SlotCache, SlotLayer
from dsi_workers.decoding.packed import Masks, Packed


@dataclass(slots=True)
class Layer:
    kind: str
    input_norm: torch.Tensor
    qkv: nn.Module
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: nn.Module
    mlp_norm: torch.Tensor
    gate_up: nn.Module
    down: nn.Module


_PRODUCTS = ("qkv", "output", "gate_up", "down")


@dataclass(slots=True)
class _Turns:
    """What the rows of one forward are rotated by, [rows, 1, dim], and what each segment may read, by kind of layer."""

    cos: torch.Tensor
    sin: torch.Tensor
    masks: dict[str, list[torch.Tensor | None]]
    #: Attention of each position is computed by itself.
    apart: bool


class Decoder:
    """A model as a function of rows of several generations, packed one after another, whose keys a SlotCache holds."""

    recorded_rows: Sequence[int] = ()
    group_rows, sums_in_one_order = 1, False

    def __init__(
        self, weights: MutableMapping[str, torch.Tensor], config: Any, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Weights and configuration have the library's names; cos and sin are [positions, head_dim]. Matrices of products are
        taken out of `weights`."""
        self.embedding = weights["model.embed_tokens.weight"]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.dim = cos.shape[-1]
        self.heads = len(weights["model.layers.0.self_attn.q_proj.weight"]) // self.dim
        self.kv_heads = len(weights["model.layers.0.self_attn.k_proj.weight"]) // self.dim
        self.scaling = self.dim**-0.5
        self.epsilon = float(config.rms_norm_eps)
        self._epsilon = torch.tensor(self.epsilon, device=self.device)
        sign = torch.ones(self.dim, dtype=self.dtype, device=self.device)
        sign[: self.dim // 2] = -1
        #: [positions, dim]. The first half of the sines is negative.
        self.cos, self.sin = cos.to(self.device), sin.to(self.device) * sign
        number = int(config.num_hidden_layers)
        kinds = getattr(config, "layer_types", None) or [""] * number
        self.masks = Masks(config)
        self.layers = [_layer(weights, f"model.layers.{layer}", kinds[layer]) for layer in range(number)]
        self.norm = weights["model.norm.weight"]
        self.head: nn.Module = _linear(weights, "lm_head")

    def lay_out(self, lay_out: Callable[[nn.Linear], nn.Module]) -> None:
        """Replace what multiplies by weights, one after another, so that few weights are there twice."""
        for layer in self.layers:
            for name in _PRODUCTS:
                setattr(layer, name, lay_out(getattr(layer, name)))
        assert isinstance(self.head, nn.Linear)
        self.head = lay_out(self.head)

    def products(self) -> list[Any]:
        return [getattr(self.layers[0], name) for name in _PRODUCTS] + [self.head]

    def __call__(self, packed: Packed, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        """Logits [len(packed.kept), vocabulary]."""
        turns = self._turns(packed)
        x = functional.embedding(torch.tensor(packed.ids, device=self.device), self.embedding)
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            between_layers()
            x = self._advance(x, layer, stored, turns)
        kept = torch.tensor(packed.kept, device=self.device)
        logits: torch.Tensor = self.head.forward(self._normed(x[kept], self.norm))
        return logits

    def _turns(self, packed: Packed) -> _Turns:
        # Padding may lie beyond the last position that the model knows.
        positions = torch.tensor(packed.positions, device=self.device).clamp(max=len(self.cos) - 1)
        own_masks: dict[str, list[torch.Tensor | None]] = {"": [None] * len(packed.segments)}
        if not self.masks.hide_nothing(packed):
            masks = self.masks.of(packed, self.device)
            kinds = masks if isinstance(masks, Mapping) else {"": masks}
            own_masks = {kind: self._own_masks(mask, packed) for kind, mask in kinds.items()}
        return _Turns(self.cos[positions][:, None], self.sin[positions][:, None], own_masks, packed.apart)

    def _advance(self, x: torch.Tensor, layer: Layer, stored: SlotLayer, turns: _Turns) -> torch.Tensor:
        """By one layer. x: [rows, hidden]."""
        rows, heads, kv_heads, dim = len(x), self.heads, self.kv_heads, self.dim
        # `forward`, not a call: what torch looks for around a module costs as much as a small product.
        qkv = layer.qkv.forward(self._normed(x, layer.input_norm)).view(rows, heads + 2 * kv_heads, dim)
        queries_keys, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = queries_keys.split((heads, kv_heads), dim=1)
            queries_keys = torch.cat(
                (self._normed(queries, layer.query_norm), self._normed(keys, layer.key_norm)), dim=1
            )
        turned = queries_keys.roll(dim // 2, -1)
        rotated = torch.addcmul(queries_keys * turns.cos, turned, turns.sin).transpose(0, 1)[None]
        pieces = stored.update(rotated[:, heads:], values.transpose(0, 1)[None])
        own = turns.masks[layer.kind if len(turns.masks) > 1 else ""]
        attended = self._attend(rotated[:, :heads], pieces, own, apart=turns.apart)
        x = x + layer.output.forward(attended.reshape(rows, heads * dim))
        gate, up = layer.gate_up.forward(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
        x = x + layer.down.forward(functional.silu(gate) * up)
        return x

    def _own_masks(self, mask: torch.Tensor, packed: Packed) -> list[torch.Tensor | None]:
        """For each segment: they are the same in each layer."""
        found, begin, group = list[torch.Tensor | None](), 0, self.heads // self.kv_heads
        for segment in packed.segments:
            end = begin + segment.width
            found.append(mask_of_group(mask[:, :, begin:end, : segment.readable], group, self.dtype))
            begin = end
        return found

    def _attend(
        self, queries: torch.Tensor, pieces: Any, masks: list[torch.Tensor | None], *, apart: bool
    ) -> torch.Tensor:
        """[1, rows, heads, dim]. Rows of no segment are padding and get zeros."""
        outputs, begin = [], 0
        for (rows, keys), (_, values), mask in zip(*pieces, masks, strict=True):
            outputs.append(attend(queries[:, :, rows], keys, values, mask, self.scaling, apart=apart))
            begin = rows.stop
        if begin < queries.shape[2]:
            outputs.append(queries.new_zeros(1, queries.shape[2] - begin, self.heads, self.dim))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return root_mean_square_normed(x, weight, self._epsilon)


def root_mean_square_normed(x: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Along the last dimension, in float32 as the library does it; the mean by way of the length, which is one pass."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, 2, -1, True)
    return (wide * torch.addcmul(epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()).to(x.dtype) * weight


def _layer(weights: MutableMapping[str, torch.Tensor], name: str, kind: str) -> Layer:
    return Layer(
        kind=kind,
        input_norm=weights[f"{name}.input_layernorm.weight"],
        qkv=_linear(weights, *(f"{name}.self_attn.{part}_proj" for part in "qkv")),
        query_norm=weights.get(f"{name}.self_attn.q_norm.weight"),
        key_norm=weights.get(f"{name}.self_attn.k_norm.weight"),
        output=_linear(weights, f"{name}.self_attn.o_proj"),
        mlp_norm=weights[f"{name}.post_attention_layernorm.weight"],
        gate_up=_linear(weights, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
        down=_linear(weights, f"{name}.mlp.down_proj"),
    )


def _linear(weights: MutableMapping[str, torch.Tensor], *names: str) -> nn.Linear:
    """One layer that gives what these give, one after another. Their weights are taken out of `weights`: those that are joined
    would lie on the device twice until all of the model is loaded."""
    parts = [weights.pop(f"{name}.weight") for name in names]
    biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        made.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return made
