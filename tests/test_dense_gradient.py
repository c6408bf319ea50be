"""The dense gradient, which decides what is grown (SPEC 2, Backward)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srigl_core import SriglError, ValueTypeError
from srigl_core._arrays.dtypes import accumulator_dtype, value_dtype
from srigl_core.reference import dense_gradient
from srigl_core.testing.bounds import Outcome, first_violation
from srigl_core.testing.flush_mode import flushing_subnormals


@given(
    batch=st.integers(0, 40),
    n_out=st.integers(1, 9),
    n_in=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_dense_gradient_is_within_the_error_bound(batch, n_out, n_in, dtype, seed):
    rng = np.random.default_rng(seed)
    grad = rng.standard_normal((batch, n_out)).astype(value_dtype(dtype))
    x = rng.standard_normal((batch, n_in)).astype(value_dtype(dtype))
    wide_grad, wide_x = grad.astype(np.longdouble), x.astype(np.longdouble)
    outcome = Outcome(
        wide_grad.T @ wide_x,
        np.abs(wide_grad).T @ np.abs(wide_x),
        np.array(batch),
        accumulator_dtype(grad.dtype),
    )
    found = dense_gradient(grad, x)
    assert found.dtype == accumulator_dtype(grad.dtype)
    assert first_violation(found, outcome) is None


def test_leading_axes_are_summed_over():
    rng = np.random.default_rng(0)
    grad, x = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 5))
    flat = dense_gradient(grad.reshape(6, 4), x.reshape(6, 5))
    assert dense_gradient(grad, x).tobytes() == flat.tobytes()


def test_subnormals_count_in_any_thread_mode():
    grad, x = np.full((1, 1), 1e-20, np.float32), np.full((1, 2), 1e-20, np.float32)
    with flushing_subnormals():
        found = dense_gradient(grad, x)
    assert (found > 0).all()


@pytest.mark.parametrize(
    ("grad", "x", "error"),
    [
        (np.zeros((2, 3, 2)), np.zeros((3, 2, 4)), SriglError),
        (np.zeros((2, 3)), np.zeros((3, 3)), SriglError),
        (np.zeros(()), np.zeros(()), SriglError),
        ([[1.0]], np.zeros((1, 1)), ValueTypeError),
        (np.zeros((1, 1), int), np.zeros((1, 1)), ValueTypeError),
        (np.zeros((1, 1), "f2"), np.zeros((1, 1), value_dtype("bfloat16")), ValueTypeError),
    ],
)
def test_what_does_not_fit_is_refused(grad, x, error):
    with pytest.raises(error):
        dense_gradient(grad, x)
