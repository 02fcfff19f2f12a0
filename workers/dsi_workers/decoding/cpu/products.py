"""Matrix products, in Numba: y = x W^T, with the weights in tiles (vectors.py, linear.py)."""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

from dsi_workers.decoding.cpu import GROUP, INPUTS_PER_SUM, OUTPUTS, SUMMED, VECTORS, kernel_cache
from dsi_workers.decoding.cpu.vectors import HAS_WIDE_VECTORS, products
from dsi_workers.decoding.cpu.whole_vectors import whole_products

#: The most rows that are multiplied at once by a tile, and by half of a tile: registers hold that many sums. With whole numbers
#: each output needs two registers: one for a sum of whole numbers, and one for a sum in float32.
_ROWS, _ROWS_OF_HALF = (8, 0) if HAS_WIDE_VECTORS else (2, 6)
_WHOLE_ROWS, _WHOLE_ROWS_OF_HALF = (4, 0) if HAS_WIDE_VECTORS else (2, 4)
#: Weights that are multiplied by all rows before the next weights are: so many that they stay in a core's own cache.
_CACHED_BYTES = 1 << 18
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


@_part
def _multiply_tiles(x, tiles, scale, out):
    """out = x W^T, but for scales of outputs."""
    rows, outputs = out.shape
    given, whole = _as_multiplied(x, tiles), outputs // OUTPUTS
    cached = max(1, _CACHED_BYTES // (tiles[0].size * tiles.itemsize))
    out[:] = 0
    for begin in range(0, whole, cached):
        _add_products(given, tiles, scale, begin, min(cached, whole - begin), out, begin * OUTPUTS)
    if whole < len(tiles):  # the last tile has fewer outputs
        last = np.zeros((rows, OUTPUTS), np.float32)
        _add_products(given, tiles, scale, whole, 1, last, 0)
        out[:, whole * OUTPUTS :] = last[:, : outputs - whole * OUTPUTS]


def _as_multiplied(x, tiles):
    """The arrays that are multiplied with such weights: x itself, or what `_rounded` makes of it."""


@overload(_as_multiplied)
def _as_multiplied_by(x, tiles):
    return (lambda x, tiles: _rounded(x)) if _are_whole(tiles) else (lambda x, tiles: (x,))


def _are_whole(tiles):
    return tiles.dtype in (types.int8, types.uint8)


@_kernel
def _add_products(given, tiles, scale, first, count, out, column):
    """out[:, column : column + count OUTPUTS] += the products of all rows with `count` tiles."""
    row, rows, most = 0, len(given[0]), _most_rows(tiles)
    while row < rows:
        parts = -(-(rows - row) // most)  # as equal as can be
        together = -(-(rows - row) // parts)
        _add_of_rows(together, given, row, tiles, scale, first, count, out, column)
        row += together


def _most_rows(tiles):
    """How many rows can be multiplied at once with such weights."""


@overload(_most_rows)
def _most_rows_by(tiles):
    most = max(_WHOLE_ROWS, _WHOLE_ROWS_OF_HALF) if _are_whole(tiles) else max(_ROWS, _ROWS_OF_HALF)
    return lambda tiles: most


def _add_of_rows(together, given, row, tiles, scale, first, count, out, column):
    """out[row : row + together, column : ...] += the products of these rows."""


@overload(_add_of_rows)
def _add_of_rows_by(together, given, row, tiles, scale, first, count, out, column):
    add = _add_of_whole_rows if _are_whole(tiles) else _add_of_number_rows

    def added(together, given, row, tiles, scale, first, count, out, column):
        add(together, given, row, tiles, scale, first, count, out, column)

    return added


def _by_rows(make, of_tile, of_half):
    """Return the function that multiplies rows by tiles.

    make(rows, vectors): the function that multiplies so many rows by these vectors of a tile. of_tile, of_half: the most rows for
    all vectors, and for half of them.
    """
    choose = None
    for rows in range(1, max(of_tile, of_half) + 1):
        parts = [range(VECTORS)] if rows <= of_tile else [range(VECTORS // 2), range(VECTORS // 2, VECTORS)]
        choose = _or_fewer(rows, _by_tiles([make(rows, part) for part in parts]), choose)
    return choose


def _or_fewer(rows, multiply_them, fewer):
    """Return the function that multiplies so many rows, or leaves fewer ones to the function `fewer`."""
    if fewer is None:

        @_part
        def only(together, given, row, tiles, scale, first, count, out, column):
            multiply_them(given, row, tiles, scale, first, count, out, column)

        return only

    @_part
    def choose(together, given, row, tiles, scale, first, count, out, column):
        if together == rows:
            multiply_them(given, row, tiles, scale, first, count, out, column)
        else:
            fewer(together, given, row, tiles, scale, first, count, out, column)

    return choose


def _by_tiles(parts):
    """Return the function that multiplies rows by `count` tiles, each in these parts."""
    first_part, last_part = parts[0], parts[-1]
    in_parts = len(parts) > 1

    @_part
    def multiply_them(given, row, tiles, scale, first, count, out, column):
        size = given[0].shape[1]
        for number in range(count):
            for begin in range(0, size, INPUTS_PER_SUM):
                end = min(begin + INPUTS_PER_SUM, size)
                first_part(given, row, begin, end, tiles, scale, first + number, out, column + number * OUTPUTS)
                if in_parts:
                    last_part(given, row, begin, end, tiles, scale, first + number, out, column + number * OUTPUTS)

    return multiply_them


def _of_numbers(rows, vectors):
    of_rows = products(rows, vectors)
    return _part(
        lambda given, row, begin, end, tiles, scale, tile, out, column: of_rows(
            given[0], row, begin, end, tiles, tile, out, column
        )
    )


def _of_whole_numbers(rows, vectors):
    of_rows = whole_products(rows, vectors)
    return _part(
        lambda given, row, begin, end, tiles, scale, tile, out, column: of_rows(
            given[0], given[1], given[2], given[3], row, begin, end, tiles, scale, tile, out, column
        )
    )


_add_of_number_rows = _by_rows(_of_numbers, _ROWS, _ROWS_OF_HALF)
_add_of_whole_rows = _by_rows(_of_whole_numbers, _WHOLE_ROWS, _WHOLE_ROWS_OF_HALF)


@numba.njit(error_model="numpy", fastmath={"nnan", "ninf", "nsz", "reassoc"}, cache=kernel_cache())
def _rounded(x):
    """x in int8, and the factor, the sum and the scaled sum of each group, as whole_vectors.py takes them."""
    rows, groups = len(x), x.shape[1] // GROUP
    numbers, factors = np.empty(x.shape, np.int8), np.empty((rows, groups), np.float32)
    sums, scaled = np.empty((rows, groups), np.int32), np.empty((rows, groups), np.float32)
    for row in range(rows):
        for group in range(groups):
            begin, largest = group * GROUP, np.float32(0)
            for i in range(GROUP):
                largest = max(largest, abs(x[row, begin + i]))
            factor = largest / _LARGEST
            inverse = _LARGEST / largest if largest > 0 else np.float32(0)
            for i in range(GROUP):
                numbers[row, begin + i] = np.int8(np.rint(x[row, begin + i] * inverse))
            total = np.int32(0)
            for i in range(GROUP):
                total += np.int32(numbers[row, begin + i])
            factors[row, group], sums[row, group], scaled[row, group] = factor, total, np.float32(total) * factor
    return numbers, factors, sums, scaled


def check_products(bits: int | None = None) -> None:
    """Compute a small product with weights of so many bits. Raises the error of Numba if it cannot be compiled, and
    ArithmeticError if it is wrong."""
    x = np.tile(np.arange(3, 128, 4, dtype=np.float32), (5, 1))  # what is rounded to itself: one group
    weights, none = np.arange(OUTPUTS * GROUP).reshape(OUTPUTS, GROUP) % 16, np.empty(0, np.float32)
    numbers, scale = weights, none
    if bits == 4:  # times 1, plus 0
        numbers = weights[:, : GROUP // 2] + 16 * weights[:, GROUP // 2 :]
        scale = np.array([[[[0x3F80] * OUTPUTS, [0] * OUTPUTS]]], np.uint16)
    beside = 1 if bits is None else SUMMED
    tiles = numbers.reshape(1, OUTPUTS, -1, beside).swapaxes(1, 2)
    kind = {None: np.float32, 8: np.int8, 4: np.uint8}[bits]
    found = np.empty((5, OUTPUTS), np.float32)
    multiply(x, np.ascontiguousarray(tiles.astype(kind)), scale, none, found)
    if not np.allclose(found, x @ weights.T, rtol=1e-5):
        raise ArithmeticError("a product of whole numbers came out wrong")
