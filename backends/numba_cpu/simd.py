"""A vector register as a Numba type, and the operations on it that the kernels use.

A vector may have more lanes than a register of the machine. LLVM then uses several registers, so
that one source serves AVX-512, AVX2 and NEON. Arrays are one-dimensional and contiguous. Offsets
count elements, and are not checked. `lanes` is a constant in the kernel's source.
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
from srigl_core.backends.numba_cpu.value_types import from_bfloat16, from_half, from_int8

__all__ = [
    "VectorType",
    "add",
    "first_lane",
    "flat",
    "fma",
    "gather",
    "load",
    "load_quad",
    "repeated",
    "splat",
    "store",
    "transpose",
    "widened",
    "zeros",
]

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LLVM = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.int16: _I16,
    types.int32: _I32,
}
_NARROW = (types.int8, types.uint16, types.int16)
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


def _read(builder: Any, address: Any, llvm_type: Any, align: int) -> Any:
    value = builder.load(builder.bitcast(address, llvm_type.as_pointer()))
    value.align = align
    return value


def repeated(builder: Any, scalar: Any, lanes: int) -> Any:
    """Return an LLVM vector with `scalar` in each lane."""
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
    """Return a vector with `scalar`, float32 or float64, in each lane."""
    vector = VectorType(scalar, _constant_lanes(lanes))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return repeated(builder, args[0], vector.lanes)

    return vector(scalar, lanes), generate


@intrinsic(prefer_literal=True)
def load(typing_context: Any, array: Any, offset: Any, lanes: Any) -> Any:
    """Return ``array[offset : offset + lanes]``.

    float32, float64 and int32 stay as they are. Values of fewer bits, from `value_types.as_bits`,
    become float32: int8, uint16 that holds float16, and int16 that holds bfloat16.
    """
    dtype, n = array.dtype, _constant_lanes(lanes)
    if dtype not in (*_NARROW, *_LLVM):
        raise TypingError(f"no vectors of {dtype}")
    vector = VectorType(types.float32 if dtype in _NARROW else dtype, n)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        raw = _read(
            builder, address, ir.VectorType(context.get_data_type(dtype), n), dtype.bitwidth // 8
        )
        return widened(builder, raw, dtype)

    return vector(array, types.uintp, lanes), generate


def widened(builder: Any, raw: Any, dtype: Any) -> Any:
    """Return a vector as it was read from an array of `dtype`, with narrow numbers as float32."""
    if dtype == types.int8:
        return from_int8(builder, raw)
    if dtype == types.int16:
        return from_bfloat16(builder, raw)
    if dtype == types.uint16 and has_half_precision():
        n = raw.type.count
        halves = builder.bitcast(raw, ir.VectorType(ir.HalfType(), n))
        return builder.fpext(halves, ir.VectorType(ir.FloatType(), n))
    if dtype == types.uint16:
        return from_half(builder, raw)
    return raw


@intrinsic
def load_quad(typing_context: Any, array: Any, offset: Any) -> Any:
    """Return four elements of a uint8 or uint16 array as one uint64, the first in the low bits."""
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
    is_float = a.element in (types.float32, types.float64)
    return (
        a(a, b),
        lambda context, builder, signature, args: (
            builder.fadd(*args) if is_float else builder.add(*args)
        ),
    )


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, lane by lane, rounded once if the machine has the instruction.

    LLVM's own fma would call a C function for each lane on a machine without it.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(args[0], args[1], flags=_NO_NAN_RULES)
        return builder.fadd(product, args[2], flags=_NO_NAN_RULES)

    return a(a, b, c), generate


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

    `source_offsets` is a tuple (base, stride, last). Row i of the square starts at
    ``source[base + min(i, last) * stride]``. It becomes column i of a square whose row j starts at
    ``target[target_offset + j * target_stride]``.
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
    """Exchange each bit of the row number with the same bit of the lane number."""
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
    """Return a one-dimensional view of a contiguous array.

    The view has the same Numba type for any number of axes, read-only or not, so that a kernel is
    compiled only once. The caller must not write to a read-only array.
    """
    if array.layout not in "CF":
        raise TypingError("only a contiguous array has a flat view")
    line = types.Array(array.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        original = make_array(array)(context, builder, args[0])
        view = make_array(line)(context, builder)
        populate_array(
            view,
            data=original.data,
            shape=[original.nitems],
            strides=[original.itemsize],
            itemsize=original.itemsize,
            meminfo=original.meminfo,
            parent=original.parent,
        )
        return impl_ret_borrowed(context, builder, line, view._getvalue())

    return line(array), generate


@intrinsic(prefer_literal=True)
def gather(typing_context: Any, array: Any, indices: Any, offset: Any, lanes: Any) -> Any:
    """Return ``array[indices[offset : offset + lanes]]`` for indices of uint16 or uint32.

    This makes one load for each lane, and one for each 8 bytes of indices. That is faster than the
    gather instructions of processors.
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


@intrinsic
def first_lane(typing_context: Any, vector: Any) -> Any:
    """Return the number in the first lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], _I32(0))

    return vector.element(vector), generate
