"""Matrix products, in Numba: y = x W^T, with the weights in tiles (vectors.py, linear.py)."""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

from dsi_workers.decoding.cpu import LANES, OUTPUTS, kernel_cache
from dsi_workers.decoding.cpu.bfloat16 import bits_of_float
from dsi_workers.decoding.cpu.vectors import HAS_WIDE_VECTORS, products

_products_of_1, _products_of_2, _products_of_4, _products_of_8 = (products(rows) for rows in (1, 2, 4, 8))
_parts_of_4 = products(4, in_parts=True)
#: The fewest rows for which that pays.
_LEAST_IN_PARTS = 16
#: Rows that are multiplied by all weights before the next rows are: so many that they stay in a core's own cache.
_MOST_BYTES = 1 << 19

_kernel = numba.njit(error_model="numpy", cache=kernel_cache())


def _eights(x, row, end, tiles, block, out, column):
    """Rows from `row` on, eight at a time. Returns the next row. In float32 four rows fill the registers."""


@overload(_eights)
def _eights_of(x, row, end, tiles, block, out, column):
    if x.dtype != types.uint16:
        return lambda x, row, end, tiles, block, out, column: row

    def eights(x, row, end, tiles, block, out, column):
        while row + 8 <= end:
            _products_of_8(x, row, tiles, block, out, column)
            row += 8
        return row

    return eights


def _as_multiplied(x, tiles, block):
    """The tiles and the number of a block as x is multiplied with them: whole numbers become bfloat16 for an x in bfloat16. Of 8
    bits each has an exact one."""


@overload(_as_multiplied)
def _as_multiplied_by(x, tiles, block):
    if not (x.dtype == types.uint16 and tiles.dtype == types.int8):
        return lambda x, tiles, block: (tiles, block)

    def converted(x, tiles, block):
        found = np.empty((1, *tiles.shape[1:]), np.uint16)
        numbers, narrowed = tiles[block].reshape(-1), found.reshape(-1)
        for i in range(len(numbers)):
            narrowed[i] = bits_of_float(np.float32(numbers[i])) >> np.uint32(16)
        return found, 0

    return converted


@_kernel
def _multiply_block(x, begin, end, tiles, block, out, column):
    """The rows [begin, end) of a block's outputs, the first of which is `column`."""
    tiles, block = _as_multiplied(x, tiles, block)
    row = _eights(x, begin, end, tiles, block, out, column)
    while not HAS_WIDE_VECTORS and end - begin >= _LEAST_IN_PARTS and row + 4 <= end:
        _parts_of_4(x, row, tiles, block, out, column)
        row += 4
    while row + 4 <= end:
        _products_of_4(x, row, tiles, block, out, column)
        row += 4
    if row + 2 <= end:
        _products_of_2(x, row, tiles, block, out, column)
        row += 2
    if row < end:
        _products_of_1(x, row, tiles, block, out, column)


@_kernel
def multiply(x, tiles, scale, bias, out):
    """out = (x W^T) * scale + bias.

    x: [rows, size] in float32, or in bfloat16 where the processor multiplies these (`multiplies_bfloat16`). tiles: W, [blocks,
    size / LANES, OUTPUTS, LANES]. scale, bias: [outputs] in float32, or empty. out: [rows, outputs] in float32.
    """
    rows, outputs = out.shape
    whole, together = outputs // OUTPUTS, max(8, _MOST_BYTES // (x.shape[1] * x.itemsize) // 8 * 8)
    for begin in range(0, rows, together):
        for block in range(whole):
            _multiply_block(x, begin, min(rows, begin + together), tiles, block, out, block * OUTPUTS)
    if whole < len(tiles):  # the last block has fewer outputs
        last = np.empty((rows, OUTPUTS), np.float32)
        _multiply_block(x, 0, rows, tiles, whole, last, 0)
        for row in range(rows):
            for output in range(whole * OUTPUTS, outputs):
                out[row, output] = last[row, output - whole * OUTPUTS]
    if len(scale):
        for row in range(rows):
            for output in range(outputs):
                out[row, output] *= scale[output]
    if len(bias):
        for row in range(rows):
            for output in range(outputs):
                out[row, output] += bias[output]


def check_products() -> None:
    """Compute a small product. Raises the error of Numba if it cannot be compiled, and ArithmeticError if it is wrong."""
    x = np.arange(5 * LANES, dtype=np.float32).reshape(5, LANES)
    tiles = np.arange(LANES * OUTPUTS, dtype=np.float32).reshape(1, 1, OUTPUTS, LANES)
    found, none = np.empty((5, OUTPUTS), np.float32), np.empty(0, np.float32)
    multiply(x, tiles, none, none, found)
    if not np.allclose(found, x @ tiles[0, 0].T, rtol=1e-5):
        raise ArithmeticError("a product of whole numbers came out wrong")
