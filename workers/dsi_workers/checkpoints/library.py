"""Runs any model with transformers' own layers, through its interfaces for attention functions and caches.

Importing transformers takes seconds. Models of the Llama family do without: see checkpoint.py and decoding/decoder.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from dsi_workers.checkpoints.quantized import COMPRESSED_TENSORS, refuse_if_quantized, refuse_quantized_activations
from dsi_workers.decoding.attention import additive_group_mask, attend
from dsi_workers.decoding.capacity import prompt_chunk_of
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.kv_cache import SegmentTensors, SlotCache, SlotLayer
from dsi_workers.decoding.packed import Masks, PackedBatch
from dsi_workers.decoding.packing import PackedLinear
from dsi_workers.engine import EngineError
from dsi_workers.models.files import first_line
from dsi_workers.models.misfit import refuse_loading_info

_DECODER_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
#: RoPE types whose rotation depends on more than the position.
_OTHER_ROPES = ("dynamic", "longrope")


def read_config(directory: Path, reference: str) -> Any:
    """Read config.json with transformers. Raises EngineError if that fails. Never runs code that came with the model."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        raise EngineError(f"transformers cannot read the configuration of {reference}: {first_line(error)}") from None


def read_model(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    config: Any,
    reference: str,
    *,
    first_layers: bool = False,
) -> Any:
    """Read the model with transformers, set up for TransformersDecoder. All its linear layers become nn.Linear.

    `config` is that of `read_config`. `first_layers`: it has fewer layers than the files, and those of the files that it lacks
    are left out. `reference`: the model's name in error messages.

    Raises ModelError if the weights do not fit the configuration, and EngineError if they stay quantized.
    """
    quantization = dict(getattr(config, "quantization_config", None) or {})
    method = str(quantization.get("quant_method"))
    refuse_quantized_activations(quantization, reference)
    if method == COMPRESSED_TENSORS:
        config.quantization_config = {**quantization, "dequantize": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=_ATTENTION,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with their names
    )
    model, info = loaded
    if first_layers:
        layers = int(config.get_text_config(decoder=True).num_hidden_layers)
        info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not _is_of_later_layer(name, layers)]
    refuse_loading_info(info, model, reference)
    if quantization:
        refuse_if_quantized(model, method, reference)
    model = model.eval().requires_grad_(False).to(device)
    for module in list(model.modules()):  # Conv1D: GPT-2's linear layer, whose weight is transposed
        for name, child in list(module.named_children()):
            if type(child) is Conv1D:
                setattr(module, name, _as_linear(child))
    return model


def _is_of_later_layer(name: str, layers: int) -> bool:
    """Whether the weight `name` is of a layer behind the first `layers` ones."""
    found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
    return found is not None and int(found[1]) >= layers


def _as_linear(layer: Any) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear


def as_decoder(model: Any, config: Any, positions: int) -> Decoder | None:
    """Return our own decoder with the model's weights. None if the model is not of the Llama family."""
    inner: Any = getattr(model, "model", None)
    kinds = {type(layer).__name__ for layer in getattr(inner, "layers", ())}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if not kinds or not kinds <= set(_DECODER_LAYERS) or config.hidden_act != "silu" or rope in _OTHER_ROPES:
        return None
    weights: dict[str, torch.Tensor] = model.state_dict()
    embedding = weights["model.embed_tokens.weight"]
    cos, sin = inner.rotary_emb(embedding[:1], torch.arange(positions, device=embedding.device)[None])
    if cos.shape[-1] != inner.layers[0].self_attn.head_dim:
        return None
    return Decoder(weights, config, cos[0], sin[0])


class TransformersDecoder:
    """Computes logits with transformers' layers. The interface is that of Decoder."""

    recorded_rows: Sequence[int] = ()
    batch_invariant = False

    def __init__(self, model: Any, config: Any, last_position: int) -> None:
        """`last_position`: the largest position that padding rows may have.

        With some RoPE types, one position that is too large changes the rotation of all rows.
        """
        self._model = model
        self._masks = Masks(config)
        self._last_position = last_position
        self.dtype: torch.dtype = model.dtype
        self.prompt_chunk = prompt_chunk_of(model.device.type)
        self._cache: _Cache | None = None
        self._between_layers: Callable[[], None] = lambda: None
        for layer in self._decoder_layers():
            layer.register_forward_pre_hook(lambda module, inputs: self._between_layers())

    def __call__(self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        self._between_layers = between_layers
        _attention.per_position = packed.per_position
        device = self._model.device
        if self._cache is None or self._cache.slots is not cache:
            self._cache = _Cache(cache)
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor([packed.ids], device=device),
            position_ids=torch.tensor([packed.positions], device=device).clamp(max=self._last_position),
            attention_mask=self._masks.of(packed, device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(packed.logits_to_keep, device=device),
        ).logits
        return logits[0]

    def linear_layers(self) -> list[Any]:
        return [module for module in self._model.modules() if isinstance(module, nn.Linear | PackedLinear)]

    @torch.inference_mode()
    def check_attention(self, forward: Callable[[], object]) -> None:
        """Raise EngineError if some layer does not use our attention function. `forward` must compute one forward pass."""
        calls = _attention.calls
        # Another attention function fails with these errors, because our cache does not return tensors.
        with contextlib.suppress(AttributeError, TypeError):
            forward()
        if _attention.calls - calls != len(self._decoder_layers()):
            raise EngineError(
                f"{self._model.config.model_type} models do not use transformers' attention interface in every layer, so "
                "their attention masks cannot be checked: choose another model"
            )

    def _decoder_layers(self) -> nn.ModuleList:
        """The decoder layers of the model: its longest list of modules."""
        lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)


class _CacheLayer(CacheLayerMixin):
    """One layer of our KV cache, behind transformers' interface of a cache layer."""

    is_compileable = False
    is_sliding = False

    def __init__(self, layer: SlotLayer, slots: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer = layer
        self._slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(  # type: ignore[override]  # our attention function takes SegmentTensors
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[SegmentTensors, SegmentTensors]:
        segments = self._layer.update(key_states, value_states)
        return segments, segments

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(segment.readable for segment in self._slots.segments), 0

    def get_seq_length(self) -> int:
        return self._slots.segments[0].position

    def get_max_length(self) -> int:
        return self._slots.capacity


class _Cache(Cache):
    """Our KV cache, behind transformers' interface of a cache."""

    def __init__(self, slots: SlotCache) -> None:
        self.slots = slots
        super().__init__(layers=[_CacheLayer(layer, slots) for layer in slots.layers])


class _Attention:
    """The attention function that transformers' layers call: `attend` for each segment, instead of SDPA with repeat_kv.

    query: [1, heads, rows, dim]. key, which is value, too: the segments of SlotLayer.update, [1, kv_heads, readable, dim] each.
    attention_mask: [1, 1, rows, readable], for the longest segment. Padding rows get zeros.
    """

    def __init__(self) -> None:
        #: Calls so far. `check_attention` compares it with the number of layers.
        self.calls = 0
        #: Compute attention for each position by itself (see `attend`).
        self.per_position = False

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: SegmentTensors,
        value: SegmentTensors,
        attention_mask: torch.Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        self.calls += 1
        for unsupported in ("softcap", "s_aux"):
            if kwargs.get(unsupported) is not None:
                raise EngineError(
                    f"this model's attention needs {unsupported}, which this engine does not support: choose another model"
                )
        batch, heads, width, _ = query.shape
        outputs, begin = list[torch.Tensor](), 0
        for rows, keys, values in key:
            mask = additive_group_mask(attention_mask[:, :, rows, : keys.shape[2]], heads // keys.shape[1], query.dtype)
            outputs.append(attend(query[:, :, rows], keys, values, mask, scaling, per_position=self.per_position))
            begin = rows.stop
        if begin < width:
            outputs.append(outputs[0].new_zeros(batch, width - begin, *outputs[0].shape[2:]))
        return torch.cat(outputs, dim=1), None


_ATTENTION = "dsi"
_attention = _Attention()
AttentionInterface.register(_ATTENTION, _attention)
