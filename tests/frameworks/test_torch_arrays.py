"""PyTorch's tensors as arguments: what goes in comes out, and is read and written where it lies."""

import numpy as np
import pytest
from array_library_tests import (
    DTYPES,
    UPDATE,
    ArrayLibraryTests,
    arrays_of,
    bfloat16,
)

from srigl_core import (
    MatmulGradients,
    SriglError,
    ValueTypeError,
    condensed_matmul,
    prepare,
    update_mask,
)
from srigl_core._arrays.checks import as_float_array
from srigl_core._arrays.libraries import common_library, device_of, library_of

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402


class Tensors:
    """Tensors, as the tests need them."""

    cls = torch.Tensor
    dtypes = DTYPES

    @staticmethod
    def make(array):
        if array.dtype == bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    @staticmethod
    def as_numpy(tensor):
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(bfloat16)
        return tensor.numpy()

    @staticmethod
    def address(tensor):
        return tensor.data_ptr()


class TestTensors(ArrayLibraryTests):
    adapter = Tensors


def test_devices_of_tensors_are_named():
    assert device_of(torch.ones(3)) == "cpu"
    with FakeTensorMode():
        there, elsewhere = torch.ones(3, device="cuda"), torch.ones(3, device="xpu")
    assert device_of(there) == "cuda"
    with pytest.raises(ValueTypeError, match="x is on device cpu, bias on xpu; move"):
        common_library({"x": torch.ones(3), "bias": elsewhere})


def test_bfloat16_does_not_pass_dlpack_and_is_passed_as_bits():
    tensor = torch.tensor([1.0, -0.0, float("nan")], dtype=torch.bfloat16)
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(tensor)
    read = as_float_array(tensor, "x")
    assert read.dtype == bfloat16
    assert read.ctypes.data == tensor.data_ptr()
    back = library_of(tensor).to_caller(read, tensor)
    assert back.dtype == torch.bfloat16
    assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), bfloat16], ids=str)
def test_a_tensor_that_requires_a_gradient_is_only_read(product_backend, dtype):
    weight, x, _, bias = arrays_of(dtype)
    tensors = [Tensors.make(array).requires_grad_() for array in (x, bias)]
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(tensors[0])
    got = condensed_matmul(tensors[0], weight, tensors[1], backend=product_backend)
    assert not got.requires_grad
    wanted = condensed_matmul(x, weight, bias, backend=product_backend)
    assert Tensors.as_numpy(got).tobytes() == wanted.tobytes()
    parameter = torch.nn.Parameter(tensors[0].detach())
    assert type(condensed_matmul(parameter, weight, backend=product_backend)) is torch.Tensor


def test_a_read_only_array_never_becomes_a_tensor_that_can_write_it():
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


def test_what_stands_for_a_tensor_and_holds_no_numbers_is_refused():
    weight, _, _, _ = arrays_of(np.float32)
    plan, reference = prepare(weight), prepare(weight, backend="reference")
    with FakeTensorMode():
        fake = torch.ones(3, 12)
    for stands_for in (torch.ones(3, 12, device="meta"), fake):
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


def test_strides_are_kept(product_backend):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_is_written_in_place(product_backend, dtype):
    weight, x, grad, bias = arrays_of(dtype)
    make, as_numpy = Tensors.make, Tensors.as_numpy
    out = make(np.zeros((3, 8), dtype))
    plan = prepare(weight, backend=product_backend)
    assert plan(make(x), make(bias), out=out) is out
    assert as_numpy(out).tobytes() == plan(x, bias).tobytes()
    with torch.inference_mode():
        untracked = torch.zeros(3, 8)
        assert plan(make(x), out=untracked) is untracked
    given = MatmulGradients(x=make(np.zeros((3, 12), dtype)))
    got = plan.backward(make(grad), make(x), out=given)
    assert got.x is given.x
    wanted = plan.backward(grad, x)
    assert as_numpy(got.x).tobytes() == wanted.x.tobytes()
    assert as_numpy(got.values).tobytes() == wanted.values.tobytes()


def test_autograd_sees_that_a_tensor_was_written():
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


def test_a_tensor_that_shares_memory_is_refused_as_out():
    weight, _, _, _ = arrays_of(np.float32)
    x = torch.zeros(3, 12)
    with pytest.raises(SriglError, match="out shares memory with x"):
        prepare(weight)(x, out=x[:, :8])
    with pytest.raises(SriglError, match="elements that share memory"):
        prepare(weight)(x, out=torch.zeros(1, 8).expand(3, 8))


def test_a_subclass_is_of_its_base_classs_library():
    class Named(torch.Tensor):
        pass

    weight, x, _, _ = arrays_of(np.float32)
    got = prepare(weight)(torch.from_numpy(x).as_subclass(Named))
    np.testing.assert_array_equal(got.numpy(), condensed_matmul(x, weight))


def test_a_tensor_without_plain_memory_is_refused_with_the_reason():
    weight, _, _, _ = arrays_of(np.float32)
    plan = prepare(weight)
    assert_refused(lambda: plan(torch.eye(12).to_sparse()), "x of type Tensor", "Sparse layout")
    assert_refused(lambda: plan(torch._neg_view(torch.ones(3, 12))), "negative bit")
    assert_refused(lambda: plan(torch.ones(3, 12, dtype=torch.int64)), "x of dtype 'int64'")
    assert_refused(lambda: plan(torch.ones(3, 12, dtype=torch.float8_e4m3fn)), "Float8_e4m3fn")
