"""Computes the Gumbel noise of sampling from (seed, position, token), in integers, so that it has the same bits everywhere.

A token is sampled as the argmax over tokens of log p + g (the Gumbel-max trick). If the drafter and the target add the same
noise g, they agree as often as their distributions are close, and the token depends on the target's logits, the seed and the
position alone (Daliri, Musco, Suresh, arXiv 2408.07978). This module computes one number at a time, and is the reference for
the workers, which compute the same numbers with tensors. SPEC.md section 7.1 describes it, vectors/gumbel.json has examples.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal, localcontext

_MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment
#: Logarithms to base 2 are fixed-point numbers with this many bits after the point.
POINT_BITS = 40
TABLE_BITS = 12
FRACTION_BITS = TABLE_BITS + 32
#: The doubles nearest to ln 2 and to ln ln 2.
LN_2 = 0.6931471805599453
LN_LN_2 = -0.36651292058166435


def mix(number: int) -> int:
    """Returns the output function of SplitMix64 (Steele, Lea, Flood, 2014; Stafford's mix 13) for a 64-bit number."""
    number ^= number >> 30
    number = number * 0xBF58476D1CE4E5B9 & _MASK
    number ^= number >> 27
    number = number * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


def stream_key(seed: int, position: int) -> int:
    """Returns the state of the SplitMix64 stream that belongs to this seed and position."""
    return mix((mix(seed) + position * GAMMA) & _MASK)


def random_bits(key: int, token: int) -> int:
    """Returns 64 uniform bits: output number `token` + 1 of the stream with the state `key`."""
    return mix((key + (token + 1) * GAMMA) & _MASK)


@functools.cache
def half_log_table() -> tuple[int, ...]:
    """Returns the table round(2^40 (1 - log2(1 + j / 4096))) for j from 0 to 4096. It falls from 2^40 to 0."""
    with localcontext(Context(prec=40)):
        ln_2 = Decimal(2).ln()
        cells = 1 << TABLE_BITS
        scale = Decimal(1 << POINT_BITS)
        return tuple(
            int((scale * (1 - (1 + Decimal(j) / cells).ln() / ln_2)).to_integral_value()) for j in range(cells + 1)
        )


def _half_log(fraction: int) -> int:
    """Returns 2^40 (1 - log2(1 + f)) for f = fraction / 2^44 in [0, 1), by linear interpolation in the table."""
    table = half_log_table()
    cell, within = fraction >> 32, fraction & 0xFFFFFFFF
    return table[cell] - ((table[cell] - table[cell + 1]) * within >> 32)


def log2_exponential(bits: int) -> int:
    """Returns 2^40 log2(-log2 u) for u = bits / 2^64 in (0, 1): the logarithm of an exponential variate, in fixed point."""
    bits = max(bits, 1)
    zeros = 64 - bits.bit_length()
    fraction = (bits << zeros & _MASK) >> (63 - FRACTION_BITS) & ((1 << FRACTION_BITS) - 1)
    exponential = max(1, (zeros << POINT_BITS) + _half_log(fraction))  # 2^40 (-log2 u)
    exponent = exponential.bit_length() - 1
    fraction = (exponential - (1 << exponent) << 46 - exponent) >> 46 - FRACTION_BITS
    return (exponent - POINT_BITS << POINT_BITS) + (1 << POINT_BITS) - _half_log(fraction)


def gumbel(seed: int, position: int, token: int) -> float:
    """Returns a standard Gumbel variate, -ln(-ln u). The product and the sum are each rounded once, as IEEE doubles."""
    logarithm = log2_exponential(random_bits(stream_key(seed, position), token))
    return -(logarithm * 2.0**-POINT_BITS * LN_2) - LN_LN_2
