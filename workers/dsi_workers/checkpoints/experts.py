"""Puts experts whose bits do not depend on other rows in the place of transformers' own (decoding/experts.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dsi_workers.decoding.experts import BLOCK_ROWS, Blocks, DenseExperts, Expert, Experts, route_in_blocks

#: Names of a router in the module that it shares with the experts.
_ROUTERS = ("gate", "router")
#: At least this many output values are compared to find out whether a row's bits depend on its place in a block.
_LEAST_VALUES = 20_000

#: Maps [BLOCK_ROWS, size] to tensors of as many rows.
_Compute = Callable[[torch.Tensor], Sequence[torch.Tensor]]
_Activation = Callable[[torch.Tensor], torch.Tensor]


def replace_experts(model: nn.Module) -> Blocks | None:
    """Replace each mixture of experts in a transformers model by our own, whose linear layers are nn.Linear.

    Their weights are views of the old ones. Returns what all experts share. None if the model has no experts.
    """
    blocks, found = Blocks(), False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            experts = _experts_of(child, blocks)
            if experts is None:
                continue
            found = True
            setattr(parent, name, experts)
            for router in (getattr(parent, name, None) for name in _ROUTERS):
                if router is not None:
                    route_in_blocks(router, blocks)
    return blocks if found else None


def choose_block_rows(model: Any, blocks: Blocks) -> None:
    """Set the rows of blocks of a transformers model so that on this machine no bit depends on the place of a row in a block."""
    experts = [module for module in model.modules() if isinstance(module, Expert)]
    layers = {type(layer): layer for layer in model.modules() if any(isinstance(c, Experts) for c in layer.children())}
    choose_rows(blocks, experts, [partial(_routes, layer) for layer in layers.values()], model.device, model.dtype)


@torch.inference_mode()
def choose_rows(
    blocks: Blocks, experts: Iterable[Expert], routers: Iterable[_Compute], device: torch.device, dtype: torch.dtype
) -> None:
    """Set the rows of blocks so that on this machine no bit depends on the place of a row in a block.

    A router multiplies by a kernel of its own, so it may need other blocks than the experts. `routers` map rows to all that the
    routers give for them.
    """
    blocks.used, blocks.rows, blocks.router_rows = None, BLOCK_ROWS, BLOCK_ROWS
    of_a_shape = list({(expert.up.in_features, expert.up.out_features): expert for expert in experts}.values())
    size = int(of_a_shape[0].up.in_features)

    def same_bits(compute: _Compute) -> bool:
        return _same_bits_at_every_place(compute, size, device, dtype)

    if not all(same_bits(lambda x, expert=expert: [expert(x)]) for expert in of_a_shape):  # type: ignore[misc]
        blocks.rows = 1
    if not all(same_bits(router) for router in routers):
        blocks.router_rows = 1


def _same_bits_at_every_place(compute: _Compute, size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """True if `compute` gives each row the same bits at every place of a block."""
    for seed in range(-(-_LEAST_VALUES // (BLOCK_ROWS**2 * size))):
        inputs = torch.randn(BLOCK_ROWS, size, generator=torch.Generator().manual_seed(seed))
        inputs = inputs.to(device, dtype)
        expected = compute(inputs)
        for shift in range(1, BLOCK_ROWS):
            outputs = [output.roll(-shift, 0) for output in compute(inputs.roll(shift, 0))]
            if not all(map(torch.equal, outputs, expected)):
                return False
    return True


def _routes(layer: nn.Module, x: torch.Tensor) -> Sequence[torch.Tensor]:
    """All that the router of a layer with experts gives for the rows x, [rows, hidden]."""
    found = list[torch.Tensor]()

    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        found.extend([output] if isinstance(output, torch.Tensor) else output)

    routers = [router for router in (getattr(layer, name, None) for name in _ROUTERS) if router is not None]
    hooks = [router.register_forward_hook(keep) for router in routers]
    layer(x[None])
    for hook in hooks:
        hook.remove()
    return found


def _experts_of(module: Any, blocks: Blocks) -> Experts | None:
    """Our experts with the weights of `module`, which loses them. None if `module` is no mixture of experts."""
    if type(module).__name__ == "Llama4TextExperts":
        act_fn = module.act_fn

        def gate_first(x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            gated: torch.Tensor = up * act_fn(gate)
            return gated

        return DenseExperts(list(_split(module, "gate_up_proj", gate_first, transposed=True)), blocks)
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return None
    up, activate = ("gate_up_proj", module._apply_gate) if module.has_gate else ("up_proj", module.act_fn)
    return Experts(list(_split(module, up, activate, transposed=module.is_transposed)), blocks)


def _split(module: Any, up: str, activate: _Activation, *, transposed: bool) -> Iterator[Expert]:
    """Each expert of a transformers module, whose weights are [experts, out, in], or [experts, in, out] if `transposed`."""
    finish = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    layers = []
    for name in (up, "down_proj"):
        weights, biases = module._parameters.pop(name), module._parameters.pop(f"{name}_bias", None)
        matrices = weights.detach().transpose(1, 2) if transposed else weights.detach()
        layers.append([_linear(matrix, None if biases is None else biases[i]) for i, matrix in enumerate(matrices)])
    for first, second in zip(*layers, strict=True):
        yield Expert(first, second, activate, finish)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
