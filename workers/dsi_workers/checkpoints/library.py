"""Models that the library runs: of whatever kind, through its own layers, attention function and cache interface.

Importing the library takes seconds. What is not needed for a model of the Llama family stands in checkpoint.py and decoder.py.
"""

from __future__ import annotations

import contextlib
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

from dsi_workers.decoding.attention import attend, mask_of_group
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.kv_cache import Pieces, SlotCache, SlotLayer
from dsi_workers.decoding.packed import Masks, Packed
from dsi_workers.decoding.packing import PackedLinear
from dsi_workers.engine import EngineError
from dsi_workers.models.files import first_line

_DECODER_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
#: Ropes that depend on more than the position.
_OTHER_ROPES = ("dynamic", "longrope")


def read_config(directory: Path, reference: str) -> Any:
    """Raises EngineError. Code that came with a model is never run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        raise EngineError(f"transformers cannot read the configuration of {reference}: {first_line(error)}") from None


def read_model(directory: Path, dtype: torch.dtype, device: torch.device, config: Any) -> Any:
    """The model with the configuration of `read_config`. If that has fewer layers than the files, these are the first layers."""
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=_ATTENTION,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model = model.eval().requires_grad_(False).to(device)
    for module in list(model.modules()):  # GPT-2's own kind of linear layer, whose weight lies the other way
        for name, child in list(module.named_children()):
            if type(child) is Conv1D:
                setattr(module, name, _as_linear(child))
    return model


def _as_linear(layer: Any) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear


def as_decoder(model: Any, config: Any, positions: int) -> Decoder | None:
    """Our own layers on the model's weights; None for a model of another kind."""
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


class LibraryDecoder:
    """Called like a Decoder."""

    recorded_rows: Sequence[int] = ()
    group_rows, sums_in_one_order = 1, False

    def __init__(self, model: Any, config: Any, last_position: int) -> None:
        """Padding may lie beyond the last position that the model knows, where its rope would change for all."""
        self._model = model
        self._masks = Masks(config)
        self._last_position = last_position
        self.dtype: torch.dtype = model.dtype
        self._cache: _Cache | None = None
        self._between_layers: Callable[[], None] = lambda: None
        for layer in self._decoder_layers():
            layer.register_forward_pre_hook(lambda module, inputs: self._between_layers())

    def __call__(self, packed: Packed, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        self._between_layers = between_layers
        _attention.apart = packed.apart
        device = self._model.device
        if self._cache is None or self._cache.slots is not cache:
            self._cache = _Cache(cache)
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor([packed.ids], device=device),
            position_ids=torch.tensor([packed.positions], device=device).clamp(max=self._last_position),
            attention_mask=self._masks.of(packed, device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(packed.kept, device=device),
        ).logits
        return logits[0]

    def products(self) -> list[Any]:
        return [module for module in self._model.modules() if isinstance(module, nn.Linear | PackedLinear)]

    @torch.inference_mode()
    def check_attention(self, forward: Callable[[], object]) -> None:
        """Raises EngineError if in a forward some layer goes round our attention function."""
        calls = _attention.calls
        with contextlib.suppress(AttributeError, TypeError):  # what the cache gives is for our function only
            forward()
        if _attention.calls - calls != len(self._decoder_layers()):
            raise EngineError(
                f"{self._model.config.model_type} models do not use transformers' attention interface in every layer: "
                "their masks cannot be trusted here, choose another model"
            )

    def _decoder_layers(self) -> nn.ModuleList:
        """The longest list of modules in the model: its decoder layers."""
        lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)


class _CacheLayer(CacheLayerMixin):
    """One layer of our cache, as the library wants to see it."""

    is_compileable = False
    is_sliding = False

    def __init__(self, layer: SlotLayer, slots: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer = layer
        self._slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(  # type: ignore[override]  # our own attention function takes pieces
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Pieces, Pieces]:
        return self._layer.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(segment.readable for segment in self._slots.segments), 0

    def get_seq_length(self) -> int:
        return self._slots.segments[0].position

    def get_max_length(self) -> int:
        return self._slots.capacity


class _Cache(Cache):
    def __init__(self, slots: SlotCache) -> None:
        self.slots = slots
        super().__init__(layers=[_CacheLayer(layer, slots) for layer in slots.layers])


class _Attention:
    """SDPA with the query heads of a group as further rows of one head: no repeat_kv, the same bits, less memory.

    query: [1, heads, rows, dim]; key, value: for each segment its rows and [1, kv_heads, readable, dim]; attention_mask:
    [1, 1, rows, the most readable]. Rows of no segment are padding and get zeros.
    """

    def __init__(self) -> None:
        #: Warm-up looks whether every layer comes by here.
        self.calls = 0
        #: Each position is computed by itself.
        self.apart = False

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: Pieces,
        value: Pieces,
        attention_mask: torch.Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        self.calls += 1
        for unsupported in ("softcap", "s_aux"):
            if kwargs.get(unsupported) is not None:
                raise EngineError(f"this model's attention needs {unsupported}, which this engine does not have")
        batch, heads, width, _ = query.shape
        output = query.new_zeros(batch, width, heads, value[0][1].shape[-1])
        for (rows, keys), (_, values) in zip(key, value, strict=True):
            mask = mask_of_group(attention_mask[:, :, rows, : keys.shape[2]], heads // keys.shape[1], query.dtype)
            output[:, rows] = attend(query[:, :, rows], keys, values, mask, scaling, apart=self.apart)
        return output, None


_ATTENTION = "dsi"
_attention = _Attention()
AttentionInterface.register(_ATTENTION, _attention)
