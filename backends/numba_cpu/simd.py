"""A vector register as a Numba type, and the few operations on it that the kernels are made of.

A vector may have more lanes than a register of the machine: LLVM then takes several, or narrower
ones, so one source serves AVX-512, AVX2 and NEON. Arrays are one-dimensional and contiguous,
offsets count their elements and are not checked. `lanes` is a constant of the kernel's source.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import make_array, populate_array

from srigl_core.backends.numba_cpu.processor import has_half_precision

__all__ = [
    "VectorType",
    "add",
    "count_ones",
    "first_lane",
    "flat",
    "fma",
    "fold_product",
    "gather",
    "is_finite",
    "load",
    "load_four",
    "load_quad",
    "look_up_pair",
    "shift_right",
    "splat",
    "splat_lane",
    "store",
    "sum_each",
    "transpose",
    "zeros",
]

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LLVM = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.int16: _I16,
    types.int32: _I32,
}
_NO_NAN_RULES = ("contract",)


class VectorType(types.Type):  # type: ignore[misc]
    """`lanes` numbers of one type, held in registers."""

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"vector({element} x {lanes})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, ir.VectorType(_LLVM[vector.element], vector.lanes))


def _constant_lanes(lanes: Any) -> int:
    if not isinstance(lanes, types.IntegerLiteral):
        raise TypingError("the number of lanes must be a constant of the source")
    return int(lanes.literal_value)


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    return builder.gep(make_array(array_type)(context, builder, array).data, [offset])


def _read(builder: Any, address: Any, kind: Any, align: int) -> Any:
    value = builder.load(builder.bitcast(address, kind.as_pointer()))
    value.align = align
    return value


def _repeat(builder: Any, scalar: Any, lanes: int) -> Any:
    one = ir.VectorType(scalar.type, 1)
    single = builder.insert_element(ir.Constant(one, ir.Undefined), scalar, _I32(0))
    return _shuffle(builder, single, single, [0] * lanes)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


@intrinsic(prefer_literal=True)
def zeros(typing_context: Any, like: Any, lanes: Any) -> Any:
    """Return `lanes` zeros of the element type of the array `like`."""
    vector = VectorType(like.dtype, _constant_lanes(lanes))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(vector), None)

    return vector(like, lanes), generate


@intrinsic(prefer_literal=True)
def splat(typing_context: Any, scalar: Any, lanes: Any) -> Any:
    """Return a vector that has `scalar`, float32 or float64, in each lane."""
    vector = VectorType(scalar, _constant_lanes(lanes))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _repeat(builder, args[0], vector.lanes)

    return vector(scalar, lanes), generate


@intrinsic(prefer_literal=True)
def splat_lane(typing_context: Any, source: Any, lane: Any, lanes: Any) -> Any:
    """Return a vector that has the lane `lane`, a constant, of `source` in each lane."""
    vector = VectorType(source.element, _constant_lanes(lanes))
    chosen = _constant_lanes(lane)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _shuffle(builder, args[0], args[0], [chosen] * vector.lanes)

    return vector(source, lane, lanes), generate


@intrinsic(prefer_literal=True)
def load(typing_context: Any, array: Any, offset: Any, lanes: Any) -> Any:
    """Return ``array[offset : offset + lanes]``.

    float32, float64 and int32 as they are; bits of 16-bit numbers, as `value_types.as_bits` gives
    them, as float32: uint16 are float16's, int16 are bfloat16's.
    """
    kind, n = array.dtype, _constant_lanes(lanes)
    if kind not in (types.uint16, *_LLVM):
        raise TypingError(f"no vectors of {kind}")
    vector = VectorType(types.float32 if kind in (types.uint16, types.int16) else kind, n)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        stored = context.get_data_type(kind)
        raw = _read(builder, address, ir.VectorType(stored, n), kind.bitwidth // 8)
        if kind == types.int16:
            wide = builder.zext(raw, ir.VectorType(_I32, n))
            shift = ir.Constant(wide.type, [16] * n)
            return builder.bitcast(builder.shl(wide, shift), ir.VectorType(ir.FloatType(), n))
        if kind == types.uint16:
            return _halves_as_floats(builder, raw)
        return raw

    return vector(array, types.uintp, lanes), generate


def _halves_as_floats(builder: Any, raw: Any) -> Any:
    """Convert float16 bits, without the instruction as `value_types` does for scalars."""
    n = raw.type.count
    integers, floats = ir.VectorType(_I32, n), ir.VectorType(ir.FloatType(), n)
    if has_half_precision():
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), n)), floats)

    def constant(number: int) -> Any:
        return ir.Constant(integers, [number] * n)

    wide = builder.zext(raw, integers)
    moved = builder.shl(builder.and_(wide, constant(0x7FFF)), constant(13))
    scale = ir.Constant(floats, [2.0**112] * n)
    scaled = builder.fmul(builder.bitcast(moved, floats), scale)
    bits = builder.bitcast(scaled, integers)
    special = builder.fcmp_ordered(">=", scaled, ir.Constant(floats, [65536.0] * n))
    bits = builder.select(special, builder.or_(bits, constant(0x7F800000)), bits)
    sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(bits, sign), floats)


@intrinsic
def load_four(typing_context: Any, array: Any, offset: Any) -> Any:
    """Return the four numbers from ``array[offset]`` on, to be told out by `splat_lane`."""
    vector = VectorType(array.dtype, 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        return _read(builder, address, context.get_value_type(vector), array.dtype.bitwidth // 8)

    return vector(array, types.uintp), generate


@intrinsic
def load_quad(typing_context: Any, array: Any, offset: Any) -> Any:
    """Return four elements of a uint8 or uint16 array as one uint64, the first lowest."""
    bits = array.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        packed = _read(builder, address, ir.IntType(4 * bits), 1)
        return packed if bits == 16 else builder.zext(packed, _I64)

    if array.dtype not in (types.uint8, types.uint16):
        raise TypingError(f"no quads of {array.dtype}")
    return types.uint64(array, types.uintp), generate


@intrinsic
def store(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write `vector` to ``array[offset : offset + lanes]``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        place = builder.bitcast(address, args[2].type.as_pointer())
        builder.store(args[2], place).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    if array.dtype != vector.element:
        raise TypingError(f"{vector} does not go into an array of {array.dtype}")
    return types.void(array, types.uintp, vector), generate


@intrinsic
def add(typing_context: Any, a: Any, b: Any) -> Any:
    """Return ``a + b``, lane by lane."""
    return a(a, b), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, lane by lane, in one rounding where the machine has the instruction.

    Not LLVM's own fma, which calls a C function for each lane on a machine that has not.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(args[0], args[1], flags=_NO_NAN_RULES)
        return builder.fadd(product, args[2], flags=_NO_NAN_RULES)

    return a(a, b, c), generate


@intrinsic
def shift_right(typing_context: Any, vector: Any, bits: Any) -> Any:
    """Return an int32 vector with each lane shifted right by `bits`, zeros coming in."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = builder.trunc(args[1], _I32)
        return builder.lshr(args[0], _repeat(builder, count, vector.lanes))

    return vector(vector, types.uintp), generate


@intrinsic
def look_up_pair(typing_context: Any, low: Any, indices: Any, high: Any) -> Any:
    """Return lane i of ``concatenate(low, high)[indices[i] % 32]``; needs AVX-512.

    One instruction, ``vpermi2ps``. Compiling it for a processor without it ends the process: see
    `processor.has_avx512`.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = [arg.type for arg in args]
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kinds[0], kinds),
            "llvm.x86.avx512.vpermi2var.ps.512",
        )
        return builder.call(function, args)

    return low(low, indices, high), generate


@intrinsic(prefer_literal=True)
def transpose(
    typing_context: Any,
    source: Any,
    source_offsets: Any,
    target: Any,
    target_offset: Any,
    target_stride: Any,
    lanes: Any,
) -> Any:
    """Transpose a square of `lanes` rows and columns, a power of two.

    Row i of the square starts at ``source[source_offsets[i]]`` and becomes column i of the rows
    that start at ``target[target_offset + j * target_stride]``. `source_offsets` is a function of
    i, given as base, stride and last: ``base + min(i, last) * stride``.
    """
    n = _constant_lanes(lanes)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, stride, last = cgutils.unpack_tuple(builder, args[1], 3)
        vector = ir.VectorType(context.get_data_type(source.dtype), n)
        align = source.dtype.bitwidth // 8
        rows = []
        for i in range(n):
            row = _I64(i)
            within = builder.select(builder.icmp_unsigned("<", row, last), row, last)
            offset = builder.add(base, builder.mul(within, stride))
            address = _address(context, builder, signature.args[0], args[0], offset)
            rows.append(_read(builder, address, vector, align))
        for j, row in enumerate(_transposed(builder, rows)):
            offset = builder.add(args[3], builder.mul(args[4], _I64(j)))
            address = _address(context, builder, signature.args[2], args[2], offset)
            builder.store(row, builder.bitcast(address, vector.as_pointer())).align = align
        return context.get_dummy_value()

    offsets = types.UniTuple(types.uintp, 3)
    signature = types.void(source, offsets, target, types.uintp, types.uintp, lanes)
    return signature, generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Exchange bit after bit of the row number with that of the lane number."""
    n = len(rows)
    distance = 1
    while distance < n:
        low = [lane if not lane & distance else n + lane - distance for lane in range(n)]
        high = [lane + distance if not lane & distance else n + lane for lane in range(n)]
        for i in range(n):
            if not i & distance:
                a, b = rows[i], rows[i + distance]
                rows[i] = _shuffle(builder, a, b, low)
                rows[i + distance] = _shuffle(builder, a, b, high)
        distance *= 2
    return rows


@intrinsic
def flat(typing_context: Any, array: Any) -> Any:
    """Return a contiguous array as a one-dimensional one of the same memory.

    Whatever the number of axes and whether it may be written, the type is the same, so that a
    kernel is compiled for it once. The caller sees to it that an input is not written.
    """
    if array.layout not in "CF":
        raise TypingError("only a contiguous array can be seen as flat")
    line = types.Array(array.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = make_array(array)(context, builder, args[0])
        seen = make_array(line)(context, builder)
        populate_array(
            seen,
            data=given.data,
            shape=[given.nitems],
            strides=[given.itemsize],
            itemsize=given.itemsize,
            meminfo=given.meminfo,
            parent=given.parent,
        )
        return impl_ret_borrowed(context, builder, line, seen._getvalue())

    return line(array), generate


@intrinsic(prefer_literal=True)
def gather(typing_context: Any, array: Any, indices: Any, offset: Any, lanes: Any) -> Any:
    """Return ``array[indices[offset : offset + lanes]]`` for indices of uint16 or uint32.

    One load for each lane, and one for each 8 bytes of indices: faster than the gather instructions
    of the processors that have them.
    """
    vector = VectorType(array.dtype, _constant_lanes(lanes))
    bits = indices.dtype.bitwidth
    at_once = 64 // bits

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = ir.Constant(context.get_value_type(vector), ir.Undefined)
        for lane in range(vector.lanes):
            if lane % at_once == 0:
                place = builder.add(args[2], _I64(lane))
                packed = _address(context, builder, indices, args[1], place)
                packed = _read(builder, packed, _I64, bits // 8)
            where = builder.lshr(packed, _I64(bits * (lane % at_once)))
            where = builder.and_(where, _I64((1 << bits) - 1))
            element = builder.load(_address(context, builder, array, args[0], where))
            result = builder.insert_element(result, element, _I32(lane))
        return result

    if indices.dtype not in (types.uint16, types.uint32):
        raise TypingError(f"no gather by indices of {indices.dtype}")
    return vector(array, indices, types.uintp, lanes), generate


@intrinsic(prefer_literal=True)
def fold_product(typing_context: Any, a: Any, b: Any, lanes: Any) -> Any:
    """Return ``a * b`` with its parts of `lanes` lanes added up, one after the other."""
    n = _constant_lanes(lanes)
    result = VectorType(a.element, n)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = None
        for start in range(0, a.lanes, n):
            part = list(range(start, start + n))
            product = builder.fmul(
                _shuffle(builder, args[0], args[0], part),
                _shuffle(builder, args[1], args[1], part),
                flags=_NO_NAN_RULES,
            )
            total = product if total is None else builder.fadd(total, product, flags=_NO_NAN_RULES)
        return total

    return result(a, b, lanes), generate


@intrinsic
def sum_each(typing_context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return a vector of four: the sums over the lanes of four vectors, halves added to halves."""
    result = VectorType(a.element, 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def halved(numbers: int, pieces: int, left: Any, right: Any) -> Any:
            """Add the second half of each piece to the first; `numbers` of left and right."""
            size = left.type.count // pieces
            first = [i for i in range(numbers) if i % size < size // 2]
            second = [i for i in range(numbers) if i % size >= size // 2]
            return builder.fadd(
                _shuffle(builder, left, right, first), _shuffle(builder, left, right, second)
            )

        both = 2 * a.lanes
        total = halved(both, 2, halved(both, 1, *args[:2]), halved(both, 1, *args[2:]))
        while total.type.count > 4:
            total = halved(total.type.count, 4, total, total)
        return total

    return result(a, b, c, d), generate


@intrinsic
def first_lane(typing_context: Any, vector: Any) -> Any:
    """Return the number in the first lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], _I32(0))

    return vector.element(vector), generate


@intrinsic
def is_finite(typing_context: Any, vector: Any) -> Any:
    """Whether no lane is NaN or infinite."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nought = builder.fsub(args[0], args[0])
        lanes = builder.fcmp_unordered("une", nought, ir.Constant(nought.type, None))
        packed = builder.bitcast(lanes, ir.IntType(vector.lanes))
        return builder.icmp_unsigned("==", packed, packed.type(0))

    return types.boolean(vector), generate


@intrinsic
def count_ones(typing_context: Any, bits: Any) -> Any:
    """Return how many bits of an integer are set."""
    return bits(bits), lambda context, builder, signature, args: builder.ctpop(args[0])
