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

from dsi_workers.decoding.cpu import INPUTS_PER_SUM, LANES, OUTPUTS, POSITIONS_TOGETHER, VECTORS, has_feature
from dsi_workers.decoding.cpu import instructions as emit

#: A vector of LANES numbers fits into one register, of which there are 32 (AVX-512).
HAS_WIDE_VECTORS = has_feature("avx512f")
#: How far ahead weights are fetched where a whole tile is computed. Measured on a Zen 4. Where a tile is computed in parts, each
#: part fetches its share of the weights of the next INPUTS_PER_SUM inputs: memory then has the time of all parts.
_AHEAD_BYTES = 2048
#: Sums of two products of bfloat16 each, added to float32 (AVX512_BF16).
_BFLOAT16_PRODUCTS = "llvm.x86.avx512bf16.dpbf16ps.512"


def products(rows, vectors):
    """Return the function that adds the products of `rows` rows with a tile of weights. `vectors`: the numbers of the
    vectors whose outputs are computed, of the VECTORS that a tile has."""

    @intrinsic
    def of_rows(context, x, row, begin, end, tiles, tile, out, column):
        """out[row : row + rows, column : column + OUTPUTS] += the products of the inputs [begin, end) of these rows with the
        weights of the tile.

        Each output has a lane of its own, and its products are added in the order of the inputs.

        x: [any, size]. tiles: as linear.py lays them out, in float32 or bfloat16. out: [any, width] in float32. All are
        contiguous, and begin and end are even. If x is in bfloat16, the weights must be, too, and the processor must multiply
        these.
        """
        given, kind = x.dtype, tiles.dtype

        def generate(context, builder, signature, arguments):
            x, tiles, out = (emit.array_of(context, builder, signature, arguments, place) for place in (0, 4, 6))
            row, begin, end, tile, column = (arguments[place] for place in (1, 2, 3, 5, 7))
            index, size = row.type, x.shape[1]
            inputs = [
                builder.gep(x.data, [builder.mul(builder.add(row, index(number)), size)]) for number in range(rows)
            ]
            tile_size = builder.mul(size, index(OUTPUTS))
            first = builder.gep(tiles.data, [builder.mul(tile, tile_size)])
            beside, vector_bytes = 32 // kind.bitwidth, 2 * LANES * kind.bitwidth // 8

            def fetch(place):
                """Fetch the weights that are needed next."""
                ahead, share = builder.mul(place, index(OUTPUTS)), len(vectors) * vector_bytes
                if len(vectors) == VECTORS:
                    return emit.fetch(builder, builder.gep(first, [ahead]), _AHEAD_BYTES, share)
                of_parts_before = vectors[0] * LANES * INPUTS_PER_SUM
                ahead = builder.mul(builder.add(begin, index(INPUTS_PER_SUM)), index(OUTPUTS))
                ahead = builder.add(ahead, builder.mul(builder.sub(place, begin), index(len(vectors) * LANES)))
                return emit.fetch(builder, builder.gep(first, [builder.add(ahead, index(of_parts_before))]), 0, share)

            def weights_of(vector, place):
                at = builder.add(builder.mul(place, index(OUTPUTS)), index(LANES * beside * vector))
                return builder.gep(first, [at])

            def step(place, totals):
                """Two inputs."""
                fetch(place)
                weights = [weights_of(vector, place) for vector in vectors]
                from_here = [builder.gep(first, [place]) for first in inputs]
                if given == types.uint16:
                    return _in_bfloat16(builder, from_here, weights, totals)
                both = [emit.two(builder, each, kind) for each in weights]
                for number in range(2):
                    one = [builder.load(builder.gep(first, [index(number)])) for first in from_here]
                    x = [emit.same(builder, each) for each in one]
                    totals = emit.added(builder, x, [of_both[number] for of_both in both], totals)
                return totals

            totals = emit.loop(builder, begin, end, 2, rows * len(vectors), step, emit.VECTOR)
            for number, total in enumerate(totals):
                to, part = divmod(number, len(vectors))
                at = builder.add(row, index(to)), builder.add(column, index(LANES * vectors[part]))
                emit.add_to(builder, total, out, *at)

        return types.void(x, row, begin, end, tiles, tile, out, column), emit.without_result(generate)

    return of_rows


def scores(rows):
    """Return the function that computes the scores of `rows` queries for POSITIONS_TOGETHER positions."""

    @intrinsic
    def of_rows(context, queries, row, keys, position, out):
        """out[row : row + rows, position : position + POSITIONS_TOGETHER] = the products of these queries and keys.

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
                for number in range(POSITIONS_TOGETHER)
            ]

            def step(place, totals):
                wide = [emit.wide(builder, builder.gep(first, [place]), kind) for first in firsts]
                given = [emit.load(builder, builder.gep(first, [place]), LANES) for first in inputs]
                return emit.added(builder, given, wide, totals)

            totals = emit.loop(builder, index(0), dim, LANES, rows * POSITIONS_TOGETHER, step, emit.VECTOR)
            emit.store_scores(builder, emit.sums(builder, totals, LANES), out, row, position)

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

            totals = emit.loop(builder, begin, end, 1, rows * vectors, step, emit.VECTOR)
            for number, total in enumerate(totals):
                to, part = divmod(number, vectors)
                at = builder.add(row, index(to)), builder.add(first, index(LANES * part))
                emit.store(builder, total, emit.place_in(builder, out, *at))

        return types.void(weights, row, values, begin, end, first, out), emit.without_result(generate)

    return of_rows


def _in_bfloat16(builder, inputs, weights, totals):
    """Add the products of two inputs to each total (AVX512_BF16). Returns the new totals."""
    multiply = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(totals[0].type, [totals[0].type, emit.PAIRS, emit.PAIRS]), _BFLOAT16_PRODUCTS
    )
    both = [builder.bitcast(emit.load(builder, first, 2 * LANES), emit.PAIRS) for first in weights]
    given = []
    for first in inputs:
        pair = builder.load(builder.bitcast(first, emit.INT32.as_pointer()))
        given.append(builder.bitcast(emit.same(builder, pair), emit.PAIRS))
    pairs = [(x, weight) for x in given for weight in both]
    return [builder.call(multiply, [total, weight, x]) for (x, weight), total in zip(pairs, totals, strict=True)]
