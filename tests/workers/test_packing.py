"""Packed weights multiply as the layer did, for any number of rows, and rows do not disturb one another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsi_workers.packing import PackedLinear, pack, replace_linear_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
        torch.testing.assert_close(packed(x), linear(x))


def test_layers_that_cannot_be_packed_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(4, 4), nn.Linear(4, 4, dtype=torch.float64))
    replace_linear_layers(model, lambda layer: pack(layer, 8))
    assert not any(isinstance(module, PackedLinear) for module in model)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(4, 4))
    replace_linear_layers(model, lambda layer: pack(layer, 8))
    assert type(model[0]) is nn.Linear
