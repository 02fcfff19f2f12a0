"""Triton kernels for a mixture of experts, for few rows and for a chunk of a prompt.

Each row chooses `top_k` experts. A pair is a row and one of its choices: pair row * top_k + choice. An expert computes the pairs
that chose it, in tiles of a fixed number of pairs. Nothing is copied to the host, and no size depends on what rows choose: so the
kernels can be recorded as a CUDA graph.

The sums of a pair depend neither on the other pairs of its tile nor on its place there. What the experts of a row give is added
up in the order of its choices. So a row has the same bits whatever other rows choose (docs/exactness.md). Rows with a negative
position are padding: they choose no expert.

`pdl`: see kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def choose_experts(
    logits, positions, choices, shares,
    experts: tl.constexpr, top_k: tl.constexpr, renormalized: tl.constexpr, block_rows: tl.constexpr,
    block_experts: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """Choose the experts of each row by its router logits [rows, experts] in float32. One program for `block_rows` rows.

    choices [rows, experts], int8: 1 for the expert with the highest logit, 2 for the next, and so on up to top_k; 0 for those
    that are not chosen. Among equals, the smaller number comes first. shares [rows, top_k], float32: the softmax probabilities
    of the chosen experts in this order; `renormalized`: divided by their sum.
    """
    if pdl:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    expert = tl.arange(0, block_experts)[None, :]
    inside = expert < experts
    real = (tl.load(positions + row) >= 0)[:, None]
    at = row[:, None] * experts + expert
    logit = tl.load(logits + at, mask=inside, other=float("-inf"))
    exponential = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    probability = exponential / tl.sum(exponential, axis=1)[:, None]
    left = tl.where(inside, probability, -1.0)
    choice = tl.zeros((block_rows, block_experts), tl.int32)
    total = tl.zeros((block_rows,), tl.float32)
    for number in tl.static_range(1, top_k + 1):
        best = tl.max(left, axis=1)
        chosen = expert == tl.min(tl.where(left == best[:, None], expert, block_experts), axis=1)[:, None]
        choice = tl.where(chosen, number, choice)
        left = tl.where(chosen, -1.0, left)
        total += best
    if renormalized:
        probability = probability / total[:, None]
    choice = tl.where(real, choice, 0)
    tl.store(shares + row[:, None] * top_k + choice - 1, probability, mask=choice > 0)
    tl.store(choices + at, choice.to(tl.int8), mask=inside)


@triton.jit
def list_pairs(
    choices, pairs, counts, rows, experts: tl.constexpr, top_k: tl.constexpr, block_rows: tl.constexpr, pdl: tl.constexpr
):  # fmt: skip
    """List the pairs of an expert in the order of rows. One program for each expert.

    choices [rows, experts]: see `choose_experts`. counts [experts]: how many pairs an expert has. pairs [experts, rows]: their
    numbers; behind them, anything.
    """
    if pdl:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    row = tl.arange(0, block_rows)
    choice = tl.load(choices + row * experts + expert, mask=row < rows, other=0).to(tl.int32)
    chosen = (choice > 0).to(tl.int32)
    place = tl.cumsum(chosen, axis=0) - 1
    tl.store(pairs + expert * rows + place, row * top_k + choice - 1, mask=choice > 0)
    tl.store(counts + expert, tl.sum(chosen, axis=0))


@triton.jit
def multiply_by_experts(
    x, weights, y, scales, norm, pairs, counts, epsilon, outputs, rows,
    inputs: tl.constexpr, experts: tl.constexpr, top_k: tl.constexpr, by_row: tl.constexpr, gated: tl.constexpr,
    scaled: tl.constexpr, normed: tl.constexpr, tile: tl.constexpr, block_experts: tl.constexpr, block_n: tl.constexpr,
    block_k: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """Multiply each pair by the weights of its expert: y [rows * top_k, outputs].

    weights [experts, outputs, inputs]. `by_row`: x has one row for each row, [rows, inputs], else one for each pair. pairs and
    counts: see `list_pairs`. `gated`: the weights are [experts, 2 * outputs, inputs], and y is silu of the first half of the
    product times the second half. `scaled`: multiply by scales, [experts, outputs] or twice as many. `normed`: see `multiply` in
    kernels.py.

    One expert that has pairs and block_n outputs are one unit of work. The programs share the units.
    """
    if pdl:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.arange(0, block_experts)
    used = tl.load(counts + number, mask=number < experts, other=0) > 0
    ends = tl.cumsum(used.to(tl.int32), axis=0)
    blocks = tl.cdiv(outputs, block_n)
    matrix_rows = outputs * 2 if gated else outputs
    k = tl.arange(0, block_k)
    whole: tl.constexpr = inputs % block_k == 0
    for unit in tl.range(tl.program_id(0), tl.max(ends, axis=0) * blocks, tl.num_programs(0), num_stages=1):
        expert = tl.sum((ends <= unit // blocks).to(tl.int32), axis=0)
        count = tl.load(counts + expert)
        n = (unit % blocks) * block_n + tl.arange(0, block_n)
        inside = n < outputs
        rows_of_weights = weights + (expert.to(tl.int64) * matrix_rows + n)[:, None] * inputs
        for begin in tl.range(0, count, tile, num_stages=1):
            place = begin + tl.arange(0, tile)
            real = place < count
            pair = tl.load(pairs + expert * rows + place, mask=real, other=0)
            source = x + (pair // top_k if by_row else pair)[None, :] * inputs
            sums = tl.zeros((block_n, tile), tl.float32)
            gates = tl.zeros((block_n, tile), tl.float32)
            squares = tl.zeros((tile,), tl.float32)
            for first in range(0, inputs, block_k):
                at = first + k
                if whole:
                    part = tl.load(source + at[:, None], mask=real[None, :], other=0)
                    block = tl.load(rows_of_weights + at[None, :], mask=inside[:, None], other=0)
                else:
                    known = at < inputs
                    part = tl.load(source + at[:, None], mask=real[None, :] & known[:, None], other=0)
                    block = tl.load(rows_of_weights + at[None, :], mask=inside[:, None] & known[None, :], other=0)
                if normed:
                    wide = part.to(tl.float32)
                    squares += tl.sum(wide * wide, axis=0)
                    part = part * tl.load(norm + at, mask=at < inputs, other=0)[:, None]
                if scaled:
                    block = block.to(part.dtype)
                sums = tl.dot(block, part, sums, input_precision="ieee")
                if gated:
                    other = tl.load(
                        rows_of_weights + outputs * inputs + at[None, :],
                        mask=inside[:, None] & (at < inputs)[None, :], other=0,
                    )  # fmt: skip
                    if scaled:
                        other = other.to(part.dtype)
                    gates = tl.dot(other, part, gates, input_precision="ieee")
            if normed:
                size = tl.rsqrt(squares / inputs + epsilon)
                sums = sums * size[None, :]
                gates = gates * size[None, :]
            if scaled:
                scale = scales + expert * matrix_rows + n
                sums = sums * tl.load(scale, mask=inside, other=0)[:, None].to(tl.float32)
                if gated:
                    gates = gates * tl.load(scale + outputs, mask=inside, other=0)[:, None].to(tl.float32)
            if gated:
                sums = sums * tl.sigmoid(sums) * gates
            tl.store(
                y + pair[None, :] * outputs + n[:, None],
                sums.to(y.dtype.element_ty),
                mask=inside[:, None] & real[None, :],
            )


@triton.jit
def add_experts(
    x, parts, shares, positions, hidden, top_k: tl.constexpr, block_rows: tl.constexpr, block: tl.constexpr, pdl: tl.constexpr
):  # fmt: skip
    """Add what its experts give to each row of x [rows, hidden], in place. One program for `block` numbers of `block_rows` rows.

    parts [rows * top_k, hidden], in float32. shares [rows, top_k]: the factor of each.
    """
    if pdl:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    at = tl.program_id(1) * block + tl.arange(0, block)
    real = tl.load(positions + row) >= 0
    inside = real[:, None] & (at < hidden)[None, :]
    sums = tl.zeros((block_rows, block), tl.float32)
    for choice in tl.static_range(top_k):
        pair = row * top_k + choice
        share = tl.load(shares + pair, mask=real, other=0)[:, None]
        sums += tl.load(parts + pair[:, None] * hidden + at[None, :], mask=inside, other=0) * share
    place = x + row[:, None] * hidden + at[None, :]
    tl.store(place, (tl.load(place, mask=inside, other=0).to(tl.float32) + sums).to(x.dtype.element_ty), mask=inside)
