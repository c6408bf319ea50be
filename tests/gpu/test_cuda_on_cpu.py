"""The harness that runs CUDA kernels on the CPU: what is right runs, what is wrong is found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import host_device
import ml_dtypes
import numpy as np
import pytest
from host_device import (
    ORDERS,
    BuildError,
    HarnessUnavailableError,
    HostModule,
    KernelError,
    LaunchError,
    Order,
    is_sanitized,
    run_in_order,
    run_sanitized,
    tight,
    tight_empty,
)
from hypothesis import given
from hypothesis import strategies as st

if (reason := host_device.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

FOLDER = Path(host_device.__file__).parent
VALUE_TYPES = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}
SAMPLES = (
    *("tiled_product<float, 8>", "tiled_product<double, 16>"),
    *("block_sum<float>", "block_sum<double>"),
    *(f"shuffles<{name}>" for name in VALUE_TYPES),
    *("votes", "round_to_16_bits", "widen_from_16_bits", "histogram", "places", "scalars"),
    "arrivals",
)
FAULTY = (
    *("read_unwritten", "barrier_in_branch", "return_before_barrier", "two_barriers"),
    *("barrier_against_shuffle", "shuffle_with_mask", "shuffle_of_width", "reverse_in_shared"),
    "reverse_in_array<float>",
)
unless_sanitized = pytest.mark.skipif(
    is_sanitized(), reason="not for a process under the sanitizers"
)
in_each_order = pytest.mark.parametrize("order", ORDERS, ids=str)


@pytest.fixture(scope="module")
def samples():
    return HostModule(FOLDER, "sample_kernels.cu", SAMPLES, sanitize=is_sanitized())


@pytest.fixture(scope="module")
def faulty():
    return HostModule(FOLDER, "faulty_kernels.cu", FAULTY, sanitize=is_sanitized())


def numbers(*shape, dtype=np.float32, seed=0):
    """Return small integers, whose products and sums are exact."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(dtype)


def product(module, a, b, name="tiled_product<float, 8>", tile=8):
    (m, k), n = a.shape, b.shape[1]
    c = tight_empty((m, n), a.dtype)
    grid = (-(-n // tile), -(-m // tile))
    module.kernel(name)(grid, (tile, tile), (tight(a), tight(b), c, *np.int32([m, n, k])))
    return c


def is_right_in(order, module, seed=0):
    a, b = numbers(19, 21, seed=seed), numbers(21, 11, seed=seed + 1)
    with run_in_order(order):
        return np.array_equal(product(module, a, b), a @ b)


# Kernels that are right


@given(
    st.tuples(*[st.integers(1, 40)] * 3),
    st.sampled_from([Order("forward"), Order("reverse", "reverse"), *map(Order, range(50))]),
)
def test_a_tiled_product_is_right_in_every_order(samples, shape, order):
    m, n, k = shape
    a, b = numbers(m, k, dtype=np.float64), numbers(k, n, dtype=np.float64, seed=1)
    with run_in_order(order):
        c = product(samples, a, b, "tiled_product<double, 16>", 16)
    np.testing.assert_array_equal(c, a @ b)


@in_each_order
@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("double", np.float64)])
@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_a_sum_by_shuffles_is_right_in_every_order(samples, name, dtype, threads, order):
    x, total = numbers(5000, dtype=dtype), tight(np.zeros(1, dtype))
    kernel = samples.kernel(f"block_sum<{name}>")
    with run_in_order(order):
        args = (tight(x), total, np.int64(x.size))
        kernel((3,), (threads,), args, shared_mem=threads // 32 * x.itemsize)
    assert total[0] == x.sum()


def shuffled(x, operand, width):
    """Return what PTX's definition of ``shfl.sync`` gives, for each of the four ways."""
    lane, operand = np.arange(32), operand % 32
    first, last = lane & ~(width - 1), lane | (width - 1)
    sources = [
        first + operand % width,
        np.where(lane - operand >= first, lane - operand, lane),
        np.where(lane + operand <= last, lane + operand, lane),
        np.where(lane ^ operand <= last, lane ^ operand, lane),
    ]
    return np.stack([x[source] for source in sources])


@pytest.mark.parametrize("name", VALUE_TYPES)
def test_shuffles_move_values_as_the_device_does(samples, name):
    x = np.random.default_rng(0).integers(0, 2**31, 32).astype(VALUE_TYPES[name])
    if x.itemsize == 8:
        x[:] *= 1 + 2**31 // x.dtype.type(3)  # the upper half counts too
    for width in (1, 2, 4, 8, 16, 32):
        for operand in (0, 1, 2, 5, 16, 31):
            out = tight_empty((4, 32), x.dtype)
            args = (tight(x), out, np.int32(operand), np.int32(width))
            samples.kernel(f"shuffles<{name}>")((1,), (32,), args)
            np.testing.assert_array_equal(out, shuffled(x, operand, width))


POSITIVE = {"none": [], "some": [3, 17, 40], "first warp": slice(0, 32), "all": slice(None)}


@in_each_order
@pytest.mark.parametrize("positive", POSITIVE)
def test_votes_count_the_threads_that_take_part(samples, positive, order):
    x = -np.ones(64, np.int32)
    x[POSITIVE[positive]] = 1
    out = tight_empty((64, 7), np.uint32)
    with run_in_order(order):
        samples.kernel("votes")((1,), (64,), (tight(x), out))
    is_positive, lane = x > 0, np.arange(64) % 32
    ballots = [
        sum(1 << i for i in range(32) if p[i] and (i < 16) == (at < 16))
        for p, at in zip(np.repeat(is_positive.reshape(2, 32), 32, axis=0), lane, strict=True)
    ]
    np.testing.assert_array_equal(out[:, 0], ballots)
    source = np.arange(64) - lane + np.where(lane < 16, (lane + 1) % 16, lane ^ 1)
    np.testing.assert_array_equal(out[:, 1].view(np.int32), x[source])
    of_warp = np.repeat(is_positive.reshape(2, 32), 32, axis=0)
    np.testing.assert_array_equal(out[:, 2], of_warp.any(axis=1))
    np.testing.assert_array_equal(out[:, 3], of_warp.all(axis=1))
    assert (out[:, 4] == is_positive.any()).all()
    assert (out[:, 5] == is_positive.all()).all()
    assert (out[:, 6] == is_positive.sum()).all()


BFLOAT16 = ml_dtypes.bfloat16


def same_bits(a, b):
    """Return where two arrays have the same bits, or both are NaN."""
    bits = {2: np.uint16, 4: np.uint32}[a.itemsize]
    return (a.view(bits) == b.view(bits)) | (np.isnan(a) & np.isnan(b))


def test_16_bit_floats_are_rounded_to_nearest_even(samples):
    bits = np.random.default_rng(0).integers(0, 2**32, 60000, np.uint32)
    every = np.arange(2**16, dtype=np.uint16)
    halves = np.concatenate([every.view(t).astype(np.float32) for t in (np.float16, BFLOAT16)])
    near = halves.view(np.uint32) + np.random.default_rng(1).integers(-1, 2, halves.size)
    middle = every[:-1].astype(np.uint32) << 16 | 0x8000
    x = np.concatenate([bits, near.astype(np.uint32), middle, middle + 1, middle - 1])
    x = np.resize(x, x.size + x.size % 2).view(np.float32)
    out = [tight_empty(x.size, dtype) for dtype in (np.float16, BFLOAT16) * 2]
    kernel = samples.kernel("round_to_16_bits")
    kernel((-(-x.size // 256),), (256,), (tight(x), *out, np.int32(x.size)))
    with np.errstate(over="ignore", invalid="ignore"):
        for rounded in out:
            assert same_bits(rounded, x.astype(rounded.dtype)).all()


def test_16_bit_floats_are_widened_exactly(samples):
    every = np.arange(2**16, dtype=np.uint16)
    singly, in_pairs = (tight_empty((2, every.size), np.float32) for _ in range(2))
    args = (tight(every), tight(every), singly, in_pairs, np.int32(every.size))
    samples.kernel("widen_from_16_bits")((256,), (256,), args)
    for out in (singly, in_pairs):
        assert same_bits(out[0], every.view(np.float16).astype(np.float32)).all()
        assert same_bits(out[1], every.view(BFLOAT16).astype(np.float32)).all()


@in_each_order
def test_atomics_count_in_shared_and_in_global_memory(samples, order):
    bins = np.random.default_rng(0).integers(1, 40, 1000).astype(np.uint32)
    counts, extremes = tight(np.zeros(40, np.uint64)), tight(np.array([0, 99], np.int32))
    bits = tight_empty(1000, np.uint32)
    args = (tight(bins), counts, extremes, bits, np.uint32(1000), np.uint32(40))
    with run_in_order(order):
        samples.kernel("histogram")((4,), (256,), args, shared_mem=40 * 4)
    np.testing.assert_array_equal(counts, np.bincount(bins, minlength=40))
    assert list(extremes) == [bins.max(), bins.min()]
    expected = [
        n.bit_count() | (32 - n.bit_length()) << 8 | ((n & -n).bit_length() << 16) | (n & 1) << 24
        for n in bins.tolist()
    ]
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize(
    ("grid", "block"), [((3,), (70,)), ((2, 3), (5, 4)), ((2, 3, 4), (4, 3, 5)), ((1,), (1,))]
)
def test_each_thread_knows_its_place(samples, grid, block):
    full_grid, full_block = (s + (1,) * (3 - len(s)) for s in (grid, block))
    out = tight_empty((*full_grid[::-1], *full_block[::-1], 6), np.int32)
    samples.kernel("places")(grid, block, (out,))
    z, y, x, tz, ty, tx = np.indices(out.shape[:-1])
    np.testing.assert_array_equal(out, np.stack([tx, ty, tz, x, y, z], axis=-1))


def arrivals(module, order):
    out = tight_empty((2, 2, 64), np.int32)
    with run_in_order(order):
        module.kernel("arrivals")((2,), (64,), (tight(np.zeros(1, np.uint32)), out))
    return out


def test_threads_and_blocks_come_in_the_order_asked_for(samples, monkeypatch):
    forward = arrivals(samples, Order())
    expected = np.arange(128).reshape(2, 1, 64).repeat(2, axis=1)
    np.testing.assert_array_equal(forward, expected)
    np.testing.assert_array_equal(arrivals(samples, Order("reverse")), expected[:, :, ::-1])
    np.testing.assert_array_equal(arrivals(samples, Order(blocks="reverse")), expected[::-1])
    firsts = set()
    for seed in range(40):
        shuffled = arrivals(samples, Order(seed))
        np.testing.assert_array_equal(np.sort(shuffled), expected)
        np.testing.assert_array_equal(shuffled, arrivals(samples, Order(seed)))
        firsts.update(shuffled[:, :, 0].ravel())
    assert len(firsts) > 64  # many a thread comes first
    monkeypatch.setenv(host_device.ORDER_VARIABLE, "reverse,reverse")
    np.testing.assert_array_equal(arrivals(samples, None), expected[::-1, :, ::-1])


# Arguments and launches


def test_arguments_of_each_kind_arrive(samples):
    out, null = tight_empty(7, np.float64), np.intp(0)
    values = (np.int16(-3), np.uint32(2**32 - 1), np.int64(-(2**40)), np.float32(0.1))
    values += (np.float64(0.1), np.float16(0.1), np.bool_(True))
    samples.kernel("scalars")((1,), (1,), (out, null, *values))
    np.testing.assert_array_equal(out, np.array(values, np.float64))


def test_a_read_only_array_is_passed(samples):
    x, total = np.arange(32, dtype=np.float32), np.zeros(1, np.float32)
    x.setflags(write=False)
    samples.kernel("block_sum<float>")((1,), (32,), (x, total, np.int64(32)), shared_mem=4)
    assert total[0] == x.sum()


RIGHT = (np.zeros(4, np.float32), np.zeros(1, np.float32), np.int64(4))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (RIGHT[:2], "takes 3 arguments, 2 were given"),
        ((*RIGHT, np.int32(1)), "takes 3 arguments, 4 were given"),
        ((*RIGHT[:2], np.int32(4)), "argument 2 of .* is the int32 4; .* an integer of 8 bytes"),
        ((*RIGHT[:2], np.float64(4)), "argument 2 .* float64 4.0; .* an integer of 8 bytes"),
        ((*RIGHT[:2], 4), r"argument 2 of .* is 4, of type int; .*np.int32\(...\)"),
        ((*RIGHT[:2], RIGHT[0]), "argument 2 .* array of float32; .* an integer of 8 bytes"),
        ((np.int64(4), *RIGHT[1:]), "argument 0 .* int64 4; .* a pointer of 8 bytes"),
        ((None, *RIGHT[1:]), "argument 0 .* None"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(samples, args, message):
    with pytest.raises(LaunchError, match=message):
        samples.kernel("block_sum<float>")((1,), (32,), args, shared_mem=4)


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((0,), (32,), "grid=.*x must lie between 1 and 2147483647"),
        ((1, 65536), (32,), "grid=.*y must lie between 1 and 65535"),
        ((1, 1, 65536), (32,), "grid=.*z must lie between 1 and 65535"),
        ((1,), (1025,), "block=.*x must lie between 1 and 1024"),
        ((1,), (1, 1, 65), "block=.*z must lie between 1 and 64"),
        ((1,), (33, 32), "1056 threads, more than 1024"),
        (1, (32,), "grid=1 is not a tuple"),
        ((1,), (1, 1, 1, 1), "block=.* is not a tuple of 1 to 3"),
    ],
)
def test_a_launch_beyond_the_limits_is_refused(samples, grid, block, message):
    with pytest.raises(LaunchError, match=message):
        samples.kernel("places")(grid, block, (np.zeros(6, np.int32),))


def test_more_shared_memory_needs_opting_in(faulty):
    module = HostModule(FOLDER, "faulty_kernels.cu", FAULTY, sanitize=is_sanitized())
    kernel, x = module.kernel("reverse_in_shared"), tight(np.arange(8, dtype=np.float32))
    assert kernel.max_dynamic_shared_size_bytes == 49152
    kernel((1,), (8,), (x,), shared_mem=49152)
    assert list(x) == list(range(8))[::-1]
    with pytest.raises(LaunchError, match="shared_mem=49153 exceeds 49152 bytes"):
        kernel((1,), (8,), (x,), shared_mem=49153)
    kernel.max_dynamic_shared_size_bytes = 232448
    kernel((1,), (8,), (x,), shared_mem=232448)
    assert list(x) == list(range(8))
    with pytest.raises(LaunchError, match="can opt in to 232448 bytes"):
        kernel.max_dynamic_shared_size_bytes = 232449
    module.shared_bytes_opt_in = 65536
    with pytest.raises(LaunchError, match="can opt in to 65536 bytes"):
        kernel.max_dynamic_shared_size_bytes = 65537
    with_arrays = module.kernel("reverse_in_array<float>")
    assert with_arrays.shared_size_bytes == 2 * 64 * 4
    assert with_arrays.max_dynamic_shared_size_bytes == 49152 - 512


# Kernels that are wrong


def test_shared_memory_holds_poison_before_each_block(faulty):
    out = tight_empty((2, 2), np.float32)
    faulty.kernel("read_unwritten")((2,), (32,), (out,), shared_mem=32 * 4)
    np.testing.assert_array_equal(out, [[1, 1], [np.nan, np.nan]])


def test_empty_arrays_hold_poison():
    assert np.isnan(tight_empty((3, 2), np.float64)).all()
    assert np.isnan(tight_empty(5, BFLOAT16).astype(np.float32)).all()
    assert list(tight_empty(2, np.int64)) == [-1, -1]
    assert tight_empty((0, 3), np.float32).shape == (0, 3)


ALL, LOW = np.uint32(0xFFFFFFFF), np.uint32(0xFFFF)


@in_each_order
@pytest.mark.parametrize(
    ("name", "threads", "args", "message"),
    [
        ("barrier_in_branch", 256, [np.int32(32)], "32 of 256 threads wait in the barrier at"),
        ("barrier_in_branch", 256, [np.int32(255)], "255 of 256 threads wait"),
        ("return_before_barrier", 64, [np.int32(63)], "63 of 64 threads wait"),
        ("two_barriers", 64, [], r"different barriers: thread \d+ at faulty_kernels.cu:\d+, th"),
        ("barrier_against_shuffle", 64, ["out"], "warp 0 .* a shuffle .* lane 0 does not come"),
        ("shuffle_with_mask", 32, ["out", ALL, np.int32(31)], "lane 31 does .* has returned"),
        ("shuffle_with_mask", 32, ["out", LOW, np.int32(32)], "leaves out its own lane"),
        ("shuffle_with_mask", 32, ["out", LOW, np.int32(16)], "reads lane 16, which"),
        ("shuffle_with_mask", 16, ["out", ALL, np.int32(16)], "reads lane 16, which"),
        ("shuffle_of_width", 32, ["out", np.int32(12)], "width 12, which is no power of two"),
        ("shuffle_of_width", 32, ["out", np.int32(0)], "width 0,"),
        ("shuffle_of_width", 32, ["out", np.int32(64)], "width 64,"),
    ],
)
def test_a_wait_that_not_all_reach_is_an_error(faulty, name, threads, args, message, order):
    args = [tight_empty(64, np.int32) if value == "out" else value for value in args]
    with run_in_order(order), pytest.raises(KernelError, match=f"{name}, block .*{message}"):
        faulty.kernel(name)((2,), (threads,), args)
    # The module is none the worse for it.
    x = tight(np.arange(64, dtype=np.float32))
    faulty.kernel("reverse_in_shared")((1,), (64,), (x,), shared_mem=64 * 4)
    assert list(x) == list(range(64))[::-1]


@unless_sanitized
def test_the_portable_switch_of_stacks_does_the_same(samples):
    portable = HostModule(
        FOLDER,
        "sample_kernels.cu",
        ["tiled_product<float, 8>", "arrivals"],
        sanitize=is_sanitized(),
        defines={"CUDA_CPU_PORTABLE": 1},
    )
    for order in ORDERS:
        assert is_right_in(order, portable)
        np.testing.assert_array_equal(arrivals(portable, order), arrivals(samples, order))


@pytest.mark.parametrize("comment", ["// the tile is there", "// the tile is used up"])
def test_a_missing_barrier_shows_in_some_order(tmp_path, samples, comment):
    text = (FOLDER / "sample_kernels.cu").read_text()
    without = text.replace(f"__syncthreads();  {comment}", "")
    assert without != text
    (tmp_path / "sample_kernels.cu").write_text(without)
    module = HostModule(
        tmp_path, "sample_kernels.cu", ["tiled_product<float, 8>"], sanitize=is_sanitized()
    )
    assert all(is_right_in(order, samples) for order in ORDERS)
    assert not all(is_right_in(order, module) for order in ORDERS)


# What the sanitizers find. They end the process, so each fault has one of its own.

REPORTS = {
    "nothing": (None, ""),
    "read past the end": ("heap-buffer-overflow", "READ of size 4"),
    "write past the end": ("heap-buffer-overflow", "WRITE of size 4"),
    "write before the start": ("heap-buffer-overflow", "WRITE of size 4"),
    "read of a freed array": ("heap-use-after-free", "READ of size 4"),
    "dynamic shared memory": ("heap-buffer-overflow", "WRITE of size 4"),
    "no dynamic shared memory": ("heap-buffer-overflow", "WRITE of size 4"),
    "static shared memory": ("global-buffer-overflow", "WRITE of size 4"),
    "16 bytes at a multiple of 8": ("runtime error", "requires 16 byte alignment"),
    "int32 product": ("runtime error", "signed integer overflow: 3 * 1073741824"),
}


def run_here(*arguments):
    """Run Python under the sanitizers, with the harness in its path."""
    paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "SRIGL_TEST_BACKENDS": "reference"}
    try:
        done = run_sanitized(arguments, env=environment, timeout=200)
    except HarnessUnavailableError as missing:
        pytest.skip(str(missing))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def provoked():
    return json.loads(run_here(str(FOLDER / "provoke_faults.py")))


@unless_sanitized
@pytest.mark.parametrize("fault", REPORTS)
def test_sanitizers_report(provoked, fault):
    error, detail = REPORTS[fault]
    if error is None:
        assert provoked[fault] == {"status": 0, "output": ""}
        return
    report = provoked[fault]["output"]
    assert provoked[fault]["status"] != 0
    assert error in report
    assert detail in report
    assert "faulty_kernels.cu:" in report
    assert "In block (0, 0, 0), thread (" in report


@unless_sanitized
def test_what_is_right_stays_right_under_the_sanitizers():
    """All tests of this file, pytest and Hypothesis included."""
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    summary = run_here("-m", "pytest", *options, __file__).splitlines()[-1]
    assert "passed" in summary


# Builds


def test_the_samples_compile_without_a_warning(samples, faulty):
    assert samples.compiler_output == ""
    assert faulty.compiler_output == ""


@unless_sanitized
def test_an_error_of_the_compiler_is_shown(tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void broken() { undefined_thing(); }\n")
    with pytest.raises(BuildError, match="undefined_thing"):
        HostModule(tmp_path, "broken.cu", ["broken"], sanitize=is_sanitized())


def test_an_edited_header_is_built_anew_and_mutants_live_side_by_side(tmp_path):
    """The kernels have the same names, and static arrays of different sizes."""
    source = '#include "size.cuh"\n' + (
        "template <class V> __global__ void fill(V* out) {\n"
        "  __shared__ V values[SIZE];\n"
        "  values[threadIdx.x] = V(SIZE + EXTRA);\n  __syncthreads();\n"
        "  out[threadIdx.x] = values[SIZE - 1 - threadIdx.x];\n}\n"
    )
    modules = []
    for size, extra in ((4, 0), (4, 1), (1000, 0)):
        (tmp_path / "fill.cu").write_text(source)
        (tmp_path / "size.cuh").write_text(f"#define SIZE {size}\n")
        options = {"sanitize": is_sanitized(), "defines": {"EXTRA": extra}}
        modules.append(HostModule(tmp_path, "fill.cu", ["fill<int>"], **options))
    for module, expected in zip(modules, (4, 5, 1000), strict=True):
        size = min(expected & ~1, 1000)
        out = tight_empty(size, np.int32)
        module.kernel("fill<int>")((1,), (size,), (out,))
        assert (out == expected).all()
    assert [m.kernel("fill<int>").shared_size_bytes for m in modules] == [16, 16, 4000]


@unless_sanitized
def test_of_two_processes_that_build_at_once_one_does(tmp_path):
    shutil.copy(FOLDER / "faulty_kernels.cu", tmp_path)
    compiler, builds = tmp_path / "g++", tmp_path / "builds"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> "{builds}"\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o700)
    program = (
        "from pathlib import Path; from host_device import HostModule; "
        f"HostModule(Path({str(tmp_path)!r}), 'faulty_kernels.cu', ['two_barriers'], "
        "sanitize=False).kernel('two_barriers')"
    )
    environment = os.environ | {
        "PYTHONPATH": str(FOLDER),
        "TMPDIR": str(tmp_path),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    runs = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [run.wait(timeout=100) for run in runs] == [0, 0]
    assert builds.read_text().count("-shared") == 1
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(host_device, "_cuda_headers", lambda: None)
    with pytest.raises(HarnessUnavailableError, match=r"cuda_fp16\.h.* pip install nvidia-cuda-"):
        HostModule(FOLDER, "sample_kernels.cu", ["places"], sanitize=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HarnessUnavailableError, match=r"needs g\+\+: install it"):
        HostModule(FOLDER, "sample_kernels.cu", ["places"], sanitize=False)


@unless_sanitized
def test_sanitizers_that_are_not_loaded_are_asked_for():
    with pytest.raises(HarnessUnavailableError, match="start Python by run_sanitized"):
        HostModule(FOLDER, "sample_kernels.cu", ["places"], sanitize=True)


def test_a_kernel_that_was_not_built_is_named(samples):
    with pytest.raises(KeyError, match="'missing' is none of the kernels built: tiled_product"):
        samples.kernel("missing")
