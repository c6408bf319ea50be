"""The CuPy backend: with CuPy alone what needs no device, and on a device what does."""

import numpy as np
import pytest

from srigl_core import (
    CondensedWeight,
    condensed_matmul,
    condensed_matmul_backward,
    prepare,
    update_mask,
)
from srigl_core._arrays.dtypes import VALUE_TYPES, value_dtype
from srigl_core.contract import MatmulGradients
from srigl_core.errors import SriglError, ValueTypeError

cupy = pytest.importorskip("cupy")

from cupy_on_host import hosted_backend, seen  # noqa: E402

from srigl_core.backends.cupy_gpu import cupy_device  # noqa: E402
from srigl_core.backends.cupy_gpu.variants import Variant, variants  # noqa: E402
from srigl_core.errors import BackendUnavailableError  # noqa: E402


def number_of_devices():
    try:
        return cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


def has_compiler():
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception:
        return False
    return True


needs_device = pytest.mark.skipif(not number_of_devices(), reason="there is no CUDA device")
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="CuPy finds no NVRTC")
CONVERT = Variant("arrays.cu", "convert<float>")


def problem(dtype="float32", batch=(2, 33), seed=0):
    """Return a weight, an input, a gradient and a bias, of small integers: each sum is exact."""
    rng, kind = np.random.default_rng(seed), value_dtype(dtype)
    weight = CondensedWeight.random((12, 30), fan_in=5, n_active=9, rng=rng)
    values = rng.integers(-2, 3, weight.values.shape).astype(kind)
    weight = CondensedWeight(values, weight.indices, weight.active, weight.shape)
    shapes = (*batch, 30), (*batch, 12), (12,)
    return weight, *(rng.integers(-2, 3, shape).astype(kind) for shape in shapes)


UPDATE = {"nnz_budget": 100, "drop_fraction": 0.3}


def update_problem(dtype="float32"):
    rng, kind = np.random.default_rng(1), value_dtype(dtype)
    weight, grad = (rng.standard_normal((12, 30)).astype(kind) for _ in range(2))
    return weight, grad, rng.random((12, 30)) < 0.3


@needs_compiler
@pytest.mark.parametrize("file", sorted({variant.file for variant in variants()}))
def test_cupys_compiler_compiles_the_kernels(file):
    variant = next(v for v in variants() if v.file == file)
    code, symbol = cupy_device.compiled(variant, "90")
    assert code.startswith(b"\x7fELF")
    assert symbol.encode() in code
    for_the_driver, _ = cupy_device.compiled(variant, "990")
    assert b".entry" in for_the_driver


@needs_compiler
def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(BackendUnavailableError, match='identifier "nothing" is undefined'):
        cupy_device.compiled(Variant("arrays.cu", "convert<nothing>"), "90")


@needs_compiler
def test_what_is_compiled_is_read_again(monkeypatch, tmp_path):
    monkeypatch.setenv("SRIGL_CACHE_DIR", str(tmp_path))
    loaded = []
    monkeypatch.setattr(cupy.cuda, "Device", FakeDevice)
    monkeypatch.setattr(cupy, "RawModule", lambda path: FakeModule(path, loaded))
    cupy_device._cache.cache_clear()
    try:
        first = cupy_device._kernel.__wrapped__(0, CONVERT)
        monkeypatch.setattr(cupy_device, "compiled", None)
        assert cupy_device._kernel.__wrapped__(0, CONVERT) == first
    finally:
        cupy_device._cache.cache_clear()
    assert loaded[0] == loaded[1]
    assert loaded[0].startswith(str(tmp_path))


@needs_compiler
@pytest.mark.parametrize("place", ["off", "unwritable"])
def test_where_nothing_can_be_kept_a_kernel_is_compiled_all_the_same(monkeypatch, tmp_path, place):
    loaded = []
    monkeypatch.setattr(cupy.cuda, "Device", FakeDevice)
    monkeypatch.setattr(cupy, "RawModule", lambda path: FakeModule(path, loaded))
    gone = tmp_path / "gone"
    monkeypatch.setattr(cupy_device, "_cache", lambda: (None if place == "off" else gone, place))
    assert "convert" in cupy_device._kernel.__wrapped__(0, CONVERT)
    assert not gone.exists()
    assert not loaded[0].startswith(str(tmp_path))


class FakeDevice:
    compute_capability = "90"

    def __init__(self, number):
        pass


class FakeModule:
    def __init__(self, path, loaded):
        with open(path, "rb") as file:
            assert file.read(4) == b"\x7fELF"
        loaded.append(path)

    def get_function(self, symbol):
        return symbol


@pytest.fixture
def hosted():
    with hosted_backend() as backend:
        yield backend


@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize("batch", [(3,), (2, 33)])
def test_cupy_arrays_go_in_and_come_out(hosted, dtype, batch):
    weight, x, grad, bias = problem(dtype, batch)
    upload = hosted.device.upload
    plan = prepare(weight, backend=hosted)
    y = plan(upload(x), upload(bias), activation="relu")
    assert type(y) is cupy.ndarray
    wanted = condensed_matmul(x, weight, bias, activation="relu", backend="reference")
    np.testing.assert_array_equal(seen(y), wanted)
    out = upload(np.zeros_like(wanted))
    lent = upload(np.empty(plan.workspace_bytes(x[..., 0].size), np.uint8))
    assert plan(upload(x), upload(bias), activation="relu", out=out, workspace=lent) is out
    np.testing.assert_array_equal(seen(out), wanted)
    wanted = condensed_matmul_backward(grad, x, weight, backend="reference")
    got = plan.backward(upload(grad), upload(x))
    for name in ("x", "values", "bias"):
        np.testing.assert_array_equal(seen(getattr(got, name)), getattr(wanted, name))


@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_cupy_masks_are_updated(hosted, dtype):
    arrays = update_problem(dtype)
    wanted = update_mask(*arrays, **UPDATE, backend="reference")
    got = update_mask(*map(hosted.device.upload, arrays), **UPDATE, backend=hosted)
    np.testing.assert_array_equal(seen(got.mask), wanted.mask)
    np.testing.assert_array_equal(seen(got.weight), wanted.weight)


def test_bad_arrays_are_refused_by_name(hosted):
    upload = hosted.device.upload
    weight, x, _, _ = problem(batch=(4,))
    plan = prepare(weight, backend=hosted)
    w, g, m = (upload(array) for array in update_problem())
    there = upload(x)
    of_another = cupy.ndarray((4, 12), np.float32, memptr=OtherDevice.pointer(there))
    cases = {
        "x of type ndarray is not on a CUDA device": lambda: plan(x),
        "out of type ndarray is not on a CUDA device": lambda: plan(there, out=x[:, :12]),
        "bias of type list is not on a CUDA device": lambda: plan(there, [0.0] * 12),
        "x of dtype 'int64' is not supported": lambda: plan(upload(x.astype(np.int64))),
        "out is on CUDA device 1, but device 0 is current": lambda: plan(there, out=of_another),
        "mask of type ndarray is not on a CUDA": lambda: update_mask(
            w, g, seen(m), **UPDATE, backend=hosted
        ),
        "mask must be an array of bool, got float32": lambda: update_mask(
            w, g, w, **UPDATE, backend=hosted
        ),
        "workspace must be an array of uint8, got float32": lambda: plan(there, workspace=there),
    }
    for message, call in cases.items():
        with pytest.raises(ValueTypeError, match=message):
            call()
    buffer = upload(np.zeros((4, 60), np.float32))
    cases = {
        r"x has shape \(4, 29\)": lambda: plan(there[:, :29]),
        "mask has shape": lambda: update_mask(w, g, m[:3], **UPDATE, backend=hosted),
        "out has shape": lambda: plan(there, out=there[:, :11]),
        "out shares memory with x": lambda: plan(there, out=there[:, :12]),
        "elements that share memory": lambda: plan(
            there, out=cupy.ndarray((4, 12), np.float32, memptr=buffer.data, strides=(0, 4))
        ),
        "workspace shares memory with x": lambda: plan(
            there, workspace=there.reshape(-1).view(np.uint8)
        ),
        "workspace has 16 bytes, but this call needs": lambda: plan.backward(
            there[:, :12], there, workspace=buffer.reshape(-1)[:4].view(np.uint8)
        ),
    }
    for message, call in cases.items():
        with pytest.raises(SriglError, match=message):
            call()
    assert not seen(buffer).any()


class OtherDevice:
    """Memory that says it is of device 1."""

    @staticmethod
    def pointer(array):
        unowned = cupy.cuda.UnownedMemory(array.data.ptr, array.nbytes, array, 1)
        return cupy.cuda.MemoryPointer(unowned, 0)


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


@needs_device
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


@needs_device
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


@needs_device
def test_jax_arrays_are_not_written():
    pytest.importorskip("jax")
    weight, x, _, _ = problem(batch=(4,))
    given = from_cupy("jax", cupy.asarray(x), "float32")
    with pytest.raises(ValueTypeError, match="cannot be written"):
        prepare(weight, backend="cupy")(given, out=given[:, :12])


@needs_device
def test_strided_inputs_and_results():
    weight, x, grad, _ = problem()
    wanted = condensed_matmul(x, weight, backend="reference")
    wide = cupy.zeros((*x.shape[:-1], 60), np.float32)
    wide[..., ::2] = cupy.asarray(x)
    out = cupy.zeros((*grad.shape[:-1], 24), np.float32)[..., ::2]
    plan = prepare(weight, backend="cupy")
    assert plan(wide[..., ::2], out=out) is out
    np.testing.assert_array_equal(out.get(), wanted)
    wanted = condensed_matmul_backward(grad, x, weight, backend="reference")
    dx = cupy.zeros((30, *x.shape[:-1]), np.float32).transpose(1, 2, 0)
    got = plan.backward(cupy.asarray(grad), wide[..., ::2], out=MatmulGradients(x=dx))
    assert got.x is dx
    np.testing.assert_array_equal(dx.get(), wanted.x)
    np.testing.assert_array_equal(got.values.get(), wanted.values)


@needs_device
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


@needs_device
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


@needs_device
def test_a_tensor_that_requires_a_gradient_is_only_read():
    torch = pytest.importorskip("torch")
    weight, x, _, _ = problem(batch=(4,))
    got = condensed_matmul(torch.tensor(x, device="cuda", requires_grad=True), weight)
    assert not got.requires_grad
    np.testing.assert_array_equal(
        got.cpu().numpy(), condensed_matmul(x, weight, backend="reference")
    )


@needs_device
@pytest.mark.skipif(number_of_devices() < 2, reason="there is one CUDA device")
def test_arrays_of_another_device_are_refused():
    weight, x, _, _ = problem(batch=(4,))
    plan = prepare(weight, backend="cupy")
    with cupy.cuda.Device(1):
        there = cupy.asarray(x)
        with pytest.raises(SriglError, match="on CUDA device 0, but device 1 is current"):
            plan(there)
    with pytest.raises(ValueTypeError, match="x is on CUDA device 1, but device 0 is current"):
        plan(there)


def needs_memory(gibibytes):
    enough = number_of_devices() and cupy.cuda.Device().mem_info[0] > gibibytes << 30
    return pytest.mark.skipif(not enough, reason=f"needs {gibibytes} GiB on a CUDA device")


@needs_memory(40)
@pytest.mark.parametrize("batch", [8, 70_000])
def test_arrays_of_more_elements_than_31_bits_count(batch):
    """Inputs and results of 2.3e9 elements; small integers, so that sums are exact."""
    width = 2_300_000_000 // batch
    rng = np.random.default_rng(0)
    wide = CondensedWeight.random((9, width), fan_in=4, dtype=np.float16, rng=rng)
    tall = CondensedWeight.random((width, 9), fan_in=4, dtype=np.float16, rng=rng)
    for weight in (wide, tall):
        values = rng.integers(-2, 3, weight.values.shape).astype(np.float16)
        weight = CondensedWeight(values, weight.indices, weight.active, weight.shape)
        n_out, n_in = weight.shape
        x = (cupy.arange(batch)[:, None] * 7 + cupy.arange(n_in, dtype=np.int32)) % 5
        x = x.astype(np.float16)
        got = prepare(weight, backend="cupy")(x)
        rows = np.unique([0, 1, batch // 2, batch - 2, batch - 1])
        few = x[rows[:, None], cupy.asarray(np.unique(weight.indices))[None]].get()
        where = np.searchsorted(np.unique(weight.indices), weight.indices)
        for row, inputs in zip(rows, few.astype(np.float32), strict=True):
            sums = (inputs[where] * weight.values).sum(axis=1)
            expected = np.zeros(n_out, np.float32)
            expected[weight.active] = sums
            np.testing.assert_array_equal(got[int(row)].get(), expected)
        del x, got
        cupy.get_default_memory_pool().free_all_blocks()


@needs_memory(40)
def test_a_mask_of_more_positions_than_31_bits_count():
    pytest.importorskip("numba")
    shape = (70_000, 33_000)
    rng = np.random.default_rng(0)
    numbers = rng.integers(-1000, 1000, shape, dtype=np.int16).view(np.float16)
    numbers = np.where(np.isfinite(numbers), numbers, np.float16(1))
    mask = rng.integers(0, 10, shape, dtype=np.uint8) == 0
    settings = {"nnz_budget": mask.size // 10, "drop_fraction": 0.3}
    grad = numbers[::-1].copy()
    wanted = update_mask(numbers, grad, mask, **settings, backend="numba")
    got = update_mask(*map(cupy.asarray, (numbers, grad, mask)), **settings, backend="cupy")
    for first in range(0, shape[0], 7000):
        some = slice(first, first + 7000)
        np.testing.assert_array_equal(got.mask[some].get(), wanted.mask[some])
        np.testing.assert_array_equal(got.weight[some].get(), wanted.weight[some])
