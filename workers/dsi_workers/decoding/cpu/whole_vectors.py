"""The innermost loops of products with weights of 8 or 4 bits: whole numbers are multiplied, a group of inputs at a time.

This takes less time than to convert each weight to float32. The inputs are rounded to 8 bits, with one scale for each GROUP of
them, and a processor multiplies 32 or 64 such numbers with one instruction (AVX-VNNI, AVX512_VNNI) or with two or three (AVX2).
Sums of whole numbers are exact, so they do not depend on the instructions.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dsi_workers.decoding.cpu import GROUP, LANES, OUTPUTS, SUMMED, has_feature
from dsi_workers.decoding.cpu import instructions as emit
from dsi_workers.decoding.cpu.vectors import HAS_WIDE_VECTORS

#: Numbers that one instruction multiplies, and the sums of products that it gives: one for each output.
_NUMBERS = 64 if has_feature("avx512vnni") else 32
_SUMS = _NUMBERS // SUMMED
#: Vectors of weights of a group and a part: each has SUMMED inputs.
_STEPS = GROUP // SUMMED
_HAS_VNNI, _HAS_AVX2 = has_feature("avx512vnni") or has_feature("avxvnni"), has_feature("avx2")
#: How far ahead weights are fetched. Measured on a Zen 4. There, with AVX-512, weights of 8 bits come sooner if none are fetched.
_AHEAD_BYTES = 4096
#: Numbers with the signs of others, or 0 where these are 0. (AVX2)
_SIGN = "llvm.x86.avx2.psign.b"
#: Tells `llvm.abs` that -128 is allowed.
_FALSE = ir.Constant(ir.IntType(1), 0)
_KIND = ir.VectorType(ir.IntType(8), _NUMBERS)
_PAIRS, _WHOLE = ir.VectorType(ir.IntType(16), _NUMBERS // 2), ir.VectorType(emit.INT32, _SUMS)
_FLOATS = ir.VectorType(emit.FLOAT32, _SUMS)
_BY_STEPS = _HAS_AVX2 and not _HAS_VNNI


def whole_products(rows, vectors):
    """Return the function that multiplies `rows` rows by a tile of weights of 8 or of 4 bits. `vectors`: the numbers of
    the vectors whose outputs are computed, of the VECTORS that a tile has."""
    parts = [part for part in range(OUTPUTS // _SUMS) if part * _SUMS // LANES in vectors]

    @intrinsic
    def of_rows(context, x, factors, sums, scaled, row, begin, end, tiles, scales, tile, out, column):
        """out[row : row + rows, column : column + OUTPUTS] += the products of the inputs [begin, end) of these rows with the
        weights of the tile.

        x: [any, size] in int8, within [-127, 127]. factors: [any, size / GROUP], what the numbers of a group are multiplied by.
        sums: [any, size / GROUP] in int32, of the numbers of a group. scaled: the same times the factors. out: [any, width].
        factors, scaled and out are in float32. tiles, scales: as linear.py lays them out. For 8 bits scaled and scales are not
        read, for 4 bits sums are not. All arrays are contiguous.
        """
        bits = 8 if tiles.dtype == types.int8 else 4
        group_bytes = GROUP * OUTPUTS * bits // 8

        def generate(context, builder, signature, arguments):
            x, factors, sums, scaled, tiles, scales, out = (
                emit.array_of(context, builder, signature, arguments, place) for place in (0, 1, 2, 3, 7, 8, 10)
            )
            row, begin, end, tile, column = (arguments[place] for place in (4, 5, 6, 9, 11))
            index, groups = row.type, factors.shape[1]
            first = builder.mul(tile, groups)

            def step(group, totals):
                number = builder.add(first, group)
                from_here = builder.gep(tiles.data, [builder.mul(number, index(group_bytes))])
                if 0 in vectors and (bits == 4 or not HAS_WIDE_VECTORS):
                    emit.fetch(builder, from_here, _AHEAD_BYTES, group_bytes)
                of_rows = [builder.add(builder.mul(builder.add(row, index(to)), groups), group) for to in range(rows)]
                given = [builder.gep(x.data, [builder.mul(at, index(GROUP))]) for at in of_rows]
                factor = [builder.load(builder.gep(factors.data, [at])) for at in of_rows]
                of_inputs = [builder.load(builder.gep((sums if bits == 8 else scaled).data, [at])) for at in of_rows]
                if _BY_STEPS:
                    products = _products_by_steps(builder, given, from_here, parts, bits)
                else:
                    products = _products(builder, given, of_inputs, from_here, parts, bits)
                found = list(totals)
                for place, part in enumerate(parts):
                    scale = _scales(builder, scales, number, part) if bits == 4 else None
                    for to in range(rows):
                        at = to * len(parts) + place
                        product = products[at]
                        if scale is not None:
                            product = builder.fmul(product, scale[0])
                            of_row = [emit.same(builder, of_inputs[to], _SUMS)]
                            (found[at],) = emit.added(builder, of_row, [scale[1]], [found[at]])
                        of_row = [emit.same(builder, factor[to], _SUMS)]
                        (found[at],) = emit.added(builder, of_row, [product], [found[at]])
                return found

            group = index(GROUP)
            totals = emit.loop(
                builder, builder.sdiv(begin, group), builder.sdiv(end, group), 1, rows * len(parts), step, _FLOATS
            )
            for place, total in enumerate(totals):
                to, part = divmod(place, len(parts))
                at = builder.add(row, index(to)), builder.add(column, index(parts[part] * _SUMS))
                emit.add_to(builder, total, out, *at)

        arguments = (x, factors, sums, scaled, row, begin, end, tiles, scales, tile, out, column)
        return types.void(*arguments), emit.without_result(generate)

    return of_rows


def _inputs(builder, pointer, step):
    """The SUMMED inputs of a step, as often as there are outputs."""
    words = builder.bitcast(pointer, emit.INT32.as_pointer())
    return builder.bitcast(emit.same(builder, builder.load(builder.gep(words, [step])), _SUMS), _KIND)


def _weights(builder, pointer, part, step):
    """The weights of a step for the outputs of a part, or of two steps in 4 bits."""
    first = builder.add(builder.mul(step, step.type(SUMMED * OUTPUTS)), step.type(_NUMBERS * part))
    return emit.load(builder, builder.gep(pointer, [first]), _NUMBERS)


def _in_bytes(builder, weights):
    """Two vectors of weights, the first in the lower 4 bits of each byte, the second in the higher ones."""
    lower, four = (ir.Constant(_KIND, [number] * _NUMBERS) for number in (15, 4))
    return builder.and_(weights, lower), builder.lshr(weights, four)


def _scales(builder, scales, number, part):
    """What a group's weights of 4 bits are multiplied by, and what is added to each: one for each output of a part."""
    first = builder.gep(scales.data, [builder.mul(number, number.type(2 * OUTPUTS))])
    return [
        emit.wide(builder, builder.gep(first, [number.type(begin + _SUMS * part)]), types.uint16, _SUMS)
        for begin in (0, OUTPUTS)
    ]


def _products(builder, given, sums, pointer, parts, bits):
    """Return for each row and each part the sums of products of a group, in float32. given: where the inputs of each row are.
    sums: the sum of each row's inputs, for weights of 8 bits. pointer: where the weights are."""
    weights = []
    for part in parts:
        loaded = [_weights(builder, pointer, part, emit.INT32(step)) for step in range(_STEPS * bits // 8)]
        if bits == 4:
            lower, higher = zip(*(_in_bytes(builder, both) for both in loaded), strict=True)
            loaded = [*lower, *higher]
        weights.append(loaded)
    signed, totals = bits == 8, [ir.Constant(_WHOLE, [0] * _SUMS) for _ in given]
    if signed and _HAS_VNNI:  # one factor of the instruction has no sign: the weights are computed with 128 more
        weights = [
            [builder.xor(each, ir.Constant(_KIND, [-128] * _NUMBERS)) for each in of_part] for of_part in weights
        ]
        totals = [emit.same(builder, builder.mul(total, emit.INT32(-128)), _SUMS) for total in sums]
    inputs = [[_inputs(builder, first, emit.INT32(step)) for step in range(_STEPS)] for first in given]
    found = []
    for x, begin in zip(inputs, totals, strict=True):
        for of_part in weights:
            total = begin
            for of_step, of_inputs in zip(of_part, x, strict=True):
                total = _with_products(builder, total, of_step, of_inputs, signed=signed)
            found.append(builder.sitofp(total, _FLOATS))
    return found


def _products_by_steps(builder, given, pointer, parts, bits):
    """The same with AVX2, in a loop over the steps. Without the loop the compiler would keep all inputs, for which there are too
    few registers. Weights of 4 bits are summed in 16 bits: 8 steps of two products below 16 times 128 fit into these."""
    of_bytes = _STEPS * bits // 8
    index, kind = ir.IntType(64), _WHOLE if bits == 8 else _PAIRS

    def step(place, totals):
        loaded = [_weights(builder, pointer, part, place) for part in parts]
        in_halves = zip(*(_in_bytes(builder, both) for both in loaded), strict=True)
        for number, weights in enumerate([loaded] if bits == 8 else in_halves):
            at = builder.add(place, index(number * of_bytes))
            factors = [(of_part, x) for x in (_inputs(builder, first, at) for first in given) for of_part in weights]
            totals = [
                _with_products(builder, total, *both, signed=True)
                if bits == 8
                else builder.add(total, _sums_of_two(builder, *both))
                for total, both in zip(totals, factors, strict=True)
            ]
        return totals

    rounds = emit.hidden(builder, index(of_bytes))
    totals = emit.loop(builder, index(0), rounds, 1, len(given) * len(parts), step, kind)
    if bits == 4:
        totals = [_sums_of_pairs(builder, total) for total in totals]
    return [builder.sitofp(total, _FLOATS) for total in totals]


def _with_products(builder, total, weights, x, *, signed):
    """total + the sums of each SUMMED products."""
    if _HAS_VNNI:
        name = f"llvm.x86.avx512.vpdpbusd.{8 * _NUMBERS}"
        return _call(builder, name, _WHOLE, total, *(builder.bitcast(each, _WHOLE) for each in (weights, x)))
    if _HAS_AVX2:
        if signed:  # sums of two products with 128 more would not fit into 16 bits
            weights, x = (
                _call(builder, "llvm.abs.v32i8", _KIND, weights, _FALSE),
                _call(builder, _SIGN, _KIND, x, weights),
            )
        return builder.add(total, _sums_of_pairs(builder, _sums_of_two(builder, weights, x)))
    whole = ir.VectorType(emit.INT32, _NUMBERS)
    extend = builder.sext if signed else builder.zext
    products = builder.mul(extend(weights, whole), builder.sext(x, whole))
    for lane in range(SUMMED):
        total = builder.add(total, emit.picked(builder, products, products, range(lane, _NUMBERS, SUMMED)))
    return total


def _sums_of_two(builder, weights, x):
    """Sums of two products each, in 16 bits. (AVX2)"""
    return _call(builder, "llvm.x86.avx2.pmadd.ub.sw", _PAIRS, weights, x)


def _sums_of_pairs(builder, pairs):
    """Sums of two numbers of 16 bits each, in 32 bits. (AVX2)"""
    return _call(builder, "llvm.x86.avx2.pmadd.wd", _WHOLE, pairs, ir.Constant(_PAIRS, [1] * _PAIRS.count))


def _call(builder, name, kind, *arguments):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [each.type for each in arguments]), name
    )
    return builder.call(function, arguments)
