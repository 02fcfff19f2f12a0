"""Llama and its kin as few operations for each layer: the library's own take longer than what they compute, for a few rows.

The projections of queries, keys and values are one product, those of gate and up another; query heads that share keys are
rows of one head. What is computed is what the library's layers compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from dsi_workers.attention import attend, mask_of_group
from dsi_workers.kv_cache import Pieces, Segment, SlotCache


@dataclass(slots=True)
class _Layer:
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


class StoresKeys(Protocol):
    """A layer of a cache."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Pieces, Pieces]: ...


@dataclass(slots=True)
class Residual:
    """A forward between two layers. x: [rows, hidden]."""

    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    masks: dict[str, list[torch.Tensor | None]]


class Decoder:
    """A model as a function of rows of several generations, packed one after another, whose keys a SlotCache holds."""

    needs_masks = False

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Any, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Weights and configuration have the library's names; cos and sin are [positions, head_dim]."""
        self._embedding = weights["model.embed_tokens.weight"]
        self.dtype, device = self._embedding.dtype, self._embedding.device
        self._dim = cos.shape[-1]
        self._heads = len(weights["model.layers.0.self_attn.q_proj.weight"]) // self._dim
        self._kv_heads = len(weights["model.layers.0.self_attn.k_proj.weight"]) // self._dim
        self._scaling = self._dim**-0.5
        self._epsilon = torch.tensor(float(config.rms_norm_eps), device=device)
        sign = torch.ones(self._dim, dtype=self.dtype, device=device)
        sign[: self._dim // 2] = -1
        #: [positions, 1, dim]
        self._cos, self._sin = cos.to(device)[:, None], (sin.to(device) * sign)[:, None]
        number = int(config.num_hidden_layers)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * number
        self._layers = [_layer(weights, f"model.layers.{layer}", kinds[layer]) for layer in range(number)]
        self._norm = weights["model.norm.weight"]
        self._head: nn.Module = _linear(weights, "lm_head")

    def lay_out(self, lay_out: Callable[[nn.Linear], nn.Module]) -> None:
        """Replace what multiplies by weights, one after another, so that few weights are there twice."""
        for layer in self._layers:
            for name in _PRODUCTS:
                setattr(layer, name, lay_out(getattr(layer, name)))
        assert isinstance(self._head, nn.Linear)
        self._head = lay_out(self._head)

    def linear_layers(self) -> list[nn.Module]:
        return [getattr(self._layers[0], name) for name in _PRODUCTS] + [self._head]

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        masks: torch.Tensor | Mapping[str, torch.Tensor] | None,
        cache: SlotCache,
        kept: torch.Tensor,
        between_layers: Callable[[], None],
    ) -> torch.Tensor:
        """Logits [len(kept), vocabulary] of the rows in `kept`, of ids and positions [rows]. Masks as of the library, True
        where a row [1, 1, rows, readable] may read; None: each may read all."""
        state = self.begin(ids, positions, masks, cache.segments)
        for layer, stored in enumerate(cache.layers):
            between_layers()
            self.advance(state, layer, stored)
        return self.logits(state, kept)

    # The same in parts, which graphs.py records

    @property
    def layers(self) -> int:
        return len(self._layers)

    def empty_states(self, rows: int) -> torch.Tensor:
        """Shaped as the keys or values of so many rows, [1, kv_heads, rows, dim]."""
        return self._embedding.new_empty(1, self._kv_heads, rows, self._dim)

    def begin(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        masks: torch.Tensor | Mapping[str, torch.Tensor] | None,
        segments: Sequence[Segment],
    ) -> Residual:
        kinds = masks if isinstance(masks, Mapping) else {"": masks}
        own_masks = {kind: self._own_masks(mask, segments) for kind, mask in kinds.items()}
        embedded = functional.embedding(ids, self._embedding)
        return Residual(embedded, self._cos[positions], self._sin[positions], own_masks)

    def advance(self, state: Residual, number: int, stored: StoresKeys) -> None:
        """By one layer."""
        layer, x, heads, kv_heads, dim = self._layers[number], state.x, self._heads, self._kv_heads, self._dim
        rows = len(x)
        # `forward`, not a call: what torch looks for around a module costs as much as a small product.
        qkv = layer.qkv.forward(self._normed(x, layer.input_norm)).view(rows, heads + 2 * kv_heads, dim)
        queries_keys, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = queries_keys.split((heads, kv_heads), dim=1)
            queries_keys = torch.cat(
                (self._normed(queries, layer.query_norm), self._normed(keys, layer.key_norm)), dim=1
            )
        turned = queries_keys.roll(dim // 2, -1)
        rotated = torch.addcmul(queries_keys * state.cos, turned, state.sin).transpose(0, 1)[None]
        pieces = stored.update(rotated[:, heads:], values.transpose(0, 1)[None])
        own = state.masks[layer.kind if len(state.masks) > 1 else ""]
        attended = self._attend(rotated[:, :heads], pieces, own)
        x = x + layer.output.forward(attended.reshape(rows, heads * dim))
        gate, up = layer.gate_up.forward(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
        state.x = x + layer.down.forward(functional.silu(gate) * up)

    def logits(self, state: Residual, kept: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(self._normed(state.x[kept], self._norm))
        return logits

    def _own_masks(self, mask: torch.Tensor | None, segments: Sequence[Segment]) -> list[torch.Tensor | None]:
        """For each segment: they are the same in each layer."""
        if mask is None:
            return [None] * len(segments)
        found, begin, group = list[torch.Tensor | None](), 0, self._heads // self._kv_heads
        for segment in segments:
            end = begin + segment.width
            found.append(mask_of_group(mask[:, :, begin:end, : segment.readable], group, self.dtype))
            begin = end
        return found

    def _attend(self, queries: torch.Tensor, pieces: Any, masks: list[torch.Tensor | None]) -> torch.Tensor:
        """[1, rows, heads, dim]. Rows of no segment are padding and get zeros."""
        outputs, begin = [], 0
        for (rows, keys), (_, values), mask in zip(*pieces, masks, strict=True):
            outputs.append(attend(queries[:, :, rows], keys, values, mask, self._scaling))
            begin = rows.stop
        if begin < queries.shape[2]:
            outputs.append(queries.new_zeros(1, queries.shape[2] - begin, self._heads, self._dim))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return root_mean_square_normed(x, weight, self._epsilon)


def root_mean_square_normed(x: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Along the last dimension, in float32 as the library does it; the mean by way of the length, which is one pass."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, 2, -1, True)
    return (wide * torch.addcmul(epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()).to(x.dtype) * weight


def _layer(weights: Mapping[str, torch.Tensor], name: str, kind: str) -> _Layer:
    return _Layer(
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


def _linear(weights: Mapping[str, torch.Tensor], *names: str) -> nn.Linear:
    """One layer that gives what these give, one after another."""
    parts = [weights[f"{name}.weight"] for name in names]
    biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        made.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return made
