"""The innermost loops of products with weights of 8 or 4 bits: whole numbers are multiplied, a group of inputs at a time.

This takes less time than to convert each weight to float32. The inputs are rounded to 8 bits, with one scale for each GROUP of
them, and a processor multiplies 32 or 64 such numbers with one instruction (AVX-VNNI, AVX512_VNNI) or with three (AVX2).
Sums of whole numbers are exact, so they do not depend on the instructions.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dsi_workers.decoding.cpu import GROUP, LANES, OUTPUTS, SUMMED, has_feature
from dsi_workers.decoding.cpu import instructions as emit

#: Numbers that one instruction multiplies, and vectors of them in a tile of LANES inputs.
_NUMBERS = 64 if has_feature("avx512vnni") else 32
_PARTS = LANES * OUTPUTS // _NUMBERS
#: Outputs of such a vector, and sums of products.
_OUTPUTS, _SUMS = OUTPUTS // _PARTS, _NUMBERS // SUMMED
_HAS_VNNI, _HAS_AVX2 = has_feature("avx512vnni") or has_feature("avxvnni"), has_feature("avx2")
#: How far ahead weights are fetched. Measured on a Zen 4.
_AHEAD_BYTES = 3072


def whole_products(rows):
    """Return the function that computes `rows` times OUTPUTS sums of products, with weights of 8 or of 4 bits."""

    @intrinsic
    def of_rows(context, x, factors, sums, row, tiles, scales, block, out, column):
        """out[row : row + rows, column : column + OUTPUTS] = the products of these rows of x with the weights of the block.

        x: [any, size] in int8, within [-127, 127]. factors: [any, size / GROUP], what the numbers of a group are multiplied by.
        sums: [any, size / GROUP, SUMMED], of the inputs of a group, times the factor; for 4 bits only. out: [any, width]. These
        three are in float32. All arrays are contiguous.

        8 bits: tiles: [blocks, size / LANES, OUTPUTS, LANES] in int8, within [-127, 127].
        4 bits: tiles: [blocks, size / GROUP, OUTPUTS, LANES] in uint8: the first half of a group in the lower bits, the second
        in the higher ones. scales: [blocks, size / GROUP, 2, OUTPUTS], the bits of bfloat16: what the numbers of a group are
        multiplied by, and what is added to each.
        """
        bits = 8 if tiles.dtype == types.int8 else 4
        group_bytes = GROUP * OUTPUTS * bits // 8

        def generate(context, builder, signature, arguments):
            x, factors, sums, tiles, scales, out = (
                emit.array_of(context, builder, signature, arguments, place) for place in (0, 1, 2, 4, 5, 7)
            )
            row, block, column = (arguments[place] for place in (3, 6, 8))
            index, groups = row.type, factors.shape[1]
            before = builder.mul(block, groups)

            def step(group, totals):
                number = builder.add(before, group)
                weights = builder.gep(tiles.data, [builder.mul(number, index(group_bytes))])
                emit.fetch(builder, weights, _AHEAD_BYTES, group_bytes)
                halves = _halves(builder, weights, bits)
                scale, low = _scales(builder, scales, number) if bits == 4 else (None, None)
                found = []
                for to in range(rows):
                    at = builder.add(builder.mul(builder.add(row, index(to)), groups), group)
                    first = builder.gep(x.data, [builder.mul(at, index(GROUP))])
                    given = [
                        emit.load(builder, builder.gep(first, [index(begin)]), LANES)
                        for begin in range(0, GROUP, LANES)
                    ]
                    factor = emit.same(builder, builder.load(builder.gep(factors.data, [at])), _SUMS)
                    for part in range(_PARTS):
                        total = totals[to * _PARTS + part]
                        product = _product(builder, given, [half[part] for half in halves], signed=bits == 8)
                        if bits == 4:
                            product = builder.fmul(product, _spread(builder, scale, part))
                            of_inputs = emit.load(
                                builder, builder.gep(sums.data, [builder.mul(at, index(SUMMED))]), SUMMED
                            )
                            of_inputs = emit.picked(builder, of_inputs, of_inputs, [*range(SUMMED)] * _OUTPUTS)
                            (total,) = emit.added(builder, [of_inputs], [_spread(builder, low, part)], [total])
                        found += emit.added(builder, [product], [factor], [total])
                return found

            totals = emit.loop(builder, index(0), groups, 1, rows * _PARTS, step, _SUMS)
            emit.store(builder, emit.sums(builder, totals, SUMMED), out, row, column)

        return types.void(x, factors, sums, row, tiles, scales, block, out, column), emit.without_result(generate)

    return of_rows


def _halves(builder, weights, bits):
    """The weights for both halves of a group of inputs, each in _PARTS vectors."""
    tile = OUTPUTS * LANES
    loaded = [
        emit.load(builder, builder.gep(weights, [emit.INT32(begin)]), _NUMBERS)
        for begin in range(0, tile if bits == 4 else 2 * tile, _NUMBERS)
    ]
    if bits == 8:
        return loaded[:_PARTS], loaded[_PARTS:]
    lower, four = (ir.Constant(loaded[0].type, [number] * _NUMBERS) for number in (15, 4))
    return [builder.and_(both, lower) for both in loaded], [builder.lshr(both, four) for both in loaded]


def _scales(builder, scales, number):
    """What a group's weights of 4 bits are multiplied by, and what is added to each: one for each output."""
    first = builder.gep(scales.data, [builder.mul(number, number.type(2 * OUTPUTS))])
    return [
        emit.wide(builder, builder.gep(first, [number.type(begin)]), types.uint16, OUTPUTS) for begin in (0, OUTPUTS)
    ]


def _spread(builder, of_outputs, part):
    """A number for each output, as a vector of numbers for each sum."""
    return emit.picked(builder, of_outputs, of_outputs, [part * _OUTPUTS + lane // SUMMED for lane in range(_SUMS)])


def _product(builder, given, halves, *, signed):
    """The sums of each SUMMED products of both halves of a group, as numbers in float32."""
    total = ir.Constant(ir.VectorType(emit.INT32, _SUMS), [0] * _SUMS)
    for x, weights in zip(given, halves, strict=True):
        total = _with_products(builder, total, weights, emit.picked(builder, x, x, [*range(LANES)] * _OUTPUTS), signed)
    return builder.sitofp(total, ir.VectorType(emit.FLOAT32, _SUMS))


def _with_products(builder, total, weights, x, signed):
    """total + the sums of each SUMMED products. Weights that are not `signed` are below 128."""
    if signed:  # one factor of the instructions has no sign
        none = ir.Constant(weights.type, [0] * _NUMBERS)
        negative = builder.icmp_signed("<", weights, none)
        x = builder.select(negative, builder.sub(none, x), x)
        weights = builder.select(negative, builder.sub(none, weights), weights)
    if _HAS_VNNI:
        name = f"llvm.x86.avx512.vpdpbusd.{8 * _NUMBERS}"
        return _call(builder, name, total.type, total, *(builder.bitcast(each, total.type) for each in (weights, x)))
    if _HAS_AVX2:
        pairs = ir.VectorType(ir.IntType(16), _NUMBERS // 2)
        found = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, weights, x)
        ones = ir.Constant(pairs, [1] * (_NUMBERS // 2))
        return builder.add(total, _call(builder, "llvm.x86.avx2.pmadd.wd", total.type, found, ones))
    whole = ir.VectorType(emit.INT32, _NUMBERS)
    products = builder.mul(builder.zext(weights, whole), builder.sext(x, whole))
    for lane in range(SUMMED):
        total = builder.add(total, emit.picked(builder, products, products, range(lane, _NUMBERS, SUMMED)))
    return total


def _call(builder, name, kind, *arguments):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [each.type for each in arguments]), name
    )
    return builder.call(function, arguments)
