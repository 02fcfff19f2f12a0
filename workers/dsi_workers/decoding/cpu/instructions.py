"""What the innermost loops of the CPU kernels are written of: LLVM's instructions, on vectors of numbers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from dsi_workers.decoding.cpu import LANES, OUTPUTS, POSITIONS_TOGETHER

INT32, FLOAT32 = ir.IntType(32), ir.FloatType()
VECTOR = ir.VectorType(FLOAT32, LANES)
_BYTES = ir.IntType(8).as_pointer()


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat16)

    def __hash__(self):
        return hash(_BFloat16)


PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


class _Array:
    """The memory of an argument that is an array."""

    def __init__(self, data, shape):
        self.data, self.shape = data, shape


def array_of(context, builder, signature, arguments, place):
    array = context.make_array(signature.args[place])(context, builder, arguments[place])
    return _Array(array.data, cgutils.unpack_tuple(builder, array.shape))


def without_result(generate):
    def code(context, builder, signature, arguments):
        generate(context, builder, signature, arguments)
        return context.get_dummy_value()

    return code


def loop(builder, begin, end, step, count, body, kind):
    """Call the body for each place in range(begin, end, step), of which there is one at least. It gets `count` vectors of this
    kind, at first zeros, and returns the next ones. Returns the last ones."""
    before, inside, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(inside)
    builder.position_at_end(inside)
    place = builder.phi(begin.type)
    vectors = [builder.phi(kind) for _ in range(count)]
    following = body(place, vectors)
    end_of_body = builder.block  # it may have loops of its own
    next_place = builder.add(place, begin.type(step))
    place.add_incoming(begin, before)
    place.add_incoming(next_place, end_of_body)
    for vector, new in zip(vectors, following, strict=True):
        vector.add_incoming(ir.Constant(kind, None), before)
        vector.add_incoming(new, end_of_body)
    builder.cbranch(builder.icmp_signed("<", next_place, end), inside, after)
    builder.position_at_end(after)
    return following


def hidden(builder, number):
    """The number, of which the compiler then knows nothing: it leaves a loop of so many rounds as it is written."""
    kind = ir.FunctionType(number.type, [number.type])
    return builder.asm(kind, "", "=r,0", [number], side_effect=False)


def added(builder, given, wide, totals):
    """The next totals: total + given * wide for each of both."""
    kind = wide[0].type
    multiply = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{kind.count}f32"
    )
    pairs = [(left, right) for left in given for right in wide]
    return [builder.call(multiply, [left, right, total]) for (left, right), total in zip(pairs, totals, strict=True)]


def load(builder, pointer, count):
    """A vector of `count` numbers."""
    vector = ir.VectorType(pointer.type.pointee, count)
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    loaded.align = 1
    return loaded


def wide(builder, pointer, kind, count=LANES):
    """A vector of `count` numbers, in float32."""
    loaded, whole = load(builder, pointer, count), ir.VectorType(INT32, count)
    if kind == types.uint16:
        bits = builder.shl(builder.zext(loaded, whole), ir.Constant(whole, [16] * count))
        return builder.bitcast(bits, ir.VectorType(FLOAT32, count))
    return loaded


def two(builder, pointer, kind):
    """The weights of a vector of outputs for two inputs, in float32."""
    if kind != types.uint16:
        return load(builder, pointer, LANES), load(builder, builder.gep(pointer, [INT32(OUTPUTS)]), LANES)
    whole = ir.VectorType(INT32, LANES)
    pairs = load(builder, builder.bitcast(pointer, INT32.as_pointer()), LANES)
    lower = builder.shl(pairs, ir.Constant(whole, [16] * LANES))
    higher = builder.and_(pairs, ir.Constant(whole, [0xFFFF0000] * LANES))
    return [builder.bitcast(bits, ir.VectorType(FLOAT32, LANES)) for bits in (lower, higher)]


def same(builder, number, lanes=LANES):
    """A vector of one number."""
    one = builder.insert_element(ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined), number, INT32(0))
    return picked(builder, one, one, [0] * lanes)


def place_in(builder, array, row, column):
    """Where a number of a matrix is."""
    return builder.gep(array.data, [builder.add(builder.mul(row, array.shape[1]), column)])


def store(builder, vector, pointer):
    """Write the numbers of a vector from here on."""
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer())).align = 1


def add_to(builder, vector, out, row, column):
    """out[row, column:] += the numbers of a vector."""
    pointer = place_in(builder, out, row, column)
    store(builder, builder.fadd(load(builder, pointer, vector.type.count), vector), pointer)


def store_scores(builder, sums, out, row, column):
    """out[row:, column : column + POSITIONS_TOGETHER] = the sums: POSITIONS_TOGETHER for each row."""
    index, to = row.type, 0
    for vector in sums:
        for begin in range(0, vector.type.count, POSITIONS_TOGETHER):
            part = picked(builder, vector, vector, range(begin, begin + POSITIONS_TOGETHER))
            store(builder, part, place_in(builder, out, builder.add(row, index(to)), column))
            to += 1


def fetch(builder, pointer, ahead, length):
    """Ask for the `length` bytes from `ahead` bytes after `pointer` on. Asking for what lies behind the array does no harm."""
    prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [_BYTES] + [INT32] * 3), "llvm.prefetch.p0"
    )
    begin = builder.bitcast(pointer, _BYTES)
    for offset in range(ahead, ahead + length, 64):
        builder.call(prefetch, [builder.gep(begin, [INT32(offset)]), INT32(0), INT32(3), INT32(1)])


def sums(builder, vectors, lanes):
    """The sums of each `lanes` numbers of the vectors, in vectors. Halves are added until one number is left of each sum, and two
    vectors share each addition."""
    while lanes > 1:
        half, added = lanes // 2, []
        for number in range(0, len(vectors), 2):
            one, *more = vectors[number : number + 2]
            count = sum(vector.type.count for vector in (one, *more)) // lanes
            low, high = (
                [sum_ * lanes + begin + lane for sum_ in range(count) for lane in range(half)] for begin in (0, half)
            )
            other = more[0] if more else one
            added.append(builder.fadd(picked(builder, one, other, low), picked(builder, one, other, high)))
        vectors, lanes = added, half
    return vectors


def picked(builder, one, other, lanes):
    """A vector of these lanes of two vectors."""
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes)))
