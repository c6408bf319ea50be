"""What the public functions take, and what they refuse before anything is written."""

import itertools
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse

from srigl_core import (
    BackendUnavailableError,
    Capabilities,
    CondensedWeight,
    MatmulGradients,
    SriglError,
    ValueTypeError,
    _registry,
    condensed_matmul,
    condensed_matmul_backward,
    get_backend,
    list_backends,
    prepare,
    update_mask,
)
from srigl_core._arrays.operations import HostArrays
from srigl_core._registry import BackendStatus

bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float16), bfloat16, np.dtype(np.float32), np.dtype(np.float64))
SENTINEL = -77.0

# Small integers: every sum is exact in every type, so results are compared exactly.
VALUES = [[1.0, -2.0, 4.0], [3.0, 0.0, -1.0], [-5.0, 2.0, 1.0]]
INDICES = [[0, 2, 5], [1, 2, 3], [0, 1, 4]]


def weight_of(dtype=np.float32):
    """Row 1 of 4 is ablated."""
    return CondensedWeight(np.array(VALUES, dtype), INDICES, [0, 2, 3], (4, 6))


def small_integers(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def dense_product(x, weight, bias=None):
    z = np.asarray(x, np.float64) @ weight.to_dense().astype(np.float64).T
    return z if bias is None else z + np.asarray(bias, np.float64)


def assert_exactly(found, expected, dtype):
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float64), expected)


class Interface:
    """Speaks NumPy's array interface and nothing else."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


class Tensor:
    """Speaks DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class TensorElsewhere(Tensor):
    def __dlpack_device__(self):
        return (2, 0)  # CUDA

    def __dlpack__(self, **options):
        raise BufferError("this tensor is on a GPU")


# ---------------------------------------------------------------- what is taken


def kinds_of(array):
    """The same numbers in every kind of array that NumPy takes without a copy."""
    read_only = array.copy()
    read_only.setflags(write=False)
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1] + 1), SENTINEL, array.dtype)
    wide[..., 1::2] = array
    kinds = {
        "read-only": read_only,
        "Fortran order": np.asfortranarray(array),
        "negative strides": array[..., ::-1].copy()[..., ::-1],
        "all strides negative": np.flip(np.flip(array).copy()),
        "every second column": wide[..., 1::2],
        "unaligned": unaligned(array),
        "subclass": array.view(np.matrix if array.ndim == 2 else np.recarray),
    }
    if array.dtype != bfloat16:
        kinds["__array_interface__"] = Interface(array)
        kinds["DLPack"] = Tensor(array)
        kinds["memoryview"] = memoryview(array)
        kinds["big-endian"] = array.astype(array.dtype.newbyteorder(">"))
    return kinds


def unaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    moved = np.ndarray(array.shape, array.dtype, raw, offset=1)
    moved[...] = array
    return moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_kind_of_array_gives_the_same_product(matmul_backend, dtype):
    weight, x, bias = weight_of(dtype), small_integers((5, 6), dtype), small_integers(4, dtype, 1)
    expected = dense_product(x, weight, bias)
    for kind in kinds_of(x).values():
        found = condensed_matmul(kind, weight, bias, backend=matmul_backend)
        assert_exactly(found, expected, dtype)
    for kind in kinds_of(bias).values():
        found = condensed_matmul(x, weight, kind, backend=matmul_backend)
        assert_exactly(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_kind_of_array_gives_the_same_gradients(backward_backend, dtype):
    weight, x, grad = (
        weight_of(dtype),
        small_integers((5, 6), dtype),
        small_integers((5, 4), dtype, 1),
    )
    expected = condensed_matmul_backward(grad, x, weight, backend="reference")
    for kind_of_grad, kind_of_x in zip(kinds_of(grad).values(), kinds_of(x).values(), strict=True):
        found = condensed_matmul_backward(kind_of_grad, kind_of_x, weight, backend=backward_backend)
        for name in ("x", "values", "bias"):
            wanted = getattr(expected, name)
            assert_exactly(getattr(found, name), wanted.astype(np.float64), wanted.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_kind_of_array_gives_the_same_update(update_backend, dtype):
    rng = np.random.default_rng(0)
    weight, grad = small_integers((5, 6), dtype), small_integers((5, 6), dtype, 1)
    mask = rng.random((5, 6)) < 0.5
    options = {"nnz_budget": 15, "drop_fraction": 0.3, "backend": update_backend}
    expected = update_mask(weight, grad, mask, **options)
    for kind_of_w, kind_of_g in zip(
        kinds_of(weight).values(), kinds_of(grad).values(), strict=True
    ):
        found = update_mask(kind_of_w, kind_of_g, mask, **options)
        np.testing.assert_array_equal(found.mask, expected.mask)
        assert found.weight.tobytes() == expected.weight.tobytes()
    for kind_of_mask in (np.asfortranarray(mask), mask[::-1].copy()[::-1]):
        found = update_mask(weight, grad, kind_of_mask, **options)
        np.testing.assert_array_equal(found.mask, expected.mask)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 6), (2, 3, 6), (2, 1, 3, 6), (1, 1, 1, 6)])
def test_leading_axes_are_kept(product_backend, shape):
    weight, x, bias = weight_of(), small_integers(shape), small_integers(4, seed=1)
    for compact in (False, True):
        expected = dense_product(x, weight, bias)[..., weight.active if compact else slice(None)]
        found = condensed_matmul(x, weight, bias, compact=compact, backend=product_backend)
        assert_exactly(found, expected, np.float32)
    grad = small_integers((*shape[:-1], 4), seed=2)
    found = condensed_matmul_backward(grad, x, weight, backend=product_backend)
    assert_exactly(found.x, grad.astype(float) @ weight.to_dense().astype(float), np.float32)
    dense = grad.reshape(-1, 4).astype(float).T @ x.reshape(-1, 6)
    assert_exactly(found.values, np.take_along_axis(dense[weight.active],
                   weight.indices.astype(int), 1), np.float32)  # fmt: skip
    assert_exactly(found.bias, grad.reshape(-1, 4).sum(axis=0), np.float32)


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (2, 0, 6)])
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(product_backend, shape):
    weight = weight_of()
    for compact, n in ((False, 4), (True, 3)):
        found = condensed_matmul(np.empty(shape, np.float32), weight, np.ones(4), compact=compact,
                                 activation="gelu", backend=product_backend)  # fmt: skip
        assert found.shape == (*shape[:-1], n)
        assert found.dtype == np.float32
    out = MatmulGradients(values=np.full((3, 3), SENTINEL))
    found = condensed_matmul_backward(
        np.empty((*shape[:-1], 4), np.float32),
        np.empty(shape, np.float32),
        weight,
        out=out,
        backend=product_backend,
    )
    assert found.x.shape == shape
    assert found.values is out.values
    assert not found.values.any()
    assert found.bias.shape == (4,)
    assert not found.bias.any()


@pytest.mark.parametrize(("x_dtype", "w_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_results_have_the_type_that_holds_both(matmul_backend, x_dtype, w_dtype):
    weight, x = weight_of(w_dtype), small_integers((3, 6), x_dtype)
    if {x_dtype.name, w_dtype.name} == {"float16", "bfloat16"}:
        with pytest.raises(ValueTypeError, match=r"do not combine.* convert one of them"):
            condensed_matmul(x, weight, backend=matmul_backend)
        return
    widest = {2: None, 4: np.float32, 8: np.float64}[max(x_dtype.itemsize, w_dtype.itemsize)]
    widest = x_dtype if widest is None else np.dtype(widest)
    for bias_dtype in DTYPES:
        bias = small_integers(4, bias_dtype, 1)
        found = condensed_matmul(x, weight, bias, backend=matmul_backend)
        assert_exactly(found, dense_product(x, weight, bias), widest)


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [(np.float16, np.float32), (bfloat16, np.float32), (np.float32, np.float64)],
)
def test_a_bias_is_cast_to_the_type_of_the_result(matmul_backend, dtype, wider):
    """Also where `out` could hold it as it is: 1 + u becomes 1."""
    weight, x = weight_of(dtype), np.zeros((2, 6), dtype)
    bias = np.full(4, 1 + {2: 2.0**-12, 4: 2.0**-30}[np.dtype(dtype).itemsize], wider)
    assert (bias != 1).all()
    out = np.full((2, 4), SENTINEL, wider)
    condensed_matmul(x, weight, bias, out=out, backend=matmul_backend)
    assert (out == 1).all()


@pytest.mark.parametrize(("g_dtype", "w_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_gradients_have_their_types(backward_backend, g_dtype, w_dtype):
    weight, grad = weight_of(w_dtype), small_integers((3, 4), g_dtype)
    x = small_integers((3, 6), g_dtype, 1)
    if {g_dtype.name, w_dtype.name} == {"float16", "bfloat16"}:
        with pytest.raises(ValueTypeError, match="do not combine"):
            condensed_matmul_backward(grad, x, weight, backend=backward_backend)
        return
    found = condensed_matmul_backward(grad, x, weight, backend=backward_backend)
    assert found.x.dtype == np.result_type(g_dtype, w_dtype)
    wide = max(g_dtype.itemsize, w_dtype.itemsize) == 8
    assert found.values.dtype == (np.float64 if wide else np.float32)
    assert found.bias.dtype == (np.float64 if g_dtype.itemsize == 8 else np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_of_any_type_and_layout(matmul_backend, dtype):
    weight, x, bias = weight_of(), small_integers((2, 3, 6)), small_integers(4, seed=1)
    expected = dense_product(x, weight, bias)
    room = np.full((4, 6, 9), SENTINEL, dtype)
    for out in (
        np.full((2, 3, 4), SENTINEL, dtype),
        np.full((4, 3, 2), SENTINEL, dtype).T,
        room[::2, 1::2, ::-2][..., :4],
        np.full((3, 2, 4), SENTINEL, dtype).transpose(1, 0, 2)[::-1],
    ):
        found = condensed_matmul(x, weight, bias, out=out, backend=matmul_backend)
        assert found is out
        assert_exactly(out, expected, dtype)
    assert np.count_nonzero(room == SENTINEL) == room.size - 24  # nothing beside it is touched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_may_be_written_to_any_type_and_layout(backward_backend, dtype):
    weight, x, grad = weight_of(), small_integers((2, 3, 6)), small_integers((2, 3, 4), seed=1)
    expected = condensed_matmul_backward(grad, x, weight, backend="reference")
    out = MatmulGradients(
        x=np.full((6, 3, 2), SENTINEL, dtype).T,
        values=np.full((3, 6), SENTINEL, dtype)[:, ::2],
        bias=np.full(8, SENTINEL, dtype)[::-2],
    )
    found = condensed_matmul_backward(grad, x, weight, out=out, backend=backward_backend)
    for name in ("x", "values", "bias"):
        assert getattr(found, name) is getattr(out, name)
        assert_exactly(getattr(out, name), getattr(expected, name).astype(np.float64), dtype)


def test_only_the_gradients_asked_for_are_computed(backward_backend):
    weight, x, grad = weight_of(), small_integers((3, 6)), small_integers((3, 4), seed=1)
    names = ("x", "values", "bias")
    full = condensed_matmul_backward(grad, x, weight, backend=backward_backend)
    for wrt in (("x",), ("bias",), ("values", "x"), ["bias", "values"], {"x", "bias"}, "x"):
        given_x = x if "values" in wrt else None
        found = condensed_matmul_backward(grad, given_x, weight, wrt=wrt, backend=backward_backend)
        for name in names:
            if name in wrt:
                np.testing.assert_array_equal(getattr(found, name), getattr(full, name))
            else:
                assert getattr(found, name) is None


# ---------------------------------------------------------------- what is refused


X = small_integers((2, 6))
BIAS = small_integers(4, seed=1)
BAD_ARRAYS = [
    ("list", [[1.0] * 6] * 2, ValueTypeError, "{} must be an array .*, got list; convert"),
    ("None", None, ValueTypeError, "{} must be an array .* got NoneType"),
    ("int", X.astype(np.int64), ValueTypeError, r"{} of dtype 'int64' .* array\.astype"),
    ("bool", X > 0, ValueTypeError, "{} of dtype 'bool' is not supported"),
    ("complex", X + 0j, ValueTypeError, "{} of dtype 'complex64' is not supported"),
    ("object", X.astype(object), ValueTypeError, "{} of dtype 'object' is not supported"),
    ("text", X.astype(str), ValueTypeError, "{} of dtype 'str"),
    ("long double", X.astype(np.longdouble), ValueTypeError, "{} of dtype"),
    ("date", X.astype("m8[s]"), ValueTypeError, "{} of dtype 'timedelta64"),
    ("structure", np.zeros((2, 6), "f4,f4"), ValueTypeError, "{} of dtype 'void"),
    ("bytes", memoryview(b"123456"), ValueTypeError, "{} of dtype 'uint8'"),
    ("elsewhere", TensorElsewhere(X), ValueTypeError, r"{} of type TensorElsewhere"),
    ("masked", np.ma.masked_array(X, X > 1), ValueTypeError, r"{} is a masked array; .*filled"),
    ("sparse", scipy.sparse.csr_array(X), ValueTypeError, "{} must be an array .* csr_array"),
]
BAD_ARRAY_IDS = [name for name, *_ in BAD_ARRAYS]


@pytest.mark.parametrize(
    ("array", "error", "message"), [case[1:] for case in BAD_ARRAYS], ids=BAD_ARRAY_IDS
)
def test_what_is_no_array_of_numbers_is_refused(product_backend, array, error, message):
    weight = weight_of()
    out = np.full((2, 4), SENTINEL, np.float32)
    gradients = MatmulGradients(*(np.full(s, SENTINEL) for s in ((2, 6), (3, 3), (4,))))
    with pytest.raises(error, match=message.format("x")):
        condensed_matmul(array, weight, BIAS, out=out, backend=product_backend)
    if array is not None:  # no bias is meant
        with pytest.raises(error, match=message.format("bias")):
            condensed_matmul(X, weight, array, out=out, backend=product_backend)
    with pytest.raises(error, match=message.format("grad")):
        condensed_matmul_backward(array, X, weight, out=gradients, backend=product_backend)
    if array is not None:
        with pytest.raises(error, match=message.format("x")):
            condensed_matmul_backward(X[:, :4], array, weight, out=gradients,
                                      backend=product_backend)  # fmt: skip
    for written in (out, gradients.x, gradients.values, gradients.bias):
        assert (written == SENTINEL).all()


@pytest.mark.parametrize(("kind", "array", "error", "message"), BAD_ARRAYS, ids=BAD_ARRAY_IDS)
def test_an_update_refuses_what_is_no_array_of_numbers(update_backend, kind, array, error, message):
    options = {"nnz_budget": 6, "drop_fraction": 0.3, "backend": update_backend}
    mask = X > 0
    with pytest.raises(error, match=message.format("weight")):
        update_mask(array, X, mask, **options)
    with pytest.raises(error, match=message.format("grad")):
        update_mask(X, array, mask, **options)
    with pytest.raises(ValueTypeError, match=r"mask (must be an array of bool|of type TensorE)"):
        update_mask(X, X, array if kind != "bool" else [[True] * 6] * 2, **options)


BAD_PRODUCTS = [
    ("x 0-d", {"x": np.array(1.0)}, SriglError, r"x has shape \(\), .* n_in=6"),
    ("x too short", {"x": np.ones((2, 5))}, SriglError, r"x has shape \(2, 5\), .* n_in=6"),
    ("x transposed", {"x": np.ones((6, 2))}, SriglError, r"x has shape \(6, 2\), .* n_in=6"),
    (
        "bias short",
        {"bias": np.ones(3)},
        SriglError,
        r"\(3,\), .* n_out=4 .* ablated ones included",
    ),
    ("bias 2-D", {"bias": np.ones((1, 4))}, SriglError, r"bias has shape \(1, 4\)"),
    ("bias 0-d", {"bias": np.array(1.0)}, SriglError, r"bias has shape \(\)"),
    ("activation", {"activation": "swish"}, SriglError, "activation='swish' is unknown; use none,"),
    ("activation case", {"activation": "ReLU"}, SriglError, "activation='ReLU' is unknown"),
    ("activation int", {"activation": 0}, SriglError, "activation=0 is unknown"),
    ("activation function", {"activation": np.tanh}, SriglError, "activation=<ufunc 'tanh'>"),
    ("threads 0", {"threads": 0}, SriglError, "threads=0 must be at least 1"),
    ("threads -1", {"threads": -1}, SriglError, "threads=-1 must be at least 1"),
    ("threads 2.0", {"threads": 2.0}, ValueTypeError, r"threads=2\.0 must be an integer"),
    ("threads True", {"threads": True}, ValueTypeError, "threads=True must be an integer"),
    ("threads text", {"threads": "all"}, ValueTypeError, "threads='all' must be an integer"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [case[1:] for case in BAD_PRODUCTS],
    ids=[case[0] for case in BAD_PRODUCTS],
)
def test_a_bad_argument_of_a_product_is_refused(matmul_backend, arguments, error, message):
    out = np.full((2, 4), SENTINEL, np.float32)
    arguments = {"x": X, "bias": BIAS, "out": out, **arguments}
    x, weight = arguments.pop("x"), weight_of()
    with pytest.raises(error, match=message):
        condensed_matmul(x, weight, **arguments, backend=matmul_backend)
    plan = prepare(weight, backend=matmul_backend)
    with pytest.raises(error, match=message):
        plan(x, **arguments)
    assert (out == SENTINEL).all()


def test_a_compact_result_needs_a_compact_out(matmul_backend):
    for compact, n, due in ((True, 4, 3), (False, 3, 4)):
        out = np.full((2, n), SENTINEL, np.float32)
        with pytest.raises(SriglError, match=rf"out has shape \(2, {n}\), .* has \(2, {due}\)"):
            condensed_matmul(X, weight_of(), compact=compact, out=out, backend=matmul_backend)
        assert (out == SENTINEL).all()


def read_only(shape):
    array = np.full(shape, SENTINEL, np.float32)
    array.setflags(write=False)
    return array


BAD_OUTS = [
    (
        "list",
        lambda s: [[0.0] * s[-1]] * s[0],
        ValueTypeError,
        "out must be an array, got list",
    ),
    ("read-only Tensor", lambda s: Tensor(read_only(s)), SriglError, "out is read-only"),
    ("short", lambda s: np.full((s[0] - 1, *s[1:]), SENTINEL), SriglError, "out has shape"),
    ("more axes", lambda s: np.full((1, *s), SENTINEL), SriglError, "out has shape"),
    ("transposed", lambda s: np.full((*s[::-1], 1), SENTINEL), SriglError, "out has shape"),
    ("int", lambda s: np.full(s, int(SENTINEL)), ValueTypeError, "out of dtype 'int64'"),
    ("complex", lambda s: np.full(s, SENTINEL + 0j), ValueTypeError, "out of dtype 'complex128'"),
    ("object", lambda s: np.full(s, SENTINEL, object), ValueTypeError, "out of dtype 'object'"),
    ("big-endian", lambda s: np.full(s, SENTINEL, ">f4"), ValueTypeError, "native byte order"),
    ("read-only", read_only, SriglError, "out is read-only; pass a writeable array"),
    ("broadcast", lambda s: np.broadcast_to(np.float32(SENTINEL), s), SriglError, "read-only"),
]


@pytest.mark.parametrize(
    ("make_out", "error", "message"),
    [case[1:] for case in BAD_OUTS],
    ids=[case[0] for case in BAD_OUTS],
)
def test_an_out_that_cannot_be_written_is_refused(product_backend, make_out, error, message):
    weight, out = weight_of(), make_out((2, 4))
    with pytest.raises(error, match=message):
        condensed_matmul(X, weight, BIAS, out=out, backend=product_backend)
    assert not isinstance(out, np.ndarray) or (out == SENTINEL).all()
    for name, shape in (("x", (2, 6)), ("values", (3, 3)), ("bias", (4,))):
        arrays = {n: np.full(s, SENTINEL) for n, s in (("x", (2, 6)), ("values", (3, 3)))}
        arrays[name] = make_out(shape)
        with pytest.raises(error, match=message):
            condensed_matmul_backward(
                X[:, :4], X, weight, out=MatmulGradients(**arrays), backend=product_backend
            )
        assert all((a == SENTINEL).all() for a in arrays.values() if isinstance(a, np.ndarray))


def test_an_out_whose_elements_share_memory_is_refused(product_backend):
    weight = weight_of()
    base = np.full(40, SENTINEL, np.float32)
    as_strided = np.lib.stride_tricks.as_strided
    for strides in ((4, 4), (0, 4), (4, 0), (12, 4), (8, 4)):
        out = as_strided(base, (2, 4), strides)
        with pytest.raises(SriglError, match="elements that share memory; pass an array"):
            condensed_matmul(X, weight, out=out, backend=product_backend)
        gradients = MatmulGradients(x=as_strided(base, (2, 6), strides))
        with pytest.raises(SriglError, match="elements that share memory"):
            condensed_matmul_backward(X[:, :4], X, weight, out=gradients, backend=product_backend)
        assert (base == SENTINEL).all()
    for strides in ((16, 4), (4, 8)):  # apart, one after the other or interleaved
        out = as_strided(base, (2, 4), strides)
        condensed_matmul(X, weight, out=out, backend=product_backend)
        np.testing.assert_array_equal(out, dense_product(X, weight))


def test_an_out_that_shares_memory_with_an_input_is_refused(matmul_backend):
    weight = weight_of()
    base = small_integers(64, seed=5)
    copy = base.copy()
    x = base[:12].reshape(2, 6)
    bias = base[40:44]
    for name, out in (
        ("x", base[4:12].reshape(2, 4)),
        ("x", base[8:24:2].reshape(2, 4)),
        ("bias", base[36:44].reshape(2, 4)),
        ("bias", base[43:51].reshape(2, 4)),
    ):
        with pytest.raises(SriglError, match=f"out shares memory with {name}, .* copy one"):
            condensed_matmul(x, weight, bias, out=out, backend=matmul_backend)
        np.testing.assert_array_equal(base, copy)
    expected = dense_product(x, weight, bias)
    out = base[12:20].reshape(2, 4)  # beside them is fine
    assert_exactly(
        condensed_matmul(x, weight, bias, out=out, backend=matmul_backend), expected, np.float32
    )
    pairs = small_integers((2, 12), seed=6)  # and so is in between
    expected = dense_product(pairs[:, ::2], weight)
    condensed_matmul(pairs[:, ::2], weight, out=pairs[:, 1:9:2], backend=matmul_backend)
    np.testing.assert_array_equal(pairs[:, 1:9:2], expected)


def test_gradients_that_share_memory_are_refused(backward_backend):
    """Also where the input's and the gradient's names are the same: both are called x."""
    weight = weight_of()
    base = small_integers(64, seed=5)
    copy = base.copy()
    x, grad = base[:12].reshape(2, 6), base[12:20].reshape(2, 4)
    for out, message in (
        (MatmulGradients(x=x), "shares memory with x"),
        (MatmulGradients(values=base[3:12].reshape(3, 3)), "shares memory with x"),
        (MatmulGradients(values=base[11:20].reshape(3, 3)), "shares memory with"),
        (MatmulGradients(bias=base[12:16]), "shares memory with grad"),
        (MatmulGradients(bias=base[:4]), "shares memory with x"),
        (
            MatmulGradients(x=base[20:32].reshape(2, 6), values=base[31:40].reshape(3, 3)),
            "shares memory with the gradient of x",
        ),
        (
            MatmulGradients(values=base[31:40].reshape(3, 3), bias=base[39:43]),
            "shares memory with the gradient of values",
        ),
    ):
        with pytest.raises(SriglError, match=message):
            condensed_matmul_backward(grad, x, weight, out=out, backend=backward_backend)
        np.testing.assert_array_equal(base, copy)


BAD_GRADIENTS = [
    ("grad compact", {"grad": np.ones((2, 3))}, SriglError, "n_out=4 .* compact gradients"),
    ("grad 0-d", {"grad": np.array(1.0)}, SriglError, r"grad has shape \(\)"),
    ("no x", {"x": None}, SriglError, "gradient of the values needs x"),
    ("x batch", {"x": np.ones((3, 6))}, SriglError, r"x has shape \(3, 6\), .* need \(2, 6\)"),
    ("x width", {"x": np.ones((2, 5))}, SriglError, r"x has shape \(2, 5\)"),
    ("x axes", {"x": np.ones((1, 2, 6))}, SriglError, r"x has shape \(1, 2, 6\)"),
    ("wrt nothing", {"wrt": ()}, SriglError, r"wrt=\(\) must name one or more of x, values, bias"),
    ("wrt unknown", {"wrt": ("x", "weight")}, SriglError, "wrt=.*'weight'.* must name"),
    ("wrt text", {"wrt": "w"}, SriglError, "wrt='w' must name"),
    ("wrt number", {"wrt": 5}, SriglError, "wrt=5 must name"),
    ("wrt None", {"wrt": None}, SriglError, "wrt=None must name"),
    ("wrt list of lists", {"wrt": [["x"]]}, SriglError, "must name one or more"),
    ("out array", {"out": np.zeros((2, 6))}, ValueTypeError, "out must be a MatmulGradients"),
    ("out dict", {"out": {}}, ValueTypeError, r"got dict; for example out=MatmulGradients\(x="),
    ("threads", {"threads": 0}, SriglError, "threads=0 must be at least 1"),
    ("threads text", {"threads": "2"}, ValueTypeError, "threads='2' must be an integer"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [case[1:] for case in BAD_GRADIENTS],
    ids=[case[0] for case in BAD_GRADIENTS],
)
def test_a_bad_argument_of_the_gradients_is_refused(backward_backend, arguments, error, message):
    out = MatmulGradients(*(np.full(s, SENTINEL) for s in ((2, 6), (3, 3), (4,))))
    arguments = {"grad": X[:, :4], "x": X, "out": out, **arguments}
    grad, x, weight = arguments.pop("grad"), arguments.pop("x"), weight_of()
    with pytest.raises(error, match=message):
        condensed_matmul_backward(grad, x, weight, **arguments, backend=backward_backend)
    with pytest.raises(error, match=message):
        prepare(weight, backend=backward_backend).backward(grad, x, **arguments)
    assert all((a == SENTINEL).all() for a in (out.x, out.values, out.bias))


def test_float16_and_bfloat16_do_not_meet_in_the_gradients(backward_backend):
    out = MatmulGradients(values=np.full((3, 3), SENTINEL))
    x, grad = X.astype(np.float16), X[:, :4].astype(bfloat16)
    with pytest.raises(ValueTypeError, match="do not combine"):
        condensed_matmul_backward(grad, x, weight_of(), out=out, backend=backward_backend)
    assert (out.values == SENTINEL).all()


@pytest.mark.parametrize(
    "weight",
    [np.ones((4, 6)), scipy.sparse.csr_array(np.eye(6)), None, "fc1"],
    ids=["ndarray", "csr", "None", "name"],
)
def test_what_is_no_condensed_weight_is_refused(product_backend, weight):
    message = f"weight must be a CondensedWeight, got {type(weight).__name__}; make one with"
    with pytest.raises(ValueTypeError, match=message):
        condensed_matmul(X, weight, backend=product_backend)
    with pytest.raises(ValueTypeError, match=message):
        condensed_matmul_backward(X, X, weight, backend=product_backend)
    with pytest.raises(ValueTypeError, match=message):
        prepare(weight, backend=product_backend)


BAD_UPDATES = [
    ("weight 1-D", {"weight": np.ones(6)}, SriglError, r"shape \(6,\) has no neurons with inputs"),
    ("weight empty", {"weight": np.ones((2, 0))}, SriglError, r"\(2, 0\) has no neurons"),
    ("grad shape", {"grad": np.ones((6, 2))}, SriglError, r"grad has shape \(6, 2\), .* \(2, 6\)"),
    ("mask shape", {"mask": np.ones(6, bool)}, SriglError, r"mask has shape \(6,\), .* \(2, 6\)"),
    (
        "mask numbers",
        {"mask": np.ones((2, 6))},
        ValueTypeError,
        "got dtype float64; pass mask != 0",
    ),
    ("mask list", {"mask": [[True] * 6] * 2}, ValueTypeError, "bool, got list"),
    ("threads", {"threads": 0}, SriglError, "threads=0 must be at least 1"),
    ("threads text", {"threads": "2"}, ValueTypeError, "threads='2' must be an integer"),
    ("budget", {"nnz_budget": 13}, SriglError, r"nnz_budget=13 exceeds the 12 weights .* 1\.\.12"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [case[1:] for case in BAD_UPDATES],
    ids=[case[0] for case in BAD_UPDATES],
)
def test_a_bad_argument_of_an_update_is_refused(update_backend, arguments, error, message):
    arguments = {"weight": X, "grad": X, "mask": X > 0, "nnz_budget": 6, **arguments}
    copies = {n: a.copy() for n, a in arguments.items() if isinstance(a, np.ndarray)}
    with pytest.raises(error, match=message):
        update_mask(**arguments, drop_fraction=0.3, backend=update_backend)
    for name, copy in copies.items():
        np.testing.assert_array_equal(arguments[name], copy)


# ---------------------------------------------------------------- plans


def test_a_plan_is_immutable_and_printable(matmul_backend):
    weight = weight_of()
    plan = prepare(weight, backend=matmul_backend, threads=2)
    assert plan.weight is weight
    assert plan.backend.name == matmul_backend
    assert plan.threads == 2
    for name in ("weight", "threads", "anything"):
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(plan, name, None)
    facts = plan.describe()
    assert facts["backend"] == matmul_backend
    assert facts["threads"] == 2
    assert {"kernel", "layout", "bytes"} <= facts.keys()
    assert isinstance(facts["bytes"], int)
    facts.clear()
    assert plan.describe()
    text = repr(plan)
    assert repr(weight) in text
    assert all(f"{name}=" in text for name in ("backend", "kernel", "layout", "bytes"))
    assert "default" in repr(prepare(weight, backend=matmul_backend))


@pytest.mark.parametrize("threads", [0, -3, 1.0, True])
def test_a_plan_of_no_threads_is_refused(matmul_backend, threads):
    with pytest.raises(SriglError, match=f"threads={threads}"):
        prepare(weight_of(), backend=matmul_backend, threads=threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_with_other_values_computes_with_them(product_backend, dtype):
    weight, x = weight_of(dtype), small_integers((3, 6), dtype)
    plan = prepare(weight, backend=product_backend)
    values = small_integers((3, 3), dtype, 9)
    other = plan.with_values(values)
    assert_exactly(other(x), dense_product(x, weight.with_values(values)), dtype)
    assert_exactly(plan(x), dense_product(x, weight), dtype)
    assert np.shares_memory(other.weight.indices, weight.indices)
    values[:] = 0
    assert other.weight.values.any()
    with pytest.raises(SriglError, match=r"values has shape \(3, 2\), but must have .* \(3, 3\)"):
        plan.with_values(values[:, :2])
    with pytest.raises(ValueTypeError, match="but must be"):
        plan.with_values(values.astype(np.float64 if dtype != np.float64 else np.float32))
    grad = small_integers((3, 4), dtype, 4)
    again = prepare(weight, backend=product_backend).with_values(other.weight.values)
    expected = grad.astype(float) @ other.weight.to_dense().astype(float)
    assert_exactly(again.backward(grad, wrt="x").x, expected, dtype)


# ---------------------------------------------------------------- backends


class FakeBackend:
    """The reference, counted, and unable to do some things."""

    name = "fake"

    def __init__(self, **capabilities):
        self.capabilities = Capabilities(**capabilities)
        self.reference = get_backend("reference")
        self.n_prepared = 0

    def prepare(self, weight):
        self.n_prepared += 1
        return self.reference.prepare(weight)

    def update_mask(self, weight, grad, mask, settings, *, threads):
        return self.reference.update_mask(weight, grad, mask, settings, threads=threads)


def test_registered_backends_are_listed_preferred_first():
    statuses = list_backends()
    names = [status.name for status in statuses]
    assert {"reference", "numba", "scipy"} <= set(names)
    assert len(set(names)) == len(names)
    available = [status for status in statuses if status.available]
    assert statuses[: len(available)] == available
    priorities = [status.capabilities.priority for status in available]
    assert priorities == sorted(priorities, reverse=True)
    assert {"reference", "scipy"} <= {status.name for status in available}
    for status in statuses:
        assert (status.reason == "") == status.available
        assert (status.capabilities is None) != status.available


def test_the_preferred_backend_is_used_where_none_is_named():
    for operation in ("condensed_matmul", "condensed_matmul_backward", "update_mask"):
        able = [
            s
            for s in list_backends()
            if s.available
            and operation in s.capabilities.operations
            and s.capabilities.device == "cpu"
        ]
        assert get_backend(operation=operation).name == able[0].name
        assert get_backend(None, operation=operation) is get_backend(able[0].name)


def test_where_numba_cannot_run_one_warning_says_why_and_others_do_the_work(monkeypatch):
    reason = "backend 'numba' needs the package 'numba': pip install numba"
    without = [s for s in list_backends() if s.name != "numba"]
    caches = (_registry._preferred, _registry._warn_if_slow)
    with monkeypatch.context() as patched:
        patched.setattr(
            _registry, "list_backends", lambda: [*without, BackendStatus("numba", False, reason)]
        )
        for cache in caches:
            cache.cache_clear()
        assert get_backend("scipy").name == "scipy"  # named, so without a warning
        with pytest.warns(RuntimeWarning, match=re.escape(reason)) as warned:
            chosen = [get_backend(operation=each).name for each in (None, "update_mask")]
        assert chosen == ["scipy", "reference"]
        assert len(warned) == 1
        fast = FakeBackend(priority=50)  # of another package, perhaps as fast
        own = BackendStatus("numba", False, reason)
        known = [BackendStatus("fake", True, "", fast.capabilities), *without, own]
        patched.setattr(_registry, "list_backends", lambda: known)
        patched.setattr(_registry, "_load", lambda name: fast)
        for cache in caches:
            cache.cache_clear()
        with warnings.catch_warnings(action="error"):
            assert get_backend() is fast
    for cache in caches:
        cache.cache_clear()


class OnCuda:
    """What tells of an array on a CUDA device, and no more."""

    def __dlpack__(self, **options):
        raise BufferError("this array is on a CUDA device")

    def __dlpack_device__(self):
        return (2, 0)


def test_an_array_on_a_cuda_device_gets_a_backend_for_one(monkeypatch):
    for_cuda = FakeBackend(device="cuda", priority=-1)
    weight, there = weight_of(), OnCuda()
    known = [*list_backends(), BackendStatus("fake", True, "", for_cuda.capabilities)]
    with monkeypatch.context() as patched:
        patched.setattr(_registry, "list_backends", lambda: known)
        patched.setattr(_registry, "_load", {"fake": for_cuda}.get)
        _registry._preferred.cache_clear()
        assert get_backend(device="cuda") is for_cuda
        with pytest.raises(ValueTypeError, match="x of type OnCuda"):
            condensed_matmul(there, weight)  # it takes NumPy's arrays, in truth
        assert for_cuda.n_prepared == 1
    _registry._preferred.cache_clear()


@pytest.mark.skipif(
    any(s.available and s.capabilities.device == "cuda" for s in list_backends()),
    reason="there is a backend for CUDA devices",
)
def test_an_array_on_a_cuda_device_is_never_copied_to_the_cpu():
    there, weight = OnCuda(), weight_of()
    for call in (
        lambda: condensed_matmul(there, weight),
        lambda: condensed_matmul_backward(there, X, weight),
        lambda: update_mask(there, X, X > 0, nnz_budget=6, drop_fraction=0.3),
    ):
        with pytest.raises(BackendUnavailableError, match=r"on a cuda device.*backend 'cupy'"):
            call()
    with pytest.raises(ValueTypeError, match="x of type OnCuda cannot be read without a copy"):
        condensed_matmul(there, weight, backend="reference")


class Boxed:
    """An array of a kind that NumPy cannot read."""

    def __init__(self, content):
        self.content = content
        self.shape = content.shape


class BoxedArrays(HostArrays):
    def as_float_array(self, array, what):
        if not isinstance(array, Boxed):
            raise ValueTypeError(f"{what} is in no box")
        return super().as_float_array(array.content, what)

    def as_mask(self, mask, shape):
        return super().as_mask(mask.content, shape)

    def as_out(self, out, shape, inputs):
        return super().as_out(out.content, shape, inputs)

    def to_caller(self, array, like):
        assert isinstance(like, Boxed)
        return Boxed(array)


def test_a_backend_with_arrays_of_its_own_gives_them_back():
    backend = FakeBackend()
    backend.arrays = BoxedArrays()
    weight, bias = weight_of(), np.arange(4, dtype=np.float32)
    expected = condensed_matmul(X, weight, bias, backend="reference")
    plan = prepare(weight, backend=backend)
    result = plan(Boxed(X), Boxed(bias))
    np.testing.assert_array_equal(result.content, expected)
    out = Boxed(np.empty_like(expected))
    assert plan(Boxed(X), Boxed(bias), out=out) is out
    np.testing.assert_array_equal(out.content, expected)
    with pytest.raises(ValueTypeError, match="bias is in no box"):
        plan(Boxed(X), bias)

    grad = X[:, :4]
    wanted = condensed_matmul_backward(grad, X, weight, backend="reference")
    got = plan.backward(
        Boxed(grad), Boxed(X), out=MatmulGradients(x=Boxed(np.empty_like(wanted.x)))
    )
    for name in ("x", "values", "bias"):
        np.testing.assert_array_equal(getattr(got, name).content, getattr(wanted, name))

    options = {"nnz_budget": 6, "drop_fraction": 0.3}
    wanted = update_mask(X, -X, X > 0, backend="reference", **options)
    got = update_mask(Boxed(X), Boxed(-X), Boxed(X > 0), backend=backend, **options)
    np.testing.assert_array_equal(got.mask.content, wanted.mask)
    np.testing.assert_array_equal(got.weight.content, wanted.weight)


def test_an_unknown_backend_is_refused_with_those_there_are():
    for call in (
        lambda: get_backend("cuda"),
        lambda: prepare(weight_of(), backend="cuda"),
        lambda: condensed_matmul(X, weight_of(), backend="cuda"),
        lambda: condensed_matmul_backward(X[:, :4], X, weight_of(), backend="cuda"),
        lambda: update_mask(X, X, X > 0, nnz_budget=6, drop_fraction=0.3, backend="cuda"),
    ):
        with pytest.raises(SriglError, match=r"no backend is called 'cuda'.* reference"):
            call()


class WithoutPrepare:
    name, capabilities = "wrong", Capabilities(priority=1000)


@pytest.mark.parametrize("made", [None, object(), FakeBackend, WithoutPrepare()])
def test_an_entry_point_that_makes_no_backend_leaves_the_others_usable(monkeypatch, made):
    class Wrong:
        name, value = "wrong", "package:make"

        def load(self):
            return lambda: made

    found = _registry.entry_points

    def with_the_wrong_one(**wanted):
        is_asked_for = wanted.get("name", "wrong") == "wrong"
        return [*found(**wanted), *([Wrong()] if is_asked_for else [])]

    caches = (_registry._load, _registry._preferred)
    with monkeypatch.context() as patched:
        patched.setattr(_registry, "entry_points", with_the_wrong_one)
        for cache in caches:
            cache.cache_clear()
        (status,) = (each for each in list_backends() if each.name == "wrong")
        assert not status.available
        assert "'wrong' (package:make) is not a backend" in status.reason
        assert get_backend().name != "wrong"
        with pytest.raises(BackendUnavailableError, match="a method for each operation"):
            get_backend("wrong")
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("backend", [3, object(), ["reference"], FakeBackend.prepare])
def test_what_is_neither_name_nor_backend_is_refused(backend):
    with pytest.raises(ValueTypeError, match=r"backend must be a name .* reference"):
        get_backend(backend)
    with pytest.raises(ValueTypeError, match="backend must be a name"):
        condensed_matmul(X, weight_of(), backend=backend)


def test_an_operation_that_is_not_offered_is_refused_with_those_that_offer_it():
    with pytest.raises(SriglError, match=r"backend 'scipy' does not offer update_mask.* reference"):
        update_mask(X, X, X > 0, nnz_budget=6, drop_fraction=0.3, backend="scipy")
    forward_only = FakeBackend(operations=frozenset({"condensed_matmul"}))
    weight = weight_of()
    message = "backend 'fake' does not offer condensed_matmul_backward; use one of: "
    with pytest.raises(SriglError, match=message):
        condensed_matmul_backward(X[:, :4], X, weight, backend=forward_only)
    with pytest.raises(SriglError, match=message):
        prepare(weight, backend=forward_only).backward(X[:, :4], X)
    assert_exactly(
        condensed_matmul(X, weight, backend=forward_only), dense_product(X, weight), np.float32
    )


def test_a_backend_object_is_used_as_it_is_and_its_plan_kept_with_the_weight():
    fake, weight = FakeBackend(), weight_of()
    assert get_backend(fake) is fake
    for _ in range(3):
        found = condensed_matmul(X, weight, backend=fake)
        assert_exactly(found, dense_product(X, weight), np.float32)
    assert fake.n_prepared == 1
    condensed_matmul(X, weight_of(), backend=fake)
    assert fake.n_prepared == 2
    update = update_mask(X, X, X > 0, nnz_budget=6, drop_fraction=0.3, backend=fake)
    assert update.fan_in == 3


def test_dtypes_a_backend_does_not_take_are_refused():
    few = frozenset({"float32"})
    single = FakeBackend(value_dtypes=few, input_dtypes=few, index_dtypes=frozenset({"uint16"}))
    with pytest.raises(
        ValueTypeError, match="'fake' does not take values of dtype float64; it takes"
    ):
        prepare(weight_of(np.float64), backend=single)
    with pytest.raises(ValueTypeError, match="'fake' does not take x of dtype float64"):
        condensed_matmul(X.astype(np.float64), weight_of(), backend=single)
    with pytest.raises(ValueTypeError, match="'fake' does not take grad of dtype float16"):
        condensed_matmul_backward(X[:, :4].astype("f2"), X, weight_of(), backend=single)
    wide = CondensedWeight(np.ones((1, 1), np.float32), [[0]], [0], (1, 65537))
    with pytest.raises(
        ValueTypeError, match="'fake' does not take indices of dtype uint32; it takes uint16"
    ):
        prepare(wide, backend=single)
    arrays = {"weight": X, "grad": X}
    for name in arrays:
        wider = arrays | {name: X.astype(np.float64)}
        message = f"'fake' does not take {name} of dtype float64; it takes float32"
        with pytest.raises(ValueTypeError, match=message):
            update_mask(**wider, mask=X > 0, nnz_budget=6, drop_fraction=0.3, backend=single)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs a distribution with backends of its own."""

    def install(modules):
        monkeypatch.syspath_prepend(tmp_path)
        info = tmp_path / "others_backends-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: others_backends\nVersion: 1.0\n"
        )
        lines = [f"{name} = {name}_module:make" for name in modules]
        (info / "entry_points.txt").write_text("\n".join(["[srigl_core.backends]", *lines]))
        for name, text in modules.items():
            (tmp_path / f"{name}_module.py").write_text(text)

    return install


def test_a_backend_that_cannot_run_is_listed_with_its_reason_and_never_replaced(installed):
    installed(
        {
            "no_gpu": "from srigl_core import BackendUnavailableError\n"
            "def make(): raise BackendUnavailableError('no GPU; install cupy')\n",
            "no_library": "import a_library_nobody_has\n",
        }
    )
    found = {status.name: status for status in list_backends()}
    assert not found["no_gpu"].available
    assert found["no_gpu"].reason == "no GPU; install cupy"
    assert not found["no_library"].available
    assert "a_library_nobody_has" in found["no_library"].reason
    assert "install" in found["no_library"].reason
    assert found["reference"].available
    for name, reason in (("no_gpu", "no GPU; install"), ("no_library", "a_library_nobody_has")):
        for error in (BackendUnavailableError, ImportError, SriglError):
            with pytest.raises(error, match=reason):
                get_backend(name)
        with pytest.raises(BackendUnavailableError, match=reason):
            condensed_matmul(X, weight_of(), backend=name)
    assert get_backend().name not in ("no_gpu", "no_library")


def test_a_backend_of_another_distribution_is_found_by_its_name(installed):
    installed(
        {
            "another": "from srigl_core.reference.backend import ReferenceBackend\n"
            "class make(ReferenceBackend):\n    name = 'another'\n"
        }
    )
    assert get_backend("another").name == "another"
    assert "another" in [status.name for status in list_backends()]
    found = condensed_matmul(X, weight_of(), backend="another")
    assert_exactly(found, dense_product(X, weight_of()), np.float32)


def test_messages_say_what_was_given_and_what_to_do():
    """Value, rule and remedy, on the errors a user meets most."""
    calls = {
        lambda: condensed_matmul([1.0], weight_of()): ("list", "array", "numpy.asarray"),
        lambda: condensed_matmul(X[:, :5], weight_of()): ("(2, 5)", "last axis", "n_in=6"),
        lambda: condensed_matmul(X, weight_of(), activation="tanh"): (
            "'tanh'",
            "unknown",
            "gelu_tanh",
        ),
        lambda: condensed_matmul(X, X): ("ndarray", "CondensedWeight", "from_dense"),
        lambda: condensed_matmul(X, weight_of(), threads=0): ("threads=0", "at least", "1"),
        lambda: update_mask(X, X, X, nnz_budget=1, drop_fraction=0): ("float32", "bool", "!= 0"),
        lambda: get_backend("gpu"): ("'gpu'", "no backend", "reference"),
    }
    for call, words in calls.items():
        with pytest.raises(SriglError) as caught:
            call()
        for word in words:
            assert re.search(re.escape(word), str(caught.value)), (word, str(caught.value))


class Lending:
    """A prepared weight that says what it was lent."""

    def __init__(self, prepared):
        self.prepared, self.lent = prepared, []

    def workspace_bytes(self, batch, dtype):
        return batch * dtype.itemsize

    def matmul(self, *arrays, workspace=None, **options):
        self.lent.append(workspace)
        self.prepared.matmul(*arrays, **options)

    def backward(self, *arrays, workspace=None, **options):
        self.lent.append(workspace)
        self.prepared.backward(*arrays, **options)


class LendingBackend(FakeBackend):
    def prepare(self, weight):
        self.prepared = Lending(super().prepare(weight))
        return self.prepared


def test_a_workspace_reaches_the_kernels_that_take_one():
    backend = LendingBackend()
    plan = prepare(weight_of(), backend=backend)
    assert plan.workspace_bytes(10) == 40
    assert plan.workspace_bytes(10, np.float64) == 80
    assert plan.workspace_bytes(0) == 0
    lent = np.empty(40, np.uint8)
    np.testing.assert_array_equal(plan(X, workspace=lent), plan(X))
    plan.backward(X[:, :4], X, workspace=lent)
    assert [array is lent for array in backend.prepared.lent] == [True, False, True]


def test_a_bad_workspace_is_refused_before_anything_is_written():
    plan = prepare(weight_of(), backend=LendingBackend())
    out = np.full((len(X), 4), 7, np.float32)
    bad = {
        "got list": [0] * 64,
        "got float32": np.empty(64, np.float32),
        "one run of bytes": np.empty(64, np.uint8)[::2],
        "multiple of 16": np.empty(65, np.uint8)[1:],
        "shares memory with out": out.reshape(-1).view(np.uint8),
    }
    for message, workspace in bad.items():
        with pytest.raises(SriglError, match=message):
            plan(X, out=out, workspace=workspace)
    read_only = np.empty(64, np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(SriglError, match="read-only"):
        plan(X, out=out, workspace=read_only)
    assert (out == 7).all()


@pytest.mark.parametrize("backend", ["reference", "scipy"])
def test_a_backend_without_a_workspace_says_so(backend):
    plan = prepare(weight_of(), backend=backend)
    assert plan.workspace_bytes(10) == 0
    for call in (plan, lambda x, **options: plan.backward(x[:, :4], x, **options)):
        with pytest.raises(SriglError, match=f"'{backend}' takes no workspace"):
            call(X, workspace=np.empty(8, np.uint8))
