"""Packed weights multiply as the layer did, for any number of rows, and rows do not disturb one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dsi_workers.decoding import packing
from dsi_workers.decoding.packing import PackedLinear, pack, replace_linear_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_the_same_product(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)
    model = nn.Sequential(linear)
    replace_linear_layers(model, lambda layer: pack(layer, 8))
    packed = model[0]
    assert isinstance(packed, PackedLinear)
    for shape in ((1, 48), (8, 48), (2, 33, 48)):
        x = torch.randn(shape, dtype=dtype)
        found = packed(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, linear(x))


def test_layers_that_cannot_be_packed_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(4, 4), nn.Linear(4, 4, dtype=torch.float64))
    replace_linear_layers(model, lambda layer: pack(layer, 8))
    assert not any(isinstance(module, PackedLinear) for module in model)
    packing._compute_dtype_for.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(4, 4))
    replace_linear_layers(model, lambda layer: pack(layer, 8))
    assert type(model[0]) is nn.Linear
    packing._compute_dtype_for.cache_clear()


@pytest.mark.parametrize("lacks", ["instructions", "the kernel"])
def test_half_precision_is_multiplied_in_float32_where_the_processor_lacks(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_has_bfloat16_instructions", lambda: lacks != "instructions")
    if lacks == "the kernel":

        def refuse(weight: torch.Tensor, rows: int) -> Any:
            if weight.dtype is torch.bfloat16:
                raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")
            return reorder(weight, rows)

        reorder = torch.ops.mkldnn._reorder_linear_weight
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    packing._compute_dtype_for.cache_clear()
    packed = pack(nn.Linear(48, 80, dtype=torch.bfloat16), 8)
    packing._compute_dtype_for.cache_clear()
    assert isinstance(packed, PackedLinear)
    assert (packed.dtype, packed.compute_dtype) == (torch.bfloat16, torch.float32)
