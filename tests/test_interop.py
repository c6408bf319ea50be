"""Arrays of other libraries: what goes in comes out, and is read and written where it lies."""

import gc
import json
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from srigl_core import (
    CondensedWeight,
    MatmulGradients,
    SriglError,
    ValueTypeError,
    condensed_matmul,
    condensed_matmul_backward,
    prepare,
    update_mask,
)
from srigl_core._arrays.checks import as_float_array, as_mask
from srigl_core._arrays.libraries import common_library, device_of, library_of, lookup

bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": bfloat16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
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


# ---------------------------------------------------------------- the libraries


class Torch:
    """PyTorch, as the tests need it."""

    def __init__(self):
        self.module = pytest.importorskip("torch")
        self.kind = self.module.Tensor

    def make(self, array):
        if array.dtype == bfloat16:
            return self.module.from_numpy(array.view(np.int16)).view(self.module.bfloat16)
        return self.module.from_numpy(array)

    def seen(self, tensor):
        if tensor.dtype == self.module.bfloat16:
            return tensor.view(self.module.int16).numpy().view(bfloat16)
        return tensor.numpy()

    def address(self, tensor):
        return tensor.data_ptr()


class Jax:
    """JAX, with 64-bit types."""

    def __init__(self):
        self.module = pytest.importorskip("jax")
        self.kind = self.module.Array

    def make(self, array):
        return self.module.device_put(array)

    def seen(self, array):
        return np.asarray(array)

    def address(self, array):
        return array.unsafe_buffer_pointer()


class Tensorflow:
    """TensorFlow itself, where it is installed."""

    def __init__(self):
        self.module = pytest.importorskip("tensorflow")
        self.kind = self.module.Tensor

    def make(self, array):
        return self.module.convert_to_tensor(array)

    def seen(self, tensor):
        return tensor.numpy()

    def address(self, tensor):
        return np.asarray(memoryview(tensor)).ctypes.data


class Lender:
    """Speaks DLPack and nothing else."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class TensorflowStandIn:
    """What this library uses of TensorFlow, under its name."""

    def __init__(self, monkeypatch):
        tf = self.module = types.ModuleType("tensorflow")
        for name, dtype in DTYPES.items():
            setattr(tf, name, dtype)
        tf.uint16 = np.dtype(np.uint16)
        tf.Tensor = type("Tensor", (), {})

        class EagerTensor(tf.Tensor):
            device = "/job:localhost/replica:0/task:0/device:CPU:0"

            def __init__(self, array):
                self.array = array
                self.shape, self.dtype = array.shape, array.dtype

            def numpy(self):
                return self.array

        class Variable:
            device = EagerTensor.device

            def __init__(self, tensor):
                self.tensor = tensor

            def numpy(self):
                return self.tensor.array

        def from_dlpack(capsule):
            class Capsule:
                def __dlpack__(self, **options):
                    return capsule

                def __dlpack_device__(self):
                    return 1, 0

            return EagerTensor(np.from_dlpack(Capsule()))

        tf.Variable = Variable
        tf.convert_to_tensor = lambda t: t.tensor if isinstance(t, Variable) else t
        tf.bitcast = lambda tensor, dtype: EagerTensor(tensor.array.view(dtype))
        tf.experimental = types.SimpleNamespace(
            dlpack=types.SimpleNamespace(
                to_dlpack=lambda tensor: tensor.array.__dlpack__(), from_dlpack=from_dlpack
            )
        )
        self.kind, self.symbolic = EagerTensor, tf.Tensor
        monkeypatch.setitem(sys.modules, "tensorflow", tf)

    def make(self, array):
        return self.kind(array)

    def seen(self, tensor):
        return tensor.array

    def address(self, tensor):
        return tensor.array.ctypes.data


class ArrayApiStandIn:
    """A library that has nothing but what the array API standard says."""

    class Array(Lender):
        def __array_namespace__(self):
            return types.SimpleNamespace(
                from_dlpack=lambda lender: ArrayApiStandIn.Array(np.from_dlpack(lender))
            )

    kind = Array

    def make(self, array):
        return self.Array(array)

    def seen(self, array):
        return array.array

    def address(self, array):
        return array.array.ctypes.data


@pytest.fixture(params=["torch", "jax", "tensorflow", "tensorflow stand-in", "array API stand-in"])
def library(request, monkeypatch):
    if request.param == "tensorflow stand-in":
        yield TensorflowStandIn(monkeypatch)
    elif request.param == "array API stand-in":
        yield ArrayApiStandIn()
    elif request.param == "jax":
        jax = pytest.importorskip("jax")
        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", True)
        yield Jax()
        jax.config.update("jax_enable_x64", before)
    else:
        yield {"torch": Torch, "tensorflow": Tensorflow}[request.param]()


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def skip_what_is_not_there(library, dtype):
    if isinstance(library, ArrayApiStandIn) and dtype == bfloat16:
        pytest.skip("the array API standard has no bfloat16")


# ---------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_product_is_of_the_callers_kind_and_has_the_same_bits(library, product_backend, dtype):
    skip_what_is_not_there(library, dtype)
    weight, x, _, bias = arrays_of(dtype)
    plan = prepare(weight, backend=product_backend)
    for shape in ((12,), (3, 12), (1, 3, 12), (0, 12)):
        some = np.resize(x, shape)
        for given in (None, bias):
            for options in ({}, {"activation": "gelu"}, {"compact": True}):
                got = plan(
                    library.make(some), given if given is None else library.make(given), **options
                )
                wanted = plan(some, given, **options)
                assert isinstance(got, library.kind)
                seen = library.seen(got)
                assert seen.dtype == wanted.dtype
                assert seen.shape == wanted.shape
                assert seen.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_are_of_the_callers_kind(library, backward_backend, dtype):
    skip_what_is_not_there(library, dtype)
    weight, x, grad, _ = arrays_of(dtype)
    got = condensed_matmul_backward(
        library.make(grad), library.make(x), weight, backend=backward_backend
    )
    wanted = condensed_matmul_backward(grad, x, weight, backend=backward_backend)
    for name in ("x", "values", "bias"):
        assert isinstance(getattr(got, name), library.kind)
        seen = library.seen(getattr(got, name))
        assert seen.dtype == getattr(wanted, name).dtype
        assert seen.tobytes() == getattr(wanted, name).tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_update_is_of_the_callers_kind(library, update_backend, dtype):
    skip_what_is_not_there(library, dtype)
    arrays = update_arrays(dtype)
    got = update_mask(*map(library.make, arrays), **UPDATE, backend=update_backend)
    wanted = update_mask(*arrays, **UPDATE, backend=update_backend)
    for name in ("mask", "weight"):
        assert isinstance(getattr(got, name), library.kind)
        assert library.seen(getattr(got, name)).tobytes() == getattr(wanted, name).tobytes()
    for name in ("ablated", "revived", "salient_counts"):
        assert type(getattr(got, name)) is np.ndarray
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_arrays_are_read_where_they_lie(library, dtype):
    skip_what_is_not_there(library, dtype)
    _, x, _, _ = arrays_of(dtype)
    given = library.make(x)
    read = as_float_array(given, "x")
    if not (isinstance(library, Tensorflow) and dtype == bfloat16):  # which has no address to see
        assert read.ctypes.data == library.address(given)
    assert read.dtype == dtype
    assert read.tobytes() == x.tobytes()
    mask = x.astype(np.float32) > 0
    np.testing.assert_array_equal(as_mask(library.make(mask), mask.shape), mask)


def test_a_condensed_weight_is_packed_from_any_librarys_arrays(library):
    dense, _, mask = update_arrays()
    mask[:] = np.arange(12) % 3 == 0
    packed = CondensedWeight.from_dense(library.make(dense), library.make(mask))
    assert packed == CondensedWeight.from_dense(dense, mask)
    values = np.flip(packed.values).copy()
    assert packed.with_values(library.make(values)) == packed.with_values(values)


def test_a_result_outlives_what_it_was_made_from(library):
    weight, x, _, _ = arrays_of(np.float32)
    many = np.resize(x, (5000, 12))  # of memory that a library may take over
    got = condensed_matmul(library.make(many.copy()), weight)
    wanted = condensed_matmul(many, weight)
    gc.collect()
    np.full((5000, 8), 7, np.float32)  # which may get memory given back too soon
    np.testing.assert_array_equal(library.seen(got), wanted)


def test_masks_of_numbers_are_refused(library):
    weight, grad, mask = update_arrays()
    given = [library.make(array) for array in (weight, grad, mask.astype(np.float32))]
    with pytest.raises(ValueTypeError, match="mask must be an array of bool, got dtype float32"):
        update_mask(*given, **UPDATE)


# ---------------------------------------------------------------- refused by name


def test_arrays_of_two_libraries_are_refused_by_name(library):
    weight, x, grad, bias = arrays_of(np.float32)
    theirs, ours = library.make(x), library.make(bias)
    its = library_of(theirs).describe(theirs)
    message = f"x is {its}, bias a NumPy array; pass arrays of one library"
    for plan in (prepare(weight), prepare(weight, backend="reference")):
        with pytest.raises(ValueTypeError, match=message):
            plan(theirs, bias)
        with pytest.raises(ValueTypeError, match=f"x is a NumPy array, bias {its}"):
            plan(x, ours)
        with pytest.raises(ValueTypeError, match=f"x is {its}, out a NumPy array"):
            plan(theirs, out=np.empty((3, 8), np.float32))
        with pytest.raises(ValueTypeError, match=f"grad is {its}, x a NumPy array"):
            plan.backward(library.make(grad), x)
        with pytest.raises(ValueTypeError, match=rf"grad is {its}, out\.x a NumPy array"):
            plan.backward(library.make(grad), theirs, out=MatmulGradients(x=np.empty_like(x)))
    w, g, m = update_arrays()
    with pytest.raises(ValueTypeError, match=f"weight is {its}, mask a NumPy array"):
        update_mask(library.make(w), library.make(g), m, **UPDATE)


class OnDevice:
    """What says that it is on a device, and no more."""

    def __init__(self, device):
        self.device = device

    def __dlpack__(self, **options):
        raise BufferError("not to be had")

    def __dlpack_device__(self):
        return self.device, 0


def test_arrays_on_two_devices_are_refused_by_name():
    weight, x, _, bias = arrays_of(np.float32)
    plan = prepare(weight, backend="reference")
    message = "bias of type OnDevice is on a CUDA device, and x of type ndarray is not; move"
    for cuda in (2, 13):
        with pytest.raises(ValueTypeError, match=message):
            plan(x, OnDevice(cuda))
    message = "bias of type ndarray is not on a CUDA device, and x of type OnDevice is; move"
    with pytest.raises(ValueTypeError, match=message):
        plan(OnDevice(2), bias)


def test_devices_are_told_apart(torch, monkeypatch):
    assert device_of(np.ones(3)) == "cpu"
    assert device_of(torch.ones(3)) == "cpu"
    assert device_of([1.0]) == "cpu"
    assert device_of(OnDevice(2)) == "cuda"
    assert device_of(types.SimpleNamespace(__cuda_array_interface__={})) == "cuda"
    fake = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode()
    with fake:
        there, elsewhere = torch.ones(3, device="cuda"), torch.ones(3, device="xpu")
    assert device_of(there) == "cuda"
    with pytest.raises(ValueTypeError, match="x is on device cpu, bias on xpu; move"):
        common_library({"x": torch.ones(3), "bias": elsewhere})
    tf = TensorflowStandIn(monkeypatch)
    tensor = tf.make(np.ones(3))
    assert device_of(tensor) == "cpu"
    tensor.device = "/job:localhost/replica:0/task:0/device:GPU:1"
    assert device_of(tensor) == "cuda"
    lender, _ = library_of(tensor).export(tensor)
    assert lender.__dlpack_device__() == (2, 1)


# ---------------------------------------------------------------- traps


def test_bfloat16_does_not_pass_dlpack_and_is_passed_as_bits(torch):
    tensor = torch.tensor([1.0, -0.0, float("nan")], dtype=torch.bfloat16)
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(tensor)
    read = as_float_array(tensor, "x")
    assert read.dtype == bfloat16
    assert read.ctypes.data == tensor.data_ptr()
    back = library_of(tensor).to_caller(read, tensor)
    assert back.dtype == torch.bfloat16
    assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_that_requires_a_gradient_is_only_read(torch, product_backend, dtype):
    weight, x, _, bias = arrays_of(DTYPES[dtype])
    tensors = [Torch().make(array).requires_grad_() for array in (x, bias)]
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(tensors[0])
    got = condensed_matmul(tensors[0], weight, tensors[1], backend=product_backend)
    assert not got.requires_grad
    wanted = condensed_matmul(x, weight, bias, backend=product_backend)
    assert Torch().seen(got).tobytes() == wanted.tobytes()
    parameter = torch.nn.Parameter(tensors[0].detach())
    assert type(condensed_matmul(parameter, weight, backend=product_backend)) is torch.Tensor


def test_jax_arrays_are_read_only_and_refused_as_out(jax):
    weight, x, grad, _ = arrays_of(np.float32)
    given = jax.device_put(x)
    assert not np.asarray(given).flags.writeable
    assert not np.from_dlpack(given, copy=True).flags.writeable
    plan = prepare(weight)
    out = jax.device_put(np.zeros((3, 8), np.float32))
    remedy = r"out of type \w+ cannot be written; leave out out, or pass all arrays as NumPy, "
    with pytest.raises(ValueTypeError, match=remedy):
        plan(given, out=out)
    with pytest.raises(ValueTypeError, match="cannot be written"):
        plan.backward(jax.device_put(grad), given, out=MatmulGradients(x=given))
    assert not np.asarray(out).any()


def test_a_read_only_array_never_becomes_a_tensor_that_can_write_it(torch):
    frozen = np.zeros(3, np.float32)
    frozen.flags.writeable = False
    alias = torch.from_dlpack(frozen)
    alias[0] = 1
    assert frozen[0] == 1  # that is the trap
    made = library_of(alias).to_caller(frozen, alias)
    made[0] = 2
    assert frozen[0] == 1
    bits = np.zeros(3, bfloat16)
    bits.flags.writeable = False
    library_of(alias).to_caller(bits, alias)[0] = 1
    assert not bits[0]


def assert_refused(call, *words):
    with pytest.raises(ValueTypeError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_what_stands_for_a_tensor_and_holds_no_numbers_is_refused(torch):
    weight, _, _, _ = arrays_of(np.float32)
    plan, reference = prepare(weight), prepare(weight, backend="reference")
    fake = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode()
    with fake:
        made_up = torch.ones(3, 12)
    for stands_for in (torch.ones(3, 12, device="meta"), made_up):
        for call in (
            lambda s=stands_for: plan(s),
            lambda s=stands_for: reference(s),
            lambda s=stands_for: condensed_matmul(s, weight),
            lambda s=stands_for: condensed_matmul(torch.ones(3, 12), weight, s),
            lambda s=stands_for: plan.backward(torch.ones(3, 8), s),
            lambda s=stands_for: update_mask(s, s, s > 0, **UPDATE),
        ):
            assert_refused(call, "holds no numbers", "srigl_core.torch.CondensedLinear")
    assert_refused(lambda: torch.func.vmap(plan)(torch.ones(3, 12)), "srigl_core.torch")
    assert_refused(lambda: torch.func.grad(lambda t: plan(t).sum())(torch.ones(3, 12)), "x of type")


def test_a_jax_tracer_is_refused(jax):
    weight, x, grad, _ = arrays_of(np.float32)
    plan, reference = prepare(weight), prepare(weight, backend="reference")
    update = lambda w: update_mask(w, w, w > 0, **UPDATE).weight  # noqa: E731
    for call in (
        lambda: jax.jit(plan)(x),
        lambda: jax.jit(reference)(x),
        lambda: jax.vmap(plan)(jax.device_put(x)),
        lambda: jax.grad(lambda t: plan(t).sum())(jax.device_put(x)),
        lambda: jax.jit(lambda t: condensed_matmul(t, weight))(x),
        lambda: jax.jit(lambda b: plan(jax.device_put(x), b))(np.ones(8, np.float32)),
        lambda: jax.jit(lambda g: plan.backward(g, wrt="x").x)(grad),
        lambda: jax.jit(update)(np.ones((8, 12), np.float32)),
    ):
        assert_refused(call, "is a JAX tracer", "srigl_core.jax.condensed_linear")


def test_a_tensor_of_a_tensorflow_graph_is_refused(monkeypatch):
    weight, _, _, _ = arrays_of(np.float32)
    stand_in = TensorflowStandIn(monkeypatch)
    symbolic = stand_in.symbolic()
    symbolic.device = ""
    assert_refused(lambda: condensed_matmul(symbolic, weight), "TensorFlow graph", "tf.function")


def test_a_tensorflow_variable_is_read(monkeypatch):
    weight, x, _, _ = arrays_of(np.float32)
    stand_in = TensorflowStandIn(monkeypatch)
    got = condensed_matmul(stand_in.module.Variable(stand_in.make(x)), weight)
    assert isinstance(got, stand_in.kind)
    np.testing.assert_array_equal(got.array, condensed_matmul(x, weight))


def test_no_library_is_imported_for_an_array_of_another(backend_names):
    program = """
import json, sys
import numpy as np, srigl_core
class Lender:
    def __init__(self, array): self.array = array
    def __dlpack__(self, **options): return self.array.__dlpack__(**options)
    def __dlpack_device__(self): return 1, 0
weight = srigl_core.CondensedWeight.random((4, 6), fan_in=2, rng=0)
ones = np.ones((4, 6), np.float32)
x, grad, mask = Lender(ones), Lender(ones[:, :4]), np.eye(4, 6, dtype=bool)
for backend in sys.argv[1:]:
    srigl_core.condensed_matmul(x, weight, out=Lender(ones[:, :4].copy()), backend=backend)
    srigl_core.condensed_matmul_backward(grad, x, weight, backend=backend)
    srigl_core.update_mask(x, x, mask, nnz_budget=8, drop_fraction=0.3, backend=backend)
print(json.dumps([name for name in ("torch", "jax", "tensorflow", "cupy") if name in sys.modules]))
"""
    names = [name for name in backend_names("update_mask") if name != "cupy"]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True,
                          timeout=120, check=True)  # fmt: skip
    assert json.loads(done.stdout) == []


def test_strides_are_kept(torch, product_backend):
    weight, x, _, bias = arrays_of(np.float32)
    wide = torch.from_numpy(np.zeros((12, 6), np.float32))
    view = wide.T[::2]
    view.copy_(torch.from_numpy(x))
    read = as_float_array(view, "x")
    assert read.strides == tuple(4 * stride for stride in view.stride()) == (8, 24)
    assert read.ctypes.data == view.data_ptr()
    wanted = condensed_matmul(x, weight, bias, backend=product_backend)
    got = condensed_matmul(view, weight, torch.from_numpy(bias), backend=product_backend)
    np.testing.assert_array_equal(got.numpy(), wanted)
    expanded = torch.from_numpy(x[:1]).expand(3, 12)
    assert as_float_array(expanded, "x").strides == (0, 4)
    out = torch.zeros(8, 6).T[::2]
    assert condensed_matmul(view, weight, torch.from_numpy(bias), out=out,
                            backend=product_backend) is out  # fmt: skip
    np.testing.assert_array_equal(out.numpy(), wanted)


# ---------------------------------------------------------------- written in place


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_tensor_is_written_in_place(torch, product_backend, dtype):
    weight, x, grad, bias = arrays_of(dtype)
    theirs = Torch()
    out = theirs.make(np.zeros((3, 8), dtype))
    plan = prepare(weight, backend=product_backend)
    assert plan(theirs.make(x), theirs.make(bias), out=out) is out
    assert theirs.seen(out).tobytes() == plan(x, bias).tobytes()
    with torch.inference_mode():
        untracked = torch.zeros(3, 8)
        assert plan(theirs.make(x), out=untracked) is untracked
    given = MatmulGradients(x=theirs.make(np.zeros((3, 12), dtype)))
    got = plan.backward(theirs.make(grad), theirs.make(x), out=given)
    assert got.x is given.x
    wanted = plan.backward(grad, x)
    assert theirs.seen(got.x).tobytes() == wanted.x.tobytes()
    assert theirs.seen(got.values).tobytes() == wanted.values.tobytes()


def test_autograd_sees_that_a_tensor_was_written(torch):
    weight, x, grad, _ = arrays_of(np.float32)
    plan, x, grad = prepare(weight), torch.from_numpy(x), torch.from_numpy(grad)
    for shape, write in (
        ((3, 8), lambda out: plan(x, out=out)),
        ((8,), lambda out: plan.backward(grad, x, out=MatmulGradients(bias=out))),
    ):
        kept = torch.ones(shape)
        product = (torch.ones(shape, requires_grad=True) * kept).sum()
        write(kept)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        watched = torch.zeros(shape, requires_grad=True)
        with pytest.raises(ValueTypeError, match=r"out is a PyTorch tensor that requires.*detach"):
            write(watched)
        assert not watched.any()


def test_a_tensor_that_shares_memory_is_refused_as_out(torch):
    weight, _, _, _ = arrays_of(np.float32)
    x = torch.zeros(3, 12)
    with pytest.raises(SriglError, match="out shares memory with x"):
        prepare(weight)(x, out=x[:, :8])
    with pytest.raises(SriglError, match="elements that share memory"):
        prepare(weight)(x, out=torch.zeros(1, 8).expand(3, 8))


def test_whatever_lends_writable_memory_is_written_in_place(product_backend):
    weight, x, _, _ = arrays_of(np.float32)
    wanted = condensed_matmul(x, weight, backend=product_backend)
    room = np.zeros((3, 8), np.float32)
    interface = types.SimpleNamespace(__array_interface__=room.__array_interface__)
    for out in (Lender(room), memoryview(room), interface):
        room[:] = 0
        assert condensed_matmul(x, weight, out=out, backend=product_backend) is out
        np.testing.assert_array_equal(room, wanted)
    room[:] = 0
    room.flags.writeable = False
    interface = types.SimpleNamespace(__array_interface__=room.__array_interface__)
    for out in (Lender(room), memoryview(room), interface):
        with pytest.raises(SriglError, match="out is read-only"):
            condensed_matmul(x, weight, out=out, backend=product_backend)
    assert not room.any()


def test_read_only_arrays_are_read(product_backend):
    weight, x, _, bias = arrays_of(np.float32)
    wanted = condensed_matmul(x, weight, bias, backend=product_backend)
    for array in (x, bias):
        array.flags.writeable = False
    for kind in (Lender, memoryview, np.asarray):
        got = condensed_matmul(kind(x), weight, kind(bias), backend=product_backend)
        np.testing.assert_array_equal(got, wanted)


# ---------------------------------------------------------------- particular to one library


def test_a_subclass_is_of_its_base_classs_library(torch):
    class Named(torch.Tensor):
        pass

    weight, x, _, _ = arrays_of(np.float32)
    got = prepare(weight)(torch.from_numpy(x).as_subclass(Named))
    np.testing.assert_array_equal(got.numpy(), condensed_matmul(x, weight))


def test_what_a_tensor_cannot_lend_is_refused_with_the_reason(torch):
    weight, _, _, _ = arrays_of(np.float32)
    plan = prepare(weight)
    assert_refused(lambda: plan(torch.eye(12).to_sparse()), "x of type Tensor", "Sparse layout")
    assert_refused(lambda: plan(torch._neg_view(torch.ones(3, 12))), "negative bit")
    assert_refused(lambda: plan(torch.ones(3, 12, dtype=torch.int64)), "x of dtype 'int64'")
    assert_refused(lambda: plan(torch.ones(3, 12, dtype=torch.float8_e4m3fn)), "Float8_e4m3fn")


def test_jax_gets_no_float64_that_it_would_round_silently(jax):
    if jax.config.jax_enable_x64:
        pytest.skip("this JAX has float64")
    weight, x, _, _ = arrays_of(np.float64)
    given = jax.device_put(x)
    assert given.dtype == np.float32
    for backend in (None, "reference"):
        assert_refused(lambda b=backend: condensed_matmul(given, weight, backend=b), "enable_x64")


def test_jax_takes_memory_over_without_a_copy(jax):
    array = prepare(arrays_of(np.float32)[0]).arrays.empty((5000, 8), np.dtype(np.float32))
    array[:] = 1
    made = library_of(jax.numpy.ones(3)).to_caller(array, jax.numpy.ones(3))
    assert made.unsafe_buffer_pointer() == array.ctypes.data


def test_a_result_is_on_the_jax_device_of_its_input():
    pytest.importorskip("jax")
    program = """
import jax, numpy as np, srigl_core
jax.config.update("jax_num_cpu_devices", 2)
weight = srigl_core.CondensedWeight.random((4, 6), fan_in=2, rng=0)
x, devices = np.ones((2, 6), np.float32), jax.devices()
assert len(devices) == 2
for backend in ("reference", None):
    for device in devices:
        given = jax.device_put(x, device)
        got = srigl_core.condensed_matmul(given, weight, backend=backend)
        assert got.devices() == {device} and got.committed
    got = srigl_core.condensed_matmul(jax.numpy.asarray(x), weight, backend=backend)
    assert got.devices() == {devices[0]} and not got.committed
    with jax.default_device(devices[1]):
        given = jax.numpy.asarray(x)
    got = srigl_core.condensed_matmul(given, weight, backend=backend)
    assert got.devices() == {devices[1]}
    mesh = jax.sharding.Mesh(np.array(devices), "a")
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    try:
        srigl_core.condensed_matmul(jax.device_put(x, rows), weight, backend=backend)
    except srigl_core.ValueTypeError as error:
        assert "x is spread over 2 JAX devices" in str(error)
    else:
        raise AssertionError("it was gathered")
"""
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)


def test_recognition_needs_no_module_that_is_not_there(monkeypatch):
    """Also while one is being imported, in another thread say."""
    lookup._library_of_type.cache_clear()
    for name in ("torch", "jax", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert library_of(Lender(np.ones(3))) is library_of(np.ones(3))
    monkeypatch.undo()
    lookup._library_of_type.cache_clear()
    assert library_of(3.0) is library_of(np.ones(3))
