"""A mixture of experts on a GPU, for few rows and for a chunk of a prompt (expert_kernels.py).

It takes six kernels, whatever the rows choose: the router, the choice, the list of each expert's rows, two products and a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import nn

from dsi_workers.decoding.experts import Mixture
from dsi_workers.decoding.gpu.expert_kernels import add_experts, choose_experts, list_pairs, multiply_by_experts
from dsi_workers.decoding.gpu.linear import GpuLinear, processors, rows_for, shared_bytes, supports_pdl
from dsi_workers.decoding.quantization import Int8Linear

#: Outputs of one program of the router. It has few outputs, and more programs read it sooner.
_ROUTER_BLOCK = 16
#: Rows of one program of the choice and of the sum. They divide all numbers of rows that are computed.
_BLOCK_ROWS = 4
#: Numbers of a row that one program of the sum adds up.
_SUM_BLOCK = 256
#: Programs of a product for each multiprocessor of the device.
_PROGRAMS = 4


@dataclass(frozen=True, slots=True)
class _Plan:
    """Launch settings of a product. Products are summed step by step, so other inputs per step change the bits."""

    #: Pairs of a tile.
    tile: int
    #: Outputs per program, inputs per step, warps, and the most pipeline stages.
    block_n: int
    block_k: int
    warps: int
    stages: int


#: For few rows: mostly, few of them choose the same expert, and all of the time goes to reading its weights.
_FEW_ROWS = _Plan(tile=16, block_n=32, block_k=128, warps=4, stages=4)
#: For a chunk of a prompt: an expert has tens of its rows.
_CHUNK = _Plan(tile=64, block_n=128, block_k=64, warps=8, stages=3)


class ExpertBuffers:
    """Intermediate results of a mixture for `rows` rows. All layers of a forward share them."""

    def __init__(self, experts: Sequence[GpuExperts], rows: int, device: torch.device) -> None:
        most_experts, top_k = max(each.experts for each in experts), max(each.top_k for each in experts)
        inner, hidden = max(each.inner for each in experts), experts[0].in_features
        self.logits = torch.zeros(rows * most_experts, device=device)
        self.choices = torch.zeros(rows * most_experts, dtype=torch.int8, device=device)
        self.pairs = torch.zeros(most_experts * rows, dtype=torch.int32, device=device)
        self.shares = torch.zeros(rows * top_k, device=device)
        self.gated = torch.zeros(rows * top_k * inner, dtype=experts[0].dtype, device=device)
        self.parts = torch.zeros(rows * top_k * hidden, device=device)


class GpuExperts:
    """The MLP of a layer that is a mixture of experts: RMSNorm, router, experts, and the sum with the residual.

    The weights of the experts of one layer become one tensor. The linear layers of `mixture` become views of it.
    """

    def __init__(self, mixture: Mixture, norm: torch.Tensor, epsilon: float) -> None:
        """`norm` [hidden]: the weights of the RMSNorm before the MLP."""
        experts = mixture.experts.each
        self._router = GpuLinear(mixture.router, block_n=_ROUTER_BLOCK)
        self._up, self._up_scales = _stack([expert.up for expert in experts])
        self._down, self._down_scales = _stack([expert.down for expert in experts])
        self._norm, self._epsilon, self._renormalizes = norm, epsilon, mixture.renormalizes
        self.experts, self.top_k, self.inner = len(experts), mixture.top_k, self._down.shape[2]
        self.in_features = self.out_features = self._down.shape[1]
        #: Number type of x.
        self.dtype = norm.dtype
        #: How many rows of the last forward chose each expert, [experts].
        self.counts = torch.zeros(self.experts, dtype=torch.int32, device=norm.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output [rows, hidden] for x [rows, hidden], with any number of rows."""
        rows = rows_for(len(x))
        padded = x.new_zeros(rows, self.in_features)
        padded[: len(x)] = x
        positions = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
        positions[: len(x)] = 0
        self.add_to(padded, positions, ExpertBuffers([self], rows, x.device))
        return padded[: len(x)]

    def add_to(
        self, x: torch.Tensor, positions: torch.Tensor, buffers: ExpertBuffers, *, of_prompt: bool = False
    ) -> None:
        """Add the MLP's output for x [rows, hidden] to x, in place. positions [rows], int32: negative for padding.

        `rows` must be a value of `rows_for`; with `of_prompt`, a multiple of 64.
        """
        rows, plan, pdl = len(x), _CHUNK if of_prompt else _FEW_ROWS, supports_pdl(x.device)
        block_experts = triton.next_power_of_2(self.experts)
        options: dict[str, Any] = {"pdl": pdl, **({"launch_pdl": True} if pdl else {})}
        logits = buffers.logits[: rows * self.experts].view(rows, self.experts)
        self._router.multiply(x, logits, norm=self._norm, epsilon=self._epsilon)
        choose_experts[(rows // _BLOCK_ROWS,)](
            logits, positions, buffers.choices, buffers.shares, experts=self.experts, top_k=self.top_k,
            renormalized=self._renormalizes, block_rows=_BLOCK_ROWS, block_experts=block_experts, num_warps=4, **options,
        )  # fmt: skip
        list_pairs[(self.experts,)](
            buffers.choices, buffers.pairs, self.counts, rows, experts=self.experts, top_k=self.top_k,
            block_rows=triton.next_power_of_2(rows), num_warps=1, **options,
        )  # fmt: skip
        self._multiply(x, self._up, self._up_scales, buffers.gated, buffers, rows, plan, options, first=True)
        self._multiply(
            buffers.gated, self._down, self._down_scales, buffers.parts, buffers, rows, plan, options, first=False
        )
        add_experts[(rows // _BLOCK_ROWS, triton.cdiv(self.in_features, _SUM_BLOCK))](
            x, buffers.parts, buffers.shares, positions, self.in_features, top_k=self.top_k, block_rows=_BLOCK_ROWS,
            block=_SUM_BLOCK, num_warps=4, **options,
        )  # fmt: skip

    def _multiply(
        self, x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None, y: torch.Tensor, buffers: ExpertBuffers,
        rows: int, plan: _Plan, options: dict[str, Any], *, first: bool,
    ) -> None:  # fmt: skip
        """Multiply by the experts' first matrices (gate and up), or by their last ones."""
        outputs = self.inner if first else self.in_features
        step = plan.block_k * (
            plan.block_n * weights.element_size() * (2 if first else 1) + plan.tile * self.dtype.itemsize
        )
        stages = max(2, min(plan.stages, shared_bytes(x.device) // step))
        units = self.experts * triton.cdiv(outputs, plan.block_n)
        multiply_by_experts[(min(units, _PROGRAMS * processors(x.device)),)](
            x, weights, y, weights if scales is None else scales, self._norm, buffers.pairs, self.counts, self._epsilon,
            outputs, rows, inputs=weights.shape[2], experts=self.experts, top_k=self.top_k, by_row=first, gated=first,
            scaled=scales is not None, normed=first, tile=plan.tile, block_experts=triton.next_power_of_2(self.experts),
            block_n=plan.block_n, block_k=plan.block_k, num_warps=plan.warps, num_stages=stages, **options,
        )  # fmt: skip


def _stack(linears: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights of the linear layers as one tensor [experts, out, in], and the scales of int8 weights [experts, out].

    The layers become views of it, so that their old weights can be freed.
    """
    quantized = [linear for linear in linears if isinstance(linear, Int8Linear)]
    weights = torch.stack([_weight_of(linear) for linear in linears])
    scales = torch.stack([linear.scale for linear in quantized]) if quantized else None
    for number, linear in enumerate(linears):
        if isinstance(linear, Int8Linear):
            linear.weight = weights[number]
        elif isinstance(linear, nn.Linear):
            linear.weight = nn.Parameter(weights[number], requires_grad=False)
    return weights, scales


def _weight_of(linear: nn.Module) -> torch.Tensor:
    assert isinstance(linear, nn.Linear | Int8Linear)
    assert linear.bias is None, "the kernels add no biases"
    return linear.weight.detach()
