"""Triton kernels that choose a draft from logits and make it the input of the next forward pass.

The noise is that of dsi_protocol.gumbel from the same random bits, in float32 in place of integers: a draft is a guess, and is
seldom another one for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsi_protocol.gumbel import GAMMA
from dsi_workers.decoding.gpu.kernels import SPLIT

#: Tokens of the vocabulary that one program of `choose_in_blocks` looks at.
BLOCK_TOKENS = 1024
_GAMMA = tl.constexpr(GAMMA)
_LARGEST = tl.constexpr(3.0e38)


@triton.jit
def _mix(number):
    """SplitMix64's output function, for uint64."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB
    return number ^ (number >> 31)


@triton.jit
def _gumbel_noise(key, token):
    """-ln(-ln u) for u = bits / 2^64. Where u is near 1, -ln u comes from 1 - u: u itself has no digits left there."""
    bits = _mix(key + (token + 1).to(tl.uint64) * _GAMMA)
    u = tl.maximum(bits.to(tl.float32) * 5.421010862427522e-20, 5.421010862427522e-20)
    v = tl.maximum((bits ^ 0xFFFFFFFFFFFFFFFF).to(tl.float32) * 5.421010862427522e-20, 5.421010862427522e-20)
    series = v * (1 + v * (0.5 + v * (1 / 3 + v * (0.25 + v * 0.2))))
    exponential = tl.where(v < 0.0625, series, -tl.log(u))
    return -tl.log(tl.maximum(exponential, 5.421010862427522e-20))


@triton.jit
def choose_in_blocks(
    logits, positions, keys_of_rows, temperatures, thresholds, words, best, best_tokens, vocabulary, blocks,
    sampled: tl.constexpr, filtered: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Find the best token of each block of the vocabulary. One program for each row (axis 0) and block (axis 1).

    logits: [rows, vocabulary]. words [1]: only tokens below it may be chosen. Results: best and best_tokens, [rows, blocks].
    `sampled`: divide by temperatures [rows], and add noise; keys_of_rows [rows] is `mix` of each row's seed
    (dsi_protocol.gumbel).
    `filtered`: only tokens whose logit is at least thresholds [rows].
    """
    row, part = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    if position >= 0:
        token = part * block + tl.arange(0, block)
        inside = token < tl.load(words)
        score = tl.load(logits + row.to(tl.int64) * vocabulary + token, mask=inside, other=float("-inf")).to(tl.float32)
        score = tl.minimum(tl.where(score == score, score, float("-inf")), _LARGEST)
        if sampled:
            if filtered:
                score = tl.where(score >= tl.load(thresholds + row), score, float("-inf"))
            score = tl.minimum(score / tl.load(temperatures + row), _LARGEST)
            key = _mix(tl.load(keys_of_rows + row).to(tl.uint64) + (position + 1).to(tl.uint64) * _GAMMA)
            score += _gumbel_noise(key, token)
        value, place = tl.max(score, axis=0, return_indices=True)
        tl.store(best + row * blocks + part, value)
        tl.store(best_tokens + row * blocks + part, part * block + place)


@triton.jit
def take_choices(
    best, best_tokens, tokens, steps, ids, positions, units, ends, rows, blocks, block_rows: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Write the best token of each row to tokens [steps, rows], and make it the row's next input. One program.

    ids, positions, units and ends are inputs of the recorded forward pass (kernels.py). Each row attends by itself. steps [1]
    counts how often this has run.
    """
    row = tl.arange(0, block_rows)
    position = tl.load(positions + row, mask=row < rows, other=-1)
    live = position >= 0
    part = tl.arange(0, block)
    values = tl.load(
        best + row[:, None] * blocks + part[None, :], mask=live[:, None] & (part < blocks)[None, :], other=float("-inf")
    )
    _, place = tl.max(values, axis=1, return_indices=True)
    token = tl.load(best_tokens + row * blocks + place, mask=live, other=0)
    step = tl.load(steps)
    tl.store(tokens + step * rows + row, token, mask=live)
    tl.store(steps, step + 1)
    tl.store(ids + row, token, mask=live)
    tl.store(positions + row, position + 1, mask=live)
    splits = tl.where(live, (position + 1 + SPLIT) // SPLIT, 0)
    tl.store(ends + row, tl.cumsum(splits, axis=0), mask=row < rows)
    tl.store(units, tl.sum(splits, axis=0))
