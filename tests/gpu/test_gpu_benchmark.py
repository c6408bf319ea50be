"""The GPU benchmark, on a machine without one: a device with a clock of its own stands in."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import compile_gate
import host_device
import numpy as np
import pytest
from typer.testing import CliRunner

import srigl_core
from srigl_core.benchmarks import gpu as gpu_benchmark
from srigl_core.benchmarks.cases import HEADLINE, Case, Layer, matching
from srigl_core.benchmarks.goals import GPU_GOALS, verdicts
from srigl_core.benchmarks.gpu import GpuSettings, run_gpu, wrong_results
from srigl_core.benchmarks.on_gpu import limits
from srigl_core.benchmarks.on_gpu.cases import ablated, gpu_cases
from srigl_core.benchmarks.on_gpu.contenders.contender import DeviceContender
from srigl_core.benchmarks.on_gpu.limits import GpuLimits, Needs, least_seconds, needs
from srigl_core.benchmarks.on_gpu.measure import Bench
from srigl_core.benchmarks.on_gpu.report import crossovers, page
from srigl_core.benchmarks.on_gpu.timing import (
    FEWEST_RUNS,
    FEWEST_VERY_LONG_RUNS,
    RUNS,
    DeviceRun,
    interleaved_on_device,
)
from srigl_core.benchmarks.problems import Batch, WrongResultError
from srigl_core.benchmarks.results import OURS_ON_GPU, Results, load_results, save_results
from srigl_core.cli.app import app
from srigl_core.errors import BackendUnavailableError, FileFormatError, SriglError

OURS = OURS_ON_GPU
OURS_16 = f"{OURS} float16"

# What is measured


def test_a_whole_run_has_every_layer_sparsity_batch_and_cache():
    cases = gpu_cases(quick=False)
    assert len(set(cases)) == len(cases)
    found = {
        (c.operation, c.layer.name, f"{c.layer.sparsity:.0%}", c.batch, c.cold)
        for c in cases
        if c.layer.n_active == c.layer.n_out
    }
    for layer in ("3072-768", "768-3072", "4096-4096"):
        for sparsity in ("80%", "90%", "95%", "99%"):
            for batch in (1, 8, 64, 256, 2048):
                assert ("forward", layer, sparsity, batch, False) in found
                assert (("forward", layer, sparsity, batch, True) in found) == (batch <= 256)
    output = [case for case in cases if case.layer.name == "768-670000"]
    assert {(c.layer.fan_in, c.batch) for c in output} == {
        (k, batch) for k in (32, 77) for batch in (1, 8, 64, 256, 2048)
    }
    assert {c.batch for c in output if c.cold} == {1, 8}
    for sparsity in ("80%", "90%", "95%", "99%"):
        assert ("backward", "3072-768", sparsity, 256, False) in found
        assert ("update", "3072-768", sparsity, 0, False) in found
    assert not any(case.threads for case in cases)


def test_layers_of_a_run_are_not_torn_apart():
    layers = [case.layer for case in gpu_cases(quick=False)]
    changes = sum(one != other for one, other in itertools.pairwise(layers))
    assert changes == len(set(layers)) - 1


def test_in_ablated_layers_forty_percent_of_the_neurons_are_gone_and_no_weight():
    for shape in (HEADLINE, (768, 3072), (4096, 4096)):
        layer = ablated(*shape, 0.9)
        assert layer.n_active == round(0.6 * layer.n_out)
        assert layer.sparsity == 0.9
        batches = {case.batch for case in gpu_cases(quick=False) if case.layer == layer}
        assert batches == {1, 8, 64, 256, 2048}


def test_a_quick_run_is_part_of_a_whole_one():
    def described(case):
        return dataclasses.replace(case, compiled=False)

    whole = {described(case) for case in gpu_cases(quick=False)}
    quick = {described(case) for case in gpu_cases(quick=True)}
    assert quick < whole
    assert len(quick) < 15


def test_every_goal_has_its_case_in_a_whole_run():
    described = [
        {**case.facts(), "l2": "cold" if case.cold else "warm"} for case in gpu_cases(quick=False)
    ]
    headline = dict(zip(("n_in", "n_out"), HEADLINE, strict=True))
    for goal in GPU_GOALS:
        wanted = {"l2": "warm"} | headline | goal.case
        assert any(wanted.items() <= case.items() for case in described), goal.name


def test_only_takes_one_word_of_each():
    cases = gpu_cases(quick=False)
    chosen = matching(cases, ["3072-768", "90%", "batch=256", "warm", "forward"], "gpu")
    assert {case.layer.n_active for case in chosen} == {768, 461}
    assert len(chosen) == 2
    (chosen,) = matching(cases, ["3072-768", "batch=256", "ablated"], "gpu")
    assert chosen.layer == ablated(*HEADLINE, 0.9)
    assert {case.layer.fan_in for case in matching(cases, ["k=32,k=77"], "gpu")} == {32, 77}
    assert not any("threads=0" in case.words("gpu") for case in cases)


# What a case needs, and what the device can do

LIMITS = GpuLimits(
    copy_bandwidth=1000.0, multiply_adds=100.0, shared_bandwidth=500.0, between_marks=0.0
)


def test_needs_are_connections_arrays_once_and_a_read_for_each_product():
    layer = Layer(n_in=8, n_out=4, fan_in=2, n_active=3)
    forward = needs("forward", layer, 5, 4)
    assert forward == Needs(6 * (4 + 2) + 5 * (8 + 4) * 4 + 4 * 4, 6 * 5 * 4, 6 * 5)
    half = needs("forward", layer, 5, 2)
    assert half == Needs(6 * (2 + 2) + 5 * (8 + 4) * 2 + 4 * 2, 6 * 5 * 2, 6 * 5)
    backward = needs("backward", layer, 5, 4)
    moved = 6 * (4 + 2) + 6 * 4 + 5 * (8 + 8 + 4) * 4
    assert backward == Needs(moved, 2 * 6 * 5 * 4, 2 * 6 * 5)
    assert needs("update", layer, 0, 4) == Needs(8 * 4 * (3 * 4 + 2), 0, 0)
    wide = Layer(n_in=70_000, n_out=1, fan_in=2, n_active=1)
    assert needs("forward", wide, 1, 4).moved == 2 * (4 + 4) + 70_001 * 4 + 4


def test_the_least_time_is_that_of_the_scarcest_resource():
    assert least_seconds(Needs(2000.0, 500.0, 100.0), LIMITS) == (2.0, "memory")
    assert least_seconds(Needs(2000.0, 1500.0, 100.0), LIMITS) == (3.0, "shared memory")
    assert least_seconds(Needs(2000.0, 1500.0, 400.0), LIMITS) == (4.0, "multiply-adds")


def test_the_output_layer_at_batch_one_is_bound_by_memory():
    layer = Layer(768, 670_000, 32, 670_000)
    need = needs("forward", layer, 1, 2)
    assert need.moved == 670_000 * 32 * 4 + (768 + 670_000) * 2 + 670_000 * 2
    assert need.shared / need.moved < 1


@dataclasses.dataclass(frozen=True)
class Kernel:
    file: str
    name: str


@pytest.mark.skipif(
    compile_gate.missing_compiler() is not None, reason=str(compile_gate.missing_compiler())
)
def test_the_limits_kernels_compile_and_keep_their_loops(tmp_path):
    kernels = [Kernel(limits.KERNELS.name, name) for name in ("multiply_adds", "shared_reads")]
    reports = compile_gate.compile_gate(limits.KERNELS.parent, kernels, (75, 90, 120))
    assert not compile_gate.spills(reports)
    for report in reports:
        if report.variant.name == "shared_reads":
            assert report.shared_bytes >= (1024 + 7 * 128) * 16


@pytest.mark.skipif(
    host_device.unavailable() is not None or host_device.is_sanitized(),
    reason=host_device.unavailable() or "the sanitizers are for the backend's kernels",
)
def test_the_limits_kernels_do_what_is_counted():
    names = ("multiply_adds", "shared_reads")
    module = host_device.HostModule(
        limits.KERNELS.parent, limits.KERNELS.name, names, sanitize=False
    )
    out = np.zeros(2 * limits.THREADS, np.float32)
    # With factor one, each multiply-add adds one; a thread has eight sums.
    numbers = (np.int32(3), np.float32(1), np.float32(1))
    module.kernel("multiply_adds")((2,), (limits.THREADS,), (out, *numbers))
    thread = np.arange(limits.THREADS)
    begin = 8 * thread + sum(range(8))
    np.testing.assert_array_equal(out.reshape(2, -1) - begin, 3 * limits.MULTIPLY_ADDS)
    module.kernel("shared_reads")((2,), (limits.THREADS,), (out, np.int32(2)))
    read = [(thread + 32 * repeat) % 1024 + 128 * i for repeat in range(2) for i in range(8)]
    assert 16 * len(read) == 2 * limits.READ_BYTES
    np.testing.assert_array_equal(out.reshape(2, -1), [4.0 * sum(read)] * 2)


class FakeDevice:
    """A device that works through what it is given while the host goes on; and both their clocks.

    Where `alive` is set to False, it takes no more work.
    """

    MARK_SECONDS, FLUSH_SECONDS = 1e-6, 5e-6

    def __init__(self):
        self.host, self.free, self.record = 0.0, 0.0, []
        self.spins, self.released, self.alive = [], 0, True

    def clock(self):
        return self.host

    def submit(self, host, device):
        self.host += host
        self.free = max(self.free, self.host) + device

    def mark(self):
        self.submit(self.MARK_SECONDS, 0.0)
        return self.free

    def has_passed(self, mark):
        return self.host >= mark

    def seconds(self, first, last):
        return last - first

    def spin(self, seconds):
        self.record.append("spin")
        self.spins.append(seconds)
        self.submit(self.MARK_SECONDS, seconds)

    def flush(self):
        self.record.append("flush")
        self.submit(self.FLUSH_SECONDS, 4e-5)

    def wait(self):
        if not self.alive:
            raise RuntimeError("CUDA error: an illegal memory access\nat /some/folder/file.cpp:1")
        self.host = max(self.host, self.free)

    def release(self):
        self.released += 1

    def facts(self):
        return {"gpu": "Some GPU", "memory": 139 << 30, "L2": 60 << 20, "driver_version": "1.2"}

    def call(self, name, device=1e-5, host=2e-5, *, waits=False):
        def run():
            self.record.append(name)
            self.submit(host, device)
            if waits:
                self.wait()
            return name

        return run

    def run(self, name, *, cold=False, **costs):
        calls = [self.call(f"{name}{copy}", **costs) for copy in range(4)]
        return DeviceRun(calls, self, cold=cold, clock=self.clock)


class FakeCuda:
    """PyTorch and CuPy, as far as the device and its limits ask for them."""

    L2 = 1000

    def __init__(self, queue):
        self.queue = queue
        event = lambda **options: SimpleNamespace(record=lambda: None)  # noqa: E731
        properties = SimpleNamespace(
            name="Some GPU",
            major=9,
            minor=0,
            multi_processor_count=10,
            total_memory=1 << 30,
            L2_cache_size=self.L2,
        )
        cuda = SimpleNamespace(
            is_available=lambda: True,
            set_device=lambda number: None,
            get_device_properties=lambda number: properties,
            Event=event,
            synchronize=queue.wait,
            _sleep=lambda cycles: queue.submit(0.0, cycles / 2e9),
            empty_cache=queue.release,
        )
        self.torch = SimpleNamespace(
            cuda=cuda,
            version=SimpleNamespace(cuda="13.0"),
            float32="float32",
            ones=self.ones,
            empty_like=lambda other: self.array(other.numbers),
        )
        runtime = SimpleNamespace(
            getDevice=lambda: 0, driverGetVersion=lambda: 13000, runtimeGetVersion=lambda: 13001
        )
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(runtime=runtime),
            float32="float32",
            empty=lambda size, dtype: size,
            RawModule=self.module,
            get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=queue.release),
        )

    def ones(self, numbers, *, dtype, device):
        assert (dtype, device) == ("float32", "cuda:0")
        return self.array(numbers)

    def array(self, numbers):
        record, submit = self.queue.record, self.queue.submit
        return SimpleNamespace(
            numbers=numbers,
            fill_=lambda value: record.append(("write", 4 * numbers)),
            sum=lambda: record.append(("read", 4 * numbers)),
            copy_=lambda other: submit(0.0, 2 * 4 * numbers / 4e12),
        )

    def module(self, *, code, options):
        assert code == limits.KERNELS.read_text()
        seconds = {"multiply_adds": 1e-6, "shared_reads": 2e-6}

        def function(name):
            def kernel(grid, block, arguments):
                assert (grid, block) == ((80,), (limits.THREADS,))
                assert arguments[0] == 80 * limits.THREADS  # a number for each thread
                self.queue.submit(0.0, int(arguments[1]) * seconds[name])

            return kernel

        return SimpleNamespace(get_function=function)


@pytest.fixture
def cuda(monkeypatch):
    from srigl_core.benchmarks.on_gpu import device

    queue = FakeDevice()
    fake = FakeCuda(queue)
    monkeypatch.setitem(sys.modules, "torch", fake.torch)
    monkeypatch.setitem(sys.modules, "cupy", fake.cupy)
    monkeypatch.setattr(device, "get_backend", lambda name: None)
    monkeypatch.setattr(device.CudaDevice, "mark", lambda self: queue.mark())
    monkeypatch.setattr(device.CudaDevice, "seconds", lambda self, a, b: queue.seconds(a, b))
    answers = SimpleNamespace(text="580.1, 1980 MHz, 1980 MHz, 3201 MHz\n")

    def run(command, **options):
        assert command[0] == "nvidia-smi"
        if answers.text is None:
            raise FileNotFoundError("nvidia-smi")
        return SimpleNamespace(stdout=answers.text)

    monkeypatch.setattr(device.subprocess, "run", run)
    return SimpleNamespace(queue=queue, open=device.CudaDevice, answers=answers)


def test_a_flush_writes_and_then_reads_twice_the_second_level_cache(cuda):
    device = cuda.open()
    device.flush()
    assert cuda.queue.record == [("write", 2 * FakeCuda.L2), ("read", 2 * FakeCuda.L2)]
    device.release()
    assert cuda.queue.released == 2  # of both libraries


def test_a_spin_lasts_as_long_as_it_is_asked_to(cuda):
    device = cuda.open()
    begin = device.mark()
    device.spin(0.25)
    assert device.seconds(begin, device.mark()) == pytest.approx(0.25, rel=1e-4)


def test_the_file_says_what_the_device_is(cuda):
    facts = cuda.open().facts()
    assert facts["gpu"] == "Some GPU"
    assert (facts["L2"], facts["multiprocessors"]) == (1000, 10)
    assert (facts["driver_version"], facts["clocks.sm"]) == ("580.1", "1980 MHz")
    for text in (None, "", "one, line\nmore, lines\n"):
        cuda.answers.text = text
        assert "driver_version" not in cuda.open().facts()


def test_limits_are_what_the_kernels_do_in_a_second(cuda):
    found = limits.measure_limits(cuda.open())
    threads = 80 * limits.THREADS
    assert found.copy_bandwidth == pytest.approx(4e12, rel=0.02)
    assert found.multiply_adds == pytest.approx(threads * 128 / 1e-6, rel=0.02)
    assert found.shared_bandwidth == pytest.approx(threads * 128 / 2e-6, rel=0.02)
    assert found.between_marks == 0.0  # the fake one marks in no time


# How it is timed


def names_of(record):
    return [name[0] for name in record if name not in ("spin", "flush")]


def test_contenders_are_timed_in_turns_and_each_round_begins_with_another():
    device = FakeDevice()
    times, failed = interleaved_on_device({name: device.run(name) for name in "abc"})
    assert not failed
    parts = [p.strip("0123") for p in "".join(device.record).split("spin")[1:]]
    order = "".join(part[0] for part in parts)
    timed = order[6:]  # two parts of each tell how long it takes
    assert timed == "abcbcacab" * 6 + "ab"[:0] + "abcbca"
    assert {timing.runs for timing in times.values()} == {RUNS}
    assert {(t.timing.rounds, t.timing.calls) for t in times.values()} == {(20, 10)}


def test_a_time_is_the_devices_alone_and_the_hosts_is_told_beside_it():
    device = FakeDevice()
    runs = {"slow host": device.run("s", host=3e-4), "slow device": device.run("d", device=1e-3)}
    times, _ = interleaved_on_device(runs)
    assert times["slow host"].timing.median == pytest.approx(1e-5, rel=1e-6)
    assert times["slow host"].timing.upper == pytest.approx(1e-5, rel=1e-6)
    assert times["slow host"].host == pytest.approx(3e-4)
    assert times["slow device"].timing.median == pytest.approx(1e-3)
    for timing in times.values():
        assert (timing.clock, timing.dry) == ("device", 0)


def test_at_least_two_hundred_runs_are_timed_unless_a_call_is_long():
    device = FakeDevice()
    seconds = {"a": 1e-6, "b": 0.015, "c": 0.05, "d": 0.4, "e": 2.0}
    runs = {name: device.run(name, device=cost) for name, cost in seconds.items()}
    times, _ = interleaved_on_device(runs)
    counts = {name: timing.runs for name, timing in times.items()}
    assert counts["a"] == counts["b"] == RUNS >= 200
    assert counts["c"] in (19, 20)  # a second of them
    assert counts["d"] == FEWEST_RUNS
    assert counts["e"] == FEWEST_VERY_LONG_RUNS
    assert names_of(device.record).count("e") <= FEWEST_VERY_LONG_RUNS + 1
    for name, timing in times.items():
        assert timing.timing.median == pytest.approx(seconds[name])


def test_before_a_cold_call_the_cache_is_flushed_outside_of_its_time():
    device = FakeDevice()
    run = device.run("c", cold=True)
    run.expected()
    del device.record[:]
    samples = run.samples(10)
    spin, warm, *timed = device.record
    assert (spin, warm[0]) == ("spin", "c")
    assert timed[::2] == ["flush"] * 10
    assert [name[0] for name in timed[1::2]] == ["c"] * 10
    assert max(sample.call for sample in samples) == pytest.approx(1e-5, rel=1e-6)


def test_the_copies_of_the_inputs_are_taken_in_turns():
    device = FakeDevice()
    interleaved_on_device({"a": device.run("a")})
    called = [int(name[1]) for name in device.record if name not in ("spin", "flush")]
    steps = {(other - one) % 4 for one, other in itertools.pairwise(called)}
    assert steps == {1}


def test_the_spin_outlasts_what_the_host_takes_to_submit_a_part():
    device = FakeDevice()
    run = device.run("a", host=1e-4)
    run.expected()
    for _ in range(5):
        spin_before = len(device.spins)
        run.samples(10)
        assert len(device.spins) == spin_before + 1  # nothing had to be done again
    submitted = (10 + 4) * (1e-4 + 2 * FakeDevice.MARK_SECONDS)
    assert submitted < device.spins[-1] < 3 * submitted


def test_a_part_is_done_again_where_the_host_was_too_slow():
    device = FakeDevice()
    run = device.run("a", host=1e-5)
    run.expected()
    for _ in range(20):  # the spin grows short
        run.samples(10)
    slow = [True]

    def hiccup():
        device.submit(0.02 if slow else 1e-5, 1e-5)
        slow.clear()

    run._next = iter([hiccup] * 1000)
    samples = run.samples(10)
    assert max(sample.host for sample in samples) == pytest.approx(1e-5)
    assert max(sample.call for sample in samples) == pytest.approx(1e-5)
    assert run.dry == 0


def test_a_call_that_waits_for_the_device_is_timed_by_the_hosts_clock():
    device = FakeDevice()
    runs = {"w": device.run("w", device=2e-4, host=5e-5, waits=True), "a": device.run("a")}
    times, _ = interleaved_on_device(runs)
    assert times["w"].clock == "host"
    assert times["w"].timing.median == pytest.approx(2.5e-4)
    assert times["w"].host == times["w"].timing.median
    assert times["w"].runs == RUNS
    assert times["a"].clock == "device"


def test_a_host_that_turns_slow_does_not_change_the_clock():
    device = FakeDevice()
    run = device.run("a")
    run.expected()
    run._next = itertools.cycle([device.call("slow", host=0.5)])
    samples = run.samples(2)
    assert (run.timed_by, run.dry, len(samples)) == ("device", 1, 2)


def test_one_that_raises_is_dropped_and_the_others_go_on():
    device = FakeDevice()
    left = iter(range(50))

    def breaks():
        next(left)
        device.submit(1e-5, 1e-5)

    runs = {
        "at once": DeviceRun([lambda: 1 / 0], device, clock=device.clock),
        "later": DeviceRun([breaks], device, clock=device.clock),
        "good": device.run("g"),
    }
    times, failed = interleaved_on_device(runs)
    assert list(times) == ["good"]
    assert times["good"].runs == RUNS
    assert {name: type(error) for name, error in failed.items()} == {
        "at once": ZeroDivisionError,
        "later": StopIteration,
    }


# A run


class FakeProblem:
    """What a contender's call returns is right if it does not say that it is wrong."""

    def __init__(self, layer):
        self.layer = layer

    def batches(self, size, *, grads):
        return [Batch(copy, grads or None, 0) for copy in range(4)]

    def check(self, name, operation, got, batch, precision):
        if "wrong" in got["y"]:
            raise WrongResultError(f"{name}: y is wrong at (0, 1): 2.0, but should be 1.0")


def contender(machine, name, family, operation="forward", *, dtype="float32", **more):
    costs = {key: more.pop(key) for key in ("device", "host", "waits") if key in more}
    call = machine.call(name, **costs)
    return DeviceContender(
        name,
        family,
        operation,
        SimpleNamespace(dtype=dtype),
        more.pop("prepare", lambda problem: lambda batch: call),
        read=lambda result: {"y": result},
        **more,
    )


def raising(error):
    def prepare(problem):
        raise error

    return prepare


def made_bench(device, **more):
    around = []

    @contextmanager
    def noted():
        around.append("in")
        yield
        around.append("out")

    contenders = [
        contender(device, OURS, "ours", device=1e-5),
        contender(device, OURS_16, "ours", dtype="float16", device=8e-6),
        contender(device, OURS, "ours", "backward", device=3e-5),
        contender(device, OURS, "ours", "update", device=5e-4, waits=True),
        contender(device, "torch float32", "dense", device=4e-5),
        contender(device, "torch TF32", "tf32", device=5e-6, around=noted),
        contender(device, "torch CSR", "csr", device=3e-4),
        contender(device, "torch top-k", "other", "update", device=2e-3, waits=True),
        contender(device, "misfit", "gather", unfit=lambda case: "would take long"),
        *more.pop("contenders", []),
    ]
    return SimpleNamespace(
        bench=Bench(device, contenders, [], LIMITS, FakeProblem), around=around, **more
    )


SETTINGS = GpuSettings(quick=True, only=("3072-768",))


@pytest.fixture(autouse=True)
def fake_clock(monkeypatch):
    """Let the host's clock be the fake device's, where a run makes its own `DeviceRun`."""
    from srigl_core.benchmarks.on_gpu import measure

    def run(calls, device, **options):
        return DeviceRun(calls, device, clock=device.clock, **options)

    monkeypatch.setattr(measure, "DeviceRun", run)


def test_a_run_writes_json_and_page(tmp_path, capsys):
    device = FakeDevice()
    made = made_bench(device)
    written = run_gpu(SETTINGS, tmp_path / "out", opened=lambda: made.bench)
    assert [path.name for path in written] == ["gpu.json", "gpu.md"]
    results = load_results(written[0])
    assert results.content["incomplete"] is False
    assert len(results.rows) == len(gpu_cases(quick=True))
    row = next(results.find(operation="forward", n_in=3072, n_out=768, sparsity=0.9, batch=256))
    assert row.ours == pytest.approx(10)
    assert row.ratio("dense") == pytest.approx(4)
    assert row.ratio("dense", OURS_16) == pytest.approx(5)
    assert row.unfit == {"misfit": "would take long"}
    ours = row.contenders[OURS]
    assert (ours["runs"], ours["clock"], ours["host_us"]) == (200, "device", 20.0)
    layer = Layer.random(*HEADLINE, 0.9)
    for name, itemsize in ((OURS, 4), (OURS_16, 2)):
        need = needs("forward", layer, 256, itemsize)
        assert row.contenders[name]["bytes"] == need.moved
        least, resource = least_seconds(need, LIMITS)
        assert row.contenders[name]["least_us"] == pytest.approx(1e6 * least, rel=1e-3)
        assert row.contenders[name]["limited_by"] == resource
    (update,) = results.find(operation="update", n_in=3072)
    assert update.contenders[OURS]["clock"] == "host"
    assert made.around == ["in", "out"] * (len(made.around) // 2) != []
    assert device.released >= len(results.rows)
    assert written[1].read_text() == page(results)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("[1/")
    assert "10 us, 4.00x dense, 0.50x tf32, 30.00x csr" in said[0]


def test_a_wrong_result_is_recorded_and_not_timed(tmp_path, capsys):
    device = FakeDevice()
    bad = contender(device, "wrong dense", "dense", device=1e-9)
    bench = made_bench(device, contenders=[bad]).bench
    (written, shown) = run_gpu(SETTINGS, tmp_path, opened=lambda: bench)
    results = load_results(written)
    forward = [row for row in results.rows if row.operation == "forward"]
    for row in forward:
        assert "wrong dense" not in row.contenders
        assert row.wrong["wrong dense"].startswith("wrong dense: y is wrong at (0, 1)")
        assert row.best("dense") == ("torch float32", pytest.approx(40))
    assert len(wrong_results(results)) == len(forward)
    assert "**wrong**: wrong dense" in shown.read_text()
    assert "wrong: wrong dense: wrong dense: y is wrong" in capsys.readouterr().out


def test_the_last_copy_of_the_inputs_is_checked_too(tmp_path):
    device = FakeDevice()

    def prepare(problem):
        return lambda batch: device.call("wrong" if batch.x == 3 else "right")

    bad = contender(device, "stale", "dense", prepare=prepare)
    bench = made_bench(device, contenders=[bad]).bench
    results = load_results(run_gpu(SETTINGS, tmp_path, opened=lambda: bench)[0])
    assert "stale" in results.rows[0].wrong


def test_a_contender_that_raises_is_recorded_and_the_run_goes_on(tmp_path):
    device = FakeDevice()
    tried = []

    def no_memory(problem):
        tried.append(problem)
        raise MemoryError("CUDA out of memory at /opt/some/lib/file.cu:3\nmore")

    def fails_in_call(problem):
        return lambda batch: raising(NotImplementedError("no such kernel"))(batch) or list

    more = [
        contender(device, "large", "dense", prepare=no_memory),
        contender(device, "new", "csr", prepare=fails_in_call),
    ]
    bench = made_bench(device, contenders=more).bench
    written, shown = run_gpu(SETTINGS, tmp_path, opened=lambda: bench)
    results = load_results(written)
    for row in results.rows:
        if row.operation == "forward":
            assert row.failed == {
                "large": "MemoryError: CUDA out of memory at file.cu:3",
                "new": "NotImplementedError: no such kernel",
            }
            assert row.ratio("dense") == pytest.approx(4)
    layers = len({row.fan_in for row in results.rows})
    assert len(tried) == layers  # not once more for each case
    assert results.content["incomplete"] is False
    assert "failed: large" in shown.read_text()
    assert wrong_results(results) == []


def test_a_device_that_takes_no_more_work_ends_the_run_with_one_line(tmp_path):
    device = FakeDevice()

    def faults(problem):
        device.alive = False
        raise RuntimeError("CUDA error: an illegal memory access")

    last = gpu_cases(quick=True)[-1].layer

    def prepare(problem):
        call = device.call("fine")
        return faults(problem) if problem.layer == last else lambda batch: call

    bench = made_bench(device, contenders=[contender(device, "bad", "csr", prepare=prepare)]).bench
    with pytest.raises(SriglError, match=r"takes no more work since bad \(RuntimeError: CUDA err"):
        run_gpu(GpuSettings(quick=True), tmp_path, opened=lambda: bench)
    results = load_results(tmp_path / "gpu.json")
    assert results.content["incomplete"] is True
    assert len(results.rows) == len(gpu_cases(quick=True)) - 1
    assert "/some/folder" not in (tmp_path / "gpu.json").read_text()


def test_an_interrupted_run_leaves_what_it_measured(tmp_path):
    device = FakeDevice()
    last = gpu_cases(quick=True)[-1].layer
    seen = []

    def prepare(problem):
        if problem.layer == last:
            seen.append(json.loads((tmp_path / "gpu.json").read_text()))  # there before the end
            raise KeyboardInterrupt
        call = device.call("fine")
        return lambda batch: call

    slow = contender(device, "slow", "csr", prepare=prepare)
    bench = made_bench(device, contenders=[slow]).bench
    with pytest.raises(KeyboardInterrupt):
        run_gpu(GpuSettings(quick=True), tmp_path, opened=lambda: bench)
    results = load_results(tmp_path / "gpu.json")
    assert len(results.rows) == len(gpu_cases(quick=True)) - 1
    assert results.content["incomplete"] is True
    assert len(seen[0]["processes"][0]["cases"]) == len(results.rows)
    assert "**Incomplete**" in page(results)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_an_interrupted_layer_leaves_the_cases_before(tmp_path):
    device = FakeDevice()
    left = iter([None] * 4 * 2)  # copies of two cases

    def bind(batch):
        if next(left, "none") == "none":
            raise KeyboardInterrupt
        return device.call("fine")

    slow = contender(device, "slow", "csr", prepare=lambda problem: bind)
    bench = made_bench(device, contenders=[slow]).bench
    with pytest.raises(KeyboardInterrupt):
        run_gpu(GpuSettings(quick=True), tmp_path, opened=lambda: bench)
    assert len(load_results(tmp_path / "gpu.json").rows) == 2


def run_main(monkeypatch, tmp_path, bench, *arguments):
    monkeypatch.setattr(gpu_benchmark.run_gpu, "__kwdefaults__", {"name": "gpu", "opened": bench})
    return gpu_benchmark.main(["--quick", "--out", str(tmp_path), *arguments])


def test_the_module_prints_goals_and_fails_where_a_result_was_wrong(tmp_path, monkeypatch, capsys):
    device = FakeDevice()
    good = made_bench(device).bench
    assert run_main(monkeypatch, tmp_path, lambda: good) == 0
    said = capsys.readouterr().out
    assert "90%, batch 256: 2.5 times the best dense: 4.00 (torch float32): yes" in said
    assert "mask update: under 1 ms: 0.52 ms: yes" in said
    assert "95%, batch 256: 4 times the best dense: 4.00 (torch float32): yes" in said
    assert "99%, batch 256: 8 times the best dense: 4.00 (torch float32): NO" in said
    bad = contender(device, "wrong dense", "dense")
    wrong = made_bench(device, contenders=[bad]).bench
    assert run_main(monkeypatch, tmp_path, lambda: wrong, "--only", "update") == 0
    assert run_main(monkeypatch, tmp_path, lambda: wrong, "--only", "forward") == 1
    assert "wrong: wrong dense: y is wrong" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only", "nothing"], []])
def test_what_cannot_be_measured_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    def missing():
        raise BackendUnavailableError("the GPU benchmark needs X: pip install x")

    assert run_main(monkeypatch, tmp_path, missing, *arguments) == 1
    result = CliRunner().invoke(
        app, ["bench", "gpu", "--quick", "--out", str(tmp_path), *arguments]
    )
    assert result.exit_code == 1
    message = "leaves no case to measure" if arguments else "pip install x"
    for said in (capsys.readouterr().err, result.output):
        assert message in said
        assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


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
    assert "pip install 'srigl-core[cupy]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_device_without_pytorch_is_one_line_with_the_install(monkeypatch):
    from srigl_core.benchmarks.on_gpu import device

    monkeypatch.setattr(device, "get_backend", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailableError, match=r"needs PyTorch, .* pip install torch"):
        device.CudaDevice()


def test_the_command_writes_the_same_and_shows_the_goals(tmp_path, monkeypatch):
    device = FakeDevice()
    bad = contender(device, "wrong dense", "dense")
    bench = made_bench(device, contenders=[bad]).bench
    defaults = {"name": "gpu", "opened": lambda: bench}
    monkeypatch.setattr(gpu_benchmark.run_gpu, "__kwdefaults__", defaults)
    result = CliRunner().invoke(app, ["bench", "gpu", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 1  # for the wrong result
    assert "4.00 (torch float32)" in result.output
    assert "wrong dense: y is wrong" in result.output
    (tmp_path / "gpu.md").unlink()
    file = str(tmp_path / "gpu.json")
    assert CliRunner().invoke(app, ["bench", "report", file]).exit_code == 0
    assert (tmp_path / "gpu.md").read_text() == page(load_results(tmp_path / "gpu.json"))
    assert not (tmp_path / "gpu.png").exists()
    shown = CliRunner().invoke(app, ["bench", "goals", file])
    assert "mask update" in shown.output
    refused = CliRunner().invoke(app, ["bench", "readme", file, str(tmp_path / "README.md")])
    assert refused.exit_code == 1
    assert "is of a gpu" in refused.output


# What is made of a result


def entry(family, median, **more):
    around = {"lower_us": 0.9 * median, "upper_us": 1.1 * median}
    counts = {"rounds": 20, "calls": 10, "runs": 200, "host_us": 33.0, "clock": "device"}
    return {"family": family, "median_us": median, **around, **counts, **more}


def made_case(ours, half, dense, tf32, fp16, csr, **more):
    floor = {"bytes": 1_000_000, "least_us": 5.0, "limited_by": "shared memory"}
    case = {
        "operation": "forward",
        "n_in": 3072,
        "n_out": 768,
        "sparsity": 0.9,
        "fan_in": 307,
        "n_active": 768,
        "mask": "random",
        "batch": 256,
        "dtype": "float32",
        "l2": "warm",
        "ablated": 0,
        "least_us": 5.0,
        "limited_by": "shared memory",
        "contenders": {
            OURS: entry("ours", ours, **floor),
            OURS_16: entry("ours", half, **floor),
            "torch float32": entry("dense", dense),
            "torch TF32": entry("tf32", tf32),
            "torch float16": entry("fp16", fp16),
            "torch CSR": entry("csr", csr),
        },
        "unfit": {"torch gather": "would gather over 4 GiB"},
        "failed": {"torch 2:4 float16": "RuntimeError: not here"},
        "wrong": {},
    }
    return case | more


def made_results(*more):
    output = {"n_in": 768, "n_out": 670_000, "fan_in": 32, "n_active": 670_000, "sparsity": 0.96}
    cases = [
        made_case(10.0, 8.0, 30.0, 4.0, 3.0, 50.0, batch=1),
        made_case(20.0, 12.0, 40.0, 30.0, 10.0, 500.0, batch=64),
        made_case(25.0, 12.0, 60.0, 15.0, 20.0, 500.0, l2="cold"),
        made_case(20.0, 12.0, 60.0, 15.0, 20.0, 500.0),
        made_case(90.0, 70.0, 80.0, 30.0, 11.0, 5000.0, batch=2048),
        made_case(20.0, 12.0, 60.0, 15.0, 20.0, 500.0, sparsity=0.99, fan_in=31),
        made_case(50.0, 30.0, 900.0, 400.0, 250.0, 800.0, batch=1, l2="cold", **output),
        made_case(50.0, 31.0, 90.0, 40.0, 25.0, 800.0, operation="backward"),
        made_case(70.0, 50.0, 90.0, 40.0, 25.0, 800.0, n_active=461, ablated=307, fan_in=512),
        *more,
    ]
    update = made_case(900.0, 1, 1, 1, 1, 1, operation="update", batch=0, failed={}, unfit={})
    host = {**update["contenders"][OURS], "clock": "host"}
    top_k = entry("other", 4000.0, clock="host")
    cases.append(update | {"contenders": {OURS: host, "torch top-k": top_k}})
    limit = {
        "copy_bandwidth": 4e10,
        "multiply_adds": 3e13,
        "shared_bandwidth": 3e13,
        "between_marks": 1.5e-6,
    }
    process = {
        "instructions": "gpu",
        "versions": {"python": "3.12.3", "torch": "2.11.0"},
        "absent": [{"library": "X", "reason": "none", "install": "pip install x"}],
        "limits": [limit],
        "cases": cases,
    }
    content = {
        "format": 1,
        "benchmark": "gpu",
        "started": "2026-01-02T03:04:05+00:00",
        "incomplete": False,
        "machine": FakeDevice().facts(),
        "settings": {"quick": False, "only": [], "runs": 200},
        "processes": [process],
        "seconds": 9.0,
    }
    return Results(content)


def tables(text):
    return [part for part in text.split("\n\n") if part.startswith("|")]


def test_results_are_read_as_they_were_written(tmp_path):
    save_results(tmp_path / "gpu.json", made_results())
    assert load_results(tmp_path / "gpu.json") == made_results()
    other = dict(made_results().content, benchmark="tpu")
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(FileFormatError, match="'tpu', which is none of cpu, gpu"):
        load_results(tmp_path / "other.json")


def test_the_page_shows_every_row_and_where_ours_loses():
    results = made_results()
    text = page(results)
    for words in (
        "| 307 | 90% | 256 | warm | float32 | 20.0 (18.0 to 22.0) | 33.0 | 50.0 "
        "| 25% shared memory | 3.00x | 0.75x | 1.00x | 25.00x |",
        "| 307 | 90% | 256 | warm | float16 | 12.0 (10.8 to 13.2) | 33.0 |",
        "| 307 | 90% | 2048 | warm | float32 | 90.0 (81.0 to 99.0) | 33.0 | 11.1 "
        "| 6% shared memory | 0.89x | 0.33x | 0.12x | 55.56x |",
        "| 307 | 90% | 256 | cold |",
        "## Forward, 3072→768, 40% of the neurons ablated",
        "## Backward, 3072→768",
        "| 307 | 90% | 256 | warm | float32 | 50.0 (45.0 to 55.0) | 33.0 | 2.50 |",
        "900 (810 to 990), host clock",
        "`pip install x`",
        "failed: torch 2:4 float16, 9 cases: RuntimeError: not here",
        "torch gather, 9 cases: would gather over 4 GiB",
        "median of 200 runs after warm-up",
        "Some GPU, 139 GiB, L2 60 MiB; driver_version 1.2",
    ):
        assert words in text, words
    assert "Incomplete" not in text
    widths = [{line.count("|") for line in part.splitlines()} for part in tables(text)]
    assert all(len(width) == 1 for width in widths)
    for row in results.rows:
        for name, found in row.contenders.items():
            assert f"{found['median_us']:,.0f}"[:3] in text, name


def test_a_contender_of_ours_that_failed_has_its_line():
    case = made_case(20.0, 12.0, 60.0, 15.0, 20.0, 500.0, batch=8)
    del case["contenders"][OURS]
    case["failed"] = {OURS: "RuntimeError: no"}
    assert "| 307 | 90% | 8 | warm | float32 | **failed** |" in page(made_results(case))


def test_a_page_of_one_case_has_no_holes():
    results = made_results()
    results.processes[0]["cases"][:] = results.processes[0]["cases"][-1:]
    text = page(results)
    assert "Not measured." in text
    assert "## Mask update" in text


def test_the_crossover_is_where_dense_stays_quicker():
    found = {row.fan_in: words for row, words in crossovers(made_results())}
    assert found[307] == {
        "dense": "2048",
        "tf32": "256, also at 1",
        "fp16": "2048, also at 1, 64",
        "bf16": "not measured",
    }
    assert found[31]["dense"] == "not up to 256"
    assert found[31]["tf32"] == "256"
    assert 512 in found
    assert "| 3072→768, k = 307 | 90% | 2048 | 256, also at 1 |" in page(made_results())


def test_goals_are_met_missed_or_not_measured():
    found = {(v.name, v.asked): v for v in verdicts(made_results())}
    dense = found["90%, batch 256", "2.5 times the best dense"]
    assert (dense.reached, dense.met) == ("3.00 (torch float32)", True)
    assert found["90%, batch 256", "20 times the best CSR"].met is True
    assert found["90%, batch 256, L2 cold", "2.5 times the best dense"].met is False
    assert found["99%, batch 256", "8 times the best dense"].met is False
    assert found["95%, batch 256", "4 times the best dense"].met is None
    assert found["90%, batch 2048", "1.5 times the best dense"].met is False
    assert found["mask update", "under 1 ms"].met is True
    backward = found[
        "backward (dx and dvalues), 90%, batch 256", "at most 3 times the forward pass"
    ]
    assert (backward.reached, backward.met) == ("2.50", True)
    output = "768→670000, k = 32, batch 1, float16, L2 cold"
    assert found[output, "8 times the best dense float16"].reached == "8.33 (torch float16)"
    share = found[output, "80% of the copy bandwidth"]
    assert (share.reached, share.met) == ("83%", True)
    assert math.isclose(1e6 / 30e-6 / 4e10, 0.83, rel_tol=0.01)


# With PyTorch: the contenders themselves, on the CPU

TINY = Layer(n_in=48, n_out=32, fan_in=5, n_active=32)
ABLATED = Layer(n_in=48, n_out=32, fan_in=5, n_active=20)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the contenders need PyTorch")


@pytest.fixture
def on_cpu(torch):
    """Return the contenders on the CPU, ours by a CPU backend, and what makes their problems."""
    from srigl_core.benchmarks.on_gpu.contenders import pytorch
    from srigl_core.benchmarks.on_gpu.contenders.ours import ArrayKind, contenders_of_backend
    from srigl_core.benchmarks.on_gpu.problems import DeviceProblem

    def of_tensor(tensor):
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def as_tensor(array):
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    arrays = ArrayKind(of_tensor, as_tensor)
    contenders = [*pytorch.contenders("cpu"), *contenders_of_backend("reference", arrays)]
    return SimpleNamespace(
        contenders=contenders, problem=lambda layer: DeviceProblem(layer, "cpu"), torch=torch
    )


def checked(on_cpu, contender, case, spoil=lambda got: got):
    problem = contender.problem(on_cpu.problem(case.layer))
    batches = problem.batches(max(case.batch, 1), grads=case.operation == "backward")
    bind = contender.prepare(problem)
    for batch in batches:
        with contender.around():
            got = contender.read(bind(batch)())
        problem.check(contender.name, case.operation, spoil(got), batch, contender.precision)
    return got


@pytest.mark.parametrize("layer", [TINY, ABLATED], ids=["all active", "some ablated"])
@pytest.mark.parametrize(
    ("operation", "batches"), [("forward", (1, 2, 9)), ("backward", (1, 9)), ("update", (0,))]
)
def test_every_contender_agrees_with_float64(on_cpu, layer, operation, batches):
    taken = set()
    for batch in batches:
        case = Case(operation, layer, 0, batch)
        for each in on_cpu.contenders:
            if each.operation == operation and not each.unfit(case):
                checked(on_cpu, each, case)
                taken.add(each.name)
    assert OURS in taken
    if operation != "update":
        dense = {f"torch {label}" for label in ("float32", "TF32", "float16", "bfloat16")}
        assert taken >= {OURS_16, f"{OURS} bfloat16", "torch CSR"} | dense
    if operation == "forward":
        fewer = {name for name in taken if name.endswith("active neurons only")}
        assert len(fewer) == (5 if layer is ABLATED else 0)
        assert ("torch gather" in taken) == (layer is TINY)


def test_the_compiled_gather_takes_part_where_it_is_asked_for(on_cpu, monkeypatch):
    monkeypatch.setattr(on_cpu.torch, "compile", lambda function, *, dynamic: function)
    (each,) = [c for c in on_cpu.contenders if c.name == "torch gather, compiled"]
    assert "for a few cases only" in each.unfit(Case("forward", TINY, 0, 9))
    case = Case("forward", TINY, 0, 9, compiled=True)
    assert each.unfit(case) == ""
    checked(on_cpu, each, case)


@pytest.mark.parametrize("operation", ["forward", "backward", "update"])
def test_a_result_with_one_wrong_entry_is_refused(on_cpu, operation):
    case, weight = Case(operation, TINY, 0, 9), on_cpu.problem(TINY).weight
    for each in on_cpu.contenders:
        if each.operation != operation or each.unfit(case):
            continue
        for what in {"forward": ["y"], "backward": ["dx", "dvalues"], "update": ["mask"]}[
            operation
        ]:

            def one_off(got, what=what):
                array = got[what].clone()
                last = tuple(size - 1 for size in array.shape)
                if what == "dvalues" and array.shape == (TINY.n_out, TINY.n_in):
                    last = (TINY.n_out - 1, weight.indices[-1, -1])  # the others are not needed
                array[last] = ~array[last] if operation == "update" else array[last] + 0.5
                return {**got, what: array}

            def cut(got, what=what):
                return {**got, what: got[what][:-1]}

            with pytest.raises(WrongResultError, match=rf"{what} is wrong at"):
                checked(on_cpu, each, case, one_off)
            if what != "dvalues":
                with pytest.raises(WrongResultError, match=rf"{what} has shape"):
                    checked(on_cpu, each, case, cut)


def test_numbers_that_are_none_are_refused(on_cpu):
    (each,) = [c for c in on_cpu.contenders if (c.name, c.operation) == (OURS, "forward")]
    with pytest.raises(WrongResultError, match="nan"):
        checked(on_cpu, each, Case("forward", TINY, 0, 9), lambda got: {"y": got["y"] * math.nan})


def test_a_float32_result_of_tf32_is_refused(on_cpu):
    torch = on_cpu.torch

    def cut(tensor):  # to 11 bits, as tensor cores may
        return (tensor.view(torch.int32) & ~((1 << 13) - 1)).view(torch.float32)

    problem = on_cpu.problem(Layer(512, 64, 51, 64))
    (batch, *_) = problem.batches(64)
    weight, bias = problem.dense("float32"), problem.bias("float32")
    got = {"y": cut(batch.x) @ cut(weight).T + bias}
    by_name = {(c.name, c.operation): c for c in on_cpu.contenders}
    tf32, plain = (by_name[f"torch {name}", "forward"] for name in ("TF32", "float32"))
    problem.check("TF32", "forward", got, batch, tf32.precision)
    with pytest.raises(WrongResultError, match="y is wrong"):
        problem.check("float32", "forward", got, batch, plain.precision)


@pytest.mark.parametrize(("neurons", "place"), [(5, (4, 21)), (31, (8, 31)), (32, (0, 0))])
def test_results_are_compared_in_pieces_and_the_place_is_told(on_cpu, monkeypatch, neurons, place):
    from srigl_core.benchmarks.on_gpu import problems

    monkeypatch.setattr(problems, "_CHUNK", 9 * neurons)
    (each,) = [c for c in on_cpu.contenders if (c.name, c.operation) == (OURS, "forward")]
    case = Case("forward", TINY, 0, 9)
    checked(on_cpu, each, case)

    def spoil(got):
        y = got["y"].clone()
        y[place] = 70.0
        return {"y": y}

    with pytest.raises(WrongResultError, match=rf"y is wrong at \({place[0]}, {place[1]}\): 70"):
        checked(on_cpu, each, case, spoil)


def test_two_of_four_inputs_are_connected(on_cpu):
    problem = on_cpu.problem(TINY).two_of_four()
    dense = problem.dense("float16")
    counts = (dense.view(32, 12, 4) != 0).sum(2)
    assert (counts == 2).all()
    (each,) = [c for c in on_cpu.contenders if c.name == "torch 2:4 float16"]
    assert each.unfit(Case("forward", TINY, 0, 8)) == "runs on CUDA devices only"


def test_two_of_four_says_which_shapes_do_not_fit(torch):
    from srigl_core.benchmarks.on_gpu.contenders import pytorch

    (each,) = [c for c in pytorch.contenders("cuda:0") if c.name == "torch 2:4 float16"]
    assert each.unfit(Case("forward", TINY, 0, 8)) == ""
    odd = Case("forward", Layer(50, 32, 5, 32), 0, 8)
    assert each.unfit(odd) == "a weight of (32, 50) has a side that is no multiple of 16"
    for case in gpu_cases(quick=False):
        assert not each.unfit(case)


def test_what_would_take_long_says_why(on_cpu):
    large = Layer(768, 670_000, 77, 670_000)
    by_name = {(c.name, c.operation): c for c in on_cpu.contenders}
    gather = by_name["torch gather", "forward"]
    assert gather.unfit(Case("forward", large, 0, 1)) == ""
    assert gather.unfit(Case("forward", large, 0, 64)) == "would gather over 4 GiB"
    for dtype in ("float16", "bfloat16"):
        ours = by_name[f"{OURS} {dtype}", "forward"]
        assert ours.unfit(Case("forward", large, 0, 8)) == ""
        assert "takes long" in ours.unfit(Case("forward", large, 0, 64))
        assert ours.unfit(Case("forward", Layer.random(4096, 4096, 0.8), 0, 2048)) == ""
    assert by_name[OURS, "forward"].unfit(Case("forward", large, 0, 2048)) == ""


def test_tf32_is_on_for_its_contender_alone(on_cpu):
    torch = on_cpu.torch
    by_name = {(c.name, c.operation): c for c in on_cpu.contenders}
    for name, precision in (("TF32", "high"), ("float32", "highest"), ("float16", "highest")):
        with by_name[f"torch {name}", "forward"].around():
            assert torch.get_float32_matmul_precision() == precision
        assert torch.get_float32_matmul_precision() == "highest"


def test_ours_uses_one_plan_for_all_cases_of_a_layer(on_cpu):
    problem = on_cpu.problem(ABLATED)
    weight = problem.condensed("float32")
    assert problem.condensed("float32") is weight
    assert problem.active_only().condensed("float32") is weight
    assert weight.plan("reference") is weight.plan("reference")
    assert problem.condensed("float16").dtype == np.float16
    assert weight == srigl_core.CondensedWeight.random((32, 48), fan_in=5, n_active=20, rng=0)


def test_a_whole_run_on_the_cpu_leaves_no_contender_wrong(on_cpu, tmp_path, monkeypatch):
    """Everything but the device: the cases of a small layer, through JSON and page."""
    device = FakeDevice()
    cases = [
        *(Case("forward", layer, 0, batch) for layer in (TINY, ABLATED) for batch in (1, 9)),
        Case("backward", TINY, 0, 9),
        Case("update", TINY, 0),
    ]
    cases.sort(key=lambda case: case.layer.n_active)
    monkeypatch.setattr(gpu_benchmark, "gpu_cases", lambda *, quick: cases)

    def taking_time(each):
        def prepare(problem):
            bind = each.prepare(problem)

            def bound(batch):
                call = bind(batch)
                return lambda: (device.submit(1e-5, 1e-5), call())[1]

            return bound

        return dataclasses.replace(each, prepare=prepare)

    contenders = [taking_time(each) for each in on_cpu.contenders]
    bench = Bench(device, contenders, [], LIMITS, on_cpu.problem)
    results = load_results(run_gpu(GpuSettings(), tmp_path, opened=lambda: bench)[0])
    assert len(results.rows) == len(cases)
    for row in results.rows:
        assert not row.wrong
        assert not row.failed
        assert OURS in row.contenders
