"""Matrix products, in Numba: y = x W^T, with the weights in tiles (vectors.py, linear.py)."""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

from dsi_workers.decoding.cpu import GROUP, LANES, OUTPUTS, SUMMED, kernel_cache
from dsi_workers.decoding.cpu.bfloat16 import bits_of_float, narrow, wide
from dsi_workers.decoding.cpu.vectors import HAS_WIDE_VECTORS, products
from dsi_workers.decoding.cpu.whole_vectors import whole_products

_of_1, _of_2, _of_4, _of_8 = (products(rows) for rows in (1, 2, 4, 8))
_parts_of_3, _parts_of_4, _parts_of_6 = (products(rows, in_parts=True) for rows in (3, 4, 6))
_whole_of_1, _whole_of_2, _whole_of_4 = (whole_products(rows) for rows in (1, 2, 4))
#: The fewest rows for which parts pay: with weights in bfloat16, and in float32, which come from memory half as fast.
_LEAST_IN_PARTS, _LEAST_IN_PARTS_OF_FLOAT32 = 3, 12
#: Weights that are multiplied by all rows before the next weights are: so many that they stay in a core's own cache.
_TOGETHER_BYTES = 1 << 18
#: The largest number of 8 bits.
_LARGEST = np.float32(127)

_kernel = numba.njit(error_model="numpy", cache=kernel_cache())
#: What becomes a part of a kernel.
_part = numba.njit(inline="always")


@_kernel
def multiply(x, tiles, scale, bias, out):
    """out = x W^T + bias.

    x: [rows, size] in float32, or in bfloat16 where the processor multiplies these (`multiplies_bfloat16`). tiles, scale: W, as
    linear.py lays it out. bias: [outputs] in float32, or empty. out: [rows, outputs] in float32.
    """
    _multiply_tiles(x, tiles, scale, out)
    _scale_outputs(scale, out)
    if len(bias):
        rows, outputs = out.shape
        for row in range(rows):
            for output in range(outputs):
                out[row, output] += bias[output]


def _scale_outputs(scale, out):
    """Multiply by one scale for each output, if there are such."""


@overload(_scale_outputs)
def _scale_outputs_of(scale, out):
    if scale.ndim > 1:  # there is one for each group of inputs
        return lambda scale, out: None

    def scaled(scale, out):
        rows, outputs = out.shape
        if len(scale):
            for row in range(rows):
                for output in range(outputs):
                    out[row, output] *= scale[output]

    return scaled


def _multiply_tiles(x, tiles, scale, out):
    """out = x W^T, but for scales of outputs."""


@overload(_multiply_tiles)
def _multiply_tiles_of(x, tiles, scale, out):
    if tiles.dtype in (types.int8, types.uint8) and x.dtype == types.float32:
        return _multiply_rounded

    def by_numbers(x, tiles, scale, out):
        rows, outputs = out.shape
        whole, together = outputs // OUTPUTS, _blocks_together(tiles)
        for begin in range(0, whole, together):
            found, first = _in_bfloat16(tiles, scale, begin)
            _multiply_blocks(x, found, first, min(together, whole - begin), out, begin * OUTPUTS)
        if whole < len(tiles):  # the last block has fewer outputs
            last = np.empty((rows, OUTPUTS), np.float32)
            found, first = _in_bfloat16(tiles, scale, whole)
            _multiply_blocks(x, found, first, 1, last, 0)
            out[:, whole * OUTPUTS :] = last[:, : outputs - whole * OUTPUTS]

    return by_numbers


def _multiply_rounded(x, tiles, scale, out):
    """The same with weights of 8 or 4 bits: the inputs are rounded to 8 bits."""
    rows, outputs = out.shape
    whole = outputs // OUTPUTS
    numbers, factors, sums = _rounded(x)
    for block in range(whole):
        _multiply_whole_block(numbers, factors, sums, tiles, scale, block, out, block * OUTPUTS)
    if whole < len(tiles):
        last = np.empty((rows, OUTPUTS), np.float32)
        _multiply_whole_block(numbers, factors, sums, tiles, scale, whole, last, 0)
        out[:, whole * OUTPUTS :] = last[:, : outputs - whole * OUTPUTS]


@_part
def _multiply_whole_block(numbers, factors, sums, tiles, scale, block, out, column):
    """The outputs of a block, the first of which is `column`."""
    row, rows = 0, len(numbers)
    while row + 4 <= rows:
        _whole_of_4(numbers, factors, sums, row, tiles, scale, block, out, column)
        row += 4
    if row + 2 <= rows:
        _whole_of_2(numbers, factors, sums, row, tiles, scale, block, out, column)
        row += 2
    if row < rows:
        _whole_of_1(numbers, factors, sums, row, tiles, scale, block, out, column)


@numba.njit(error_model="numpy", fastmath={"nnan", "ninf", "nsz", "reassoc"}, cache=kernel_cache())
def _rounded(x):
    """x in int8, the factor of each group, and its sums, as whole_vectors.py takes them."""
    rows, groups = len(x), x.shape[1] // GROUP
    numbers, factors = np.empty(x.shape, np.int8), np.empty((rows, groups), np.float32)
    sums = np.empty((rows, groups, SUMMED), np.float32)
    for row in range(rows):
        for group in range(groups):
            begin, largest = group * GROUP, np.float32(0)
            for i in range(GROUP):
                largest = max(largest, abs(x[row, begin + i]))
            factor = largest / _LARGEST
            inverse = _LARGEST / largest if largest > 0 else np.float32(0)
            for i in range(GROUP):
                numbers[row, begin + i] = np.int8(np.rint(x[row, begin + i] * inverse))
            for lane in range(SUMMED):
                total = np.int32(0)
                for half in range(begin + lane * SUMMED, begin + GROUP, LANES):
                    for i in range(half, half + SUMMED):
                        total += np.int32(numbers[row, i])
                sums[row, group, lane] = np.float32(total) * factor
            factors[row, group] = factor
    return numbers, factors, sums


def _blocks_together(tiles):
    """Blocks that are multiplied by all rows before the next ones are. Whole numbers are converted block by block."""


@overload(_blocks_together)
def _blocks_together_of(tiles):
    if tiles.dtype in (types.int8, types.uint8):
        return lambda tiles: 1
    return lambda tiles: max(1, _TOGETHER_BYTES // (tiles[0].size * tiles.itemsize))


def _in_bfloat16(tiles, scale, block):
    """The tiles and the number of a block as an x in bfloat16 is multiplied with them: whole numbers become bfloat16."""


@overload(_in_bfloat16)
def _in_bfloat16_of(tiles, scale, block):
    if tiles.dtype == types.int8:  # each has an exact one

        def of_8_bits(tiles, scale, block):
            found = np.empty((1, *tiles.shape[1:]), np.uint16)
            numbers, narrowed = tiles[block].reshape(-1), found.reshape(-1)
            for i in range(len(numbers)):
                narrowed[i] = bits_of_float(np.float32(numbers[i])) >> np.uint32(16)
            return found, 0

        return of_8_bits
    if tiles.dtype == types.uint8:

        def of_4_bits(tiles, scale, block):
            groups = tiles.shape[1]
            found = np.empty((1, 2 * groups, OUTPUTS, LANES), np.uint16)
            for group in range(groups):
                for output in range(OUTPUTS):
                    factor, low = wide(scale[block, group, 0, output]), wide(scale[block, group, 1, output])
                    for lane in range(LANES):
                        both = tiles[block, group, output, lane]
                        found[0, 2 * group, output, lane] = narrow(np.float32(both & 15) * factor + low, found)
                        found[0, 2 * group + 1, output, lane] = narrow(np.float32(both >> 4) * factor + low, found)
            return found, 0

        return of_4_bits
    return lambda tiles, scale, block: (tiles, block)


def _by_blocks(rows):
    """Return the function that multiplies the rows [row, row + n) by `count` blocks, the first of which has the outputs from
    `column` on. `rows`: the innermost loop, for n rows."""

    @_part
    def multiply_by_blocks(x, row, tiles, first, count, out, column):
        for number in range(count):
            rows(x, row, tiles, first + number, out, column + number * OUTPUTS)

    return multiply_by_blocks


_rows_of_1, _rows_of_2, _rows_of_4, _rows_of_8 = (_by_blocks(rows) for rows in (_of_1, _of_2, _of_4, _of_8))
_narrow_of_3, _narrow_of_4, _narrow_of_6 = (_by_blocks(rows) for rows in (_parts_of_3, _parts_of_4, _parts_of_6))


@_kernel
def _multiply_blocks(x, tiles, first, count, out, column):
    """All rows by `count` blocks: as many rows at once as there are registers for."""
    row, rows = _many(x, tiles, first, count, out, column), len(x)
    if row + 2 <= rows:
        _rows_of_2(x, row, tiles, first, count, out, column)
        row += 2
    if row < rows:
        _rows_of_1(x, row, tiles, first, count, out, column)


def _many(x, tiles, first, count, out, column):
    """Rows from the first one on, several at a time. Returns the next row, after which at most three are left."""


@overload(_many)
def _many_of(x, tiles, first, count, out, column):
    if not HAS_WIDE_VECTORS and x.dtype == types.float32:
        least = _LEAST_IN_PARTS_OF_FLOAT32 if tiles.dtype == types.float32 else _LEAST_IN_PARTS

        def narrow_vectors(x, tiles, first, count, out, column):
            row, rows = 0, len(x)
            if rows < least:
                while row + 4 <= rows:
                    _rows_of_2(x, row, tiles, first, count, out, column)
                    row += 2
                return row
            while row + 6 <= rows:
                _narrow_of_6(x, row, tiles, first, count, out, column)
                row += 6
            if row + 4 <= rows:
                _narrow_of_4(x, row, tiles, first, count, out, column)
                row += 4
            if row + 3 <= rows:
                _narrow_of_3(x, row, tiles, first, count, out, column)
                row += 3
            return row

        return narrow_vectors
    most = 8 if x.dtype == types.uint16 else 4  # in float32 four fill the registers

    def wide_vectors(x, tiles, first, count, out, column):
        row, rows = 0, len(x)
        while most == 8 and row + 8 <= rows:
            _rows_of_8(x, row, tiles, first, count, out, column)
            row += 8
        while row + 4 <= rows:
            _rows_of_4(x, row, tiles, first, count, out, column)
            row += 4
        return row

    return wide_vectors


def check_products(bits: int | None = None) -> None:
    """Compute a small product with weights of so many bits. Raises the error of Numba if it cannot be compiled, and
    ArithmeticError if it is wrong."""
    x = np.tile(np.arange(3, 128, 4, dtype=np.float32), (5, 1))  # what is rounded to itself: one group
    weights, none = np.arange(OUTPUTS * GROUP).reshape(OUTPUTS, GROUP) % 16, np.empty(0, np.float32)
    tiles, scale = weights.reshape(1, OUTPUTS, 2, LANES).swapaxes(1, 2), none
    if bits == 4:  # times 1, plus 0
        tiles, scale = tiles[:, :1] + 16 * tiles[:, 1:], np.array([[[[0x3F80] * OUTPUTS, [0] * OUTPUTS]]], np.uint16)
    kind = {None: np.float32, 8: np.int8, 4: np.uint8}[bits]
    found = np.empty((5, OUTPUTS), np.float32)
    multiply(x, np.ascontiguousarray(tiles.astype(kind)), scale, none, found)
    if not np.allclose(found, x @ weights.T, rtol=1e-5):
        raise ArithmeticError("a product of whole numbers came out wrong")
