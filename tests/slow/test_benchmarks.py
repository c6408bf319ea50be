"""The benchmarks of both devices: what they measure, check, time and report; never how fast."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import PEAKS, HostTensors, gpu_contenders
from typer.testing import CliRunner

import srigl_core
from srigl_core.benchmarks import cliffs, measure, pictures, problems, readme, run
from srigl_core.benchmarks.arrays import Arrays
from srigl_core.benchmarks.cases import Case, Layer, cpu_cases, gpu_cases, matching
from srigl_core.benchmarks.cliffs import BATCHES, confirmed_times, find_cliffs, measure_cliffs
from srigl_core.benchmarks.compare import compare
from srigl_core.benchmarks.contenders import load_contenders
from srigl_core.benchmarks.devices import cpu_peaks
from srigl_core.benchmarks.devices.cpu import Flush, cache_sizes
from srigl_core.benchmarks.devices.pools import environment
from srigl_core.benchmarks.overhead import PICTURE
from srigl_core.benchmarks.problems import (
    FULL,
    RESULTS,
    TF32,
    Precision,
    Problem,
    WrongResultError,
)
from srigl_core.benchmarks.report import page, write_report
from srigl_core.benchmarks.results import OURS, load_results, save_results
from srigl_core.benchmarks.roofline import CpuPeaks, Work, least_time, work_of
from srigl_core.benchmarks.timing import HostRun, TimeBudget, interleaved
from srigl_core.benchmarks.verdict import verdict
from srigl_core.cli.app import app
from srigl_core.errors import FileFormatError, SriglError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "cpu.json"

both = pytest.mark.parametrize("device", ["cpu", "gpu"])


def command(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


# What is measured


def cases_of(device, *, quick=False):
    return gpu_cases(quick=quick) if device == "gpu" else cpu_cases(quick=quick, threads=(1, 2))


@both
def test_cases_of_a_layer_follow_each_other_and_a_quick_run_is_part_of_a_whole_one(device):
    cases, quick = (
        [dataclasses.replace(case, compiled=False) for case in cases_of(device, quick=quick)]
        for quick in (False, True)
    )
    assert len(set(cases)) == len(cases)
    layers = [(case.layer, case.dtype) for case in cases if case.dtype == "float32"]
    changes = sum(one != other for one, other in itertools.pairwise(layers))
    assert changes == len(set(layers)) - 1
    assert set(quick) < set(cases)
    assert len(quick) < 25
    assert not any(case.compiled for case in cases_of("cpu") if case.cold)  # too slow to compile


def test_only_takes_one_word_of_each():
    cases = cases_of("cpu")
    only = ["3072-768,1024-1024", "90%", "batch=1", "threads=2", "cold"]
    names = [case.layer.name for case in matching(cases, only)]
    assert names == ["3072-768", "1024-1024"]
    assert matching(cases, ["avx2"]) == []
    assert matching(cases, []) == cases
    on_gpu = matching(cases_of("gpu"), ["3072-768", "90%", "batch=256", "warm", "forward"])
    assert [case.layer.n_active for case in on_gpu] == [768, 461]  # 40% are ablated, no weight is
    assert {case.layer.sparsity for case in on_gpu} == {0.9}
    assert matching(on_gpu, ["ablated"]) == on_gpu[1:]


def test_learned_masks_are_measured_each_beside_a_random_one(tmp_path):
    learned = srigl_core.CondensedWeight.random((200, 150), fan_in=9, n_active=180, rng=1)
    small = srigl_core.CondensedWeight.random((10, 150), fan_in=9, rng=2)
    tensors = {"fc": learned, "head": small, "bias": np.zeros(3, np.float32)}
    srigl_core.save_condensed(tmp_path / "net.safetensors", tensors)
    cases = cpu_cases(quick=True, threads=(1,), masks=tmp_path)
    layers = list(dict.fromkeys(case.layer for case in cases if case.layer.n_in == 150))
    assert [layer.mask for layer in layers] == ["learned: net fc", "random"]
    assert Problem(layers[0], Arrays()).weight == layers[0].weight == learned
    twin = Problem(layers[1], Arrays()).weight
    assert (twin.shape, twin.fan_in, twin.n_active) == ((200, 150), 9, 180)


# What the contenders compute

TINY = Layer(n_in=48, n_out=32, fan_in=5, n_active=32)
ABLATED = Layer(n_in=48, n_out=32, fan_in=5, n_active=20)


@pytest.fixture
def bench(device, monkeypatch):
    """The contenders of a device; for the GPU on host tensors, ours with the reference."""
    if importlib.util.find_spec("torch"):  # compiling would take seconds
        monkeypatch.setattr("torch.compile", lambda function, *, dynamic: function)
    if device == "cpu":
        return SimpleNamespace(contenders=load_contenders("cpu")[0], arrays=Arrays())
    contenders = [each for each in gpu_contenders() if "2:4" not in each.name]
    return SimpleNamespace(contenders=contenders, arrays=HostTensors())


def taking_part(bench, case):
    return [c for c in bench.contenders if c.operation == case.operation and not c.unfit(case)]


def computed(bench, contender, case, number=0):
    """Return a contender's result, and a function that checks such results."""
    whole = Problem(case.layer, bench.arrays, case.dtype)
    problem = contender.problem(whole).at(contender.precision)
    batch = whole.batch(max(case.batch, 1), number, grad=case.operation == "backward")
    with contender.around():
        result = contender.bind(problem)(batch)()
    return result, lambda got: problem.check(contender.name, case.operation, got, batch)


@both
@pytest.mark.parametrize("layer", [TINY, ABLATED], ids=["all active", "some ablated"])
@pytest.mark.parametrize("operation", ["forward", "backward", "update"])
def test_every_contender_agrees_with_float64(bench, device, layer, operation):
    is_cpu = device == "cpu"
    batches = (1, 2, 9) if operation != "update" else (0,)
    case = Case(operation, layer, int(is_cpu), narrow=True, compiled=layer is TINY)
    cases = [dataclasses.replace(case, batch=batch) for batch in batches]
    if is_cpu and operation == "forward":
        cases.append(dataclasses.replace(cases[-1], dtype="float64"))
    names = set()
    for case in cases:
        for contender, number in itertools.product(taking_part(bench, case), (0, 3)):
            result, check = computed(bench, contender, case, number)
            check(result)
            names.add(contender.name)
    assert OURS[device] in names
    if operation == "forward":
        assert f"{OURS[device]}{', bfloat16 values' if is_cpu else ' bfloat16'}" in names
        active_only = {name for name in names if name.endswith("active neurons only")}
        assert len(active_only) == (5 if not is_cpu and layer is ABLATED else 0)


@both
@pytest.mark.parametrize("operation", ["forward", "backward", "update"])
def test_a_result_with_one_wrong_entry_is_refused(bench, device, operation):
    case = Case(operation, TINY, int(device == "cpu"), 9, narrow=True)
    connection = Problem(TINY, bench.arrays).weight.indices[-1, -1]
    for contender in taking_part(bench, case):
        result, check = computed(bench, contender, case)
        parts = list(result) if operation == "backward" else [result]
        for index, what in enumerate(RESULTS[operation]):
            right = parts[index]
            wrong = bench.arrays.cast(bench.arrays.result(right), "float64") + 0.0
            last = [size - 1 for size in wrong.shape]
            if what == "dvalues" and tuple(wrong.shape) == (TINY.n_out, TINY.n_in):
                last[1] = int(connection)  # other entries are not compared
            refused = [(wrong[:-1], "has shape")] if what != "dvalues" else []
            for difference in (0.5, math.nan):
                changed = wrong + 0.0
                changed[tuple(last)] += difference
                refused.append((changed, "is wrong at"))
            for parts[index], why in refused:
                with pytest.raises(WrongResultError, match=f"{what} {why}"):
                    check(parts if operation == "backward" else parts[0])
            parts[index] = right


def product_of(problem, batch):
    return batch.x @ problem.dense.T + problem.bias


@both
def test_a_float32_result_of_tf32_is_refused(bench, device):
    def truncated(array):  # to 11 bits, as tensor cores may
        bits = np.asarray(array).view(np.int32) & ~((1 << 13) - 1)
        return bench.arrays.array(bits.view(np.float32))

    problem = Problem(Layer(512, 64, 51, 64), bench.arrays)
    batch = problem.batch(64)
    y = truncated(batch.x) @ truncated(problem.dense).T + problem.bias
    problem.at(TF32).check("TF32", "forward", y, batch)
    with pytest.raises(WrongResultError, match="y is wrong"):
        problem.check("float32", "forward", y, batch)


@both
@pytest.mark.parametrize(("neurons", "place"), [(5, (4, 24)), (31, (8, 31)), (32, (0, 0))])
def test_results_are_compared_in_pieces(bench, device, monkeypatch, neurons, place):
    monkeypatch.setattr(problems, "_PIECE", 9 * neurons)
    problem = Problem(TINY, bench.arrays)
    batch = problem.batch(9)
    y = product_of(problem, batch)
    problem.check("right", "forward", y, batch)
    y[place] = 70.0
    with pytest.raises(WrongResultError, match=rf"wrong at \({place[0]}, {place[1]}\): 70"):
        problem.check("wrong", "forward", y, batch)


def test_an_update_has_no_ties():
    for array in Problem(Layer(300, 200, 30, 200), Arrays()).update_inputs[:2]:
        magnitudes = np.abs(array[array != 0])
        assert np.unique(magnitudes).size == magnitudes.size


@both
def test_a_problem_is_drawn_again_the_same_and_another_seed_changes_only_the_weight(bench, device):
    one, same, other = (Problem(ABLATED, bench.arrays, seed=seed) for seed in (0, 0, 1))
    assert one.weight == same.weight != other.weight
    assert (one.batch(2).x == other.batch(2).x).all()
    assert not (one.batch(2).x == one.batch(2, 1).x).any()


def test_a_library_that_is_not_installed_is_listed_with_its_install_line(monkeypatch):
    hidden = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    for module in ("pytorch", "pytorch_int8", "onnxruntime_int8", "openvino_int8"):
        monkeypatch.setitem(sys.modules, f"srigl_core.benchmarks.contenders.{module}", None)
    contenders, absent = load_contenders("cpu")
    for package, name in hidden.items():
        (library,) = [library for library in absent if library["library"] == name]
        assert library["install"].startswith(f"pip install {package}")
        assert "halted" in library["reason"]
    families = {contender.family for contender in contenders}
    assert "int8" not in families
    assert {"dense", "csr", "active rows"} <= families


@pytest.mark.parametrize("layer", [TINY, ABLATED], ids=["all active", "some ablated"])
def test_an_int8_result_is_refused_beyond_its_own_rounding(layer):
    """Every input and weight is off by half a step, in the direction that hurts most."""
    of_inputs, of_weights = 1 / 255, 1 / 254
    problem = Problem(layer, Arrays()).at(Precision(of_inputs=of_inputs, of_weights=of_weights))
    batch = problem.batch(9)
    x, weight = batch.x.astype(np.float64), problem.dense.astype(np.float64)
    connected = weight != 0
    step_of_x, step_of_w = of_inputs * np.abs(x).max(), of_weights * np.abs(weight).max(1)
    exact = x @ weight.T + problem.bias
    bound = step_of_x * np.abs(weight).sum(1) + step_of_w * (
        np.abs(x) @ connected.T + step_of_x * connected.sum(1)
    )
    problem.check("at the bound", "forward", exact + bound, batch)
    outside = exact + 1.1 * bound + 1e-5
    with pytest.raises(WrongResultError, match="y is wrong"):
        problem.check("outside", "forward", outside, batch)
    with pytest.raises(WrongResultError, match="y is wrong"):
        problem.at(FULL).check("float32", "forward", exact + bound + 1e-3, batch)


def test_contenders_of_a_learned_mask_drop_its_ablated_neurons():
    contenders, _ = load_contenders("cpu")
    dropped = [each for each in contenders if each.name.endswith(", ablated rows dropped")]
    assert "NumPy x @ V, V = W.T stored, ablated rows dropped" in {each.name for each in dropped}
    for contender in dropped:
        assert contender.unfit(Case("forward", TINY, 1, 9)) == "no neuron is ablated"
        assert not contender.unfit(Case("forward", ABLATED, 1, 9))


# How a CPU is timed; tests/gpu/test_gpu_benchmark.py has the GPU


class FakeMachine:
    """A clock that only calls advance, and a record of the calls."""

    def __init__(self):
        self.now, self.record = 0.0, []

    def call(self, name, *costs):
        def call():
            self.record.append(name)
            self.now += costs[self.record.count(name) % len(costs)]

        return call

    def time(self, seconds=0.0, before=(), rest=lambda: None, **costs):
        def clock():
            return self.now

        runs = {n: HostRun(self.call(n, *c), before, clock=clock) for n, c in costs.items()}
        timings, errors = interleaved(runs, is_enough=TimeBudget(seconds, clock), rest=rest)
        assert not errors
        return timings


def test_contenders_are_timed_in_turns_and_each_round_begins_with_another():
    machine = FakeMachine()
    rest = machine.call("rest", 0.0)
    timings = machine.time(rest=rest, a=[0.003], b=[0.003], c=[0.003])
    turns = "".join(machine.record).split("rest")[1:]
    assert all(len(set(turn)) == 1 for turn in turns)
    assert "".join(turn[0] for turn in turns) == "abc" + "abcbcacababcbca"
    for timing in timings.values():
        assert timing["median_us"] == 3000
        assert (timing["rounds"], timing["calls"]) == (5, 1)


def test_a_time_is_the_median_over_rounds_of_each_rounds_median():
    timing = FakeMachine().time(0.1, only=[0.001, 0.001, 0.5])["only"]
    assert timing["median_us"] == timing["lower_us"] == 1000


def test_more_rounds_are_made_while_there_is_time_and_no_more_than_fifteen():
    machines = {seconds: FakeMachine() for seconds in (0.0, 0.3, 100.0)}
    few, some, most = (m.time(s, only=[0.02])["only"]["rounds"] for s, m in machines.items())
    assert few == 5 < some < 15 == most
    assert machines[0.3].now <= 0.3


def test_a_contender_that_takes_seconds_is_called_three_times():
    machine = FakeMachine()
    timings = machine.time(1, slow=[4.0], fast=[1e-4])
    assert machine.record.count("slow") == timings["slow"]["rounds"] == 3
    assert timings["slow"]["median_us"] == 4e6
    assert timings["fast"]["median_us"] == 100
    assert timings["fast"]["calls"] > 10


def test_one_that_raises_is_dropped_and_the_others_go_on():
    runs = {"later": HostRun(iter([1, 2]).__next__), "good": HostRun(lambda: None)}
    timings, errors = interleaved(runs, is_enough=TimeBudget(0.0))
    assert (set(timings), set(errors)) == ({"good"}, {"later"})


def test_before_a_cold_call_the_caches_are_flushed_and_other_weights_are_used():
    machine = FakeMachine()
    before = (machine.call("flush", 0.1), machine.call("other", 0.01))
    timing = machine.time(before=before, call=[0.001])["call"]
    assert timing["median_us"] == 1000
    assert machine.record == ["flush", "other", "call"] * (len(machine.record) // 3)


def test_a_flush_reads_twice_the_largest_cache(tmp_path):
    flush = Flush(2)
    flush()
    assert flush.buffer.nbytes >= 2 * max(cache_sizes().values(), default=0)
    caches = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("3", "Unified", "16384K")]
    for number, words in enumerate(caches):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in zip(("level", "type", "size"), words, strict=True):
            (folder / name).write_text(f"{text}\n")
    assert cache_sizes(tmp_path) == {"L1": 48 << 10, "L3": 16 << 20}
    assert cache_sizes(tmp_path / "none") == {}


LOOP = """
import numba
import numpy as np
from threadpoolctl import threadpool_info
from srigl_core.backends.numba_cpu.processor import vector_bytes

@numba.njit(fastmath=True)
def total(x):
    s = np.float32(0)
    for number in x:
        s += number
    return s

total(np.ones(9, np.float32))
(assembly,) = total.inspect_asm().values()
kernels = {each.get("architecture") for each in threadpool_info()} - {None}
print(vector_bytes(), "ymm" in assembly, "zmm" in assembly, *kernels)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86")
def test_avx2_rows_are_measured_with_avx2_alone():
    command, variables = [sys.executable, "-c", LOOP], environment(1, "avx2")
    options = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    done = subprocess.run(command, env=variables, **options)
    assert done.stdout.split()[:3] == ["32", "True", "False"]
    assert done.stdout.split()[3:] in (["Haswell"], [])  # a BLAS that is not OpenBLAS is not listed


def test_native_rows_are_measured_without_limits(monkeypatch):
    limits = {
        "OPENBLAS_CORETYPE": "Haswell",
        "OPENBLAS_L2_SIZE": "512",
        "NUMBA_CPU_NAME": "generic",
    }
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SRIGL_CACHE_DIR", "elsewhere")
    native, avx2 = (environment(3, instructions) for instructions in ("native", "avx2"))
    assert native["NUMBA_NUM_THREADS"] == avx2["NUMBA_NUM_THREADS"] == "3"
    assert native["SRIGL_CACHE_DIR"] == "elsewhere"
    assert not limits.keys() & native.keys()
    assert avx2["NUMBA_CPU_NAME"] == "haswell"


def test_what_cannot_be_held_to_avx2_has_no_such_row():
    contenders, _ = load_contenders("cpu")
    case = Case("forward", TINY, 1, 9, is_avx2=True)
    unfit = {c.name for c in contenders if c.operation == "forward" and "AVX2" in c.unfit(case)}
    assert unfit <= {"ONNX Runtime int8"}  # OpenVINO's processor is that of the process


# The roofline

CPU_PEAKS = CpuPeaks(1, 64, 1600.0, 50.0, ((1000, 8.0), (100_000, 2.0)))
each_peaks = pytest.mark.parametrize("peaks", [CPU_PEAKS, PEAKS], ids=["cpu", "gpu"])


def test_peaks_of_a_cpu_are_measured_with_loops_that_read_every_vector(monkeypatch):
    monkeypatch.setattr(cpu_peaks, "WORKING_SETS", (1 << 14, 1 << 16))
    monkeypatch.setattr(cpu_peaks, "_SAMPLE_SECONDS", 1e-4)
    peaks = cpu_peaks.measure_cpu_peaks(1)
    assert min(peaks.multiply_adds, peaks.loads) > 0
    assert [size for size, _ in peaks.bandwidth] == [1 << 14, 1 << 16]
    lanes = cpu_peaks.LANES
    part = np.zeros(32 * lanes, np.float32)
    assert cpu_peaks._read(part, 1) == 0
    for vector in range(32):
        part[:] = 0
        part[vector * lanes] = 1
        assert cpu_peaks._read(part, 3) == 3


@each_peaks
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_work_is_each_array_once_and_a_read_and_a_multiply_add_for_each_product(peaks, dtype):
    layer = Layer(n_in=8, n_out=4, fan_in=2, n_active=3)
    item = np.dtype(dtype).itemsize
    wide = max(item, 4)
    mask = 3 * math.log2(math.comb(8, 2)) / 8 if peaks is CPU_PEAKS else 6 * 2
    forward, backward, update = (
        work_of(Case(operation, layer, batch=5), peaks, Precision(dtype, dtype))
        for operation in ("forward", "backward", "update")
    )
    assert forward.moved == pytest.approx(6 * item + mask + 5 * (8 + 4) * item + 4 * item)
    assert (forward.gathered, forward.multiply_adds) == (6 * 5 * item, 6 * 5 * wide // 4)
    assert backward.moved == pytest.approx(6 * (item + wide) + mask + 5 * (8 + 8 + 4) * item)
    assert backward[1:] == tuple(2 * amount for amount in forward[1:])
    assert update == Work(8 * 4 * (3 * item + 2), 0, 0)


@each_peaks
def test_the_least_time_is_that_of_the_scarcest_resource(peaks):
    rates = peaks.seconds(Work(1.0, 1.0, 1.0), cold=True)
    for resource in rates:
        work = Work(*((2.0 if each == resource else 1.0) / rates[each] for each in rates))
        assert least_time(work, peaks, cold=True) == (pytest.approx(2.0), resource)


def test_bandwidth_depends_on_the_working_set_and_indices_on_the_inputs():
    assert CPU_PEAKS.bandwidth_at(1) == CPU_PEAKS.bandwidth_at(1000) == 8.0
    assert CPU_PEAKS.bandwidth_at(10_000) == pytest.approx(5.0)  # between two sizes
    assert CPU_PEAKS.bandwidth_at(1e9) == 2.0
    for cold, seconds in ((False, 1.0), (True, 4.0)):
        assert CPU_PEAKS.seconds(Work(8.0, 0, 0), cold=cold)["bandwidth"] == seconds
    assert PEAKS.mask_bytes(Layer(n_in=70_000, n_out=1, fan_in=2, n_active=1)) == 2 * 4


# Cliffs


def smooth(batch):
    return 10.0 + batch


def test_a_jump_is_a_cliff_and_a_tenth_is_none():
    times = {batch: smooth(batch) for batch in BATCHES}
    assert find_cliffs(times) == []
    assert list(map(str, find_cliffs(times | {63: 120}))) == [
        "batch 63 takes 1.62 times as long as 64"
    ]
    steps = {batch: float(128 * -(-batch // 128)) for batch in BATCHES}
    words = list(map(str, find_cliffs(steps)))
    assert "a row of batch 128 takes 0.56 times as long as one of 144" in words
    assert find_cliffs({20: 110.0, 36: 100.0}) == []
    assert find_cliffs({20: 110.1, 36: 100.0})
    assert find_cliffs({20: 110.1, 37: 100.0}) == []  # too far apart


@pytest.mark.parametrize(
    ("odd", "again", "found"),
    [
        ({}, [], []),
        ({63: [300.0]}, [[63, 64]], []),
        ({160: [300.0]}, [[144, 160]], []),
        (
            {20: [90.0], 63: [120.0, 119.0, 130.0, 125.0]},
            [[20, 21, 63, 64], [63, 64], [63, 64]],
            ["batch 63 takes 1.61 times as long as 64"],
        ),
    ],
)
def test_what_is_slow_once_is_measured_again_and_is_no_cliff(odd, again, found):
    slow, measured = {batch: iter(times) for batch, times in odd.items()}, []

    def measure(batches):
        measured.append(sorted(batches))
        return {batch: next(slow.get(batch, iter(())), smooth(batch)) for batch in batches}

    times = confirmed_times(measure)
    assert measured == [list(BATCHES), *again]
    assert list(map(str, find_cliffs(times))) == found
    assert {batch: times[batch] for batch in BATCHES if batch != 63} == {
        batch: smooth(batch) for batch in BATCHES if batch != 63
    }


def test_cliffs_are_measured_at_every_batch(monkeypatch):
    monkeypatch.setattr(cliffs, "BATCHES", range(1, 4))
    result = json.loads(json.dumps(measure_cliffs(1, seconds=0)))
    assert (result["batches"], len(result["median_us"])) == ([1, 2, 3], 3)
    assert min(result["median_us"]) > 0


# What is made of a result


def made_up(device):
    """Results that nobody measured, as a file of the committed format."""
    return load_results(ROOT / "tests" / "data" / f"made_up_{device}_benchmark.json")


@pytest.fixture
def saved(tmp_path):
    """Return a function that writes results and returns their path."""

    def save(results, name="results"):
        save_results(tmp_path / f"{name}.json", results)
        return tmp_path / f"{name}.json"

    return save


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON"),
        ('{"benchmark": "overhead"}', "is not a result of srigl bench"),
        ('{"format": 2, "benchmark": "cpu"}', "has format 2, but this version reads format 1"),
        ('{"format": 1, "benchmark": "tpu"}', "has benchmark='tpu', which is not one of cpu, gpu"),
        ('{"format": 1, "benchmark": "cpu"}', "lacks machine, processes"),
    ],
)
def test_another_file_is_refused_with_the_reason(tmp_path, text, problem):
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(FileFormatError, match=rf"{problem}.*; run srigl bench cpu"):
        load_results(tmp_path / "cpu.json")


SHOWN = {
    "cpu": (  # the committed page has the rest
        "learned: srigl-90 fc2, 18 ablated",
        "`pip install torch`",
        "batch 3 takes 2.00 times as long as 4",
    ),
    "gpu": (
        "| 3072→768, k = 307 | 90% | 256 | warm | float32 | 20.0 (18.0 to 22.0) | 33.0 | 50.0 "
        "| 25% shared memory | 3.00x (60.0 torch float32) | 0.75x (15.0 torch TF32) "
        "| 1.00x (20.0 torch float16) | 25.00x (500 torch CSR) |",
        "| 8 | warm | float32 | **failed** |",
        "| 2048 | warm | float32 | 90.0 (81.0 to 99.0) | 33.0 | 11.1 | 6% shared memory | 0.89x",
        "| 3072→768, k = 512, 307 ablated |",
        "| warm | float32 | 50.0 (45.0 to 55.0) | 33.0 | 2.50 |",  # forward passes
        "900 (810 to 990), host clock",
        "failed: torch 2:4 float16, 9 cases: RuntimeError: not here",
        "gpu Some GPU, memory 139 GiB, L2 60 MiB, driver_version 1.2",
        # The batch from which dense stays faster.
        "| 3072→768, k = 307 | 90% | 2048 | 256, also at 1 | 2048, also at 1, 64 | not measured |",
        "| 3072→768, k = 31 | 99% | not up to 256 | 256 | not up to 256 | not measured |",
    ),
}


@both
def test_the_page_shows_every_case_and_says_where_ours_loses(device):
    results = made_up(device)
    text = page(results, "cpu.png" if device == "cpu" else "")
    for words in SHOWN[device]:
        assert words in text, words
    assert "Incomplete" not in text
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert all(len({line.count("|") for line in part.splitlines()}) == 1 for part in tables)


@both
def test_a_page_of_one_case_has_no_holes(device, tmp_path):
    results = made_up(device)
    process = results.processes[0]
    process["cases"][:], process["cliffs"][:] = process["cases"][-1:], []
    text = write_report(results, tmp_path, "one")[0].read_text()
    assert "Not measured." in text
    assert "## Mask update" in text


@both
def test_results_are_written_as_they_were_read_and_page_and_plot_made_of_them_alone(device, saved):
    results = made_up(device)
    path = saved(results, device)
    assert path.read_text() == (ROOT / f"tests/data/made_up_{device}_benchmark.json").read_text()
    result = command("report", path)
    assert result.exit_code == 0, result.output
    picture = ["cpu.png"] if device == "cpu" else []
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{device}.md", *picture}
    assert path.with_suffix(".md").read_text() == page(results, *picture)
    assert all((path.parent / p).read_bytes().startswith(b"\x89PNG") for p in picture)


# The README, and the committed pages

PAGE = f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n"


def test_the_readme_gets_the_figures_between_its_markers_and_keeps_the_rest(saved):
    path = saved(made_up("cpu"))
    target = path.with_name("README.md")
    target.write_text(PAGE)
    assert command("readme", path, target).exit_code == 0
    text = target.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n| layer |")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "stale" not in text
    assert "| layer | sparsity | batch | srigl, µs | dense | dense int8 | CSR |" in text
    assert "| 3072→768, weights cold | 90% | 1 | 70.0 | 4.9x | 2.4x fast | 2.9x |" in text
    assert "the best dense in 0 of 6, the best dense without ablated rows in 0 of 1, " in text
    assert "and the best CSR in 1 of 6 cases." in text
    table = readme.long_table(made_up("cpu"))
    assert "| 768→768, learned mask | 90% | 1 | 7.0 | 4.3x | 3.6x |  | 5.7x |" in table
    assert readme.replaced(text, made_up("cpu")) == text
    picture = path.with_name(readme.PICTURE).read_text()
    for words in (
        "batch 256",
        "srigl 20.0 µs",
        "best CSR 90.0 µs, 4.5x",
        "best dense 120 µs, 6.0x",
        "best dense int8 60.0 µs, 3.0x",
    ):
        assert words in picture
    refused = command("readme", saved(made_up("gpu")), target)
    assert (refused.exit_code, "was measured on a gpu" in refused.output) == (1, True)


@pytest.mark.parametrize("page", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}", PAGE + PAGE])
def test_a_page_without_one_pair_of_markers_is_refused(page):
    with pytest.raises(FileFormatError, match="must have one"):
        readme.replaced(page, made_up("cpu"))


def test_the_committed_pages_are_made_of_the_committed_result():
    results, text = load_results(COMMITTED), (ROOT / "README.md").read_text()
    assert readme.replaced(text, results) == text
    assert text.count("\n| ", text.index(readme.BEGIN), text.index(readme.END)) <= 9
    assert COMMITTED.with_suffix(".md").read_text() == page(results, "cpu.png")
    assert COMMITTED.with_name(readme.PICTURE).read_text() == pictures.speedup(results)
    overhead = json.loads(COMMITTED.with_name("overhead.json").read_text())
    assert COMMITTED.with_name(PICTURE).read_text() == pictures.calls(overhead)


def test_a_page_says_in_words_what_is_good_and_what_is_bad():
    results = made_up("cpu")
    words = verdict(results)
    assert "faster than the best dense product in 6 of 6 cases" in words
    assert "faster than the best dense int8 product in 4 of 4 cases" in words
    assert "faster than the best dense without ablated rows product in 1 of 1 cases" in words
    assert "faster than the best CSR product in 5 of 6 cases" in words
    assert "| CSR | 3072→768 | 99% | hot | 1 | 1.1x |" in words
    results.processes[0]["cases"][:] = results.processes[0]["cases"][1:5]
    assert "no forward product was measured in which srigl is slower" in verdict(results)
    results.processes[0]["cases"].clear()
    assert verdict(results) == ""


def test_the_model_of_dense_products_is_made_of_a_result(saved, tmp_path):
    module = tmp_path / "times.py"
    result = command("model", saved(made_up("cpu")), module)
    assert result.exit_code == 0, result.output
    names = {}
    exec(module.read_text(), names)
    assert names["BATCHES"] == (1, 256)
    assert names["CALL_NANOSECONDS"] == {"dense": 1000.0, "int8": 500.0}
    for kind, call, times in (("dense", 1.0, (120, 6000)), ("int8", 0.5, (60, 3000))):
        weights = [1e3 * (time - call) / (3072 * 768) for time in times]
        assert names["WEIGHT_NANOSECONDS"][kind] == pytest.approx(weights, rel=1e-3)


def test_a_result_without_dense_int8_makes_no_model(saved, tmp_path):
    results = made_up("cpu")
    for case in results.processes[0]["cases"]:
        case["contenders"] = {n: e for n, e in case["contenders"].items() if e["family"] != "int8"}
    result = command("model", saved(results), tmp_path / "times.py")
    assert result.exit_code == 1
    assert "the model needs dense and dense int8 products" in result.output
    assert not (tmp_path / "times.py").exists()


# Comparing two runs


def changed(results, *factors):
    """Return the results with all times of the first cases multiplied."""
    for case, factor in zip(results.processes[0]["cases"], factors, strict=False):
        for entry in case["contenders"].values():
            entry |= {k: factor * v for k, v in entry.items() if k.endswith("_us")}
    return results


def test_comparing_says_what_changed_beyond_the_spread(saved):
    old, new = made_up("cpu"), changed(made_up("cpu"), 1.0, 0.5, 5 / 3, 1.1)
    new.processes[0]["cases"].append(new.processes[0]["cases"][0] | {"batch": 7})  # only there
    comparison = compare([old], [new])
    assert [change.ratio for change in comparison.faster] == [0.5]
    assert (comparison.n_times, comparison.others, comparison.warnings) == (9, 1.0, [])
    result = command("compare", saved(old, "old"), saved(new, "new"))
    assert result.exit_code == 1
    assert (
        "1 of 9 times are slower beyond the spread\n"
        "  1.67x forward 3072→768 90% batch 1 threads 2 hot, srigl numba: 15.0 (13.5 to 16.5) -> "
        "25.0 (22.5 to 27.5) us\n"
        "1 of 9 times are faster beyond the spread\n"
        "  0.50x forward 3072→768 90% batch 1 hot, srigl numba: 20.0 (18.0 to 22.0) ->"
    ) in result.output
    assert command("compare", saved(new, "new"), saved(new, "same")).exit_code == 0


def test_a_time_changed_if_no_run_of_one_version_overlaps_any_of_the_other(saved, tmp_path):
    for folder, factors in (("old", (1.0, 1.4, 1.2)), ("new", (1.5, 2.0)), ("fast", (0.7, 0.5))):
        (tmp_path / folder).mkdir()
        for number, factor in enumerate(factors):
            saved(changed(made_up("cpu"), 1.0, factor), f"{folder}/{number}")
    overlaps = command("compare", tmp_path / "old", tmp_path / "new")  # 1.4 * 1.1 > 1.5 * 0.9
    assert overlaps.exit_code == 0
    assert "0 of 9 times are slower" in overlaps.output
    faster = command("compare", tmp_path / "old", tmp_path / "fast")
    line = "  0.50x forward 3072→768 90% batch 1 hot, srigl numba: 24.0 (18.0 to 30.8) -> "
    assert line + "12.0 (9.00 to 15.4) us" in faster.output


def test_what_should_be_the_same_in_two_runs_is_warned_of(saved):
    new = made_up("cpu")
    new.content["machine"].update(cpu="Other CPU", load=3.0)
    cases = new.processes[0]["cases"]
    cases[:] = [case for case in cases if case["threads"] == 1]
    result = command("compare", saved(made_up("cpu"), "old"), saved(new, "new"))
    assert result.exit_code == 0
    assert "warning: cpu is Some CPU in the old file and Other CPU in the new one" in result.output
    assert "warning: threads is 1, 2 in the old file and 1 in the new one" in result.output
    assert result.output.count("warning") == 2


def test_files_that_cannot_be_compared_are_one_line(saved, tmp_path):
    other = made_up("cpu")
    other.processes[0]["cases"][:] = [other.processes[0]["cases"][0] | {"batch": 7}]
    for new, message in (
        (saved(made_up("gpu"), "gpu"), "some files were measured on a cpu and others on a gpu"),
        (saved(other), "have no time of our kernels in common"),
        (tmp_path / "none.json", "No such file"),
        (ROOT / "docs", "has no .json files"),
    ):
        result = command("compare", saved(made_up("cpu"), "cpu"), new)
        assert result.exit_code == 1
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1


# Runs on a CPU; tests/gpu/test_gpu_benchmark.py has the GPU


def test_a_run_writes_json_page_and_plot(tmp_path):
    arguments = ["--quick", "--threads", "1", "--only", "16-16", "--seconds", "0", "--out", "out"]
    command = [sys.executable, "-m", "srigl_core.cli", "bench", "cpu", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run(command, cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    assert "[1/1] forward 16-16" in done.stdout
    for library in load_contenders("cpu")[1]:
        assert f"not installed: {library['library']}: {library['install']}" in done.stdout
    assert "In out: cpu.json, cpu.md, cpu.png" in done.stdout
    results = load_results(tmp_path / "out" / "cpu.json")
    (row,) = results.rows
    assert min(row.ours, row.ratio("dense"), row.ratio("csr"), row.bandwidth(row.main)) > 0
    assert results.content["incomplete"] is False
    assert results.native["environment"]["NUMBA_NUM_THREADS"] == "1"
    assert row.left_out("wrong") == row.left_out("failed") == {}
    for name, entry in row.contenders.items():
        assert row.times[name].lower <= row.times[name].median <= row.times[name].upper
        assert entry["rounds"] >= 3
    assert (tmp_path / "out" / "cpu.md").read_text() == page(results, "cpu.png")
    assert (tmp_path / "out" / "cpu.png").exists()
    assert str(Path.home()) not in (tmp_path / "out" / "cpu.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "two"], "threads='two' is not a list of numbers"),
        (["--threads", "0,1"], "threads=0 is out of range"),
        (["--threads", "100000"], "threads=100000 is out of range"),
        (["--only", "nothing"], "leaves no case to measure"),
        (["--masks", "nowhere"], "holds no float32 layer"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, tmp_path):
    result = command("cpu", "--quick", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("package", ["matplotlib", "threadpoolctl"])
def test_without_its_extra_the_benchmark_prints_the_install_line(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = command("cpu", "--out", tmp_path / "out")
    assert (result.exit_code, "pip install matplotlib" in result.output) == (1, True)
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_cliffs_alone_are_looked_for_on_demand(tmp_path, monkeypatch):
    process = made_up("cpu").processes[0] | {"cases": []}
    asked = []
    monkeypatch.setattr(run, "_in_own_process", lambda one: asked.append(one) or process)
    result = command("cpu", "--cliffs", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "threads 1: batch 3 takes 2.00 times as long as 4\n" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-cliffs.json"]
    (settings,) = asked
    assert settings.cliffs
    assert measure.chosen(settings) == []


@pytest.mark.parametrize("tells_its_load", [True, False])
def test_a_run_ends_with_what_the_machine_measured(tmp_path, monkeypatch, tells_its_load):
    """Windows tells no load."""
    monkeypatch.delattr(os, "getloadavg", raising=False)
    if tells_its_load:
        monkeypatch.setattr(os, "getloadavg", lambda: (0.125, 1, 1), raising=False)
    monkeypatch.setattr(run, "_in_own_process", lambda one: made_up("cpu").processes[0])
    monkeypatch.setenv("COLUMNS", "200")
    result = command("cpu", "--quick", "--threads", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    last = " ".join(result.output.split())
    assert "srigl, us dense, us dense without ablated rows, us dense int8, us CSR, us" in last
    assert "forward 3072→768 90% batch 1 hot 20 120 60 90" in last
    assert "best dense int8: fast int8 in 4" in last
    assert "faster than the best dense int8 product in 4 of 4 cases" in last
    assert "not installed: PyTorch: pip install torch" in last
    assert last.endswith("times as long.")
    machine = load_results(tmp_path / "cpu.json").content["machine"]
    assert machine.get("load") == (0.12 if tells_its_load else None)


def test_a_process_that_fails_is_an_error_and_writes_nothing(tmp_path, monkeypatch):
    failed = SimpleNamespace(run=lambda *args, **kwargs: SimpleNamespace(returncode=3))
    monkeypatch.setattr(run, "subprocess", failed)
    with pytest.raises(SriglError, match="ended with code 3"):
        run.run(measure.Settings(quick=True, threads=(1,)), tmp_path)
    assert not list(tmp_path.iterdir())


KERNELS = """
import numpy as np
from srigl_core.testing import KernelCapabilities, declare

def kernel(x, values, indices):
    return np.stack([x[:, i] @ v for v, i in zip(values, indices)], axis=1)

def wrong(x, values, indices):
    return kernel(x, values, indices) * 2

def broken(x, values, indices):
    raise RuntimeError("not today")

@declare(capabilities=KernelCapabilities(value_dtypes={"float16"}))
def narrow(x, values, indices):
    return kernel(x, values, indices)
"""


@pytest.fixture
def bench_kernel(tmp_path, monkeypatch):
    """Return a function that measures an external kernel in one case."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    few = ["--quick", "--seconds", "0", "--only", "99%", "--only", "batch=1", "--out", "out"]
    return lambda name: command(f"kernels:{name}", *few)


def test_an_external_kernel_stands_beside_ours(bench_kernel):
    result = bench_kernel("kernel")
    assert result.exit_code == 0, result.output
    assert "kernel, us" in result.output
    (row,) = load_results(Path("out/kernel.json")).rows
    assert row.contenders["kernel"]["family"] == "external"
    shown = Path("out/kernel.md").read_text()
    assert "| vs external kernel |" in shown
    assert f"{row.time('kernel') / row.ours:.2f}x (" in shown


@pytest.mark.parametrize(("name", "why"), [("wrong", "y is wrong"), ("broken", "not today")])
def test_a_wrong_or_failing_kernel_is_not_timed_and_the_exit_code_says_so(bench_kernel, name, why):
    result = bench_kernel(name)
    assert result.exit_code == 1
    assert why in result.output
    (row,) = load_results(Path("out/kernel.json")).rows
    assert row.time(name) is None
    assert row.ours > 0  # the others are measured


def test_a_kernel_that_fits_no_case_is_an_error_that_says_why(bench_kernel):
    result = bench_kernel("narrow")
    assert result.exit_code == 1
    assert "no case" in result.output
    assert "condensed_matmul of float16" in " ".join(result.output.split())
    assert not Path("out").exists()
