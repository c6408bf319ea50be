"""The condensed format: construction, conversion, immutability (SPEC 1)."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from hypothesis import example, given
from hypothesis import strategies as st

from srigl_core import (
    CondensedTrainer,
    CondensedWeight,
    Connections,
    SparseTrainer,
    SriglError,
    ValueTypeError,
    condensed_matmul,
    prepare,
    recommend,
)
from srigl_core._arrays.dtypes import VALUE_TYPES
from srigl_core._plan import plan_of
from srigl_core.reference import (
    UpdateSchedule,
    random_mask,
    random_unstructured_mask,
    sparse_init,
)

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
NUMBERS = [0.0, -0.0, 1.0, -2.0, 0.5, 3.0, 1e-7]


@st.composite
def weights(draw, dtypes=DTYPES):
    """Any constant fan-in weight, active zeros included."""
    n_out, n_in = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    fan_in = draw(st.integers(1, n_in))
    active = sorted(draw(st.sets(st.integers(0, n_out - 1), min_size=1)))
    columns = st.sets(st.integers(0, n_in - 1), min_size=fan_in, max_size=fan_in).map(sorted)
    row = st.lists(st.sampled_from(NUMBERS), min_size=fan_in, max_size=fan_in)
    return CondensedWeight(
        np.array([draw(row) for _ in active], draw(st.sampled_from(dtypes))),
        [draw(columns) for _ in active],
        active,
        (n_out, n_in),
    )


def small_weight(dtype=np.float64):
    """Rows 0 and 2 of 3, an active zero at (2, 3)."""
    values = np.array([[0.5, -1.0], [2.0, 0.0]], dtype)
    return CondensedWeight(values, [[0, 3], [1, 3]], active=[0, 2], shape=(3, 4))


# ---------------------------------------------------------------- round trips


@given(weight=weights())
def test_dense_and_mask_make_the_weight_again(weight):
    dense, mask = weight.to_dense(), weight.to_mask()
    assert dense.shape == mask.shape == weight.shape
    assert dense.dtype == weight.dtype
    assert np.count_nonzero(mask) == weight.nnz
    assert not dense[~mask].any()
    for i, row in enumerate(weight.active):
        for j in range(weight.fan_in):
            place = row, weight.indices[i, j]
            assert dense[place].tobytes() == weight.values[i, j].tobytes()
    again = CondensedWeight.from_dense(dense, mask)
    assert again == weight
    assert again.ablated.tolist() == np.flatnonzero(~mask.any(axis=1)).tolist()


@given(weight=weights(dtypes=(np.float32, np.float64)))
def test_csr_makes_the_weight_again_active_zeros_included(weight):
    csr = weight.to_csr()
    assert csr.shape == weight.shape
    assert csr.nnz == weight.nnz
    np.testing.assert_array_equal(csr.toarray(), weight.to_dense())
    assert CondensedWeight.from_csr(csr) == weight
    assert CondensedWeight.from_csr(csr.tocoo()) == weight
    assert CondensedWeight.from_csr(scipy.sparse.csc_matrix(csr)) == weight


@given(weight=weights())
def test_pickle_and_copies_make_the_weight_again(weight):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(weight, protocol)) == weight
    for made in (copy.copy(weight), copy.deepcopy(weight)):
        assert made == weight
        assert not made.values.flags.writeable


@given(weight=weights(dtypes=(np.float16, ml_dtypes.bfloat16)))
def test_16_bit_values_become_float32_in_csr(weight):
    csr = weight.to_csr()
    assert csr.dtype == np.float32
    np.testing.assert_array_equal(csr.toarray(), weight.to_dense().astype(np.float32))


def test_an_active_zero_survives_a_mask_and_csr_but_not_from_nonzero():
    weight = small_weight()
    assert CondensedWeight.from_dense(weight.to_dense(), weight.to_mask()).fan_in == 2
    assert CondensedWeight.from_csr(weight.to_csr()).fan_in == 2
    with pytest.raises(SriglError, match="not constant fan-in"):
        CondensedWeight.from_nonzero(weight.to_dense())
    lost = CondensedWeight.from_nonzero(np.array([[0.5, 0.0], [0.0, -2.0], [0.0, -0.0]]))
    assert (lost.nnz, lost.active.tolist()) == (2, [0, 1])


def test_a_nan_is_not_zero():
    weight = CondensedWeight.from_nonzero(np.array([[np.nan, 0.0], [0.0, np.inf]]))
    assert weight.to_mask().tolist() == [[True, False], [False, True]]


def test_from_csr_adds_duplicates_and_sorts_columns_and_leaves_the_matrix():
    rows, columns = [0, 0, 0, 1, 1], [3, 1, 1, 2, 0]
    matrix = scipy.sparse.csr_array(
        (np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array(columns), np.array([0, 3, 5])),
        shape=(2, 4),
    )
    weight = CondensedWeight.from_csr(matrix)
    np.testing.assert_array_equal(weight.indices, [[1, 3], [0, 2]])
    np.testing.assert_array_equal(weight.values, [[6.0, 1.0], [16.0, 8.0]])
    assert matrix.indices.tolist() == columns
    assert len(rows) == matrix.nnz == 5


def test_a_convolution_is_flattened():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((4, 3, 2, 2)).astype(np.float32)
    mask = np.zeros((4, 12), bool)
    for row in (0, 1, 3):
        mask[row, rng.choice(12, 5, replace=False)] = True
    weight = CondensedWeight.from_dense(dense, mask.reshape(dense.shape))
    assert weight.shape == (4, 12)
    np.testing.assert_array_equal(weight.to_dense(), np.where(mask, dense.reshape(4, 12), 0))
    assert weight == CondensedWeight.from_dense(dense.reshape(4, 12), mask)


# ---------------------------------------------------------------- random


def test_random_weights_are_of_the_size_asked_for_and_reproducible():
    for dtype in ("float16", "bfloat16", "float32", np.float64):
        options = {"fan_in": 5, "n_active": 7, "dtype": dtype}
        weight = CondensedWeight.random((12, 30), rng=3, **options)
        assert (weight.n_active, weight.fan_in, weight.shape) == (7, 5, (12, 30))
        assert weight == CondensedWeight.random((12, 30), rng=np.random.default_rng(3), **options)
        assert weight != CondensedWeight.random((12, 30), rng=4, **options)
        assert np.unique(weight.values).size > 20
    assert CondensedWeight.random((3, 4), fan_in=4, rng=0).to_mask().all()


def test_random_values_have_variance_one_over_fan_in():
    values = CondensedWeight.random((2000, 40), fan_in=10, dtype=np.float64, rng=0).values
    assert abs(values.var() * 10 - 1) < 5 * np.sqrt(2 / values.size)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((3, 4), {"fan_in": 5}, SriglError, "fan_in=5 must be between 1 and 4"),
        ((3, 4), {"fan_in": 0}, SriglError, "fan_in=0 must be between 1 and 4"),
        ((3, 4), {"fan_in": 1.0}, ValueTypeError, r"fan_in=1\.0 must be an integer"),
        ((3, 4), {"fan_in": 1, "n_active": 4}, SriglError, "n_active=4 must be between 1 and 3"),
        ((3, 4), {"fan_in": 1, "dtype": int}, ValueTypeError, "'int64' is not supported"),
        ((3, 0), {"fan_in": 1}, SriglError, "n_in=0 must be between 1"),
        ((3,), {"fan_in": 1}, SriglError, r"shape=\(3,\) must be a pair"),
        (3, {"fan_in": 1}, SriglError, "shape=3 must be a pair"),
    ],
)
def test_a_random_weight_out_of_range_is_an_error(shape, options, error, message):
    with pytest.raises(error, match=message):
        CondensedWeight.random(shape, **options, rng=0)


# ---------------------------------------------------------------- construction


def test_index_dtype_follows_n_in():
    for n_in, dtype in ((1, np.uint16), (65536, np.uint16), (65537, np.uint32)):
        weight = CondensedWeight(np.ones((1, 1), np.float32), [[n_in - 1]], [0], (2, n_in))
        assert weight.indices.dtype == dtype
        assert weight.indices[0, 0] == n_in - 1
        assert weight.active.dtype == np.int64
        csr = weight.to_csr()
        assert csr.indices.tolist() == [n_in - 1]
        assert CondensedWeight.from_csr(csr) == weight
        assert CondensedWeight.from_dense(weight.to_dense(), weight.to_mask()) == weight


def test_the_largest_n_in_is_two_to_the_32():
    weight = CondensedWeight(np.ones((1, 1), np.float32), [[2**32 - 1]], [0], (1, 2**32))
    assert weight.indices.tolist() == [[2**32 - 1]]
    with pytest.raises(SriglError, match="n_in=4294967297 must be between 1 and 4294967296"):
        CondensedWeight(np.ones((1, 1), np.float32), [[0]], [0], (1, 2**32 + 1))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, ">i4", np.uint64, list])
def test_indices_of_any_integer_type_become_canonical(kind):
    def given_as(numbers):
        return numbers if kind is list else np.array(numbers, kind)

    weight = CondensedWeight(
        small_weight().values, given_as([[0, 3], [1, 3]]), given_as([0, 2]), (3, 4)
    )
    assert weight == small_weight()
    assert (weight.indices.dtype, weight.active.dtype) == (np.uint16, np.int64)


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_big_endian_values_become_native(dtype):
    values = small_weight().values
    native = np.dtype(dtype).newbyteorder("=")
    weight = CondensedWeight(values.astype(dtype), [[0, 3], [1, 3]], [0, 2], (3, 4))
    assert weight.dtype == native
    assert weight.dtype.isnative
    assert weight == small_weight(native)
    dense = weight.to_dense().astype(dtype)
    assert CondensedWeight.from_dense(dense, weight.to_mask()) == weight
    assert weight.with_values(values.astype(dtype)) == weight


def test_a_later_change_of_the_input_does_not_matter():
    values, indices, active = np.array([[0.5, -1.0], [2.0, 0.0]]), np.array([[0, 3], [1, 3]]), None
    for index_kind, active_kind in ((np.uint16, np.int64), (np.int64, np.int32)):
        given_indices, active = indices.astype(index_kind), np.array([0, 2], active_kind)
        given_values = values.copy()
        weight = CondensedWeight(given_values, given_indices, active, (3, 4))
        given_values[:] = 9
        given_indices[:] = 0
        active[:] = 0
        assert weight == small_weight()
    new_values = np.array([[7.0, 8.0], [9.0, 10.0]])
    other = weight.with_values(new_values)
    new_values[:] = 0
    np.testing.assert_array_equal(other.values, [[7.0, 8.0], [9.0, 10.0]])


def test_a_weight_cannot_be_changed():
    weight = small_weight()
    for array in (weight.values, weight.indices, weight.active):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    for name in ("values", "shape", "anything"):
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(weight, name, None)
    for fresh in (weight.to_dense(), weight.to_mask(), weight.to_csr().data, weight.ablated):
        fresh[...] = 1
    assert weight == small_weight()


VALUES = np.array([[0.5, -1.0], [2.0, 0.0]])
INDICES = [[0, 3], [1, 3]]


@pytest.mark.parametrize(
    ("values", "indices", "active", "shape", "error", "message"),
    [
        ([[0.5, 1.0]], [[0, 1]], [0], (1, 2), ValueTypeError, "values must be an array"),
        (VALUES.astype(int), INDICES, [0, 2], (3, 4), ValueTypeError, "'int64' is not supported"),
        (VALUES + 0j, INDICES, [0, 2], (3, 4), ValueTypeError, "complex128"),
        (VALUES.astype(object), INDICES, [0, 2], (3, 4), ValueTypeError, "object"),
        (VALUES.astype(np.longdouble), INDICES, [0, 2], (3, 4), ValueTypeError, "not supported"),
        (VALUES[0], INDICES, [0, 2], (3, 4), SriglError, r"values has shape \(2,\)"),
        (VALUES[:0], np.zeros((0, 2), int), np.zeros(0, int), (3, 4), SriglError, r"\(0, 2\)"),
        (VALUES[:, :0], np.zeros((2, 0), int), [0, 2], (3, 4), SriglError, r"\(2, 0\)"),
        (VALUES, INDICES, [0, 2], (3, 1), SriglError, r"\(2, 2\) .* does not fit .* \(3, 1\)"),
        (VALUES, INDICES, [0, 2], (1, 4), SriglError, r"\(2, 2\) .* does not fit .* \(1, 4\)"),
        (VALUES, [[0, 3]], [0, 2], (3, 4), SriglError, r"indices of shape \(1, 2\)"),
        (VALUES, [[0, 3], [1]], [0, 2], (3, 4), SriglError, "indices cannot be read"),
        (VALUES, [[0.0, 3.0], [1, 3]], [0, 2], (3, 4), ValueTypeError, "indices has dtype float64"),
        (VALUES, [[True, False]] * 2, [0, 2], (3, 4), ValueTypeError, "indices has dtype bool"),
        (VALUES, [[0, 4], [1, 3]], [0, 2], (3, 4), SriglError, r"holds 4, but must lie in 0\.\.3"),
        (VALUES, [[-1, 3], [1, 3]], [0, 2], (3, 4), SriglError, "indices holds -1"),
        (VALUES, [[3, 0], [1, 3]], [0, 2], (3, 4), SriglError, "strictly ascending"),
        (VALUES, [[0, 3], [1, 1]], [0, 2], (3, 4), SriglError, "strictly ascending"),
        (VALUES, np.array([[3, 0], [1, 3]], np.uint8), [0, 2], (3, 4), SriglError, "ascending"),
        (VALUES, np.array([[0, 2**63]] * 2, np.uint64), [0, 2], (3, 4), SriglError, "must lie in"),
        (VALUES, INDICES, [0, 3], (3, 4), SriglError, r"active holds 3, but must lie in 0\.\.2"),
        (VALUES, INDICES, [2, 0], (3, 4), SriglError, "active must be strictly ascending"),
        (VALUES, INDICES, [0, 0], (3, 4), SriglError, "active must be strictly ascending"),
        (VALUES, INDICES, [0], (3, 4), SriglError, r"active has shape \(1,\)"),
        (VALUES, INDICES, [0, 2], (3, 4, 1), SriglError, r"shape=\(3, 4, 1\) must be a pair"),
        (VALUES, INDICES, [0, 2], (3.0, 4), ValueTypeError, r"n_out=3\.0 must be an integer"),
        (VALUES, INDICES, [0, 2], (0, 4), SriglError, "n_out=0 must be between 1"),
        (VALUES, INDICES, [0, 2], (2**63, 4), SriglError, "n_out=9223372036854775808"),
        (VALUES, INDICES, [0, 2], None, SriglError, "shape=None must be a pair"),
    ],
)
def test_what_is_no_condensed_weight_is_an_error(values, indices, active, shape, error, message):
    with pytest.raises(error, match=message):
        CondensedWeight(values, indices, active, shape)


def test_a_mask_that_is_not_constant_fan_in_is_an_error_that_names_a_row():
    mask = np.ones((4, 3), bool)
    mask[1] = False
    mask[2, 0] = False
    with pytest.raises(SriglError, match=r"1 of 3 active rows .* 3 weights \(row 2 has 2\)"):
        CondensedWeight.from_dense(np.ones((4, 3)), mask)
    with pytest.raises(SriglError, match="no active weight"):
        CondensedWeight.from_dense(np.ones((4, 3)), np.zeros((4, 3), bool))
    with pytest.raises(SriglError, match="no active weight"):
        CondensedWeight.from_nonzero(np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("weight", "mask", "error", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), ValueTypeError, "mask must be an array of bool"),
        (np.ones((2, 3)), np.ones((2, 3), np.int8), ValueTypeError, "pass mask != 0"),
        (np.ones((2, 3)), [[True] * 3] * 2, ValueTypeError, "got list"),
        (np.ones((2, 3)), np.ones((3, 2), bool), SriglError, r"\(3, 2\), but must have"),
        (np.ones(3), np.ones(3, bool), SriglError, r"shape \(3,\) has no neurons"),
        (np.ones((2, 0)), np.ones((2, 0), bool), SriglError, r"shape \(2, 0\) has no neurons"),
        (np.ones((2, 3), int), np.ones((2, 3), bool), ValueTypeError, "int64"),
    ],
)
def test_bad_dense_weights_and_masks_are_an_error(weight, mask, error, message):
    with pytest.raises(error, match=message):
        CondensedWeight.from_dense(weight, mask)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.ones((2, 3)), ValueTypeError, "matrix must be a SciPy sparse array, got ndarray"),
        (scipy.sparse.csr_array(np.eye(3, dtype=int)), ValueTypeError, "int64"),
        (scipy.sparse.csr_array(np.array([[1.0, 2], [3, 0]])), SriglError, "store from 1 to 2"),
        (scipy.sparse.csr_array((3, 4)), SriglError, "store from 0 to 0"),
        (scipy.sparse.coo_array(np.ones(3)), SriglError, "pair|1d sparse"),
    ],
)
def test_bad_sparse_matrices_are_an_error(matrix, error, message):
    with pytest.raises(error, match=message):
        CondensedWeight.from_csr(matrix)


# ---------------------------------------------------------------- other values


@given(weight=weights())
def test_with_values_shares_the_connections(weight):
    other = weight.with_values(np.full(weight.values.shape, 0.25, weight.dtype))
    assert np.shares_memory(other.indices, weight.indices)
    assert np.shares_memory(other.active, weight.active)
    assert other.shape == weight.shape
    assert (other.values == 0.25).all()
    assert not other.values.flags.writeable
    assert weight.with_values(weight.values) == weight


def test_with_values_of_another_shape_or_dtype_is_an_error():
    weight = small_weight()
    with pytest.raises(SriglError, match=r"values has shape \(2, 1\), but must have .* \(2, 2\)"):
        weight.with_values(np.ones((2, 1)))
    with pytest.raises(ValueTypeError, match="values has dtype float32, but must be float64"):
        weight.with_values(np.ones((2, 2), np.float32))
    with pytest.raises(ValueTypeError, match="values must be an array"):
        weight.with_values([[1.0, 2.0], [3.0, 4.0]])


# ---------------------------------------------------------------- comparing and printing


def test_equality_is_of_bits():
    weight = small_weight()
    assert weight == small_weight()
    assert (weight != small_weight()) is False
    zero = np.array([[0.5, -1.0], [2.0, -0.0]])
    assert weight.with_values(zero) != weight
    nan = weight.with_values(np.full((2, 2), np.nan))
    assert nan == nan.with_values(nan.values)
    assert weight != small_weight(np.float32)
    assert weight != CondensedWeight(VALUES, [[0, 2], [1, 3]], [0, 2], (3, 4))
    assert weight != CondensedWeight(VALUES, INDICES, [0, 1], (3, 4))
    assert weight != CondensedWeight(VALUES, INDICES, [0, 2], (4, 4))
    assert weight != CondensedWeight(VALUES, INDICES, [0, 2], (3, 5))
    assert weight != "weight"
    with pytest.raises(TypeError, match="unhashable"):
        hash(weight)


def test_repr_says_what_it_is():
    assert repr(small_weight(np.float32)) == (
        "CondensedWeight((3, 4), n_active=2, fan_in=2, dtype=float32, 66.7% sparse, 40 bytes)"
    )
    assert "dtype=bfloat16" in repr(small_weight(ml_dtypes.bfloat16))


@given(weight=weights())
def test_bytes_are_those_of_the_arrays(weight):
    n_out, n_in = weight.shape
    item = weight.dtype.itemsize
    report = weight.memory_report()
    assert report.values == weight.nnz * item
    assert report.indices == weight.nnz * 2
    assert report.active == weight.n_active * 8
    assert report.condensed == weight.nbytes == report.values + report.indices + report.active
    assert report.dense == n_out * n_in * item
    assert report.csr == weight.nnz * (item + 4) + (n_out + 1) * 4
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["condensed", "CSR", "dense"]
    for line, size in zip(lines, (report.condensed, report.csr, report.dense), strict=True):
        assert f"{size:,} bytes" in line


def test_csr_bytes_are_those_of_scipy_with_32_bit_indices():
    weight = CondensedWeight.random((30, 40), fan_in=6, rng=0)
    csr = weight.to_csr()
    size = (
        csr.data.nbytes + csr.indices.astype(np.int32).nbytes + csr.indptr.astype(np.int32).nbytes
    )
    assert weight.memory_report().csr == size


def test_a_weight_is_no_sequence():
    with pytest.raises(TypeError, match="not iterable"):
        list(small_weight())


# ---------------------------------------------------------------- a linear map


@given(weight=weights(dtypes=(np.float32, np.float64)), n=st.integers(0, 4))
@example(weight=small_weight(), n=0)
def test_matmul_operator_is_the_dense_product(weight, n):
    """Of integers and halves: exact in whatever order they are added."""
    weight = weight.with_values(np.round(weight.values * 2) / 2)
    dense = weight.to_dense()
    x = np.arange(1.0, 1 + weight.shape[1] * n).reshape(weight.shape[1], n).astype(weight.dtype)
    np.testing.assert_array_equal(weight @ x, dense @ x)
    vector = np.arange(weight.shape[1], dtype=weight.dtype)
    np.testing.assert_array_equal(weight @ vector, dense @ vector)
    assert (weight @ x).dtype == weight.dtype


def test_matmul_operator_checks_its_shapes():
    weight = small_weight()
    for x in (np.ones(3), np.ones((3, 4)), np.ones((4, 2, 2)), np.float64(3)):
        with pytest.raises(SriglError, match=r"shape \(3, 4\) @ x needs x of shape \(4,\)"):
            weight @ x
    with pytest.raises(ValueTypeError):
        weight @ [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(TypeError):
        np.ones((2, 3)) @ weight


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_linear_operator_and_its_transpose_are_adjoint(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 9, (9, 5)).astype(dtype)
    weight = CondensedWeight.random((12, 20), fan_in=5, n_active=9, dtype=dtype, rng=1)
    weight = weight.with_values(values)
    operator = weight.as_linear_operator()
    assert operator.shape == (12, 20)
    assert operator.dtype == dtype
    x = rng.integers(-8, 9, (20, 3)).astype(dtype)
    y = rng.integers(-8, 9, (12, 3)).astype(dtype)
    dense = weight.to_dense()
    np.testing.assert_array_equal(operator @ x, dense @ x)
    np.testing.assert_array_equal(operator.T @ y, dense.T @ y)
    np.testing.assert_array_equal(operator.H @ y[:, 0], dense.T @ y[:, 0])
    np.testing.assert_array_equal(operator @ x[:, :1], dense @ x[:, :1])
    assert np.vdot(y, operator @ x) == np.vdot(operator.T @ y, x)
    assert (operator @ x).dtype == dtype


def test_scipy_solves_with_the_linear_operator():
    """lsqr and svds find what dense linear algebra finds."""
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((30, 8), fan_in=4, dtype=np.float64, rng=1)
    operator, dense = weight.as_linear_operator(), weight.to_dense()
    b = rng.standard_normal(30)
    found = scipy.sparse.linalg.lsqr(operator, b, atol=1e-14, btol=1e-14)[0]
    expected = np.linalg.lstsq(dense, b, rcond=None)[0]
    condition = np.linalg.cond(dense)
    assert condition < 100
    assert np.linalg.norm(found - expected) <= 1e-12 * condition**2 * np.linalg.norm(expected)
    top = scipy.sparse.linalg.svds(operator, k=1, return_singular_vectors=False, v0=np.ones(8))
    singular = np.linalg.svd(dense, compute_uv=False)
    assert abs(top[0] - singular[0]) <= 1e-10 * singular[0]


def test_linear_operator_of_16_bit_values_is_an_error():
    for dtype in (np.float16, ml_dtypes.bfloat16):
        with pytest.raises(ValueTypeError, match="convert the values to float32"):
            small_weight(dtype).as_linear_operator()


def test_a_weight_keeps_its_plan_and_copies_do_not():
    weight = small_weight()
    plan = plan_of(weight, "reference")
    assert plan_of(weight, "reference") is plan
    assert plan.weight is weight
    assert plan_of(copy.deepcopy(weight), "reference") is not plan
    assert prepare(weight, backend="reference") is not plan
    x = np.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(
        plan(x), condensed_matmul(x, weight.with_values(weight.values), backend="reference")
    )


def test_a_matrix_that_points_outside_itself_is_refused():
    matrix = scipy.sparse.csr_array(np.array([[1.0, 0, 2], [0, 3, 4]]))
    matrix.indptr[1] = 10**7
    with pytest.raises(SriglError, match="not a valid sparse matrix"):
        CondensedWeight.from_csr(matrix)


def test_the_linear_operator_keeps_the_types_of_the_product():
    weight = CondensedWeight.random((5, 8), fan_in=3, rng=0)
    operator, x = weight.as_linear_operator(), np.random.default_rng(1).standard_normal(8)
    assert (operator @ x).dtype == np.float64
    np.testing.assert_array_equal(operator @ x, weight @ x)
    with pytest.raises(ValueTypeError, match="complex"):
        operator @ (x + 1j)


# ---------------------------------------------------------------- arrays stay as they were checked


def copies_of(weight):
    yield weight
    yield pickle.loads(pickle.dumps(weight))
    yield pickle.loads(pickle.dumps(weight, protocol=5))
    yield copy.copy(weight)
    yield copy.deepcopy(weight)
    yield weight.with_values(weight.values)
    yield CondensedWeight.from_dense(weight.to_dense(), weight.to_mask())
    yield CondensedWeight.from_csr(weight.to_csr()) if weight.dtype.itemsize > 2 else weight
    yield CondensedWeight.from_connections(
        weight.values, pickle.loads(pickle.dumps(weight.connections))
    )


def views_of(array):
    yield array
    yield array.view()
    yield array.T
    yield array[:1]
    yield array.reshape(-1)
    yield np.asarray(array)
    yield np.ravel(array)
    yield array.view(np.uint8)
    yield array[..., None]
    while isinstance(array.base, np.ndarray):
        array = array.base
        yield array


@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (2, 70_000)])
def test_no_array_of_a_weight_can_be_made_writeable(dtype, shape):
    """Kernels do not check indices again, and would read beyond their input."""
    weight = CondensedWeight.random(shape, fan_in=1, dtype=dtype, rng=0)
    for each in copies_of(weight):
        assert each == weight
        for array in (each.values, each.indices, each.active):
            assert array.flags.c_contiguous
            assert array.flags.aligned
            for view in views_of(array):
                with pytest.raises(ValueError, match="WRITEABLE"):
                    view.setflags(write=True)
                with pytest.raises(ValueError, match="WRITEABLE"):
                    view.flags.writeable = True
                with pytest.raises(ValueError, match="read-only"):
                    view[...] = 1
            with pytest.raises((BufferError, TypeError, ValueError)):
                memoryview(array.view(np.uint8)).cast("B")[0] = 1


def test_an_array_that_is_changed_later_does_not_change_the_weight():
    values, indices, active = VALUES.copy(), np.array(INDICES), np.array([0, 2])
    weight = CondensedWeight(values, indices, active, (3, 4))
    before = pickle.dumps(weight)
    for array in (values, indices, active):
        array[...] = 0
    assert pickle.dumps(weight) == before


@pytest.mark.parametrize("trainer", ["sparse", "loaded"])
def test_the_masks_of_a_trainer_cannot_be_made_writeable(trainer):
    made = SparseTrainer({"a": (4, 6)}, sparsity=0.5, schedule=UpdateSchedule(20, 2))
    if trainer == "loaded":
        made.load_state_dict(made.state_dict())
    masks = [made.masks["a"], made.backward_mask("a")]
    for mask in masks:
        for view in views_of(mask):
            with pytest.raises(ValueError, match="WRITEABLE"):
                view.setflags(write=True)


# ---------------------------------------------------------------- corner cases of constructors

ZEROS = [(), (0,), (3,), (0, 6), (6, 0), (0, 0), (2, 3, 0), (0, 3, 2, 2)]
WRONG = [None, True, 0, 1.5, "x", b"x", [], [[]], {}, (), object(), int, {1}, range(3), iter(())]


class Raises:
    """An object whose own code fails, whichever way an array is made of it."""

    def fail(self, *arguments, **options):
        raise KeyError("no")

    __array__ = __iter__ = __len__ = __dlpack__ = __dlpack_device__ = fail
    __array_interface__ = property(fail)


def constructors():
    values, mask = VALUES, np.array([[True, False, False, True]])
    connections = Connections(INDICES, [0, 2], (3, 4))
    return {
        "values": lambda a: CondensedWeight(a, INDICES, [0, 2], (3, 4)),
        "indices": lambda a: CondensedWeight(values, a, [0, 2], (3, 4)),
        "active": lambda a: CondensedWeight(values, INDICES, a, (3, 4)),
        "shape": lambda a: CondensedWeight(values, INDICES, [0, 2], a),
        "from_connections, values": lambda a: CondensedWeight.from_connections(a, connections),
        "from_connections": lambda a: CondensedWeight.from_connections(values, a),
        "from_dense": lambda a: CondensedWeight.from_dense(a, mask),
        "from_dense, mask": lambda a: CondensedWeight.from_dense(np.ones((1, 4)), a),
        "from_nonzero": CondensedWeight.from_nonzero,
        "from_csr": CondensedWeight.from_csr,
        "random": lambda a: CondensedWeight.random(a, fan_in=1),
        "fan_in": lambda a: CondensedWeight.random((4, 6), fan_in=a),
        "with_values": CondensedWeight(values, INDICES, [0, 2], (3, 4)).with_values,
        "Connections": lambda a: Connections(a, [0, 2], (3, 4)),
        "Connections, active": lambda a: Connections(INDICES, a, (3, 4)),
        "Connections, shape": lambda a: Connections(INDICES, [0, 2], a),
        "Connections.from_mask": Connections.from_mask,
        "Connections.random": lambda a: Connections.random(a, fan_in=1),
        "condensed_matmul": lambda a: condensed_matmul(a, CONSTRUCTED, backend="reference"),
        "prepare": prepare,
        "recommend": lambda a: recommend(a, batch=1),
        "random_mask": lambda a: random_mask(a, fan_in=1, rng=0),
        "random_unstructured_mask": lambda a: random_unstructured_mask(a, nnz=1, rng=0),
        "sparse_init": lambda a: sparse_init(a, rng=0),
        "SparseTrainer": lambda a: SparseTrainer({"a": a}, sparsity=0.5, schedule=99),
        "CondensedTrainer": lambda a: CondensedTrainer({"a": a}, sparsity=0.5, schedule=99),
    }


CONSTRUCTED = CondensedWeight(np.ones((1, 1)), [[0]], [0], (2, 11))


@pytest.mark.parametrize("name", constructors())
def test_arrays_without_elements_or_axes_are_refused_by_name(name):
    make = constructors()[name]
    for shape in ZEROS:
        for dtype in (np.float32, np.bool_, np.int64, object, "M8[s]", "f4,f4"):
            with pytest.raises(SriglError):
                make(np.zeros(shape, dtype))
    for shape in ((0, 6), (6, 0), (0, 0), (4, 6)):
        for cls in (scipy.sparse.csr_array, scipy.sparse.coo_array, scipy.sparse.dia_array):
            with pytest.raises(SriglError):
                make(cls(shape, dtype=np.float32))
    with pytest.raises(SriglError):
        make(scipy.sparse.coo_array((6,), dtype=np.float32))


@pytest.mark.parametrize("name", constructors())
def test_what_is_no_array_is_refused_by_name(name):
    for wrong in [*WRONG, Raises(), 2**70, -(2**70), "\ud800", [[1, 2], [3]]]:
        with pytest.raises(SriglError):
            constructors()[name](wrong)


@pytest.mark.parametrize("shape", [(2**62, 2**32), (2**63 - 1, 2**32), (2**63, 1)])
def test_a_shape_that_no_array_has_is_refused(shape):
    with pytest.raises(SriglError):
        CondensedWeight.random(shape, fan_in=2)
    with pytest.raises(SriglError):
        Connections.random(shape, fan_in=2)
    with pytest.raises(SriglError):
        random_mask(shape, fan_in=2, rng=0)
    with pytest.raises(SriglError):
        random_unstructured_mask(shape, nnz=2, rng=0)
