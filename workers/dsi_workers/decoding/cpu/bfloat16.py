"""Numbers in bfloat16, in Numba: their bits as uint16, since numpy has no such type."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


@intrinsic
def float_of_bits(context, bits):
    """The float32 with these 32 bits."""
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of_float(context, number):
    """The 32 bits of a float32."""
    return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


def wide(number):
    """A float32, from a float32 or the bits of a bfloat16."""


@overload(wide)
def _wide_of(number):
    if number == types.uint16:
        return lambda number: float_of_bits(np.uint32(number) << np.uint32(16))
    return lambda number: number


def narrow(number, kind):
    """The number in the type of the array `kind`: as it is, or the bits of the nearest bfloat16, of two equally near the even."""


@overload(narrow)
def _narrow_to(number, kind):
    if kind.dtype == types.uint16:

        def rounded(number, kind):
            bits = bits_of_float(number)
            near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            return np.uint16(near) if number == number else np.uint16(0x7FC0)  # not a number

        return rounded
    return lambda number, kind: number
