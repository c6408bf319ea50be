"""Number types: which there are, how they combine, and that everything is rounded once."""

import ctypes
import shutil
import subprocess
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srigl_core import CondensedWeight, prepare
from srigl_core._arrays import float_mode
from srigl_core._arrays.dtypes import (
    VALUE_TYPES,
    accumulator_dtype,
    index_dtype,
    result_dtype,
    round_to,
    value_dtype,
)
from srigl_core._arrays.float_mode import honour_subnormals, subnormals_are_flushed
from srigl_core.contract import ACTIVATIONS
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.flush_mode import can_flush_subnormals, flushing_subnormals


def all_numbers_of(dtype):
    """Every finite number of a 16-bit type, ascending, -0.0 left out."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        numbers = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])


BFLOAT16 = all_numbers_of(ml_dtypes.bfloat16)


def nearest_bfloat16(number):
    """Round to nearest even by exact comparison of distances."""
    above = int(np.searchsorted(BFLOAT16, number))
    candidates = [BFLOAT16[i] for i in (above - 1, above) if 0 <= i < BFLOAT16.size]
    if len(candidates) == 1 or number == candidates[1]:
        return candidates[-1]
    low, high = (abs(Fraction(number) - Fraction(c)) for c in candidates)
    if low != high:
        return candidates[0] if low < high else candidates[1]
    bits = [np.array(c).astype(ml_dtypes.bfloat16).view(np.uint16) for c in candidates]
    return candidates[0] if bits[0] % 2 == 0 else candidates[1]


@given(st.floats(min_value=float(BFLOAT16[0]), max_value=float(BFLOAT16[-1])))
@example(1.00390625 + 2.0**-40)  # above a tie by less than float32 can hold
@example(1.01171875 - 2.0**-40)
@example(5e-324)
@example(4.6e-41)
def test_float64_becomes_bfloat16_in_one_rounding(number):
    rounded = round_to(np.array([number, -number]), value_dtype("bfloat16")).astype(np.float64)
    assert rounded[0] == nearest_bfloat16(number)
    assert rounded[1] == -rounded[0]


def test_rounding_to_bfloat16_keeps_special_numbers():
    special = np.array([np.inf, -np.inf, np.nan, -0.0, 1e300, -1e300])
    rounded = round_to(special, value_dtype("bfloat16")).astype(np.float64)
    np.testing.assert_array_equal(rounded, [np.inf, -np.inf, np.nan, -0.0, np.inf, -np.inf])
    assert np.signbit(rounded[3])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_limits_are_those_of_the_type(dtype):
    info, limits = ml_dtypes.finfo(value_dtype(dtype)), float_limits(value_dtype(dtype))
    assert limits.roundoff == float(info.eps) / 2
    assert limits.smallest == float(info.smallest_subnormal)
    assert limits.largest == float(info.max)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_limits_are_those_of_the_numpy_type(dtype):
    info, limits = np.finfo(dtype), float_limits(np.dtype(dtype))
    assert limits.roundoff == float(info.eps) / 2
    assert limits.smallest == float(info.smallest_subnormal)
    assert limits.largest == float(info.max)


@pytest.mark.parametrize("x", VALUE_TYPES)
@pytest.mark.parametrize("values", VALUE_TYPES)
def test_products_have_the_type_that_holds_both(x, values):
    x, values = value_dtype(x), value_dtype(values)
    if {x.name, values.name} == {"float16", "bfloat16"}:
        with pytest.raises(ValueTypeError, match="do not combine"):
            result_dtype(x, values)
    else:
        found = result_dtype(x, values)
        assert found in (x, values)
        assert found.itemsize == max(x.itemsize, values.itemsize)


def test_sums_are_kept_in_float32_or_float64():
    half, single, double = np.dtype("f2"), np.dtype("f4"), np.dtype("f8")
    assert accumulator_dtype(half, value_dtype("bfloat16")) == single
    assert accumulator_dtype(single, half) == single
    assert accumulator_dtype(half, double) == double


def test_indices_are_sixteen_bit_while_that_numbers_all_columns():
    assert index_dtype(65536) == np.uint16
    assert index_dtype(65537) == np.uint32


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "object", "U5", "no such type"])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueTypeError, match="float32"):
        value_dtype(dtype)


def test_foreign_byte_order_is_known():
    assert value_dtype(">f4") == np.dtype("=f4")


def test_every_sixteen_bit_number_is_read_exactly(backend_names):
    if "numba" not in backend_names("condensed_matmul"):
        pytest.skip("the numba backend is not under test")
    import numba

    from srigl_core.backends.numba_cpu.value_types import as_bits, load

    @numba.njit
    def read(bits, numbers):
        for i in range(bits.size):
            numbers[i] = load(bits[i])

    for dtype in (np.float16, ml_dtypes.bfloat16):
        every = np.arange(2**16, dtype=np.uint16).view(dtype)
        numbers = np.empty(2**16, np.float32)
        read(as_bits(every), numbers)
        with np.errstate(invalid="ignore"):
            expected = every.astype(np.float32)
        np.testing.assert_array_equal(numbers, expected)
        zeros = numbers == 0
        assert (np.signbit(numbers[zeros]) == np.signbit(expected[zeros])).all()


MACOS = """ /* where FE_DFL_ENV is the address of an object */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fenv.h>
fenv_t _FE_DFL_ENV;
__attribute__((constructor)) static void fill(void) { fegetenv(&_FE_DFL_ENV); }
int fesetenv(const fenv_t *environment)
{
    int (*set)(const fenv_t *) = dlsym(RTLD_NEXT, "fesetenv");
    return environment == (const fenv_t *)-1 ? 1 : set(environment);
}
"""


PLANS = {
    "float": lambda weight, backend: prepare(weight, backend=backend),
    "weight only": lambda weight, backend: prepare(weight.quantize(), backend=backend),
    "int8": lambda weight, backend: prepare(weight.quantize(), inputs="int8", backend=backend),
}


@pytest.mark.parametrize("kind", PLANS)
def test_the_callers_error_state_changes_nothing(kind, backend_names):
    """Overflow and underflow are defined results, so NumPy is not asked to report them."""
    rng = np.random.default_rng(0)
    for name in backend_names("condensed_matmul"):
        weight = CondensedWeight.random((8, 12), fan_in=3, rng=rng)
        try:
            plan = PLANS[kind](weight, name)
        except SriglError:
            continue  # it does not offer this product
        for size in (1e300, 1e30, 1e5, 1.0, 1e-5, 1e-30, 1e-320, np.nan, np.inf):
            for dtype in (np.float64, np.float32, np.float16):
                with np.errstate(all="ignore"):
                    x = (size * rng.standard_normal((2, 12))).astype(dtype)
                    wanted = [plan(x, activation=each) for each in ACTIVATIONS]
                with np.errstate(all="raise"):
                    got = [plan(x, activation=each) for each in ACTIVATIONS]
                np.testing.assert_equal(got, wanted)


@pytest.mark.skipif(not can_flush_subnormals(), reason="the mode can be set on Linux x86-64 only")
@pytest.mark.parametrize("system", ["GNU", "musl", "macOS"])
def test_a_flushing_thread_is_noticed_and_switched_for_the_time_of_a_call(
    system, tmp_path, monkeypatch
):
    library = {"GNU": "libm.so.6", "musl": None}.get(system, tmp_path / "libSystem.so")
    if system == "macOS":
        if shutil.which("gcc") is None:
            pytest.skip("needs gcc")
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library, "-lm"]
        subprocess.run(command, input=MACOS, text=True, check=True)
    monkeypatch.setattr(float_mode, "_c_library", lambda: ctypes.CDLL(library))
    assert not subnormals_are_flushed()
    with flushing_subnormals():
        assert subnormals_are_flushed()
        with honour_subnormals():
            assert not subnormals_are_flushed()
            assert np.float32(1e-38) * np.float32(0.25) != 0
        assert subnormals_are_flushed()
    assert not subnormals_are_flushed()
