"""The CuPy backend: with CuPy alone what needs no device, and on a device what does.

`tests/frameworks/test_cuda_arrays.py` has the arrays of PyTorch and JAX on a device.
"""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from srigl_core import (
    CondensedWeight,
    QuantizedWeight,
    chain,
    condensed_matmul,
    condensed_matmul_backward,
    prepare,
    update_mask,
)
from srigl_core._arrays.dtypes import VALUE_TYPES
from srigl_core.contract import MatmulGradients
from srigl_core.errors import SriglError, ValueTypeError

cupy = pytest.importorskip("cupy")

from cuda_problems import (  # noqa: E402
    UPDATE,
    needs_device,
    number_of_devices,
    problem,
    update_problem,
)
from cupy_on_host import hosted_backend, seen  # noqa: E402

from srigl_core.backends.cupy_gpu import cuda_arrays, cupy_device  # noqa: E402
from srigl_core.backends.cupy_gpu.device import DeviceProperties  # noqa: E402
from srigl_core.backends.cupy_gpu.variants import Variant, variants  # noqa: E402
from srigl_core.errors import BackendUnavailableError  # noqa: E402


def has_compiler():
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="CuPy finds no NVRTC")
CONVERT = Variant("arrays.cu", "convert<float>")


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
def test_a_device_too_old_for_the_compiler_needs_another_cupy(monkeypatch):
    with pytest.raises(BackendUnavailableError, match=r"oldest is \d+; replace .*cupy-cuda12x"):
        cupy_device.compiled(CONVERT, "20")
    supported = cupy.cuda.nvrtc.getSupportedArchs()
    between = next(n for n in range(min(supported), max(supported)) if n not in supported)
    for_the_driver, _ = cupy_device.compiled(CONVERT, str(between))
    (named,) = re.findall(rb"\.target sm_(\d+)", for_the_driver)
    assert int(named) == max(n for n in supported if n < between)


@needs_compiler
def test_what_is_compiled_is_read_again(monkeypatch, tmp_path):
    monkeypatch.setenv("SRIGL_CACHE_DIR", str(tmp_path))
    loaded = []
    monkeypatch.setattr(cupy.cuda, "Device", FakeDevice)
    monkeypatch.setattr(cupy, "RawModule", lambda path: FakeModule(path, loaded))
    cupy_device._cache.cache_clear()
    try:
        first = cupy_device._loaded_kernel(0, CONVERT)
        monkeypatch.setattr(cupy_device, "compiled", None)
        assert cupy_device._loaded_kernel(0, CONVERT).symbol == first.symbol
    finally:
        cupy_device._cache.cache_clear()
    assert loaded[0] == loaded[1]
    assert loaded[0].startswith(str(tmp_path))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def of_all(path):
    path.chmod(0o666)


@pytest.mark.parametrize("spoil", [cut, of_all, lambda path: path.write_bytes(b""), Path.unlink])
@pytest.mark.parametrize("ending", ["cubin", "kernel"])
def test_a_damaged_kernel_is_compiled_anew(monkeypatch, tmp_path, spoil, ending):
    """The compiler is made up, and so are its kernels."""
    if (spoil, ending) == (of_all, "cubin"):
        pytest.skip("its hash is in the other file")
    loaded, compiled = [], []

    def compile_it(*arguments):
        compiled.append(arguments)
        return b"\x7fELF of a kernel", "convert"

    monkeypatch.setattr(cupy.cuda, "Device", FakeDevice)
    monkeypatch.setattr(cupy, "RawModule", lambda path: FakeModule(path, loaded))
    monkeypatch.setattr(cupy_device, "compiled", compile_it)
    monkeypatch.setattr(cupy_device, "_cache", lambda: (tmp_path, ""))
    for expected in (1, 1, 2, 2):
        assert cupy_device._loaded_kernel(0, CONVERT).symbol == "convert"
        assert len(compiled) == expected
        if len(loaded) == 2:
            (file,) = tmp_path.rglob(f"*.{ending}")
            spoil(file)
    if spoil is not of_all:
        assert len(set(loaded)) == 1


@needs_compiler
@pytest.mark.parametrize("place", ["off", "unwritable"])
def test_where_nothing_can_be_kept_a_kernel_is_compiled_all_the_same(monkeypatch, tmp_path, place):
    loaded = []
    monkeypatch.setattr(cupy.cuda, "Device", FakeDevice)
    monkeypatch.setattr(cupy, "RawModule", lambda path: FakeModule(path, loaded))
    gone = tmp_path / "gone"
    monkeypatch.setattr(cupy_device, "_cache", lambda: (None if place == "off" else gone, place))
    assert "convert" in cupy_device._loaded_kernel(0, CONVERT).symbol
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
        return FakeKernel(symbol)


class FakeKernel:
    shared_size_bytes = 1000

    def __init__(self, symbol):
        self.symbol, self.kernel = symbol, SimpleNamespace(ptr=77)


@pytest.fixture(autouse=True)
def properties(monkeypatch):
    """Give the properties of a device that is not there."""
    made_up = DeviceProperties("made up", 10, 100_000, 120_000, 1536)
    if not number_of_devices():
        monkeypatch.setattr(cupy_device, "_properties", lambda device: made_up)
    return made_up


def test_a_kernel_is_given_all_shared_memory_when_it_is_loaded(monkeypatch, tmp_path, properties):
    """If launches set what they need, a thread could change it for another's launch."""
    monkeypatch.setattr(cupy_device, "_properties", lambda device: properties)
    monkeypatch.setattr(cupy.cuda, "Device", FakeDevice)
    monkeypatch.setattr(cupy, "RawModule", lambda path: FakeModule(path, []))
    monkeypatch.setattr(cupy_device, "compiled", lambda *_: (b"\x7fELF", "convert"))
    monkeypatch.setattr(cupy_device, "_cache", lambda: (tmp_path, ""))
    kernel = cupy_device._loaded_kernel(0, CONVERT)
    assert kernel.max_dynamic_shared_size_bytes == 99_000


def test_the_driver_says_how_many_blocks_fit(monkeypatch, properties):
    asked = []

    def occupancy(*arguments):
        asked.append(arguments)
        return 3

    monkeypatch.setattr(cupy_device, "_properties", lambda device: properties)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 5)
    monkeypatch.setattr(cupy.cuda.driver, "occupancyMaxActiveBlocksPerMultiprocessor", occupancy)
    monkeypatch.setitem(cupy_device._kernels, (5, CONVERT), FakeKernel("convert"))
    device = cupy_device.CupyDevice()
    try:
        assert [device.fitting_blocks(CONVERT, 256, 500) for _ in range(2)] == [30, 30]
    finally:
        cupy_device._fitting_blocks.cache_clear()
    assert asked == [(77, 256, 500)]


def test_pytorchs_stream_and_memory_are_used_without_a_warning(monkeypatch):
    """The suite turns warnings into errors, as users may."""
    library = mock.Mock(**{"stream.return_value": 0x7F00, "memory.return_value": (4096, "owner")})
    monkeypatch.setattr(cuda_arrays, "library_of", lambda array: library)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    contexts = []
    monkeypatch.setattr(cuda_arrays, "_context", lambda *parts: contexts.append(parts))
    for cached in (cuda_arrays._stream, cuda_arrays._allocator):
        cached.cache_clear()
    try:
        for _ in range(2):
            cuda_arrays.CudaArrays(None).execution_context(object())
        stream, allocate = contexts[0]
        assert stream.ptr == 0x7F00
        assert contexts[1] == (stream, allocate)
        memory = allocate(64)
        assert (memory.ptr, memory.mem.size, memory.device_id) == (4096, 64, 0)
    finally:
        for cached in (cuda_arrays._stream, cuda_arrays._allocator):
            cached.cache_clear()


def test_arrays_with_a_stream_are_read_without_waiting_for_it(monkeypatch):
    """PyTorch's DLPack makes streams wait for each other, which a captured graph forbids."""
    read = []
    monkeypatch.setattr(cupy, "asarray", lambda array: read.append("interface"))
    monkeypatch.setattr(cupy, "from_dlpack", lambda array: read.append("dlpack"))
    given = SimpleNamespace(__dlpack__=None)
    for address in (0x7F00, None):
        library = SimpleNamespace(stream=lambda array, address=address: address)
        monkeypatch.setattr(cuda_arrays, "library_of", lambda array, library=library: library)
        cuda_arrays._read(given)
    assert read == ["interface", "dlpack"]


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


@pytest.mark.parametrize("batch", [3, 40])
def test_while_a_graph_is_captured_nothing_is_made_that_is_not_there_yet(hosted, batch):
    weight, x, grad, bias = problem("float32", (batch,))
    upload, device = hosted.device.upload, hosted.device
    plan = prepare(weight, backend=hosted)
    x, grad, bias = upload(x), upload(grad), upload(bias)
    calls = lambda: (plan(x, bias), plan(x), plan.backward(grad, x))  # noqa: E731
    device.captures = True
    for call in (lambda: plan(x), lambda: plan.backward(grad, x)):
        with pytest.raises(SriglError, match=r"missing .* captured; call plan.warm\(batches"):
            call()
    device.captures = False
    plan.warm([batch], [np.float32])
    device.captures, device.waits = True, 0
    product, without_bias, gradients = calls()
    assert device.waits == 0
    assert device.launched <= device.loaded
    wanted = condensed_matmul(seen(x), weight, seen(bias), backend="reference")
    np.testing.assert_array_equal(seen(product), wanted)
    wanted = condensed_matmul(seen(x), weight, backend="reference")
    np.testing.assert_array_equal(seen(without_bias), wanted)
    wanted = condensed_matmul_backward(seen(grad), seen(x), weight, backend="reference")
    for name in ("x", "values", "bias"):
        np.testing.assert_array_equal(seen(getattr(gradients, name)), getattr(wanted, name))


@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize("batch", [3, 40])
def test_a_quantized_weight_that_is_warm_makes_nothing_while_a_graph_is_captured(
    hosted, dtype, batch
):
    weight, x, _, bias = problem(dtype, (batch,))
    values, scale = weight.values.astype(np.int8), np.full(weight.n_active, 0.5, np.float32)
    quantized = QuantizedWeight.from_connections(values, scale, weight.connections)
    upload, device = hosted.device.upload, hosted.device
    plan = prepare(quantized, backend=hosted)
    x, bias = upload(x), upload(bias)
    plan.warm([batch], [dtype])
    device.captures, device.waits = True, 0
    product = plan(x, bias, compact=True)
    assert device.waits == 0
    assert device.launched <= device.loaded
    wanted = condensed_matmul(seen(x), quantized, seen(bias), compact=True, backend="reference")
    np.testing.assert_array_equal(seen(product), wanted)


def test_the_gpu_does_not_quantise_inputs(hosted):
    weight = problem("float32", (3,))[0].quantize()
    message = "'cupy' does not offer quantized_matmul with inputs='int8'"
    with pytest.raises(SriglError, match=message):
        prepare(weight, inputs="int8", backend=hosted)


def test_batches_and_dtypes_to_warm_are_checked(hosted):
    plan = prepare(problem("float32", (3,))[0], backend=hosted)
    with pytest.raises(SriglError, match="batch"):
        plan.warm([0])
    with pytest.raises(ValueTypeError, match="dtype"):
        plan.warm([1], [np.int32])
    prepare(plan.weight, backend="reference").warm([1])  # has nothing to make


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_chain_takes_cupy_arrays(hosted, where):
    weight, x, _, bias = problem("float32", (3,))
    upload = hosted.device.upload
    last = CondensedWeight.random((5, weight.shape[0]), fan_in=4, rng=0)
    whole = chain(
        [(weight, upload(bias) if where == "device" else bias, "relu"), (last, None, None)],
        backend=hosted,
    )
    hidden = prepare(weight, backend=hosted)(upload(x), upload(bias), activation="relu")
    wanted = seen(prepare(last, backend=hosted)(hidden))
    y = whole(upload(x))
    assert type(y) is cupy.ndarray
    np.testing.assert_array_equal(seen(y), wanted)
    out = upload(np.zeros_like(wanted))
    assert whole(upload(x), out=out) is out
    np.testing.assert_array_equal(seen(out), wanted)
    with pytest.raises(ValueTypeError, match="x of type ndarray is not on a CUDA device"):
        whole(x)


@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_cupy_masks_are_updated(hosted, dtype):
    arrays = update_problem(dtype)
    wanted = update_mask(*arrays, **UPDATE, backend="reference")
    got = update_mask(*map(hosted.device.upload, arrays), **UPDATE, backend=hosted)
    np.testing.assert_array_equal(seen(got.mask), wanted.mask)
    np.testing.assert_array_equal(seen(got.weight), wanted.weight)


def test_an_update_has_few_launches_and_waits_for_two_counts(hosted):
    """What is not finite is counted on the way: an error comes with the first of the two."""
    weight, grad, mask = map(hosted.device.upload, update_problem())
    device = hosted.device
    device.n_launches = device.waits = 0
    update_mask(weight, grad, mask, **UPDATE, backend=hosted)
    assert device.n_launches <= 20
    assert device.waits == 2
    seen(grad)[0, 0] = np.nan
    kept = [seen(array).copy() for array in (weight, grad, mask)]
    device.waits = 0
    with pytest.raises(SriglError, match="grad is not finite in 1 of"):
        update_mask(weight, grad, mask, **UPDATE, backend=hosted)
    assert device.waits == 1
    for array, before in zip((weight, grad, mask), kept, strict=True):
        np.testing.assert_array_equal(seen(array), before)


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
