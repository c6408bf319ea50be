"""Read 16-bit numbers, which Numba does not know, from arrays of their bits.

A float16 array is handed to a kernel as uint16 and a bfloat16 array as int16, so that the array's
type alone tells `load` what the bits mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numpy.typing import NDArray

__all__ = ["as_bits", "load"]

_F32, _F64, _I16, _I32 = ir.FloatType(), ir.DoubleType(), ir.IntType(16), ir.IntType(32)


def as_bits(values: NDArray[Any]) -> NDArray[Any]:
    """Return `values` as a kernel takes it: a view, of the same memory."""
    if values.dtype == np.float16:
        return values.view(np.uint16)
    if values.dtype.name == "bfloat16":
        return values.view(np.int16)
    return values


@intrinsic
def load(typing_context: Any, value: Any) -> Any:
    """Return the number that `value`, an element of an array from `as_bits`, stands for.

    float32 and float64 come back as they are, the 16-bit types as float32.
    """
    if value == types.uint16:
        return types.float32(types.uint16), _from_half
    if value == types.int16:
        return types.float32(types.int16), _from_bfloat16
    if value in (types.float32, types.float64):
        return value(value), lambda context, builder, signature, args: args[0]
    raise TypingError(f"load takes an element of as_bits(...), not {value}")


def _from_bfloat16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    wide = builder.shl(builder.zext(args[0], _I32), _I32(16))
    return builder.bitcast(wide, _F32)


def _from_half(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Convert by integer arithmetic.

    LLVM's own conversion calls a C function where the processor has no F16C, and that function need
    not be there. Moved to float32's place, the exponent is too small by 112: one exact
    multiplication mends it, subnormals included. Infinity and NaN come out at 65536 and above, and
    get all exponent bits.
    """
    wide = builder.zext(args[0], _I32)
    moved = builder.shl(builder.and_(wide, _I32(0x7FFF)), _I32(13))
    scaled = builder.fmul(builder.bitcast(moved, _F32), ir.Constant(_F32, 2.0**112))
    bits = builder.bitcast(scaled, _I32)
    special = builder.fcmp_ordered(">=", scaled, ir.Constant(_F32, 65536.0))
    bits = builder.select(special, builder.or_(bits, _I32(0x7F800000)), bits)
    sign = builder.shl(builder.and_(wide, _I32(0x8000)), _I32(16))
    return builder.bitcast(builder.or_(bits, sign), _F32)
