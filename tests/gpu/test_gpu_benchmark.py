"""What only the benchmark of a GPU has, without one: a device with its own clock stands in."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import compile_gate
import host_device
import numpy as np
import pytest
from fake_gpu import PEAKS, FakeGpu, gpu_contenders
from typer.testing import CliRunner

from srigl_core.benchmarks import measure
from srigl_core.benchmarks import run as run_module
from srigl_core.benchmarks.cases import Case, Layer, gpu_cases
from srigl_core.benchmarks.contenders import Contender
from srigl_core.benchmarks.devices import gpu
from srigl_core.benchmarks.event_timing import CALLS
from srigl_core.benchmarks.measure import Bench, Settings
from srigl_core.benchmarks.problems import FLOAT16, Precision, Problem
from srigl_core.benchmarks.report import page
from srigl_core.benchmarks.results import OURS, load_results
from srigl_core.benchmarks.roofline import least_time, work_of
from srigl_core.benchmarks.timing import interleaved
from srigl_core.cli.app import app
from srigl_core.errors import BackendUnavailableError, SriglError

PEAK_KERNELS = ("multiply_adds", "shared_reads")

# The device, and the kernels that measure its peak rates


@pytest.mark.skipif(
    compile_gate.missing_compiler() is not None, reason=str(compile_gate.missing_compiler())
)
def test_the_peak_kernels_compile_and_keep_their_loops():
    kernels = [SimpleNamespace(file=gpu.KERNELS.name, name=name) for name in PEAK_KERNELS]
    reports = compile_gate.compile_gate(gpu.KERNELS.parent, kernels, (75, 90, 120))
    assert not compile_gate.spills(reports)
    for report in reports:
        if report.variant.name == "shared_reads":
            assert report.shared_bytes >= (1024 + 7 * 128) * 16


@pytest.mark.skipif(
    host_device.unavailable() is not None or host_device.is_sanitized(),
    reason=host_device.unavailable() or "the sanitizers are for the backend's kernels",
)
def test_the_peak_kernels_do_what_is_counted():
    folder, file = gpu.KERNELS.parent, gpu.KERNELS.name
    module = host_device.HostModule(folder, file, PEAK_KERNELS, sanitize=False)
    out = np.zeros(2 * gpu.THREADS, np.float32)
    # With factor one, each multiply-add adds one; a thread has eight sums.
    numbers = (np.int32(3), np.float32(1), np.float32(1))
    module.kernel("multiply_adds")((2,), (gpu.THREADS,), (out, *numbers))
    thread = np.arange(gpu.THREADS)
    begin = 8 * thread + sum(range(8))
    np.testing.assert_array_equal(out.reshape(2, -1) - begin, 3 * gpu.MULTIPLY_ADDS)
    module.kernel("shared_reads")((2,), (gpu.THREADS,), (out, np.int32(2)))
    read = [(thread + 32 * repeat) % 1024 + 128 * i for repeat in range(2) for i in range(8)]
    assert 16 * len(read) == 2 * gpu.READ_BYTES
    np.testing.assert_array_equal(out.reshape(2, -1), [4.0 * sum(read)] * 2)


def test_a_device_is_measured_and_described(monkeypatch):
    queue, torch, cupy = FakeGpu(), mock.MagicMock(), mock.MagicMock()

    def kernel(name):
        def launch(grid, block, arguments):
            assert (grid, block, arguments[0]) == ((80,), (gpu.THREADS,), 80 * gpu.THREADS)
            queue.submit(0.0, int(arguments[1]) * (1e-6 if name == "multiply_adds" else 2e-6))

        return launch

    properties = mock.MagicMock(L2_cache_size=1000, multi_processor_count=10)
    torch.empty_like.return_value.copy_ = lambda other: queue.submit(0.0, 2 * (1 << 30) / 4e12)
    torch.cuda.synchronize, torch.cuda.empty_cache = queue.wait, queue.release
    torch.cuda._sleep = lambda cycles: queue.submit(0.0, cycles / 2e9)
    torch.cuda.get_device_properties.return_value = properties
    cupy.cuda.runtime.getDevice.return_value = 0
    cupy.empty = lambda size, dtype: size
    cupy.RawModule.return_value.get_function = kernel
    cupy.get_default_memory_pool.return_value.free_all_blocks = queue.release
    for name, module in (("torch", torch), ("cupy", cupy)):
        monkeypatch.setitem(sys.modules, name, module)
    smi = mock.Mock(return_value=mock.Mock(stdout="580.1, 1980 MHz, 1980 MHz, 3201 MHz\n"))
    monkeypatch.setattr(gpu.subprocess, "run", smi)
    monkeypatch.setattr(gpu, "get_backend", lambda name: None)
    monkeypatch.setattr(gpu.GpuDevice, "mark", lambda self: queue.mark())
    monkeypatch.setattr(gpu.GpuDevice, "seconds", lambda self, a, b: queue.seconds(a, b))
    device, threads = gpu.GpuDevice(), 80 * gpu.THREADS
    begin = device.mark()
    device.spin(0.25)
    assert device.seconds(begin, device.mark()) == pytest.approx(0.25, rel=1e-4)
    peaks = device.peaks(0)
    assert peaks.copy_bandwidth == pytest.approx(4e12, rel=0.02)
    assert peaks.multiply_adds == pytest.approx(threads * 128 / 1e-6, rel=0.02)
    assert peaks.shared_bandwidth == pytest.approx(threads * 128 / 2e-6, rel=0.02)
    assert queue.released == 2  # by both libraries
    device.flush()
    assert device._flushed.method_calls == [mock.call.fill_(1.0), mock.call.sum()]
    facts = device.facts()
    assert (facts["L2"], facts["multiprocessors"]) == (1000, 10)
    assert (facts["driver_version"], facts["clocks.sm"]) == ("580.1", "1980 MHz")
    smi.return_value.stdout = "one, line\nmore, lines\n"
    assert "driver_version" not in device.facts()
    smi.side_effect = FileNotFoundError
    assert "driver_version" not in device.facts()


def test_a_device_without_pytorch_is_one_line_with_the_install(monkeypatch):
    monkeypatch.setattr(gpu, "get_backend", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailableError, match=r"needs PyTorch, .* pip install torch"):
        gpu.GpuDevice()


# How it is timed


@pytest.fixture
def device():
    return FakeGpu()


@pytest.fixture
def run(device):
    """A contender's calls, each of them 10 us long, when their length is known."""
    made = device.timed("a")
    made.estimate()
    return made


def named(timing, *names):
    return tuple(timing[name] for name in names)


def test_a_time_is_the_devices_alone_and_the_hosts_is_told_beside_it(device):
    runs = {"host": device.timed("h", host=3e-4), "device": device.timed("d", device=1e-3)}
    timings, _ = interleaved(runs)
    assert timings["host"]["median_us"] == timings["host"]["upper_us"] == 10
    assert named(timings["host"], "runs", "host_us", "clock") == (CALLS, 300.0, "device")
    assert timings["device"]["median_us"] == 1000


def test_two_hundred_calls_are_timed_unless_one_is_long(device):
    seconds = {"a": 1e-6, "b": 0.015, "c": 0.05, "d": 0.4, "e": 2.0}
    timings, _ = interleaved({n: device.timed(n, device=cost) for n, cost in seconds.items()})
    counts = {name: timing["runs"] for name, timing in timings.items()}
    assert counts.pop("c") in (19, 20)  # a second of them
    assert counts == {"a": 200, "b": 200, "d": 5, "e": 3}
    assert named(timings["a"], "rounds", "calls") == (20, 10)
    assert named(timings["d"], "rounds", "calls") == (5, 1)
    assert sum(name[0] == "e" for name in device.record) <= 3 + 1
    for name, timing in timings.items():
        assert timing["median_us"] == pytest.approx(1e6 * seconds[name])


def test_before_a_cold_call_the_cache_is_flushed_outside_of_its_time(device):
    run = device.timed("c", cold=True)
    run.estimate()
    del device.record[:]
    samples = run.samples(10)
    spin, warm, *timed = device.record
    assert (spin, warm[0]) == ("spin", "c")
    assert "".join(name[0] for name in timed) == "fc" * 10
    assert max(sample.call for sample in samples) == pytest.approx(1e-5, rel=1e-6)


def test_the_copies_of_the_inputs_are_taken_in_turns(device, run):
    run.samples(10)
    called = [int(name[1]) for name in device.record if name != "spin"]
    assert {(other - one) % 4 for one, other in itertools.pairwise(called)} == {1}


def test_the_spin_outlasts_what_the_host_takes_to_submit_a_round(device):
    run = device.timed("a", host=1e-4)
    run.estimate()
    spins = len(device.spins)
    for _ in range(5):
        run.samples(10)
    assert len(device.spins) == spins + 5  # no round was repeated
    submitted = (10 + 4) * (1e-4 + 2 * FakeGpu.MARK_SECONDS)
    assert submitted < device.spins[-1] < 3 * submitted


def test_a_round_is_repeated_where_the_host_was_too_slow(device, run):
    for _ in range(20):  # the spin grows short
        run.samples(10)
    slow = [True]

    def hiccup():
        device.submit(0.02 if slow else 1e-5, 1e-5)
        slow.clear()

    run._next = iter([hiccup] * 1000)
    for sample in run.samples(10):
        assert tuple(sample) == pytest.approx((1e-5, 1e-5))
    assert run.starved == 0


def test_a_call_that_waits_for_the_device_is_timed_by_the_hosts_clock(device):
    waiting = device.timed("w", device=2e-4, host=5e-5, waits=True)
    timings, _ = interleaved({"w": waiting, "a": device.timed("a")})
    expected = (CALLS, 250.0, 250.0, "host")
    assert named(timings["w"], "runs", "host_us", "median_us", "clock") == expected
    assert timings["a"]["clock"] == "device"


def test_a_host_that_turns_slow_does_not_change_the_clock(device, run):
    run._next = itertools.cycle([device.call("slow", host=0.5)])
    samples = run.samples(2)
    assert (run.timed_by, run.starved, len(samples)) == ("device", 1, 2)


# A run, of two layers

TINY, LAST = (Layer(n_in=48, n_out=32, fan_in=k, n_active=32) for k in (5, 7))
CASES = [
    *(Case("forward", TINY, batch=batch) for batch in (1, 9)),
    Case("backward", TINY, batch=9),
    Case("update", TINY),
    Case("forward", LAST, batch=9),
]


@pytest.fixture
def measured(device, tmp_path, monkeypatch):
    """Return a function that measures the cases with `more` contenders beside the real ones."""
    monkeypatch.setattr(measure, "gpu_cases", lambda quick: CASES)

    def computed_once(each):
        def prepare(problem):
            bind = each.prepare(problem)

            def bound(batch):
                result = bind(batch)()
                return device.call(each.name, result=lambda: result)

            return bound

        return replace(each, prepare=prepare)

    contenders = [computed_once(each) for each in gpu_contenders() if "2:4" not in each.name]

    def run(*more):
        bench = Bench(device, [*contenders, *more], [], {0: PEAKS})
        monkeypatch.setattr(run_module, "open_bench", lambda settings: bench)
        return load_results(run_module.run(Settings("gpu"), tmp_path)[0])

    return run


def extra(device, name="extra", *, error=lambda batch: 0.0, prepared=lambda problem: None, **more):
    """Return a dense contender that takes 40 us and is wrong by `error`."""

    def prepare(problem):
        prepared(problem)

        def bind(batch):
            y = batch.x @ problem.dense.T + problem.bias + error(batch)
            return device.call(name, 4e-5, result=lambda: y)

        return bind

    return Contender(name, "dense", "forward", **{"prepare": prepare, **more})


def test_a_run_writes_json_and_page_and_leaves_no_contender_wrong(
    device, measured, tmp_path, capsys
):
    misfit = extra(device, "misfit", unfit=lambda case: "would take long")
    results = measured(extra(device), misfit)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    assert results.content["incomplete"] is False
    assert (tmp_path / "gpu.md").read_text() == page(results)
    for row, case in zip(results.rows, CASES, strict=True):
        assert (row.operation, row.batch) == (case.operation, case.batch)
        assert row.left_out("wrong") == row.left_out("failed") == {}
        for name in {OURS["gpu"], f"{OURS['gpu']} float16"} & set(row.contenders):
            entry, dtype = row.contenders[name], "float16" if "float16" in name else ""
            work = work_of(case, PEAKS, Precision(dtype, dtype))
            seconds, resource = least_time(work, PEAKS)
            assert (entry["bytes"], entry["limited_by"]) == (work.moved, resource)
            assert entry["least_us"] == pytest.approx(1e6 * seconds, rel=1e-3)
            assert (entry["runs"], entry["clock"]) == (CALLS, "device")
    first = results.rows[0]
    assert (first.ours, first.time("extra")) == pytest.approx((10, 40))
    assert first.left_out("unfit")["misfit"] == "would take long"
    assert device.released >= len(CASES)
    assert capsys.readouterr().out.startswith(
        "[1/5] forward 48-32 90% k=5 batch=1 warm float32 random gpu: 10 us, 1.00x dense, 1.00x tf"
    )


@pytest.mark.parametrize("wrong", [{0, 1, 2, 3}, {3}], ids=["always", "on the last copy"])
def test_a_wrong_result_is_recorded_and_not_timed(device, measured, tmp_path, wrong):
    results = measured(extra(device, error=lambda batch: 0.5 * (batch.number in wrong)))
    forward = [row for row in results.rows if row.operation == "forward"]
    for row in forward:
        assert "extra" not in row.contenders
        assert row.left_out("wrong")["extra"].startswith("extra: y is wrong at (0, 0)")
    assert len(results.wrong) == len(forward)
    assert "**wrong**: extra" in (tmp_path / "gpu.md").read_text()
    result = command(tmp_path)
    assert result.exit_code == 1
    assert "wrong: extra: extra: y is wrong" in result.output
    assert f"In {tmp_path}: gpu.json, gpu.md" in result.output
    assert command(tmp_path, "--only", "update").exit_code == 0


def test_a_contender_that_raises_is_recorded_and_the_run_goes_on(device, measured, tmp_path):
    tried = []

    def no_memory(problem):
        tried.append(problem)
        raise MemoryError("CUDA out of memory at /opt/some/lib/file.cu:3\nmore")

    results = measured(
        extra(device, "large", prepared=no_memory),
        extra(device, "new", prepare=lambda problem: lambda batch: lambda: 1 / 0),
    )
    for row in results.rows:
        if row.operation == "forward":
            assert row.left_out("failed") == {
                "large": "MemoryError: CUDA out of memory at file.cu:3",
                "new": "ZeroDivisionError: division by zero",
            }
        assert row.ours is not None
    assert len(tried) == 2  # once a layer, not once a case
    assert (results.content["incomplete"], results.wrong) == (False, [])
    assert "failed: large, 3 cases" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("end", ["fault", "interrupt within a layer"])
def test_a_run_that_ends_early_leaves_what_it_measured(device, measured, tmp_path, end):
    def prepared(problem):
        if problem.layer == LAST:
            on_disk = json.loads((tmp_path / "gpu.json").read_text())  # written after each layer
            assert len(on_disk["processes"][0]["cases"]) == len(CASES) - 1
            device.alive = False
            raise RuntimeError("CUDA error: an illegal memory access")

    def error(batch):
        if end != "fault" and len(batch.x) == 9:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(SriglError if end == "fault" else KeyboardInterrupt) as raised:
        measured(extra(device, error=error, prepared=prepared))
    words = "the device fails since extra ran (RuntimeError: CUDA error: an illegal memory access)"
    assert end != "fault" or words in str(raised.value)
    results = load_results(tmp_path / "gpu.json")
    assert len(results.rows) == (len(CASES) - 1 if end == "fault" else 1)
    assert results.content["incomplete"] is True
    assert "**Incomplete**" in page(results)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert "/some/folder" not in (tmp_path / "gpu.json").read_text()


def command(tmp_path, *arguments):
    options = ["--quick", "--out", str(tmp_path), *arguments]
    return CliRunner().invoke(app, ["bench", "gpu", *options])


def test_without_a_device_the_module_says_so_in_one_line_and_needs_no_command_line(tmp_path):
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'threadpoolctl', 'numba', 'torch', 'cupy'):\n"
        "    sys.modules[name] = None\n"
        "from srigl_core.benchmarks.gpu import main\n"
        f"sys.exit(main(['--quick', '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "pip install cupy-cuda13x" in done.stderr
    assert not (tmp_path / "out").exists()


# The contenders; tests/slow/test_benchmarks.py checks their results


@pytest.fixture
def by_name():
    found = {(each.name, each.operation): each for each in gpu_contenders()}
    assert len(found) == len(gpu_contenders())
    return found


def test_two_of_four_inputs_are_connected_and_every_shape_of_a_run_fits(by_name, device):
    dense = Problem(TINY, device.arrays).two_of_four().at(FLOAT16).dense
    assert ((dense.reshape(32, 12, 4) != 0).sum(2) == 2).all()
    two_of_four = by_name["torch 2:4 float16", "forward"]
    reason = "a weight of (32, 50) has a side that is not a multiple of 16"
    assert two_of_four.unfit(Case("forward", Layer(50, 32, 5, 32), batch=8)) == reason
    assert not any(two_of_four.unfit(case) for case in gpu_cases(quick=False))


def test_tf32_is_on_for_its_contender_alone(by_name):
    torch = sys.modules["torch"]
    for name, precision in (("TF32", "high"), ("float32", "highest"), ("float16", "highest")):
        with by_name[f"torch {name}", "forward"].around():
            assert torch.get_float32_matmul_precision() == precision
        assert torch.get_float32_matmul_precision() == "highest"
