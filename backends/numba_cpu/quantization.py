"""The float32 steps of a product with int8 inputs: rows to integers, and sums to floats (SPEC 6).

Each operation rounds by itself, so that every backend has the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.calling import Launcher
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.simd import VectorType, repeated
from srigl_core.backends.numba_cpu.threads import pool
from srigl_core.backends.numba_cpu.value_types import float_of_bits

__all__ = ["int8_product", "quantized_rows", "row_scales", "write_octets"]

Array = NDArray[Any]

NUMBER_NANOSECONDS = 0.2
"""Estimated time of quantising a number."""

_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_LARGEST = np.float32(127)


@kernel(exact=True)
def row_scales(row):
    """Return r, which makes integers of a row of float32, and its scale s, which is NaN for NaN.

    Both are 0 where the definition has integers of 0.
    """
    bits, most = row.view(np.int32), np.int32(0)
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & _MAGNITUDE)  # that of NaN is the largest
        most = magnitude if magnitude > most else most
    zero, a = np.float32(0), float_of_bits(most)
    if most >= _INFINITY:
        return zero, np.float32(np.nan)
    if most == 0:
        return zero, zero
    r = _LARGEST / a
    return (zero, zero) if np.isinf(r) else (r, a / _LARGEST)


@kernel(exact=True)
def _quantize(first, last, x, integers, scales):
    for row in range(first, last):
        r, scales[row] = row_scales(x[row])
        for i in range(x.shape[1]):
            integers[row, i] = np.rint(x[row, i] * r)


@kernel(exact=True)
def write_octets(row, r, octets, at, stride):
    """Write the integers of a row, plus 128, in blocks of 64 bytes, the next one `stride` further.

    The first block is at ``octets[at]``. Bytes behind the last integer are not written.
    """
    u = np.uint64
    size, place, width = u(row.size), u(at), u(64)
    whole = size // width * width
    for first in range(u(0), whole, width):
        for i in range(width):
            octets[place + i] = _octet(row[first + i] * r)
        place += u(stride)
    for i in range(size - whole):
        octets[place + i] = _octet(row[whole + i] * r)


@kernel(exact=True)
def _octet(number):
    return np.uint8(np.int32(np.rint(number)) + np.int32(128))


@intrinsic
def int8_product(typing_context: Any, acc: Any, scale: Any, s: Any) -> Any:
    """Return v of SPEC 6 for a sum of integers, from the scales of its neuron and of its row.

    `acc` is a number of any type, or a vector of int32. Then `scale` is a vector, too.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer, own, of_row = args
        if isinstance(scale, VectorType):
            of_row = repeated(builder, of_row, scale.lanes)
        if isinstance(integer.type, ir.DoubleType):
            number = builder.fptrunc(integer, own.type)
        else:
            is_float = integer.type == own.type
            number = integer if is_float else builder.sitofp(integer, own.type)
        zero = ir.Constant(own.type, None)
        product = builder.fmul(number, builder.fmul(own, of_row))
        # Where the scales' product overflows, 0 times it is NaN. The row's scale may be NaN itself.
        nothing = builder.fmul(of_row, zero)
        return builder.select(builder.fcmp_ordered("==", number, zero), nothing, product)

    return scale(acc, scale, types.float32), generate


_LAUNCH = Launcher(_quantize)


def quantized_rows(x: Array, dtype: np.dtype[Any], threads: int | None) -> tuple[Array, Array]:
    """Return the rows of `x` as integers, and the scales of the rows.

    Parameters
    ----------
    x : ndarray of float32, (batch, n_in), C order
    dtype : numpy.dtype
        Float type of the integers.
    threads : int or None

    Returns
    -------
    integers : ndarray of `dtype`, (batch, n_in)
        Within -127..127; any number where the scale is NaN.
    scales : ndarray of float32, (batch,)
    """
    integers, scales = np.empty(x.shape, dtype), np.empty(len(x), np.float32)
    with pool(threads, x.size * NUMBER_NANOSECONDS) as n_threads:
        _LAUNCH(len(x), n_threads, (x, integers, scales))
    return integers, scales
