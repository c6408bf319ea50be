"""The activation functions inside a kernel (SPEC 2).

Each smooth activation is ``z * s(z)``, where s rises from 0 to 1 and ``s(z) + s(-z) = 1``. Hence

    y = z / (1 + 2**(z * q(z*z)))

for some function q: a constant for silu, linear for gelu_tanh, and for gelu a polynomial that is
fitted to ``log2(s(-z) / s(z)) / z``. In float32 one loop computes all three. It consists of
arithmetic only, so that the compiler vectorises it. A relative error of the exponent or of the
power is at most a quarter as large in y / z, which is accurate enough. float64 uses the C library's
functions, one element at a time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.contract import ACTIVATIONS

__all__ = ["activate", "activate_row"]

_SQRT_HALF = math.sqrt(0.5)
_TANH_SLOPE = -2 * math.sqrt(2 / math.pi)

_NONE, _RELU, _GELU, _GELU_TANH, _SILU = (
    ACTIVATIONS[name].code for name in ("none", "relu", "gelu", "gelu_tanh", "silu")
)

# The coefficients of q, constant first. Those of gelu are a minimax fit of s for |z| <= 5.5, whose
# error is at most 3.6e-8 = 0.61 * 2**-24.
_COEFFICIENTS = {
    _GELU: (
        -2.3022094,
        -0.10483512,
        9.4049210e-05,
        1.5957994e-04,
        -1.1439835e-05,
        3.8163139e-07,
        -5.0672395e-09,
    ),
    _GELU_TANH: (_TANH_SLOPE / math.log(2), 0.044715 * _TANH_SLOPE / math.log(2)),
    _SILU: (-1 / math.log(2),),
}
_Q = np.zeros((max(_COEFFICIENTS) + 1, 7), np.float32)  # by code
for _code, _row in _COEFFICIENTS.items():
    _Q[_code, : len(_row)] = _row
# Beyond this, q is constant: the fit ends, and z*z may overflow. There s of gelu and gelu_tanh is
# within 2**-25 of 0 or 1.
_LAST_SQUARE = np.float32(5.5**2)

# 2**f for |f| <= 1/2: a minimax fit with a relative error of at most 1.1e-7 = 1.9 * 2**-24. It is 1
# at 0, so that subnormal z are halved exactly.
_P = np.array([1, 0.69314700, 0.24022242, 0.055507336, 0.0096715130, 0.0013264727], np.float32)
_ONE = np.float32(1)
# `_power_of_two` returns 0 at the smallest exponent, and infinity at the largest.
_LEAST, _GREATEST = np.float32(-127), np.float32(128)
# Adding this rounds to an integer n, and leaves n + 127 in the last bits of the sum.
_ROUNDER = np.float32(1.5 * 2**23 + 127)


@kernel()
def activate(z: float, code: int) -> float:
    """Return the activation of `z`, computed in float64."""
    if code == _NONE:
        return z
    if code == _RELU:
        return 0.0 if z <= 0 else z
    if code == _GELU:
        return 0.5 * z * (1.0 + math.erf(z * _SQRT_HALF))
    if code == _GELU_TANH:
        return z / (1.0 + math.exp(_TANH_SLOPE * (z + 0.044715 * z * z * z)))
    return z / (1.0 + math.exp(-z))


@kernel()
def activate_row(row, code):
    """Replace the elements of `row`, float32 or float64, (n,), by their activations."""
    if code == _RELU:
        # `0 if z <= 0 else z` would store only where it changes something, which is slow on AVX2.
        # NaN stays NaN here too, and the sum turns -0.0 into 0.0.
        zero = row.dtype.type(0)
        for i in range(row.size):
            row[i] = max(row[i], zero) + zero
    elif code != _NONE:
        _smooth(row, code)


def _smooth(row, code):
    """Replace the elements of `row` by a smooth activation."""
    raise NotImplementedError  # Numba compiles one of the two below, by the dtype of `row`


# By default Numba tests each divisor for zero, which prevents vectorisation.
@overload(_smooth, jit_options={"error_model": "numpy"})
def _smooth_of_type(row, code):
    return _smooth_float32 if row.dtype == types.float32 else _smooth_float64


def _smooth_float32(row, code):
    q = _Q[code]
    for i in range(row.size):
        z = row[i]
        t = min(z * z, _LAST_SQUARE)
        slope = q[0] + t * (q[1] + t * (q[2] + t * (q[3] + t * (q[4] + t * (q[5] + t * q[6])))))
        exponent = max(min(z * slope, _GREATEST), _LEAST)
        rounded = exponent + _ROUNDER
        f = exponent - (rounded - _ROUNDER)
        p = _P[0] + f * (_P[1] + f * (_P[2] + f * (_P[3] + f * (_P[4] + f * _P[5]))))
        row[i] = z / (_ONE + p * _power_of_two(rounded))


def _smooth_float64(row, code):
    for i in range(row.size):
        row[i] = activate(row[i], code)


@intrinsic
def _power_of_two(typing_context: Any, rounded: Any) -> Any:
    """Return 2**n for ``rounded = n + _ROUNDER``, by shifting n + 127 into the exponent."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        shifted = builder.shl(builder.bitcast(args[0], word), word(23))
        return builder.bitcast(shifted, ir.FloatType())

    return types.float32(types.float32), generate
