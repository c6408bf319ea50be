"""Several vectors at once, one for each of the neurons that a kernel computes in lockstep.

A tuple of `simd.VectorType` stays in registers. An operation on a tuple is one instruction for each
vector and register, and these do not wait for each other.

Offsets of rows of a tile are uint16 and count units of `UNIT` bytes, the largest factor that an
address of x86 can have. Four of them, or four values, are read at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from srigl_core.backends.numba_cpu.processor import vector_bytes
from srigl_core.backends.numba_cpu.simd import (
    VectorType,
    _address,
    _constant_lanes,
    _read,
    _shuffle,
    widened,
)

__all__ = ["UNIT", "accumulate", "load_each", "multiply", "store_each", "zeros_each"]

UNIT = 8
"""Bytes that an offset of a row counts."""

_I64 = ir.IntType(64)
_FUSED = ("contract",)
_REGISTER_CONSTRAINTS = {"x86": "v", "i686": "v", "aarch64": "w", "arm64": "w"}
"""How inline assembly names a vector register, by the start of LLVM's triple."""


def _tuple_type(element: Any, lanes: int, count: int) -> Any:
    return types.UniTuple(VectorType(element, lanes), count)


@intrinsic(prefer_literal=True)
def zeros_each(typing_context: Any, like: Any, count: Any, lanes: Any) -> Any:
    """Return `count` vectors of `lanes` zeros of the element type of the array `like`."""
    result = _tuple_type(like.dtype, _constant_lanes(lanes), _constant_lanes(count))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(result), None)

    return result(like, count, lanes), generate


@intrinsic(prefer_literal=True)
def load_each(
    typing_context: Any, array: Any, base: Any, rows: Any, at: Any, count: Any, lanes: Any
) -> Any:
    """Return `count` vectors; the n-th starts at ``array[base + rows[at + n] * lanes]``."""
    n_lanes, n = _constant_lanes(lanes), _constant_lanes(count)
    result = _tuple_type(array.dtype, n_lanes, n)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(context.get_data_type(array.dtype), n_lanes)
        places = _row_places(context, builder, signature, args, n, vector)
        align = array.dtype.bitwidth // 8
        return context.make_tuple(
            builder, result, [_read(builder, place, vector, align) for place in places]
        )

    return result(array, types.uintp, rows, types.uintp, count, lanes), generate


@intrinsic
def store_each(typing_context: Any, array: Any, base: Any, rows: Any, at: Any, vectors: Any) -> Any:
    """Write each of the vectors to where `load_each` reads it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = cgutils.unpack_tuple(builder, args[4], vectors.count)
        places = _row_places(context, builder, signature, args, vectors.count, parts[0].type)
        for part, place in zip(parts, places, strict=True):
            pointer = builder.bitcast(place, part.type.as_pointer())
            builder.store(part, pointer).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.uintp, rows, types.uintp, vectors), generate


def _row_places(
    context: Any, builder: Any, signature: Any, args: Any, count: int, vector: Any
) -> list[Any]:
    """Return the addresses ``array[base + rows[at + n] * lanes]`` for n below `count`."""
    array, _, rows = signature.args[:3]
    places = []
    for n in range(count):
        where = builder.add(args[3], _I64(n))
        row = builder.load(_address(context, builder, rows, args[2], where))
        step = builder.mul(builder.zext(row, _I64), _I64(vector.count))
        places.append(_address(context, builder, array, args[0], builder.add(args[1], step)))
    return places


@intrinsic
def accumulate(
    typing_context: Any, totals: Any, values: Any, offsets: Any, at: Any, tile: Any
) -> Any:
    """Return the sums after one step: one more connection for each neuron, or a few.

    A step has as many connections as there are neurons, and at least four. Connection e of it, with
    ``values[at + e]`` and the row of the tile at ``offsets[at + e]``, belongs to neuron ``e % n``.
    Narrow values become float32.
    """
    vector = totals.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums = cgutils.unpack_tuple(builder, args[0], totals.count)
        first_row = _address(context, builder, tile, args[4], _I64(0))
        tiles = _tile_rows(context, builder, first_row, vector)
        for first in range(0, max(4, totals.count), 4):
            place = builder.add(args[3], _I64(first))
            four = _four_values(context, builder, values, args[1], place, vector)
            rows = tiles(_four_offsets(context, builder, offsets, args[2], place))
            for j, row in enumerate(rows):
                n = (first + j) % totals.count
                product = builder.fmul(_spread(builder, four, j, vector.lanes), row, flags=_FUSED)
                sums[n] = builder.fadd(product, sums[n], flags=_FUSED)
        return context.make_tuple(builder, totals, sums)

    return totals(totals, values, offsets, types.uintp, tile), generate


def _four_offsets(context: Any, builder: Any, offsets: Any, array: Any, at: Any) -> Any:
    return _read(builder, _address(context, builder, offsets, array, at), _I64, 2)


def _tile_rows(context: Any, builder: Any, first_row: Any, vector: VectorType) -> Any:
    """Return a function that reads the four rows of a tile that a uint64 has the offsets of."""
    start = builder.bitcast(first_row, ir.IntType(8).as_pointer())
    llvm_vector = context.get_value_type(vector)
    align = min(64, vector.lanes * vector.element.bitwidth // 8)

    def rows(packed: Any) -> list[Any]:
        read = []
        for j in range(4):
            offset = builder.and_(builder.lshr(packed, _I64(16 * j)), _I64(0xFFFF))
            place = builder.gep(start, [builder.mul(offset, _I64(UNIT))])
            read.append(_read(builder, place, llvm_vector, align))
        return read

    return rows


def _four_values(
    context: Any, builder: Any, values: Any, array: Any, at: Any, vector: VectorType
) -> Any:
    """Return ``values[at : at + 4]``, repeated to fill a register, in a way that hides the load.

    If LLVM knew that the lanes come from memory, it would load each value again to spread it, and
    loads are what limits the kernel.
    """
    stored = ir.VectorType(context.get_data_type(values.dtype), 4)
    address = _address(context, builder, values, array, at)
    raw = _read(builder, address, stored, values.dtype.bitwidth // 8)
    four = widened(builder, raw, values.dtype)
    lanes = vector_bytes() // (vector.element.bitwidth // 8)
    if lanes < 4:
        return four
    four = _shuffle(builder, four, four, [i % 4 for i in range(min(lanes, vector.lanes))])
    triple = binding.get_default_triple()
    for start, constraint in _REGISTER_CONSTRAINTS.items():
        if triple.startswith(start):
            hidden = ir.FunctionType(four.type, [four.type])
            return builder.asm(hidden, "", f"={constraint},0", [four], False)
    return four


def _spread(builder: Any, four: Any, chosen: int, lanes: int) -> Any:
    """Return `lanes` times number `chosen` of four that fill a register."""
    n = four.type.count
    within = _shuffle(builder, four, four, [i // 4 * 4 + chosen for i in range(n)])
    return _shuffle(builder, within, within, [i % n for i in range(lanes)])


@intrinsic(prefer_literal=True)
def multiply(
    typing_context: Any, factors: Any, offsets: Any, at: Any, tile: Any, start: Any, lanes: Any
) -> Any:
    """Return the sums over the lanes of ``factors * rows``, one for each connection of a step.

    The connections of a step are those of `accumulate`, and the tile starts at ``tile[start]``. The
    products are first added to vectors of `lanes` lanes, in order, and then lane by lane.
    """
    vector, part = factors.dtype, _constant_lanes(lanes)
    n_sums = max(4, factors.count)
    result = VectorType(vector.element, n_sums)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        own = cgutils.unpack_tuple(builder, args[0], factors.count)
        first_row = _address(context, builder, tile, args[3], args[4])
        tiles = _tile_rows(context, builder, first_row, vector)
        products: list[Any] = []
        for first in range(0, n_sums, 4):
            place = builder.add(args[2], _I64(first))
            for row in tiles(_four_offsets(context, builder, offsets, args[1], place)):
                factor = own[len(products) % factors.count]
                products.append(_folded_product(builder, factor, row, part))
        sums = [_lane_sums(builder, products[i : i + part]) for i in range(0, n_sums, part)]
        while len(sums) > 1:
            both = list(range(2 * sums[0].type.count))
            sums = [_shuffle(builder, sums[i], sums[i + 1], both) for i in range(0, len(sums), 2)]
        return sums[0]

    return result(factors, offsets, types.uintp, tile, types.uintp, lanes), generate


def _folded_product(builder: Any, a: Any, b: Any, lanes: int) -> Any:
    """Return the sum, in order, of the parts of ``a * b`` that have `lanes` lanes each."""
    total = None
    for start in range(0, a.type.count, lanes):
        part = list(range(start, start + lanes))
        product = builder.fmul(
            _shuffle(builder, a, a, part), _shuffle(builder, b, b, part), flags=_FUSED
        )
        total = product if total is None else builder.fadd(total, product, flags=_FUSED)
    return total


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """Return the lane sums of vectors, a power of two of at most as many as they have lanes.

    Each round adds two halves of each vector, and merges two vectors. The first rounds move numbers
    within parts of 128 bits, the others move such parts: processors have quick instructions for
    both.
    """
    n = vectors[0].type.count
    in_part = 16 // (8 if vectors[0].type.element == ir.DoubleType() else 4)
    piece = 1
    while piece < in_part:
        firsts = [
            source * n + start + at + i
            for start in range(0, n, in_part)
            for at in range(0, in_part // 2, piece)
            for source in (0, 1)
            for i in range(piece)
        ]
        seconds = [lane + in_part // 2 for lane in firsts]
        vectors = _merged_pairs(builder, vectors, firsts, seconds)
        piece *= 2
    while vectors[0].type.count > piece:
        count = len(vectors)
        lanes = range(min(count, 2) * vectors[0].type.count)
        firsts = [i for i in lanes if i // in_part % 2 == 0]
        seconds = [i for i in lanes if i // in_part % 2]
        vectors = _merged_pairs(builder, vectors, firsts, seconds)
        piece *= 2 if count > 1 else 1
    return vectors[0]


def _merged_pairs(
    builder: Any, vectors: list[Any], firsts: list[int], seconds: list[int]
) -> list[Any]:
    """Return lanes `firsts` plus lanes `seconds` of each pair of vectors, or of the last one."""
    pairs = zip(vectors[::2], vectors[1::2] or vectors, strict=True)
    return [
        builder.fadd(_shuffle(builder, *pair, firsts), _shuffle(builder, *pair, seconds))
        for pair in pairs
    ]
