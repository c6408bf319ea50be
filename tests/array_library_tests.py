"""Tests that the arrays of every library must pass; a test file inherits them for its library."""

import gc

import ml_dtypes
import numpy as np
import pytest

from srigl_core import (
    CondensedWeight,
    MatmulGradients,
    ValueTypeError,
    condensed_matmul,
    condensed_matmul_backward,
    prepare,
    update_mask,
)
from srigl_core._arrays.checks import as_float_array, as_mask
from srigl_core._arrays.libraries import library_of

bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float16), bfloat16, np.dtype(np.float32), np.dtype(np.float64))
UPDATE = {"nnz_budget": 40, "drop_fraction": 0.3}


def arrays_of(dtype, seed=0):
    """Return a weight with an ablated neuron, x, grad and bias."""
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    weight = CondensedWeight.random((8, 12), fan_in=5, n_active=7, rng=rng)
    weight = CondensedWeight(
        weight.values.astype(dtype), weight.indices, weight.active, weight.shape
    )
    x, grad, bias = (rng.standard_normal(shape).astype(dtype) for shape in ((3, 12), (3, 8), (8,)))
    return weight, x, grad, bias


def update_arrays(dtype=np.float32):
    rng = np.random.default_rng(1)
    weight, grad = (rng.standard_normal((8, 12)).astype(dtype) for _ in range(2))
    return weight, grad, rng.random((8, 12)) < 0.4


def assert_same(library, got, wanted, context):
    """Assert that an array is one of the library's, with the bits of a NumPy array."""
    assert isinstance(got, library.cls), context
    array = library.as_numpy(got)
    assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape), context
    assert array.tobytes() == wanted.tobytes(), context


class ArrayLibraryTests:
    """Inherit from it, and set `library` to an object with these attributes.

    `cls` is the class of the library's arrays, `dtypes` says which value types they have, `make`
    returns an array of the memory of a NumPy array, `as_numpy` the reverse, and `address` where an
    array's memory begins.
    """

    def test_a_product_is_an_array_of_the_same_library_with_the_same_bits(self, product_backend):
        for dtype in self.adapter.dtypes:
            weight, x, _, bias = arrays_of(dtype)
            plan = prepare(weight, backend=product_backend)
            for shape in ((12,), (3, 12), (1, 3, 12), (0, 12)):
                some = np.resize(x, shape)
                for options in ({}, {"activation": "gelu"}, {"compact": True}):
                    context = dtype, shape, options
                    got = plan(self.adapter.make(some), **options)
                    assert_same(self.adapter, got, plan(some, **options), context)
                    got = plan(self.adapter.make(some), self.adapter.make(bias), **options)
                    assert_same(self.adapter, got, plan(some, bias, **options), context)

    def test_gradients_are_arrays_of_the_same_library(self, backward_backend):
        make = self.adapter.make
        for dtype in self.adapter.dtypes:
            weight, x, grad, _ = arrays_of(dtype)
            got = condensed_matmul_backward(make(grad), make(x), weight, backend=backward_backend)
            wanted = condensed_matmul_backward(grad, x, weight, backend=backward_backend)
            for name in ("x", "values", "bias"):
                pair = getattr(got, name), getattr(wanted, name)
                assert_same(self.adapter, *pair, (dtype, name))

    def test_an_update_is_of_arrays_of_the_same_library(self, update_backend):
        for dtype in self.adapter.dtypes:
            arrays = update_arrays(dtype)
            got = update_mask(*map(self.adapter.make, arrays), **UPDATE, backend=update_backend)
            wanted = update_mask(*arrays, **UPDATE, backend=update_backend)
            for name in ("mask", "weight"):
                pair = getattr(got, name), getattr(wanted, name)
                assert_same(self.adapter, *pair, (dtype, name))
            for name in ("ablated", "revived", "salient_counts"):
                assert type(getattr(got, name)) is np.ndarray
                np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))

    def test_arrays_are_read_where_they_lie(self):
        for dtype in self.adapter.dtypes:
            _, x, _, _ = arrays_of(dtype)
            theirs = self.adapter.make(x)
            read = as_float_array(theirs, "x")
            assert read.ctypes.data == self.adapter.address(theirs)
            assert read.dtype == dtype
            assert read.tobytes() == x.tobytes()
            mask = x.astype(np.float32) > 0
            np.testing.assert_array_equal(as_mask(self.adapter.make(mask), mask.shape), mask)

    def test_a_condensed_weight_is_packed_from_the_librarys_arrays(self):
        dense, _, mask = update_arrays()
        mask[:] = np.arange(12) % 3 == 0
        packed = CondensedWeight.from_dense(self.adapter.make(dense), self.adapter.make(mask))
        assert packed == CondensedWeight.from_dense(dense, mask)
        values = np.flip(packed.values).copy()
        assert packed.with_values(self.adapter.make(values)) == packed.with_values(values)

    def test_a_result_outlives_what_it_was_made_from(self):
        weight, x, _, _ = arrays_of(np.float32)
        many = np.resize(x, (5000, 12))  # of memory that a library may take over
        got = condensed_matmul(self.adapter.make(many.copy()), weight)
        wanted = condensed_matmul(many, weight)
        gc.collect()
        np.full((5000, 8), 7, np.float32)  # which may get memory given back too soon
        np.testing.assert_array_equal(self.adapter.as_numpy(got), wanted)

    def test_masks_of_numbers_are_refused(self):
        weight, grad, mask = update_arrays()
        arrays = [self.adapter.make(array) for array in (weight, grad, mask.astype(np.float32))]
        with pytest.raises(
            ValueTypeError, match="mask must be an array of bool, got dtype float32"
        ):
            update_mask(*arrays, **UPDATE)

    def test_arrays_of_two_libraries_are_refused_by_name(self):
        weight, x, grad, bias = arrays_of(np.float32)
        theirs, its_bias, its_grad = map(self.adapter.make, (x, bias, grad))
        its = library_of(theirs).describe(theirs)
        for plan in (prepare(weight), prepare(weight, backend="reference")):
            message = f"x is {its}, bias a NumPy array; pass arrays of one library"
            with pytest.raises(ValueTypeError, match=message):
                plan(theirs, bias)
            with pytest.raises(ValueTypeError, match=f"x is a NumPy array, bias {its}"):
                plan(x, its_bias)
            with pytest.raises(ValueTypeError, match=f"x is {its}, out a NumPy array"):
                plan(theirs, out=np.empty((3, 8), np.float32))
            with pytest.raises(ValueTypeError, match=f"grad is {its}, x a NumPy array"):
                plan.backward(its_grad, x)
            with pytest.raises(ValueTypeError, match=rf"grad is {its}, out\.x a NumPy array"):
                plan.backward(its_grad, theirs, out=MatmulGradients(x=np.empty_like(x)))
        w, g, m = update_arrays()
        with pytest.raises(ValueTypeError, match=f"weight is {its}, mask a NumPy array"):
            update_mask(self.adapter.make(w), self.adapter.make(g), m, **UPDATE)
