"""Read values of fewer bits as float32: int8, and the 16-bit numbers that Numba does not support.

A kernel receives a float16 array as uint16 and a bfloat16 array as int16, so that `load` knows the
format by the array's dtype. int8 stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numpy.typing import NDArray

__all__ = ["as_bits", "float_of_bits", "from_bfloat16", "from_half", "from_int8", "load"]


def as_bits(values: NDArray[Any]) -> NDArray[Any]:
    """Return a view of `values` that kernels can take."""
    if values.dtype == np.float16:
        return values.view(np.uint16)
    if values.dtype.name == "bfloat16":
        return values.view(np.int16)
    return values


@intrinsic
def load(typing_context: Any, value: Any) -> Any:
    """Return the number whose bits are `value`, an element of an array from `as_bits`.

    float32 and float64 stay as they are; numbers of fewer bits become float32.
    """
    narrow = {types.uint16: from_half, types.int16: from_bfloat16, types.int8: from_int8}
    convert = narrow.get(value)
    if convert is not None:
        return types.float32(value), lambda context, builder, sig, args: convert(builder, args[0])
    if value in (types.float32, types.float64):
        return value(value), lambda context, builder, signature, args: args[0]
    raise TypingError(f"load takes an element of as_bits(...), not {value}")


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """Return the float32 whose bits are the int32 `bits`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


def from_int8(builder: Any, bits: Any) -> Any:
    """Convert int8, one number or a vector, to float32."""
    return builder.sitofp(bits, _word_types(bits.type)[1])


def from_bfloat16(builder: Any, bits: Any) -> Any:
    """Convert bfloat16 bits, one number or a vector, to float32."""
    integer, floating = _word_types(bits.type)
    wide = builder.shl(builder.zext(bits, integer), _constant(integer, 16))
    return builder.bitcast(wide, floating)


def from_half(builder: Any, bits: Any) -> Any:
    """Convert float16 bits, one number or a vector, to float32 by integer arithmetic.

    Without F16C, LLVM's own conversion calls a C function, which may not exist. Moved to float32's
    place, the exponent is too small by 112: one exact multiplication corrects it, also for
    subnormals. Infinity and NaN become 65536 and more, and get all exponent bits.
    """
    integer, floating = _word_types(bits.type)
    wide = builder.zext(bits, integer)
    moved = builder.shl(builder.and_(wide, _constant(integer, 0x7FFF)), _constant(integer, 13))
    scaled = builder.fmul(builder.bitcast(moved, floating), _constant(floating, 2.0**112))
    word = builder.bitcast(scaled, integer)
    special = builder.fcmp_ordered(">=", scaled, _constant(floating, 65536.0))
    word = builder.select(special, builder.or_(word, _constant(integer, 0x7F800000)), word)
    sign = builder.shl(builder.and_(wide, _constant(integer, 0x8000)), _constant(integer, 16))
    return builder.bitcast(builder.or_(word, sign), floating)


def _word_types(llvm_type: Any) -> tuple[Any, Any]:
    """Return int32 and float32, or vectors of them with the lanes of `llvm_type`."""
    words = ir.IntType(32), ir.FloatType()
    if isinstance(llvm_type, ir.VectorType):
        words = tuple(ir.VectorType(word, llvm_type.count) for word in words)
    return words


def _constant(llvm_type: Any, number: float) -> Any:
    is_vector = isinstance(llvm_type, ir.VectorType)
    return ir.Constant(llvm_type, [number] * llvm_type.count if is_vector else number)
