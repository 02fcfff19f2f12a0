"""Triton kernels for a chunk of a prompt: what lies between the library's matrix products and attention.

Each row is computed by itself, so its bits depend neither on the number of rows nor on the other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Rows of one program of each kernel. They divide the rows of every chunk (ROW_TILE in decoding/capacity.py).
ROPE_ROWS, GATE_ROWS = 16, 4


@triton.jit(do_not_specialize=["begin"])
def apply_rope_and_store_chunk(
    qkv, cos, sin, keys, values, query_norm, key_norm, epsilon, begin, capacity, last_position,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, normed: tl.constexpr, block_rows: tl.constexpr,
    block_half: tl.constexpr,
):  # fmt: skip
    """Apply RoPE to queries and keys, and store keys and values in one slot. One program for `block_rows` rows of a head.

    qkv: [rows, heads + 2 * kv_heads, dim] for the positions from `begin` on; queries are rotated in place. keys, values: those of
    the slot, [kv_heads, capacity, dim]. The other arguments are those of `apply_rope_and_store_kv` (kernels.py).
    """
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    head = tl.program_id(1)
    position = begin + row
    half = tl.arange(0, block_half)
    inside = (half < dim // 2)[None, :]
    at = qkv + (row * (heads + 2 * kv_heads) + head)[:, None] * dim + half[None, :]
    first = tl.load(at, mask=inside, other=0).to(tl.float32)
    second = tl.load(at + dim // 2, mask=inside, other=0).to(tl.float32)
    if head < heads + kv_heads:
        if normed:
            size = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / dim + epsilon)[:, None]
            weight = query_norm if head < heads else key_norm
            known = half < dim // 2
            first = first * size * tl.load(weight + half, mask=known, other=0).to(tl.float32)[None, :]
            second = second * size * tl.load(weight + half + dim // 2, mask=known, other=0).to(tl.float32)[None, :]
        of_position = tl.minimum(position, last_position)[:, None] * dim + half[None, :]
        c = tl.load(cos + of_position, mask=inside, other=0).to(tl.float32)
        s = tl.load(sin + of_position + dim // 2, mask=inside, other=0).to(tl.float32)
        rotated = first * c - second * s
        second = second * c + first * s
        first = rotated
    if head < heads:
        tl.store(at, first.to(qkv.dtype.element_ty), mask=inside)
        tl.store(at + dim // 2, second.to(qkv.dtype.element_ty), mask=inside)
    else:
        kept = keys if head < heads + kv_heads else values
        kv_head = ((head - heads) % kv_heads).to(tl.int64)
        place = kept + (kv_head * capacity + position)[:, None] * dim + half[None, :]
        tl.store(place, first.to(keys.dtype.element_ty), mask=inside)
        tl.store(place + dim // 2, second.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def multiply_by_silu(gate_up, gated, inner, block_rows: tl.constexpr, block: tl.constexpr):
    """gated [rows, inner] = silu of the first half of each row of gate_up [rows, 2 * inner] times the second half.

    One program for `block_rows` rows and `block` numbers of each.
    """
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)[:, None]
    at = (tl.program_id(1) * block + tl.arange(0, block))[None, :]
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0).to(tl.float32)
    tl.store(gated + row * inner + at, (gate * tl.sigmoid(gate) * up).to(gated.dtype.element_ty), mask=inside)
