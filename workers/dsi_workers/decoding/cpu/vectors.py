"""The innermost loops of the CPU kernels, as instructions on vectors of 16 numbers.

Each sum is computed in the same order, whatever the number of rows that are computed together. So the bits of a row do not
depend on the other rows. The instructions are written out, because a compiler would choose another order for another number of
rows. Where a processor has shorter vectors, LLVM makes two or four instructions of one.

Weights are read in the order in which they lie in memory, and fetched ahead: a core then reads them as fast as it can read at
all. Weights, keys and values may be float32 or bfloat16 (as uint16), which is converted on its way.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dsi_workers.decoding.cpu import LANES, OUTPUTS, has_feature
from dsi_workers.decoding.cpu import instructions as emit

_VECTOR = ir.VectorType(emit.FLOAT32, LANES)
#: A vector of LANES numbers fits into one register, of which there are 32 (AVX-512).
HAS_WIDE_VECTORS = has_feature("avx512f")
#: How far ahead weights are fetched, by the number of rows: more rows take longer, and memory has more time. Measured on a Zen 4.
_AHEAD_BYTES = {1: 512, 2: 512, 3: 4096, 4: 4096, 6: 4096, 8: 4096}
#: Sums of two products of bfloat16 each, added to float32 (AVX512_BF16).
_BFLOAT16_PRODUCTS = "llvm.x86.avx512bf16.dpbf16ps.512"


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat16)

    def __hash__(self):
        return hash(_BFloat16)


_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


def products(rows, *, in_parts=False):
    """Return the function that computes `rows` times OUTPUTS sums of products.

    `in_parts`: a quarter of the sums at a time, for processors with sixteen registers of half a vector (AVX2). The weights are
    then read four times. That pays only if they were read for other rows just before.
    """

    @intrinsic
    def of_rows(context, x, row, tiles, block, out, column):
        """out[row : row + rows, column : column + OUTPUTS] = the products of these rows of x with the weights of the block.

        x: [any, size]. tiles: [blocks, size / LANES, OUTPUTS, LANES]. out: [any, width] in float32. All are contiguous. If x is
        in bfloat16, the weights must be, too, and the processor must multiply these.
        """
        given, kind = x.dtype, tiles.dtype

        def generate(context, builder, signature, arguments):
            x, tiles, out = (emit.array_of(context, builder, signature, arguments, place) for place in (0, 2, 4))
            row, block, column = (arguments[place] for place in (1, 3, 5))
            index, size, tile_bytes = row.type, x.shape[1], OUTPUTS * LANES * kind.bitwidth // 8
            tile = builder.gep(tiles.data, [builder.mul(builder.mul(block, size), index(OUTPUTS))])
            inputs = [
                builder.gep(x.data, [builder.mul(builder.add(row, index(number)), size)]) for number in range(rows)
            ]

            def at(place, part=None):
                """The inputs and the weights of a step."""
                weights = builder.gep(tile, [builder.mul(place, index(OUTPUTS))])
                if part is None:
                    emit.fetch(builder, weights, _AHEAD_BYTES[rows], tile_bytes)
                else:  # memory has the time of all four parts: each fetches a quarter of the next block
                    following = builder.add(builder.mul(size, index(OUTPUTS + part)), place)
                    emit.fetch(builder, builder.gep(tile, [following]), 0, tile_bytes // OUTPUTS)
                return [builder.gep(first, [place]) for first in inputs], weights

            def in_bfloat16(place, totals):
                return _in_bfloat16(builder, *at(place), totals)

            def in_float32(outputs, begin, lanes):
                """The part of a step for some outputs, and for the lanes [begin, begin + lanes)."""
                part = outputs[0] + begin // lanes if in_parts else None

                def step(place, totals):
                    given, weights = at(place, part)
                    firsts = [builder.gep(weights, [index(LANES * output + begin)]) for output in outputs]
                    wide = [emit.wide(builder, first, kind, lanes) for first in firsts]
                    x = [emit.load(builder, builder.gep(first, [index(begin)]), lanes) for first in given]
                    return emit.added(builder, x, wide, totals)

                return emit.loop(builder, index(0), size, LANES, rows * len(outputs), step, lanes)

            if given == types.uint16:
                totals = emit.loop(builder, index(0), size, LANES, rows * OUTPUTS // 2, in_bfloat16, LANES)
                sums = emit.sums(builder, totals, LANES // 2)
            elif not in_parts:
                sums = emit.sums(builder, in_float32(range(OUTPUTS), 0, LANES), LANES)
            else:
                found = []
                for outputs in (range(OUTPUTS // 2), range(OUTPUTS // 2, OUTPUTS)):
                    low, high = (in_float32(outputs, begin, LANES // 2) for begin in (0, LANES // 2))
                    found.append([builder.fadd(*halves) for halves in zip(low, high, strict=True)])
                pairs = [vectors[2 * number : 2 * number + 2] for number in range(rows) for vectors in found]
                sums = emit.sums(builder, [vector for pair in pairs for vector in pair], LANES // 2)
            emit.store(builder, sums, out, row, column)

        return types.void(x, row, tiles, block, out, column), emit.without_result(generate)

    return of_rows


def scores(rows):
    """Return the function that computes the scores of `rows` queries for OUTPUTS positions."""

    @intrinsic
    def of_rows(context, queries, row, keys, position, out):
        """out[row : row + rows, position : position + OUTPUTS] = the products of these queries and keys.

        queries: [any, dim] in float32. keys: [positions, dim]. out: [any, positions] in float32. All are contiguous.
        """
        kind = keys.dtype

        def generate(context, builder, signature, arguments):
            queries, keys, out = (emit.array_of(context, builder, signature, arguments, place) for place in (0, 2, 4))
            row, position = arguments[1], arguments[3]
            index, dim = row.type, queries.shape[1]
            inputs = [
                builder.gep(queries.data, [builder.mul(builder.add(row, index(number)), dim)]) for number in range(rows)
            ]
            firsts = [
                builder.gep(keys.data, [builder.mul(builder.add(position, index(number)), dim)])
                for number in range(OUTPUTS)
            ]

            def step(place, totals):
                wide = [emit.wide(builder, builder.gep(first, [place]), kind) for first in firsts]
                given = [emit.load(builder, builder.gep(first, [place]), LANES) for first in inputs]
                return emit.added(builder, given, wide, totals)

            totals = emit.loop(builder, index(0), dim, LANES, rows * OUTPUTS, step, LANES)
            emit.store(builder, emit.sums(builder, totals, LANES), out, row, position)

        return types.void(queries, row, keys, position, out), emit.without_result(generate)

    return of_rows


def weighted_sums(rows, vectors):
    """Return the function that computes `rows` weighted sums of parts of values. A part has `vectors` times LANES numbers."""

    @intrinsic
    def of_rows(context, weights, row, values, begin, end, first, out):
        """out[row : row + rows, first : ...] = the sums over positions in [begin, end) of weight and value.

        weights: [any, positions] in float32. values: [positions, dim]. out: [any, dim] in float32. All are contiguous.
        """
        kind = values.dtype

        def generate(context, builder, signature, arguments):
            weights, values, out = (emit.array_of(context, builder, signature, arguments, place) for place in (0, 2, 6))
            row, begin, end, first = (arguments[place] for place in (1, 3, 4, 5))
            index = row.type
            of_rows = [
                builder.gep(weights.data, [builder.mul(builder.add(row, index(number)), weights.shape[1])])
                for number in range(rows)
            ]

            def step(position, totals):
                value = builder.gep(values.data, [builder.add(builder.mul(position, values.shape[1]), first)])
                wide = [emit.wide(builder, builder.gep(value, [index(LANES * part)]), kind) for part in range(vectors)]
                given = [emit.same(builder, builder.load(builder.gep(of_row, [position]))) for of_row in of_rows]
                return emit.added(builder, given, wide, totals)

            totals = emit.loop(builder, begin, end, 1, rows * vectors, step, LANES)
            for number, total in enumerate(totals):
                to, part = divmod(number, vectors)
                at = builder.add(
                    builder.mul(builder.add(row, index(to)), out.shape[1]), builder.add(first, index(LANES * part))
                )
                place = builder.bitcast(builder.gep(out.data, [at]), _VECTOR.as_pointer())
                builder.store(total, place).align = 4

        return types.void(weights, row, values, begin, end, first, out), emit.without_result(generate)

    return of_rows


def _in_bfloat16(builder, inputs, weights, totals):
    """The next totals: one for each input and two outputs, of which one half is for the first and one for the second."""
    both = [builder.gep(weights, [emit.INT32(2 * LANES * pair)]) for pair in range(OUTPUTS // 2)]
    pairs = [builder.bitcast(emit.load(builder, first, 2 * LANES), _PAIRS) for first in both]
    multiply = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR, _PAIRS, _PAIRS]), _BFLOAT16_PRODUCTS
    )
    found = []
    for number, first in enumerate(inputs):
        once = emit.load(builder, first, LANES)
        given = builder.bitcast(emit.picked(builder, once, once, [*range(LANES)] * 2), _PAIRS)
        for pair, weight in enumerate(pairs):
            found.append(builder.call(multiply, [totals[number * len(pairs) + pair], weight, given]))
    return found
