"""Triton kernels for forward passes of a few rows, where reading the weights takes nearly all of the time.

The kernels are batch-invariant: each output is summed in a fixed order. The order depends neither on the number of rows, nor
on the contents of other rows, nor on how much of the KV cache they read. So a token has the same bits in any batch
(docs/exactness.md). Matrix products go block by block along the rows of the weight. Attention is split at fixed positions.

Rows are those of a packed forward pass. A row with a negative position is padding: it neither reads nor writes the KV cache.

Attention takes rows in groups of 1 to MOST_GROUP_ROWS successive rows of one generation, which read the KV cache together. A
program has room for the largest group, whatever the number of rows: so a row's sums do not depend on the size of its group. One
group and one split of the KV cache are one unit of work. Programs share the units evenly, however long each generation is.

A row may lie on a branch of a tree. From position forks[row] on, such a row reads and writes branch_keys and branch_values
[kv_heads, branch_rows, dim] in place of the cache: position p stands there at firsts[row] + p - forks[row]. The keys of a
position are summed in the same order wherever they stand. A row without a branch has a fork beyond all positions.

`pdl` switches on programmatic dependent launch: a kernel starts while the kernel before it is ending, and waits only
before it reads that kernel's results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsi_workers.decoding.gpu import SPLIT_POSITIONS

#: The smallest number of rows of a tensor-core product. Fewer rows would take the same time.
LEAST_ROWS = 16
#: The most rows of a group.
MOST_GROUP_ROWS = 8
#: Positions of the KV cache in one split.
SPLIT = tl.constexpr(SPLIT_POSITIONS)
#: Splits that `combine_splits` adds up together.
_TOGETHER = tl.constexpr(16)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _prefetch_to_l2(places):
    """Prefetch the cache lines at these addresses into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def multiply(
    x, weight, y, scales, bias, residual, norm, epsilon, outputs,
    inputs: tl.constexpr, gated: tl.constexpr, scaled: tl.constexpr, biased: tl.constexpr, added: tl.constexpr,
    normed: tl.constexpr, block_rows: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, pdl: tl.constexpr,
    prefetched_lines: tl.constexpr,
):  # fmt: skip
    """Matrix product: y [rows, outputs] = x [rows, inputs] times weight [outputs, inputs] transposed.

    `normed`: apply RMSNorm with weights norm [inputs] to x first. `scaled`: multiply the product by scales [outputs]. `biased`:
    add bias [outputs]. `added`: add residual [rows, outputs]. `gated`: the weight is [2 * outputs, inputs], and y is silu of
    the first half of the product times the second half. `prefetched_lines`: cache lines of each row of the weight to prefetch
    while the kernel before is still running.

    One program for `block_rows` rows and block_n outputs. Programs for other rows and the same outputs are neighbours, so that
    only the first of them reads the weight from the device's memory, and the others from its L2 cache.
    """
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    k = tl.arange(0, block_k)
    inside = n < outputs
    whole: tl.constexpr = inputs % block_k == 0
    if pdl:
        gdc_launch_dependents()
        if prefetched_lines > 0:
            line = tl.arange(0, prefetched_lines) * (128 // (weight.dtype.element_ty.primitive_bitwidth // 8))
            _prefetch_to_l2(weight + n.to(tl.int64)[:, None] * inputs + line[None, :])
            if gated:
                _prefetch_to_l2(weight + (n + outputs).to(tl.int64)[:, None] * inputs + line[None, :])
        gdc_wait()
    sums = tl.zeros((block_n, block_rows), tl.float32)
    gates = tl.zeros((block_n, block_rows), tl.float32)
    squares = tl.zeros((block_rows,), tl.float32)
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
def apply_rope_and_store_kv(
    qkv, positions, slots, forks, firsts, cos, sin, keys, values, branch_keys, branch_values, query_norm, key_norm, epsilon,
    capacity, last_position, branch_rows,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, normed: tl.constexpr, block_half: tl.constexpr,
    pdl: tl.constexpr,
):  # fmt: skip
    """Apply RoPE to queries and keys, and store keys and values in the KV cache. One program for each row and head.

    qkv: [rows, heads + 2 * kv_heads, dim]; queries are rotated in place. keys, values: the cache, [slots, kv_heads, capacity,
    dim]. positions, slots: [rows]. cos, sin: [positions, dim], with the first half of each row of sin negated. Positions above
    `last_position` are rotated like `last_position`. `normed`: apply RMSNorm with weights query_norm and key_norm [dim] to
    queries and keys before.
    """
    if pdl:
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
        slot = tl.load(slots + row).to(tl.int64)
        if head < heads + kv_heads:
            if normed:
                size = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / dim + epsilon)
                weight = query_norm if head < heads else key_norm
                first = first * size * tl.load(weight + half, mask=inside, other=0).to(tl.float32)
                second = second * size * tl.load(weight + half + dim // 2, mask=inside, other=0).to(tl.float32)
            rope_offset = tl.minimum(position, last_position) * dim + half
            c = tl.load(cos + rope_offset, mask=inside, other=0).to(tl.float32)
            s = tl.load(sin + rope_offset + dim // 2, mask=inside, other=0).to(tl.float32)
            rotated = first * c - second * s
            second = second * c + first * s
            first = rotated
        if head < heads:
            tl.store(at, first.to(qkv.dtype.element_ty), mask=inside)
            tl.store(at + dim // 2, second.to(qkv.dtype.element_ty), mask=inside)
        else:
            kv_head = (head - heads) % kv_heads
            kept = keys if head < heads + kv_heads else values
            place = (slot * kv_heads + kv_head) * capacity + position
            fork = tl.load(forks + row)
            if position >= fork:
                kept = branch_keys if head < heads + kv_heads else branch_values
                place = kv_head.to(tl.int64) * branch_rows + tl.load(firsts + row) + position - fork
            tl.store(kept + place * dim + half, first.to(keys.dtype.element_ty), mask=inside)
            tl.store(kept + place * dim + half + dim // 2, second.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def attend_to_splits(
    qkv, positions, slots, forks, firsts, units, begins, ends, keys, values, branch_keys, branch_values, partial_outputs, maxima,
    exp_sums, capacity, branch_rows, scaling, splits,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, sliding_window: tl.constexpr, most_groups: tl.constexpr,
    block_m: tl.constexpr, block_d: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """Compute attention to each split of the KV cache. The programs of axis 0 share the units of work of a KV head (axis 1).

    units [1]: how many there are. begins: the first row of each group, and behind the last group its end. ends [most_groups]: how
    many units this group and those before it have; behind the last group, any number that is not less than `units`.

    Results, all in float32: maxima [rows, heads, splits], the largest score, in base two. exp_sums [rows, heads, splits], the
    sum of exp2(score - maximum). partial_outputs [rows, heads, splits, dim], the values weighted by exp2(score - maximum), not
    yet divided by exp_sums. `sliding_window`: the most positions that a row reads; 0 for all.
    """
    if pdl:
        gdc_launch_dependents()
        gdc_wait()
    kv_head = tl.program_id(1)
    of_head: tl.constexpr = heads // kv_heads
    m = tl.arange(0, block_m)
    d = tl.arange(0, block_d)
    known = d < dim
    every_end = tl.load(ends + tl.arange(0, most_groups))
    # Not pipelined: with the keys and values of one unit in shared memory, more programs run side by side.
    for unit in tl.range(tl.program_id(0), tl.load(units), tl.num_programs(0), num_stages=1):
        group = tl.sum((every_end <= unit).to(tl.int32), axis=0)
        split = unit - tl.max(tl.where(every_end <= unit, every_end, 0), axis=0)
        first_row = tl.load(begins + group)
        row = first_row + m // of_head
        head = kv_head * of_head + m % of_head
        inside = row < tl.load(begins + group + 1)
        position = tl.load(positions + row, mask=inside, other=-1)
        last = tl.max(position, axis=0)
        begin = split * SPLIT
        slot = tl.load(slots + first_row).to(tl.int64)
        fork = tl.load(forks + first_row)
        query = tl.load(
            qkv + (row * (heads + 2 * kv_heads) + head)[:, None] * dim + d[None, :],
            mask=inside[:, None] & known[None, :], other=0,
        )  # fmt: skip
        place = begin + tl.arange(0, SPLIT)
        at = ((slot * kv_heads + kv_head) * capacity + place)[:, None] * dim + d[None, :]
        aside = (kv_head * branch_rows + tl.load(firsts + first_row) + place - fork)[:, None] * dim + d[None, :]
        shared = (place < fork)[:, None]
        readable = (place <= last)[:, None] & known[None, :]
        key = tl.load(tl.where(shared, keys + at, branch_keys + aside), mask=readable, other=0)
        # The values are loaded early, so that they arrive while scores are computed.
        value = tl.load(tl.where(shared, values + at, branch_values + aside), mask=readable, other=0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scaling * _LOG2_E)
        visible = place[None, :] <= position[:, None]
        if sliding_window > 0:
            visible = visible & (place[None, :] > position[:, None] - sliding_window)
        scores = tl.where(visible, scores, float("-inf"))
        maximum = tl.max(scores, axis=1)
        weights = tl.exp2(scores - tl.where(maximum == float("-inf"), 0.0, maximum)[:, None])
        partial_output = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        of = (row * heads + head) * splits + split
        tl.store(maxima + of, maximum, mask=inside)
        tl.store(exp_sums + of, tl.sum(weights, axis=1), mask=inside)
        tl.store(
            partial_outputs + of.to(tl.int64)[:, None] * dim + d[None, :],
            partial_output,
            mask=inside[:, None] & known[None, :],
        )


@triton.jit
def combine_splits(
    partial_outputs, maxima, exp_sums, positions, out, splits,
    heads: tl.constexpr, dim: tl.constexpr, sliding_window: tl.constexpr, block_d: tl.constexpr, block_splits: tl.constexpr,
    pdl: tl.constexpr,
):  # fmt: skip
    """Combine the splits into the attention output, out [rows, heads, dim]. One program for each row and head.

    _TOGETHER splits are added up at a time, and these sums one after another, in order of position.
    """
    if pdl:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    d = tl.arange(0, block_d)
    known = d < dim
    end = (position + SPLIT) // SPLIT  # 0 for padding: no split
    begin = 0
    if sliding_window > 0:
        begin = tl.maximum(position + 1 - sliding_window, 0) // SPLIT
    of = (row * heads + head) * splits
    split = tl.arange(0, block_splits)
    maximum = tl.max(
        tl.load(maxima + of + split, mask=(split >= begin) & (split < end), other=float("-inf")), axis=0
    )  # fmt: skip
    sums = tl.zeros((block_d,), tl.float32)
    exp_sum = 0.0
    for aligned in range(begin // _TOGETHER * _TOGETHER, end, _TOGETHER):
        each = aligned + tl.arange(0, _TOGETHER)
        read = (each >= begin) & (each < end)
        share = tl.exp2(tl.load(maxima + of + each, mask=read, other=float("-inf")) - maximum)
        exp_sum += tl.sum(share * tl.load(exp_sums + of + each, mask=read, other=0), axis=0)
        part = tl.load(
            partial_outputs + (of + each).to(tl.int64)[:, None] * dim + d[None, :],
            mask=read[:, None] & known[None, :], other=0,
        )  # fmt: skip
        sums += tl.sum(share[:, None] * part, axis=0)
    sums = sums / tl.where(exp_sum > 0, exp_sum, 1.0)
    tl.store(out + (row * heads + head) * dim + d, sums.to(out.dtype.element_ty), mask=known)
