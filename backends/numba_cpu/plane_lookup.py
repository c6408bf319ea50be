"""Numbers split into planes of bytes, and looked up there 64 at a time; needs AVX-512 VBMI.

A block of 64 float32 becomes four planes, each one register of 64 bytes: plane p has byte p of each
number. One instruction looks up 64 bytes in a plane of two blocks. Four of them, one for each
plane, give the bytes of 64 numbers. A block, and its planes, are 64 lanes of int32 here.

Compiling these functions for a processor without the instruction ends the process. Check
`processor.has_byte_lookup` first, and for `add_products`, which needs VNNI, `has_byte_products`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from srigl_core.backends.numba_cpu.simd import VectorType

__all__ = [
    "BLOCK",
    "INDEX_WORDS",
    "PADDING",
    "add_products",
    "look_up",
    "place_of_lane",
    "split",
    "widen_pairs",
]

BLOCK = 64
"""Numbers in a block, and lanes of a lookup."""

INDEX_WORDS = BLOCK // 4
"""Numbers of int32 that hold the indices of a lookup, one byte each."""

PADDING = 1 << 7
"""Index of no number: a lane with it gets 0.0, whatever the planes hold."""

_NUMBERS, _PLANES = VectorType(types.float32, BLOCK), VectorType(types.int32, BLOCK)
_INDICES = VectorType(types.int32, INDEX_WORDS)
_LOOK_UP = "llvm.x86.avx512.vpermi2var.qi.512"
_ADD_PRODUCTS = "llvm.x86.avx512.vpdpbusd.512"


def _vector(bits: int, lanes: int) -> Any:
    return ir.VectorType(ir.IntType(bits), lanes)


def place_of_lane() -> Any:
    """Return, for each lane of a lookup, the place of its index among the 64 index bytes.

    Bytes become numbers within each quarter of a register, which takes one cycle less.
    """
    register, lane = np.divmod(np.arange(BLOCK), BLOCK // 4)
    return 16 * (lane // 4) + 4 * register + lane % 4


@intrinsic
def widen_pairs(typing_context: Any, pairs: Any) -> Any:
    """Return 64 float32 from 32 pairs of bfloat16, each an int32.

    The first 32 numbers are those of the first 16 pairs: first all that lie in the low bits, then
    those in the high bits. Loading 16-bit numbers in order would take an instruction more for each
    register.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        quarter = _vector(32, 16)
        registers = []
        for start in (0, 16):
            both = _shuffle(builder, args[0], args[0], list(range(start, start + 16)))
            registers.append(builder.shl(both, ir.Constant(quarter, [16] * 16)))
            registers.append(builder.and_(both, ir.Constant(quarter, [0xFFFF0000] * 16)))
        numbers = _concatenated(builder, registers)
        return builder.bitcast(numbers, ir.VectorType(ir.FloatType(), BLOCK))

    if pairs != VectorType(types.int32, BLOCK // 2):
        raise TypingError(f"cannot widen {pairs}")
    return _NUMBERS(pairs), generate


@intrinsic
def split(typing_context: Any, numbers: Any) -> Any:
    """Return the planes of 64 float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        registers = _registers(builder, args[0], _vector(8, BLOCK))
        planes = []
        for pair in ((0, 1), (2, 3)):
            order = [4 * number + plane for plane in pair for number in range(BLOCK // 2)]
            halves = [_shuffle(builder, registers[i], registers[i + 1], order) for i in (0, 2)]
            for start in (0, BLOCK // 2):
                lanes = [half + start + i for half in (0, BLOCK) for i in range(BLOCK // 2)]
                planes.append(_shuffle(builder, halves[0], halves[1], lanes))
        return builder.bitcast(_concatenated(builder, planes), _vector(32, BLOCK))

    if numbers != _NUMBERS:
        raise TypingError(f"cannot split {numbers}")
    return _PLANES(numbers), generate


@intrinsic
def look_up(typing_context: Any, low: Any, indices: Any, high: Any) -> Any:
    """Return 64 float32 from the planes of two blocks.

    Byte ``place_of_lane()[i]`` of `indices` is the index of lane i: 0 to 63 for a number of the
    first block, 64 to 127 for one of the second, `PADDING` for 0.0.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        register = _vector(8, BLOCK)
        first, last = (_registers(builder, args[i], register) for i in (0, 2))
        index, zero = builder.bitcast(args[1], register), ir.Constant(register, None)
        is_connected = builder.icmp_signed(">=", index, zero)
        looked_up = [
            builder.select(is_connected, _call(builder, _LOOK_UP, a, index, b), zero)
            for a, b in zip(first, last, strict=True)
        ]
        numbers = _concatenated(builder, _joined(builder, looked_up))
        return builder.bitcast(numbers, ir.VectorType(ir.FloatType(), BLOCK))

    if (low, indices, high) != (_PLANES, _INDICES, _PLANES):
        raise TypingError(f"cannot look up {indices} in {low} and {high}")
    return _NUMBERS(low, indices, high), generate


@intrinsic
def add_products(
    typing_context: Any, totals: Any, low: Any, indices: Any, high: Any, weights: Any
) -> Any:
    """Return int32 sums after a step: each lane adds four products of a byte and a weight.

    Batch row r has the lanes ``16 * r`` to ``16 * r + 15`` of `totals`, and of `low` and `high`,
    which hold the two blocks of its bytes. The 64 bytes of `indices` and `weights` are shared: byte
    i is the index of an unsigned byte, as in `look_up` but with any byte for `PADDING`, and a
    signed weight. Sums are modulo 2**32, and do not saturate.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        octets, words = _vector(8, BLOCK), args[4].type
        index, sums = builder.bitcast(args[2], octets), []
        first, last = (_registers(builder, args[i], octets) for i in (1, 3))
        for total, a, b in zip(_registers(builder, args[0], words), first, last, strict=True):
            found = builder.bitcast(_call(builder, _LOOK_UP, a, index, b), words)
            sums.append(_call(builder, _ADD_PRODUCTS, total, found, args[4]))
        return _concatenated(builder, sums)

    if not totals == low == high or indices != _INDICES or weights != _INDICES:
        raise TypingError(f"cannot add products of {low}, {high} and {weights} to {totals}")
    return totals(totals, low, indices, high, weights), generate


def _call(builder: Any, name: str, *args: Any) -> Any:
    signature = ir.FunctionType(args[0].type, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _joined(builder: Any, planes: list[Any]) -> list[Any]:
    """Return four registers of numbers from the four registers of their bytes."""

    def interleaved(a: Any, b: Any) -> list[Any]:
        """Interleave the first halves of each quarter of two registers, then the last halves."""
        n = a.type.count
        halves = []
        for skip in (0, n // 8):
            places = [start + skip + i for start in range(0, n, n // 4) for i in range(n // 8)]
            halves.append(_shuffle(builder, a, b, [p + q for p in places for q in (0, n)]))
        return halves

    pairs = zip(interleaved(*planes[:2]), interleaved(*planes[2:]), strict=True)
    numbers = []
    for pair in pairs:
        numbers += interleaved(*(builder.bitcast(half, _vector(16, BLOCK // 2)) for half in pair))
    return numbers


def _registers(builder: Any, numbers: Any, register: Any) -> list[Any]:
    """Return the registers, of 16 lanes each, of a vector whose lanes have 32 bits."""
    quarter = BLOCK // 4
    return [
        builder.bitcast(_shuffle(builder, numbers, numbers, list(range(i, i + quarter))), register)
        for i in range(0, numbers.type.count, quarter)
    ]


def _concatenated(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        lanes = list(range(2 * parts[0].type.count))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [_shuffle(builder, a, b, lanes) for a, b in pairs]
    return parts[0]


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(_vector(32, len(lanes)), lanes))
