"""A mixture of experts whose bits do not depend on the rows beside a row.

How many rows of a forward pass choose the same expert depends on their tokens. A product's bits may depend on its number of rows.
So experts, and the router that chooses them, compute blocks of one fixed number of rows. A block that is not full is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

#: Rows of a block, if a row has the same bits at every place of a block. Otherwise a block is one row.
BLOCK_ROWS = 8


@dataclass(slots=True)
class Blocks:
    """What all experts and routers of a model have in common."""

    #: Rows of a block of an expert, and of a router.
    rows: int = BLOCK_ROWS
    router_rows: int = BLOCK_ROWS
    #: The rows of this forward pass that are not padding. None: all rows. Padding would only have further experts read.
    used: Sequence[int] | None = None


class Expert(nn.Module):
    """One expert: down(activate(up(x))). Its linear layers can be replaced by packed or quantized ones."""

    def __init__(
        self, up: nn.Linear, down: nn.Linear, activate: Callable[[torch.Tensor], torch.Tensor], finish: nn.Module | None
    ) -> None:
        """`finish`: a norm of the expert's output, if the model has one."""
        super().__init__()
        self.up, self.down, self.finish = up, down, finish
        self._activate = activate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self._activate(self.up(x)))
        return y if self.finish is None else self.finish(y)


class Experts(nn.Module):
    """Computes for each row the weighted sum of the experts that the row has chosen."""

    def __init__(self, experts: Sequence[Expert], blocks: Blocks) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.each = tuple(experts)
        self._blocks = blocks

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x: [rows, hidden]. `chosen`: the experts of each row, [rows, n]. `weights`: factors of their outputs."""
        used = self._blocks.used
        if used is not None and len(used) < len(x):
            real = torch.tensor(used, device=x.device)
            output = torch.zeros_like(x)
            output[real] = self._sum(x[real], chosen[real], weights[real])
            return output
        return self._sum(x, chosen, weights)

    def _sum(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        per_row = chosen.shape[1]
        numbers = chosen.flatten()
        by_expert = numbers.argsort(stable=True)
        outputs = x.new_empty(len(numbers), x.shape[-1])
        begin = 0
        for number, count in enumerate(torch.bincount(numbers, minlength=len(self.each)).tolist()):
            if count:
                places = by_expert[begin : begin + count]
                outputs[places] = in_blocks(self.each[number], x[places // per_row], self._blocks.rows)
                begin += count
        parts = outputs.view(*chosen.shape, -1).float() * weights[..., None].float()
        total = parts[:, 0]
        for place in range(1, per_row):  # in one order: a sum along a dimension may have another one for other shapes
            total = total + parts[:, place]
        return total.to(x.dtype)


class Mixture:
    """The MLP of a layer of our own decoder: each row is computed by the `top_k` experts that its router chooses for it.

    `router` maps [rows, hidden] to [rows, experts]. `renormalizes`: the weights of a row's experts sum up to 1.
    """

    def __init__(
        self, router: nn.Linear, experts: Sequence[Expert], *, top_k: int, renormalizes: bool, blocks: Blocks
    ) -> None:
        self.router, self.experts, self.blocks = router, Experts(experts, blocks), blocks
        self.top_k, self.renormalizes = top_k, renormalizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the MLP, [rows, hidden], for x of the same shape."""
        outputs: torch.Tensor = self.experts.forward(x, *self.route(x))
        return outputs

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts that the rows x choose, and the weights of their outputs, [rows, top_k] each."""
        padded = functional.pad(x, (0, 0, 0, -len(x) % self.blocks.router_rows))
        chosen, weights = list[torch.Tensor](), list[torch.Tensor]()
        for part in padded.split(self.blocks.router_rows):
            best = self.router.forward(part).float().softmax(dim=-1).topk(self.top_k)
            chosen.append(best.indices)
            weights.append(best.values / best.values.sum(dim=-1, keepdim=True) if self.renormalizes else best.values)
        return torch.cat(chosen)[: len(x)], torch.cat(weights)[: len(x)]

    def replace_linear_layers(self, convert: Callable[[nn.Linear], nn.Module]) -> None:
        """Replace the linear layers of the experts by `convert(layer)`. The router stays as it is."""
        for expert in self.experts.each:
            for name in ("up", "down"):
                setattr(expert, name, convert(getattr(expert, name)))


class DenseExperts(Experts):
    """Experts of Llama 4: each gets a copy of all rows, scaled by the router. Rows that did not choose it are zero there."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """Return the outputs of all experts, [experts * rows, hidden]. x has the same shape."""
        output = torch.zeros_like(x)
        copies = zip(self.each, x.chunk(len(self.each)), output.chunk(len(self.each)), strict=True)
        for expert, inputs, result in copies:
            places = inputs.any(dim=-1).nonzero()[:, 0]
            if len(places):
                result[places] = in_blocks(expert, inputs[places], self._blocks.rows)
        return output


def in_blocks(compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, block: int) -> torch.Tensor:
    """Compute the rows x, [rows, ...], in blocks of `block` rows. The last block is padded with zeros."""
    padded = functional.pad(x, (0, 0, 0, -len(x) % block))
    outputs = [compute(part) for part in padded.split(block)]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[: len(x)]


def route_in_blocks(router: Any, blocks: Blocks) -> None:
    """Have a router of transformers, which returns one tensor or a tuple of tensors [rows, ...], compute blocks of rows."""
    route = router.forward

    def forward(x: torch.Tensor, *more: Any) -> Any:
        x = x.reshape(-1, x.shape[-1])
        padded = functional.pad(x, (0, 0, 0, -len(x) % blocks.router_rows))
        outputs = [route(part, *more) for part in padded.split(blocks.router_rows)]
        if isinstance(outputs[0], torch.Tensor):
            return torch.cat(outputs)[: len(x)]
        return tuple(torch.cat(parts)[: len(x)] for parts in zip(*outputs, strict=True))

    router.forward = forward
