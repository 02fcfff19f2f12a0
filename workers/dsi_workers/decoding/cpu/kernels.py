"""The kernels of the decoder for CPUs, in Numba. Three of them compute a layer, and one the logits.

Each row is computed by itself, so the bits of a row do not depend on the other rows. Arithmetic is in float32. Numbers in
bfloat16 come as uint16 (bfloat16.py).

Numba compiles a kernel at its first call and keeps the result on disk. In the loops here a sum may be computed in another order
than the one that is written (`reassoc`): else it could not be computed in vectors. The order is chosen when the kernel is
compiled, so it is the same in all calls.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np

from dsi_workers.decoding.cpu import LANES, POSITIONS_TOGETHER, ROWS_TOGETHER, kernel_cache
from dsi_workers.decoding.cpu.bfloat16 import float_of_bits, narrow, wide
from dsi_workers.decoding.cpu.products import multiply
from dsi_workers.decoding.cpu.vectors import HAS_WIDE_VECTORS, scores, weighted_sums

_FAST = {"reassoc", "contract", "arcp", "nsz"}
#: What is called from Python: other threads run meanwhile, as that of heartbeats.
_kernel = numba.njit(fastmath=_FAST, error_model="numpy", nogil=True, cache=kernel_cache())
#: What becomes a part of a kernel.
_part = numba.njit(fastmath=_FAST, inline="always")
_scores_of_1, _scores_of_2, _scores_of_4 = (scores(rows) for rows in (1, 2, 4))
_sums_of_1, _sums_of_2, _sums_of_4 = (weighted_sums(rows, 2) for rows in (1, 2, 4))
_last_of_1 = weighted_sums(1, 1)
_LOG2_E = np.float32(math.log2(math.e))
#: 2^f for f in [-1/2, 1/2]: the Taylor series of exp(f ln 2). The next term would be below 2e-7 of the sum.
_POWER = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(7))
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = _POWER
#: exp(x) is computed for x in this range, so that its exponent fits into a float32.
_LEAST_EXPONENT, _MOST_EXPONENT = np.float32(-87), np.float32(88)
_LOWEST = np.float32(np.finfo(np.float32).min)


@_part
def _exp(x):
    """exp(x), with a relative error below 1e-6 for x in [-4, 4], and below 1e-5 elsewhere. The library's function could not be
    computed in vectors."""
    power = min(max(x, _LEAST_EXPONENT), _MOST_EXPONENT) * _LOG2_E
    whole = np.floor(power + np.float32(0.5))
    f = power - whole
    y = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return y * float_of_bits(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@_part
def _add_rms_norm(x, y, weight, epsilon, out):
    """x += y, and out = RMSNorm(x) * weight. x, y: [rows, hidden] in float32. weight: [hidden]. out: as x."""
    rows, size = x.shape
    for row in range(rows):
        squares = np.float32(0)
        for i in range(size):
            total = x[row, i] + y[row, i]
            x[row, i] = total
            squares += total * total
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(size) + epsilon))
        for i in range(size):
            out[row, i] = narrow(x[row, i] * factor * wide(weight[i]), out)


@_part
def _silu_times(gate_up, out):
    """out = silu(gate) * up. gate_up: [rows, 2 * size], the gates before the others. out: [rows, size]."""
    rows, size = out.shape
    for row in range(rows):
        for i in range(size):
            gate = gate_up[row, i]
            out[row, i] = narrow(gate / (np.float32(1) + _exp(-gate)) * gate_up[row, size + i], out)


@_kernel
def before_attention(x, added, norm, epsilon, normed, qkv_linear, qkv):
    """The input of attention: x += added, and qkv = the queries, keys and values of the normed x.

    x, added: [rows, hidden], qkv: [rows, (heads + 2 kv_heads) dim], in float32. norm: [hidden]. A linear layer is a tuple of its
    tiles, scales and biases (products.py), and its input, as normed: [rows, hidden], has the number type that it multiplies.
    """
    _add_rms_norm(x, added, norm, epsilon, normed)
    multiply(normed, qkv_linear[0], qkv_linear[1], qkv_linear[2], qkv)


@_kernel
def after_attention(x, read, output, norm, epsilon, normed, gate_up_linear, gate_up, activated, down, added):
    """The rest of a layer: x += what attention read, and added = what the MLP adds to x.

    x, added: [rows, hidden] and gate_up: [rows, 2 inner], in float32. Inputs of linear layers: read: [rows, heads dim], normed:
    [rows, hidden], activated: [rows, inner].
    """
    multiply(read, output[0], output[1], output[2], added)
    _add_rms_norm(x, added, norm, epsilon, normed)
    multiply(normed, gate_up_linear[0], gate_up_linear[1], gate_up_linear[2], gate_up)
    _silu_times(gate_up, activated)
    multiply(activated, down[0], down[1], down[2], added)


@_kernel
def logits_of(x, added, norm, epsilon, normed, rows, kept, head, logits):
    """The logits of some rows: x += added, and logits = the head's output for the normed rows.

    x, added: [any, hidden] and logits: [len(rows), vocabulary], in float32. normed: [any, hidden] and kept: [len(rows), hidden]
    are inputs of linear layers. rows: their numbers; -1 is the last row.
    """
    _add_rms_norm(x, added, norm, epsilon, normed)
    for number in range(len(rows)):
        for i in range(normed.shape[1]):
            kept[number, i] = normed[rows[number], i]
    multiply(kept, head[0], head[1], head[2], logits)


@_part
def _normed(x, begin, dim, weight, epsilon):
    """RMSNorm of x[begin : begin + dim], in place."""
    squares = np.float32(0)
    for i in range(dim):
        squares += x[begin + i] * x[begin + i]
    factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(dim) + epsilon))
    for i in range(dim):
        x[begin + i] *= factor * wide(weight[i])


@_part
def _rotate(x, begin, dim, cos, sin):
    """RoPE of x[begin : begin + dim], in place. The first half of `sin` is negated."""
    half = dim // 2
    for i in range(half):
        a, b = x[begin + i], x[begin + half + i]
        x[begin + i] = a * cos[i] + b * sin[i]
        x[begin + half + i] = b * cos[half + i] + a * sin[half + i]


@_part
def _weigh(scores, row, begin, first, last, end):
    """Turn a query's scores of the positions [first, last) into weights, not yet divided by their sum. Returns the sum. The
    other positions in [begin, end) get weight 0."""
    highest = _LOWEST
    for position in range(first, last):
        highest = max(highest, scores[row, position])
    total = np.float32(0)
    for position in range(first, last):
        weight = _exp(scores[row, position] - highest)
        scores[row, position] = weight
        total += weight
    for position in range(begin, first):
        scores[row, position] = np.float32(0)
    for position in range(last, end):
        scores[row, position] = np.float32(0)
    return total


@numba.njit(error_model="numpy", cache=kernel_cache())
def _score(queries, count, keys, begin, end, out):
    """out[query, position] = the product of both, for the first `count` queries and at least the positions [begin, end)."""
    for position in range(begin, end, POSITIONS_TOGETHER):
        query = 0
        while HAS_WIDE_VECTORS and query + 4 <= count:  # as many as there are registers for
            _scores_of_4(queries, query, keys, position, out)
            query += 4
        while HAS_WIDE_VECTORS and query + 2 <= count:
            _scores_of_2(queries, query, keys, position, out)
            query += 2
        while query < count:
            _scores_of_1(queries, query, keys, position, out)
            query += 1


@numba.njit(error_model="numpy", cache=kernel_cache())
def _read(weights, count, values, begin, end, out):
    """out[query] = the sum of the values of the positions [begin, end) by its weights, for the first `count` queries."""
    last = out.shape[1] // (2 * LANES) * 2 * LANES
    if last < out.shape[1]:  # half of a part
        for query in range(count):
            _last_of_1(weights, query, values, begin, end, last, out)
    for first in range(0, last, 2 * LANES):
        query = 0
        while HAS_WIDE_VECTORS and query + 4 <= count:
            _sums_of_4(weights, query, values, begin, end, first, out)
            query += 4
        while query + 2 <= count:
            _sums_of_2(weights, query, values, begin, end, first, out)
            query += 2
        if query < count:
            _sums_of_1(weights, query, values, begin, end, first, out)


@_part
def _first_read(position, window, chunk):
    """The first position that a row at `position` reads."""
    first = max(0, position - window + 1) if window else 0
    return max(first, position // chunk * chunk) if chunk else first


@functools.cache
def attention_of(heads: int, kv_heads: int, dim: int, normed: bool):
    """Return the kernel `attend` for heads of this number and size. They are constants in it.

    `normed`: queries and keys are normed before RoPE.
    """
    group, values_begin, together = heads // kv_heads, (heads + kv_heads) * dim, ROWS_TOGETHER

    @_kernel
    def attend(
        qkv,
        query_norm,
        key_norm,
        epsilon,
        cos,
        sin,
        keys,
        values,
        first,
        window,
        chunk,
        scale,
        queries,
        scores,
        sums,
        out,
    ):
        """Attention of a run of positions in one layer. Its keys and values are stored in the cache.

        qkv: [width, (heads + 2 kv_heads) dim] in float32, the queries, keys and values of the positions from `first` on; they are
        overwritten. query_norm, key_norm: [dim]. cos, sin: [positions, dim] in float32. keys, values: the slot, [kv_heads,
        capacity, dim]; the capacity is a multiple of POSITIONS_TOGETHER. window: how many positions each row reads, 0 for all.
        chunk: each row reads only those of its own chunk of so many positions, 0 for all. queries, sums: [ROWS_TOGETHER heads /
        kv_heads, dim] and scores: [the same, capacity], in float32, are room. out: [width, heads dim].
        """
        width = len(qkv)
        for row in range(width):
            position = first + row
            at = min(position, len(cos) - 1)  # padding may lie behind the last position
            for head in range(heads + kv_heads):
                if normed:
                    _normed(qkv[row], head * dim, dim, query_norm if head < heads else key_norm, epsilon)
                _rotate(qkv[row], head * dim, dim, cos[at], sin[at])
            for head in range(kv_heads):
                for i in range(dim):
                    keys[head, position, i] = narrow(qkv[row, (heads + head) * dim + i], keys)
                    values[head, position, i] = narrow(qkv[row, values_begin + head * dim + i], values)
        totals = np.empty(together * group, np.float32)
        for begin_row in range(0, width, together):
            rows = min(together, width - begin_row)
            begin, end = _first_read(first + begin_row, window, chunk), first + begin_row + rows
            for shared in range(kv_heads):
                for row in range(rows):
                    for head in range(group):
                        at = (shared * group + head) * dim
                        for i in range(dim):
                            queries[row * group + head, i] = qkv[begin_row + row, at + i] * scale
                _score(queries, rows * group, keys[shared], begin - begin % POSITIONS_TOGETHER, end, scores)
                for row in range(rows):
                    position = first + begin_row + row
                    for query in range(row * group, (row + 1) * group):
                        own = _first_read(position, window, chunk)
                        totals[query] = _weigh(scores, query, begin, own, position + 1, end)
                _read(scores, rows * group, values[shared], begin, end, sums)
                for row in range(rows):
                    for head in range(group):
                        at, query = (shared * group + head) * dim, row * group + head
                        for i in range(dim):
                            out[begin_row + row, at + i] = narrow(sums[query, i] / totals[query], out)

    return attend
