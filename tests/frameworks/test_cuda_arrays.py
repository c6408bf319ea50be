"""Arrays of CuPy, PyTorch and JAX on a CUDA device: each library's come back as they went in."""

import numpy as np
import pytest

from srigl_core import condensed_matmul, condensed_matmul_backward, prepare, update_mask
from srigl_core._arrays.dtypes import VALUE_TYPES
from srigl_core.errors import ValueTypeError

cupy = pytest.importorskip("cupy")

from cuda_problems import UPDATE, needs_device, problem, update_problem  # noqa: E402

from srigl_core.backends.cupy_gpu import cupy_device  # noqa: E402

pytestmark = needs_device


def from_cupy(library, array, dtype):
    """Return an array of that library's, of the same numbers."""
    if library == "cupy":
        return array
    module = pytest.importorskip(library)
    if library == "torch":
        if dtype == "bfloat16":
            return module.from_dlpack(array.view(np.int16)).view(module.bfloat16)
        return module.from_dlpack(array)
    if dtype == "float64":
        pytest.skip("JAX has no float64 unless it is told to")
    return module.device_put(array.get(), module.devices("gpu")[0])


def on_host(library, array):
    """Return a NumPy array of the same numbers, in float64."""
    if library == "cupy":
        return array.view(f"u{array.dtype.itemsize}").get().view(array.dtype).astype(np.float64)
    if library == "torch":
        return array.double().cpu().numpy()
    return np.asarray(array).astype(np.float64)


@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
def test_each_librarys_arrays_come_back_as_they_went_in(library, dtype):
    weight, x, grad, bias = problem(dtype)
    device = cupy_device.CupyDevice()
    given = {
        name: from_cupy(library, device.upload(array), dtype)
        for name, array in (("x", x), ("grad", grad), ("bias", bias))
    }
    got = condensed_matmul(given["x"], weight, given["bias"], activation="gelu")
    assert type(got) is type(given["x"])
    assert got.dtype == given["x"].dtype
    wanted = condensed_matmul(x, weight, bias, activation="gelu", backend="reference")
    precision = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(
        on_host(library, got), wanted.astype(float), rtol=precision, atol=precision
    )
    got = condensed_matmul_backward(given["grad"], given["x"], weight)
    wanted = condensed_matmul_backward(grad, x, weight, backend="reference")
    for name in ("x", "values", "bias"):
        assert type(getattr(got, name)) is type(given["x"])
        np.testing.assert_array_equal(
            on_host(library, getattr(got, name)), getattr(wanted, name).astype(float)
        )


@pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
def test_each_librarys_masks_are_updated(library):
    arrays = update_problem()
    device = cupy_device.CupyDevice()
    given = [from_cupy(library, device.upload(array), "float32") for array in arrays]
    got = update_mask(*given, **UPDATE)
    wanted = update_mask(*arrays, **UPDATE, backend="reference")
    assert type(got.mask) is type(given[2])
    np.testing.assert_array_equal(on_host(library, got.mask), wanted.mask)
    np.testing.assert_array_equal(on_host(library, got.weight), wanted.weight)


def test_jax_arrays_are_not_written():
    pytest.importorskip("jax")
    weight, x, _, _ = problem(batch=(4,))
    given = from_cupy("jax", cupy.asarray(x), "float32")
    with pytest.raises(ValueTypeError, match="cannot be written"):
        prepare(weight, backend="cupy")(given, out=given[:, :12])


@pytest.mark.parametrize("batch", [3, 40])
def test_a_call_waits_for_nothing_and_runs_on_the_callers_stream(batch):
    """It can be captured in a graph, which refuses to wait, and other streams' work."""
    torch = pytest.importorskip("torch")
    weight, x, _, bias = problem(batch=(batch,))
    plan = prepare(weight, backend="cupy")
    given, offset = torch.zeros(batch, 30, device="cuda"), torch.tensor(bias, device="cuda")
    out = torch.zeros(batch, 12, device="cuda")
    lent = torch.empty(plan.workspace_bytes(batch), dtype=torch.uint8, device="cuda")
    plan(given, offset, out=out, workspace=lent)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(given, offset, out=out, workspace=lent)
    given.copy_(torch.from_numpy(x))
    graph.replay()
    wanted = condensed_matmul(x, weight, bias, backend="reference")
    np.testing.assert_array_equal(out.cpu().numpy(), wanted)


@pytest.mark.parametrize("batch", [3, 40])
def test_a_condensed_layer_is_captured_with_its_gradients(batch):
    """A replay multiplies with the values that the layer has by then."""
    torch = pytest.importorskip("torch")
    from srigl_core.torch import CondensedLinear

    layer = CondensedLinear(30, 12, fan_in=5, rng=0).cuda()
    x = torch.ones(batch, 30, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.sum().backward()
    with torch.no_grad():
        layer.values.mul_(2)
        x.copy_(torch.randn(batch, 30))
    graph.replay()
    dense = layer.to_linear()
    wanted = x.detach().requires_grad_()
    dense(wanted).sum().backward()
    torch.testing.assert_close(y, dense(x))
    torch.testing.assert_close(x.grad, wanted.grad)


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_a_result_waits_for_its_input_on_the_same_stream(library):
    weight, x, _, _ = problem(batch=(40,))
    plan = prepare(weight, backend="cupy")
    wanted = condensed_matmul(x, weight, backend="reference")
    plan(cupy.asarray(x))
    if library == "torch":
        torch = pytest.importorskip("torch")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            got = plan(torch.from_numpy(x).pin_memory().to("cuda", non_blocking=True)).cpu()
    else:
        stream = cupy.cuda.Stream(non_blocking=True)
        pinned = cupy.cuda.alloc_pinned_memory(x.nbytes)
        source = np.frombuffer(pinned, x.dtype, x.size).reshape(x.shape)
        source[...] = x
        with stream:
            busy = cupy.ones((4096, 4096), np.float32)
            for _ in range(20):
                busy = busy @ busy
            there = cupy.empty(x.shape, x.dtype)
            there.set(source)
            got = plan(there).get()
    np.testing.assert_array_equal(np.asarray(got), wanted)


def test_a_tensor_that_requires_a_gradient_is_only_read():
    torch = pytest.importorskip("torch")
    weight, x, _, _ = problem(batch=(4,))
    got = condensed_matmul(torch.tensor(x, device="cuda", requires_grad=True), weight)
    assert not got.requires_grad
    np.testing.assert_array_equal(
        got.cpu().numpy(), condensed_matmul(x, weight, backend="reference")
    )
