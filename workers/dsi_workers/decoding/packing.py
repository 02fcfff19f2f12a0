"""Linear layers for a CPU whose weights are packed once, at loading, in the memory layout of the oneDNN kernel.

torch's own linear layer on a CPU packs its weight again in every call. For a few positions, packing takes longer than the
multiplication. With a weight that is already packed, oneDNN multiplies several positions in the time of one. This is why
verifying several drafts at once pays (docs/exactness.md). Where torch has no such kernel, layers stay as they are.

Arithmetic in half precision needs instructions that many processors lack. There, weights are packed in float32: a product of
several rows then takes a half to a quarter of the time that bfloat16 takes. Every processor has the float32 kernel. Inputs and
outputs stay in half precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Instruction sets that multiply bfloat16, as torch.cpu.get_capabilities() names them. One of them is enough.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")
#: Relative tolerance of the trial product. Rounding to bfloat16 causes smaller errors.
_TOLERANCE = 0.02


class PackedLinear(nn.Module):
    """A linear layer y = x W^T + b that computes in `compute_dtype`. x: [..., in].

    W [out, in] is packed for inputs of about `rows` rows.
    """

    def __init__(self, linear: nn.Linear, rows: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        # Not a parameter or buffer: torch cannot move or save a packed tensor.
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().to(compute_dtype).contiguous(), rows
        )
        self._bias = None if linear.bias is None else linear.bias.detach().to(compute_dtype)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        #: Number type of x and y.
        self.dtype = linear.weight.dtype
        self.compute_dtype = compute_dtype
        #: Only its shape and number type: some layers of transformers ask for these.
        self.weight = linear.weight.detach().to("meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x.to(self.compute_dtype), self._weight, self._bias, "none", [], ""
        )
        return y.to(self.dtype)


def pack(linear: nn.Linear, rows: int) -> nn.Module:
    """Return the layer packed for inputs of about `rows` rows, or unchanged where packing is not possible."""
    if linear.weight.device.type != "cpu" or linear.weight.dtype not in _DTYPES:
        return linear
    compute_dtype = _compute_dtype_for(linear.weight.dtype)
    return linear if compute_dtype is None else PackedLinear(linear, rows, compute_dtype)


@functools.cache
def _compute_dtype_for(dtype: torch.dtype) -> torch.dtype | None:
    """The number type in which this processor multiplies weights of type `dtype`. None if oneDNN has no kernel at all."""
    native = dtype is torch.float32 or (dtype is torch.bfloat16 and _has_bfloat16_instructions())
    if native and _packed_product_works(dtype):
        return dtype
    return torch.float32 if _packed_product_works(torch.float32) else None


def _has_bfloat16_instructions() -> bool:
    found = torch.cpu.get_capabilities()
    if not str(found.get("architecture", "")).startswith("x86"):
        return True  # torch names no instruction sets here: the trial product decides
    return any(found.get(name) for name in _BFLOAT16_INSTRUCTIONS)


@torch.inference_mode()
def _packed_product_works(dtype: torch.dtype) -> bool:
    """True if a small product with a packed weight can be computed and is right."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48, device="meta", dtype=dtype)
    weight, bias, x = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((48, 64), (48,), (4, 64)))
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    try:
        found = PackedLinear(linear, len(x), dtype)(x)
    except RuntimeError:  # oneDNN has no such kernel, or the variable ONEDNN_MAX_CPU_ISA forbids it
        return False
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm())


def replace_linear_layers(model: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer of a transformers model by `convert(layer)`.

    Layers are converted one at a time, so that only one layer's weights are in memory twice.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, convert(child))
