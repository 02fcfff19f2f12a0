"""Runs any model with transformers' own layers, through its interfaces for attention functions and caches.

Importing transformers takes seconds. Models of the Llama family do without: see checkpoint.py and decoding/decoder.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from dsi_workers.checkpoints.experts import choose_block_rows, replace_experts
from dsi_workers.checkpoints.interfaces import ATTENTION, Expand, SlotsAsCache, attention
from dsi_workers.checkpoints.quantized import (
    COMPRESSED_TENSORS,
    MXFP4,
    refuse_if_quantized,
    refuse_quantized_activations,
)
from dsi_workers.checkpoints.text_part import is_of_another_part
from dsi_workers.decoding.attention import AttentionShape
from dsi_workers.decoding.capacity import prompt_chunk_of
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.experts import Blocks, Experts, Mixture
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.decoding.packed import Masks, PackedBatch
from dsi_workers.decoding.packing import PackedLinear, replace_linear_layers
from dsi_workers.engine import EngineError
from dsi_workers.models.files import first_line
from dsi_workers.models.misfit import refuse_loading_info

log = structlog.get_logger("dsi.engine")

_DECODER_LAYERS = (
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer",
    "MixtralDecoderLayer",
)  # fmt: skip
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
    if method in (COMPRESSED_TENSORS, MXFP4):
        config.quantization_config = {**quantization, "dequantize": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
        )
    except KeyError as error:
        if error.args == (ATTENTION,):  # the model looks for attention in a table of its own
            raise _own_attention(config.model_type) from None
        raise
    model, info = loaded
    if first_layers:
        layers = int(config.get_text_config(decoder=True).num_hidden_layers)
        info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not _is_of_later_layer(name, layers)]
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not is_of_another_part(name)]
    refuse_loading_info(info, model, reference)
    if quantization:
        refuse_if_quantized(model, method, reference)
    model = model.eval().requires_grad_(False).to(device)
    for module in list(model.modules()):  # Conv1D: GPT-2's linear layer, whose weight is transposed
        for name, child in list(module.named_children()):
            if type(child) is Conv1D:
                setattr(module, name, _as_linear(child))
    return model


@torch.inference_mode()
def logits_of(model: Any, tokens: Iterable[int]) -> torch.Tensor | None:
    """Return transformers' own logits, [tokens, vocabulary], without our attention and our cache: those that `read_model`'s model
    must have. None: transformers itself cannot compute them in this way."""
    model.set_attn_implementation("eager")
    try:
        logits: torch.Tensor = model(
            input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False
        ).logits[0]
    except Exception:
        log.debug("transformers cannot compute the model without a cache", exc_info=True)
        return None
    finally:
        model.set_attn_implementation(ATTENTION)
    return logits.float()


def _is_of_later_layer(name: str, layers: int) -> bool:
    """Whether the weight `name` is of a layer behind the first `layers` ones."""
    found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
    return found is not None and int(found[1]) >= layers


def _as_linear(layer: Any) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear


def as_decoder(model: Any, config: Any, positions: int, blocks: Blocks | None) -> Decoder | None:
    """Return our own decoder with the model's weights. None if the model is not of the Llama family.

    `blocks`: what the experts that `replace_experts` has put into the model share.
    """
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
    mixtures = {
        number: _mixture(layer.mlp, blocks)
        for number, layer in enumerate(inner.layers)
        if blocks is not None and isinstance(getattr(layer.mlp, "experts", None), Experts)
    }
    return Decoder(weights, config, cos[0], sin[0], mixtures=mixtures)


def _mixture(block: Any, blocks: Blocks) -> Mixture:
    """The mixture of experts that transformers' `block` computes: its router, and the experts that are our own already."""
    experts, hidden = block.gate.weight.shape
    router = nn.Linear(hidden, experts, bias=False, device="meta")
    router.weight = nn.Parameter(block.gate.weight.detach(), requires_grad=False)
    return Mixture(
        router, block.experts.each, top_k=block.gate.top_k, renormalizes=getattr(block.gate, "norm_topk_prob", True),
        blocks=blocks,
    )  # fmt: skip


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
        self.attention_shapes: Sequence[AttentionShape] = ()
        self._cache: SlotsAsCache | None = None
        self._between_layers: Callable[[], None] = lambda: None
        self._layers = _decoder_layers(model)
        for layer in self._layers:
            layer.register_forward_pre_hook(lambda module, inputs: self._between_layers())
        #: What the model's experts share; None: it has none.
        self.blocks = replace_experts(model)
        self._expand = _take_expand(model)
        #: Llama 4: some layers scale queries by their positions, which they compute from the length of the cache.
        self._scales_by_position = bool(getattr(config, "attn_temperature_tuning", False))

    def __call__(self, packed: PackedBatch, cache: SlotCache, between_layers: Callable[[], None]) -> torch.Tensor:
        self._between_layers = between_layers
        attention.per_position = packed.per_position
        device = self._model.device
        if self._cache is None or self._cache.slots is not cache:
            self._cache = SlotsAsCache(cache, self._expand)
        positions = torch.tensor(packed.positions, device=device).clamp(max=self._last_position)
        self._cache.seq_length = packed.segments[0].position
        if self._scales_by_position:
            self._cache.seq_length = positions - torch.arange(len(positions), device=device)
        if self.blocks is not None:
            self.blocks.used = packed.used
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor([packed.ids], device=device),
            position_ids=positions[None],
            attention_mask=self._masks.of(packed, device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(packed.logits_to_keep, device=device),
        ).logits
        return logits[0]

    def linear_layers(self) -> list[Any]:
        """The linear layers whose number of rows is that of the forward pass: all but those of experts."""
        of_experts = {
            linear for module in self._model.modules() if isinstance(module, Experts) for linear in module.modules()
        }
        linears = (module for module in self._model.modules() if type(module) in (nn.Linear, PackedLinear))
        return [linear for linear in linears if linear not in of_experts]

    @torch.inference_mode()
    def check_attention(self, forward: Callable[[], object]) -> None:
        """Raise EngineError if some layer does not use our attention function. `forward` must compute one forward pass."""
        calls, attention.shapes = attention.calls, set[AttentionShape]()
        # Another attention function fails with one of these errors, because our cache does not return tensors. Models that do not
        # even claim to have the interface may fail in any way.
        claims = getattr(self._model, "_supports_attention_backend", False)
        with contextlib.suppress(*(AttributeError, TypeError) if claims else (Exception,)):
            forward()
        shapes, attention.shapes = attention.shapes, None
        if attention.calls - calls != len(self._layers):
            raise _own_attention(self._model.config.model_type)
        self.attention_shapes = sorted(shapes, key=str)

    def replace_linear_layers(self, convert: Callable[[nn.Linear], nn.Module], *, exact: bool) -> None:
        """Replace every linear layer by `convert(layer)`. `exact`: then try in which blocks of rows experts are exact."""
        replace_linear_layers(self._model, convert)
        if self.blocks is not None and exact:
            choose_block_rows(self._model, self.blocks)


def _own_attention(model_type: str) -> EngineError:
    return EngineError(
        f"{model_type} models compute attention with code of their own, which this engine cannot make exact: choose a model of "
        "another architecture (docs/models.md lists some that work)"
    )


def _decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of the model: the longest list of modules of its language model."""
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def _take_expand(model: nn.Module) -> dict[int, Expand]:
    """By number of layer: the function that expands latent keys and values (DeepSeek).

    The layer itself calls it no more, because the cache gives it expanded keys and values.
    """
    found: dict[int, Expand] = {}
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "expand_kv")]
    for module in modules:
        found[module.layer_idx] = module.expand_kv
        module.expand_kv = lambda keys, values: (keys, values)
    return found
