"""The decoder for models of the Llama family, with few torch operations per layer.

For a few rows, the overhead of transformers' own layers takes longer than their arithmetic. This decoder computes the same
function with fewer operations: one matrix product for queries, keys and values, and one for gate and up. Keys are not
copied for query heads that share them (attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dsi_workers.decoding.attention import AttentionShape, additive_group_mask, attend
from dsi_workers.decoding.capacity import prompt_chunk_of
from dsi_workers.decoding.experts import Mixture
from dsi_workers.decoding.kv_cache import SegmentTensors, SlotCache, SlotLayer
from dsi_workers.decoding.packed import Masks, PackedBatch
from dsi_workers.decoding.ranks import Alone, Ranks


@dataclass(slots=True)
class Layer:
    """The weights of one decoder layer."""

    #: The layer's entry in `layer_types` of config.json, such as "sliding_attention". "" if the model names none.
    kind: str
    input_norm: torch.Tensor
    qkv: nn.Module
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: nn.Module
    mlp_norm: torch.Tensor
    mlp: DenseMlp | Mixture


@dataclass(slots=True)
class DenseMlp:
    """down(silu(gate) * up), where gate and up are the halves of one product."""

    gate_up: nn.Module
    down: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up.forward(x).chunk(2, dim=-1)
        y: torch.Tensor = self.down.forward(functional.silu(gate) * up)
        return y

    def replace_linear_layers(self, convert: Callable[[nn.Linear], nn.Module]) -> None:
        assert isinstance(self.gate_up, nn.Linear)
        assert isinstance(self.down, nn.Linear)
        self.gate_up, self.down = convert(self.gate_up), convert(self.down)


@dataclass(slots=True)
class _RopeAndMasks:
    """Inputs of one forward pass that are the same in every layer."""

    #: RoPE of each row: [rows, 1, dim].
    cos: torch.Tensor
    sin: torch.Tensor
    #: By kind of layer: the attention mask of each segment.
    masks: dict[str, list[torch.Tensor | None]]
    #: See `attend`.
    per_position: bool


class Decoder:
    """Computes logits for packed rows of several generations. Their keys and values are in a SlotCache.

    Runs of the generations lie one after another in one batch of rows (packed.py).
    """

    recorded_rows: Sequence[int] = ()
    batch_invariant = False

    def __init__(
        self,
        weights: MutableMapping[str, torch.Tensor],
        config: Any,
        cos: torch.Tensor,
        sin: torch.Tensor,
        ranks: Ranks | None = None,
        mixtures: Mapping[int, Mixture] | None = None,
    ) -> None:
        """`weights` and `config` use transformers' names. `cos` and `sin` are [positions, head_dim]. `ranks`: the group, of which
        this rank's share of the weights is given; None: all weights are given. `mixtures`: by number, the MLPs of layers that
        are mixtures of experts.

        The matrices of linear layers are removed from `weights`, so that they can be freed once they are laid out anew.
        """
        self._ranks: Ranks = Alone() if ranks is None else ranks
        #: This process has all of the weights.
        self.is_whole = ranks is None
        self.embedding = weights["model.embed_tokens.weight"]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.prompt_chunk = prompt_chunk_of(self.device.type)
        self.dim = cos.shape[-1]
        self.heads = len(weights["model.layers.0.self_attn.q_proj.weight"]) // self.dim
        self.kv_heads = len(weights["model.layers.0.self_attn.k_proj.weight"]) // self.dim
        self.scaling = self.dim**-0.5
        self.epsilon = float(config.rms_norm_eps)
        self._epsilon = torch.tensor(self.epsilon, device=self.device)
        sign = torch.ones(self.dim, dtype=self.dtype, device=self.device)
        sign[: self.dim // 2] = -1
        #: [positions, dim]. The first half of each row of `sin` is negated: RoPE needs that sign there.
        self.cos, self.sin = cos.to(self.device), sin.to(self.device) * sign
        number = int(config.num_hidden_layers)
        kinds = getattr(config, "layer_types", None) or [""] * number
        self.masks = Masks(config)
        self.mixtures = dict(mixtures or {})
        self.layers = [
            _layer(weights, f"model.layers.{layer}", kinds[layer], self.mixtures.get(layer)) for layer in range(number)
        ]
        self.norm = weights["model.norm.weight"]
        self.head: nn.Module = _linear(weights, "lm_head")

    def replace_linear_layers(self, convert: Callable[[nn.Linear], nn.Module]) -> None:
        """Replace every linear layer by `convert(layer)`.

        Layers are converted one at a time, so that only one layer's weights are in memory twice.
        """
        for layer in self.layers:
            assert isinstance(layer.qkv, nn.Linear)
            assert isinstance(layer.output, nn.Linear)
            layer.qkv, layer.output = convert(layer.qkv), convert(layer.output)
            layer.mlp.replace_linear_layers(convert)
        assert isinstance(self.head, nn.Linear)
        self.head = convert(self.head)

    def linear_layers(self) -> list[Any]:
        """The linear layers of the first decoder layer, of the first dense MLP, and the head. All layers have the same shapes.
        Mixtures of experts see to their own rows."""
        dense = [layer.mlp for layer in self.layers if isinstance(layer.mlp, DenseMlp)]
        of_mlp = [part for mlp in dense[:1] for part in (mlp.gate_up, mlp.down)]
        return [self.layers[0].qkv, self.layers[0].output, *of_mlp, self.head]

    @property
    def attention_shapes(self) -> Sequence[AttentionShape]:
        return [AttentionShape(self.heads, self.kv_heads, self.dim, self.dim, self.dtype)]

    def __call__(self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        """Compute one forward pass. Returns logits [len(packed.logits_to_keep), vocabulary]; those of ranks other than 0 are
        their own part of the vocabulary."""
        shared = self._rope_and_masks(packed)
        for mixture in self.mixtures.values():
            mixture.blocks.used = packed.used
        x = self._ranks.embed(torch.tensor(packed.ids, device=self.device), self.embedding)
        for layer, cache_layer in zip(self.layers, cache.layers, strict=True):
            between_layers()
            x = self._apply_layer(x, layer, cache_layer, shared)
        kept = torch.tensor(packed.logits_to_keep, device=self.device)
        return self._ranks.join(self.head.forward(self._rms_norm(x[kept], self.norm)))

    def _rope_and_masks(self, packed: PackedBatch) -> _RopeAndMasks:
        # The positions of padding may exceed the model's last position.
        positions = torch.tensor(packed.positions, device=self.device).clamp(max=len(self.cos) - 1)
        segment_masks: dict[str, list[torch.Tensor | None]] = {"": [None] * len(packed.segments)}
        if not self.masks.needs_no_mask(packed):
            masks = self.masks.of(packed, self.device)
            kinds = masks if isinstance(masks, Mapping) else {"": masks}
            segment_masks = {kind: self._segment_masks(mask, packed) for kind, mask in kinds.items()}
        return _RopeAndMasks(
            self.cos[positions][:, None], self.sin[positions][:, None], segment_masks, packed.per_position
        )

    def _apply_layer(
        self, x: torch.Tensor, layer: Layer, cache_layer: SlotLayer, shared: _RopeAndMasks
    ) -> torch.Tensor:
        """Return the output of one decoder layer, and store its keys and values. x: [rows, hidden]."""
        rows, heads, kv_heads, dim = len(x), self.heads, self.kv_heads, self.dim
        # `layer.forward(x)` skips torch's hooks. For a few rows, the hook checks of `layer(x)` cost as much as the product.
        qkv = layer.qkv.forward(self._rms_norm(x, layer.input_norm)).view(rows, heads + 2 * kv_heads, dim)
        queries_keys, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = queries_keys.split((heads, kv_heads), dim=1)
            queries_keys = torch.cat(
                (self._rms_norm(queries, layer.query_norm), self._rms_norm(keys, layer.key_norm)), dim=1
            )
        swapped = queries_keys.roll(dim // 2, -1)
        rotated = torch.addcmul(queries_keys * shared.cos, swapped, shared.sin).transpose(0, 1)[None]
        keys_values = cache_layer.update(rotated[:, heads:], values.transpose(0, 1)[None])
        masks = shared.masks[layer.kind if len(shared.masks) > 1 else ""]
        attended = self._attend(rotated[:, :heads], keys_values, masks, per_position=shared.per_position)
        x = x + self._ranks.sum(layer.output.forward(attended.reshape(rows, heads * dim)))
        return x + self._ranks.sum(layer.mlp.forward(self._rms_norm(x, layer.mlp_norm)))

    def _segment_masks(self, mask: torch.Tensor, packed: PackedBatch) -> list[torch.Tensor | None]:
        """Split the mask [1, 1, rows, readable] into one additive mask per segment."""
        found, begin, group = list[torch.Tensor | None](), 0, self.heads // self.kv_heads
        for segment in packed.segments:
            end = begin + segment.width
            found.append(additive_group_mask(mask[:, :, begin:end, : segment.readable], group, self.dtype))
            begin = end
        return found

    def _attend(
        self, queries: torch.Tensor, segments: SegmentTensors, masks: list[torch.Tensor | None], *, per_position: bool
    ) -> torch.Tensor:
        """Attention of each segment to its own slot: [1, rows, heads, dim]. Padding rows get zeros."""
        outputs, begin = [], 0
        for (rows, keys, values), mask in zip(segments, masks, strict=True):
            outputs.append(attend(queries[:, :, rows], keys, values, mask, self.scaling, per_position=per_position))
            begin = rows.stop
        if begin < queries.shape[2]:
            outputs.append(queries.new_zeros(1, queries.shape[2] - begin, self.heads, self.dim))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._epsilon)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """RMSNorm along the last dimension, computed in float32 as in transformers.

    The mean of squares comes from the vector norm, because that reads `x` only once.
    """
    wide = x.float()
    length = torch.linalg.vector_norm(wide, 2, -1, True)
    return (wide * torch.addcmul(epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()).to(x.dtype) * weight


def _layer(weights: MutableMapping[str, torch.Tensor], name: str, kind: str, mixture: Mixture | None) -> Layer:
    return Layer(
        kind=kind,
        input_norm=weights[f"{name}.input_layernorm.weight"],
        qkv=_linear(weights, *(f"{name}.self_attn.{part}_proj" for part in "qkv")),
        query_norm=weights.get(f"{name}.self_attn.q_norm.weight"),
        key_norm=weights.get(f"{name}.self_attn.k_norm.weight"),
        output=_linear(weights, f"{name}.self_attn.o_proj"),
        mlp_norm=weights[f"{name}.post_attention_layernorm.weight"],
        mlp=mixture
        or DenseMlp(
            gate_up=_linear(weights, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
            down=_linear(weights, f"{name}.mlp.down_proj"),
        ),
    )


def _linear(weights: MutableMapping[str, torch.Tensor], *names: str) -> nn.Linear:
    """Concatenate the named linear layers into one, whose output is their outputs one after another.

    Their matrices are removed from `weights`: else both copies would stay on the device until the whole model is loaded.
    """
    parts = [weights.pop(f"{name}.weight") for name in names]
    biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        made.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return made
