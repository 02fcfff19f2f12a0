"""Kernels for forwards of a few rows, in which every byte of the weights is read once and hardly anything is computed.

Each element of a result is a sum in an order that depends on nothing but its own place: neither on how many rows there are,
nor on what the others hold, nor on how much of the cache is read beside. So the bits of a token are the same in any batch
(docs/exactness.md): weights are multiplied block after block along their rows, attention is cut at fixed positions.

Rows are those of a packed forward, in groups of `group_rows` of one generation each; a row whose position is negative
is padding: it reads and writes nothing of the cache.

A group may lie on a branch of a tree. From position forks[group] on, such a group reads and writes branch_keys and branch_values
[kv_heads, branch_rows, dim] in place of the cache: position p stands there at firsts[group] + p - forks[group]. The keys of a
position are summed in the same order wherever they stand. A group without a branch has a fork beyond all positions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: The fewest rows that a tensor core multiplies by; fewer cost the same.
LEAST_ROWS = 16
#: Positions of the cache that one program attends to.
SPLIT = tl.constexpr(128)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _fetch(places):
    """Have these lines of memory brought nearer."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def multiply(
    x, weight, y, scales, bias, residual, norm, epsilon, outputs,
    inputs: tl.constexpr, gated: tl.constexpr, scaled: tl.constexpr, biased: tl.constexpr, added: tl.constexpr,
    normed: tl.constexpr, rows: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, chained: tl.constexpr,
    fetched: tl.constexpr,
):  # fmt: skip
    """y [rows, outputs] = x [rows, inputs] times weight [outputs, inputs] transposed, `scaled` by scales [outputs].

    `normed`: x is divided by its root mean square and multiplied by norm [inputs] before. `biased`: bias [outputs] is added,
    `added`: residual [rows, outputs] is. `gated`: the weight is [2 outputs, inputs], and y is silu of the first half times
    the second.
    """
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    row = tl.program_id(1) * rows + tl.arange(0, rows)
    k = tl.arange(0, block_k)
    inside = n < outputs
    whole: tl.constexpr = inputs % block_k == 0
    if chained:
        gdc_launch_dependents()
        if fetched > 0:
            line = tl.arange(0, fetched) * (128 // (weight.dtype.element_ty.primitive_bitwidth // 8))
            _fetch(weight + n.to(tl.int64)[:, None] * inputs + line[None, :])
            if gated:
                _fetch(weight + (n + outputs).to(tl.int64)[:, None] * inputs + line[None, :])
        gdc_wait()
    sums = tl.zeros((block_n, rows), tl.float32)
    gates = tl.zeros((block_n, rows), tl.float32)
    squares = tl.zeros((rows,), tl.float32)
    for begin in range(0, inputs, block_k):
        place = begin + k
        if whole:
            part = tl.load(x + row[None, :] * inputs + place[:, None])
            block = tl.load(weight + n.to(tl.int64)[:, None] * inputs + place[None, :], mask=inside[:, None], other=0)
        else:
            known = place < inputs
            part = tl.load(x + row[None, :] * inputs + place[:, None], mask=known[:, None], other=0)
            block = tl.load(
                weight + n.to(tl.int64)[:, None] * inputs + place[None, :],
                mask=inside[:, None] & known[None, :],
                other=0,
            )
        if normed:
            wide = part.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            part = part * tl.load(norm + place, mask=place < inputs, other=0)[:, None]
        if scaled:
            block = block.to(part.dtype)
        sums = tl.dot(block, part, sums, input_precision="ieee")
        if gated:
            other = tl.load(
                weight + (n + outputs).to(tl.int64)[:, None] * inputs + place[None, :],
                mask=inside[:, None] & (place < inputs)[None, :], other=0,
            )  # fmt: skip
            if scaled:
                other = other.to(part.dtype)
            gates = tl.dot(other, part, gates, input_precision="ieee")
    if normed:
        size = tl.rsqrt(squares / inputs + epsilon)
        sums = sums * size[None, :]
        gates = gates * size[None, :]
    if scaled:
        sums = sums * tl.load(scales + n, mask=inside, other=0)[:, None].to(tl.float32)
        if gated:
            gates = gates * tl.load(scales + n + outputs, mask=inside, other=0)[:, None].to(tl.float32)
    if biased:
        sums = sums + tl.load(bias + n, mask=inside, other=0)[:, None].to(tl.float32)
        if gated:
            gates = gates + tl.load(bias + n + outputs, mask=inside, other=0)[:, None].to(tl.float32)
    if gated:
        sums = sums * tl.sigmoid(sums) * gates
    at = row[None, :] * outputs + n[:, None]
    if added:
        sums = sums + tl.load(residual + at, mask=inside[:, None], other=0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit
def turn_and_keep(
    qkv, positions, slots, forks, firsts, cos, sin, keys, values, branch_keys, branch_values, query_norm, key_norm, epsilon,
    capacity, last_position, branch_rows,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, group_rows: tl.constexpr, normed: tl.constexpr,
    block_half: tl.constexpr, chained: tl.constexpr,
):  # fmt: skip
    """qkv [rows, heads + 2 kv_heads, dim]: queries are rotated where they are, keys are rotated and kept, values kept.

    keys, values: [slots, kv_heads, capacity, dim]. cos, sin: [positions, dim], the first half of a sine negative; positions
    beyond `last_position`, which only padding has, turn like it. `normed`: queries and keys are normed before. One program for
    each row and head.
    """
    if chained:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    if position >= 0:
        half = tl.arange(0, block_half)
        inside = half < dim // 2
        at = qkv + (row * (heads + 2 * kv_heads) + head) * dim + half
        first = tl.load(at, mask=inside, other=0).to(tl.float32)
        second = tl.load(at + dim // 2, mask=inside, other=0).to(tl.float32)
        slot = tl.load(slots + row // group_rows).to(tl.int64)
        if head < heads + kv_heads:
            if normed:
                size = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / dim + epsilon)
                weight = query_norm if head < heads else key_norm
                first = first * size * tl.load(weight + half, mask=inside, other=0).to(tl.float32)
                second = second * size * tl.load(weight + half + dim // 2, mask=inside, other=0).to(tl.float32)
            turn = tl.minimum(position, last_position) * dim + half
            c = tl.load(cos + turn, mask=inside, other=0).to(tl.float32)
            s = tl.load(sin + turn + dim // 2, mask=inside, other=0).to(tl.float32)
            turned = first * c - second * s
            second = second * c + first * s
            first = turned
        if head < heads:
            tl.store(at, first.to(qkv.dtype.element_ty), mask=inside)
            tl.store(at + dim // 2, second.to(qkv.dtype.element_ty), mask=inside)
        else:
            kv_head = (head - heads) % kv_heads
            kept = keys if head < heads + kv_heads else values
            place = (slot * kv_heads + kv_head) * capacity + position
            fork = tl.load(forks + row // group_rows)
            if position >= fork:
                kept = branch_keys if head < heads + kv_heads else branch_values
                place = kv_head.to(tl.int64) * branch_rows + tl.load(firsts + row // group_rows) + position - fork
            tl.store(kept + place * dim + half, first.to(keys.dtype.element_ty), mask=inside)
            tl.store(kept + place * dim + half + dim // 2, second.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def attend_in_parts(
    qkv, positions, slots, forks, firsts, keys, values, branch_keys, branch_values, parts, peaks, totals, capacity,
    branch_rows, scaling, splits,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, group_rows: tl.constexpr, slides: tl.constexpr,
    block_m: tl.constexpr, block_d: tl.constexpr, chained: tl.constexpr,
):  # fmt: skip
    """Attention of each group of rows to each part of SPLIT positions: one program for group, kv head and part.

    parts: float32 [rows, heads, splits, dim], not divided by totals [rows, heads, splits], the sums of exponentials less
    their peaks [rows, heads, splits], in base two. `slides`: how many positions a row reads at most, 0 for all.
    """
    if chained:
        gdc_launch_dependents()
        gdc_wait()
    group, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_head: tl.constexpr = heads // kv_heads
    m = tl.arange(0, block_m)
    row = group * group_rows + m // of_head
    head = kv_head * of_head + m % of_head
    inside = m < group_rows * of_head
    position = tl.load(positions + row, mask=inside, other=-1)
    last = tl.max(position, axis=0)
    begin = split * SPLIT
    if begin <= last:
        slot = tl.load(slots + group).to(tl.int64)
        fork = tl.load(forks + group)
        d = tl.arange(0, block_d)
        known = d < dim
        query = tl.load(
            qkv + (row * (heads + 2 * kv_heads) + head)[:, None] * dim + d[None, :],
            mask=inside[:, None] & known[None, :], other=0,
        )  # fmt: skip
        place = begin + tl.arange(0, SPLIT)
        at = ((slot * kv_heads + kv_head) * capacity + place)[:, None] * dim + d[None, :]
        aside = (kv_head * branch_rows + tl.load(firsts + group) + place - fork)[:, None] * dim + d[None, :]
        shared = (place < fork)[:, None]
        readable = (place <= last)[:, None] & known[None, :]
        key = tl.load(tl.where(shared, keys + at, branch_keys + aside), mask=readable, other=0)
        # The values now, so that they come while scores are computed.
        value = tl.load(tl.where(shared, values + at, branch_values + aside), mask=readable, other=0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scaling * _LOG2_E)
        seen = place[None, :] <= position[:, None]
        if slides > 0:
            seen = seen & (place[None, :] > position[:, None] - slides)
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.max(scores, axis=1)
        weights = tl.exp2(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        part = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        of = (row * heads + head) * splits + split
        tl.store(peaks + of, peak, mask=inside)
        tl.store(totals + of, tl.sum(weights, axis=1), mask=inside)
        tl.store(parts + of.to(tl.int64)[:, None] * dim + d[None, :], part, mask=inside[:, None] & known[None, :])


@triton.jit
def join_parts(
    parts, peaks, totals, positions, out, splits,
    heads: tl.constexpr, dim: tl.constexpr, slides: tl.constexpr, block_d: tl.constexpr, block_splits: tl.constexpr,
    chained: tl.constexpr,
):  # fmt: skip
    """out [rows, heads, dim]: what the parts come to together, one after another. One program for each row and head."""
    if chained:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    d = tl.arange(0, block_d)
    known = d < dim
    end = (position + SPLIT) // SPLIT  # no part for padding
    begin = 0
    if slides > 0:
        begin = tl.maximum(position + 1 - slides, 0) // SPLIT
    of = (row * heads + head) * splits
    split = tl.arange(0, block_splits)
    peak = tl.max(
        tl.load(peaks + of + split, mask=(split >= begin) & (split < end), other=float("-inf")), axis=0
    )  # fmt: skip
    sums = tl.zeros((block_d,), tl.float32)
    total = 0.0
    for each in range(begin, end):
        share = tl.exp2(tl.load(peaks + of + each) - peak)
        total += share * tl.load(totals + of + each)
        sums += share * tl.load(parts + (of + each).to(tl.int64) * dim + d, mask=known, other=0)
    sums = sums / tl.where(total > 0, total, 1.0)
    tl.store(out + (row * heads + head) * dim + d, sums.to(out.dtype.element_ty), mask=known)
