"""The benchmark: what it computes, how it times, and what it makes of a result; never how fast."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import srigl_core
from srigl_core.benchmarks import contenders as contender_modules
from srigl_core.benchmarks import limits, readme
from srigl_core.benchmarks.caches import Flush, cache_sizes
from srigl_core.benchmarks.cases import HEADLINE, Case, Layer, avx2_cases, chosen_cases, matching
from srigl_core.benchmarks.cliffs import (
    BATCHES,
    MOST_REPEATS,
    confirmed_times,
    find_cliffs,
    measure_cliffs,
)
from srigl_core.benchmarks.contenders import load_contenders
from srigl_core.benchmarks.goals import GOALS, verdicts
from srigl_core.benchmarks.pools import check_threads, environment, rest
from srigl_core.benchmarks.problems import Problem, WrongResultError, check
from srigl_core.benchmarks.report import page, write_report
from srigl_core.benchmarks.results import OURS, Results, Row, load_results, save_results
from srigl_core.benchmarks.timing import Cold, Hot, interleaved
from srigl_core.cli.app import app
from srigl_core.errors import FileFormatError, SriglError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "cpu.json"


# What is measured


def words_of(cases):
    return {(c.operation, c.layer.name, f"{c.layer.sparsity:.0%}", c.batch) for c in cases}


def test_a_whole_run_has_every_layer_sparsity_and_batch():
    cases = chosen_cases(quick=False, threads=(1, 2), masks=None)
    found = words_of(cases)
    for layer in ("3072-768", "768-3072", "4096-4096", "1024-1024"):
        for sparsity in ("80%", "90%", "95%", "99%"):
            for batch in (1, 2, 4, 8, 16, 64, 256, 2048):
                assert ("forward", layer, sparsity, batch) in found
            assert ("backward", layer, sparsity, 256) in found
        assert ("update", layer, "90%", 0) in found
    output = [case for case in cases if case.layer.name == "768-100000"]
    assert {case.layer.fan_in for case in output} == {32}
    for case in cases:
        assert dataclasses.replace(case, threads=3 - case.threads) in cases
    assert len(set(cases)) == len(cases)


def test_a_quick_run_is_part_of_a_whole_one():
    whole = words_of(chosen_cases(quick=False, threads=(1,), masks=None))
    quick = words_of(chosen_cases(quick=True, threads=(1,), masks=None))
    assert quick < whole
    assert len(quick) < 15


def test_every_goal_has_its_case_in_a_whole_run():
    cases = chosen_cases(quick=False, threads=(1, 2), masks=None)
    described = [described_case(case, "native") for case in cases]
    described += [described_case(case, "avx2") for case in avx2_cases((1, 2))]
    for goal in GOALS:
        assert any(goal.case.items() <= case.items() for case in described), goal.name


def described_case(case, instructions):
    return {
        "operation": case.operation,
        "n_in": case.layer.n_in,
        "n_out": case.layer.n_out,
        "sparsity": case.layer.sparsity,
        "batch": case.batch,
        "threads": case.threads,
        "weights": "cold" if case.cold else "hot",
        "instructions": instructions,
    }


def test_only_takes_one_word_of_each():
    cases = chosen_cases(quick=False, threads=(1, 2), masks=None)
    only = ["3072-768,1024-1024", "90%", "batch=1", "threads=2", "cold"]
    chosen = matching(cases, only, "native")
    assert {case.layer.name for case in chosen} == {"3072-768", "1024-1024"}
    assert {(c.layer.sparsity, c.batch, c.threads, c.cold) for c in chosen} == {(0.9, 1, 2, True)}
    assert matching(cases, ["avx2"], "native") == []
    assert matching(cases, [], "native") == cases


def test_learned_masks_are_measured_each_beside_a_random_one(tmp_path):
    learned = srigl_core.CondensedWeight.random((200, 150), fan_in=9, n_active=180, rng=1)
    small = srigl_core.CondensedWeight.random((10, 150), fan_in=9, rng=2)
    tensors = {"fc": learned, "head": small, "bias": np.zeros(3, np.float32)}
    srigl_core.save_condensed(tmp_path / "net.safetensors", tensors)
    cases = chosen_cases(quick=True, threads=(1,), masks=tmp_path)
    layers = list(dict.fromkeys(case.layer for case in cases if case.layer.n_in == 150))
    assert [layer.mask for layer in layers] == ["learned: net fc", "random"]
    assert layers[0].weight == learned
    assert Problem(layers[0], 2, "float32").weight == learned
    twin = Problem(layers[1], 2, "float32").weight
    assert (twin.shape, twin.fan_in, twin.n_active) == ((200, 150), 9, 180)


def test_a_folder_without_learned_layers_is_an_error(tmp_path):
    with pytest.raises(
        SriglError, match=r"holds no float32 layer .* examples/demo writes such files"
    ):
        chosen_cases(quick=True, threads=(1,), masks=tmp_path)


# What the contenders compute

TINY = Layer(n_in=40, n_out=24, fan_in=5, n_active=24)
ABLATED = Layer(n_in=40, n_out=24, fan_in=5, n_active=20)


def fitting(operation, case, contenders):
    return [c for c in contenders if c.operation == operation and not c.unfit(case)]


def problem_for(contender, problem):
    if contender.values:
        problem = problem.narrowed(contender.values)
    return problem.cut(contender.share) if contender.share < 1 else problem


@pytest.mark.parametrize("layer", [TINY, ABLATED], ids=["all active", "some ablated"])
@pytest.mark.parametrize(
    ("operation", "batches", "dtype"),
    [
        ("forward", (1, 2, 9), "float32"),
        ("forward", (1, 9), "float64"),
        ("backward", (1, 9), "float32"),
        ("update", (0,), "float32"),
    ],
)
def test_every_contender_agrees_with_the_reference(layer, operation, batches, dtype):
    contenders, _ = load_contenders()
    problem = Problem(layer, 9, dtype)
    for batch in batches:
        case = Case(operation, layer, 1, batch, dtype=dtype, narrow=dtype == "float32")
        taking_part = fitting(operation, case, contenders)
        assert OURS in [contender.name for contender in taking_part]
        for contender in taking_part:
            own = problem_for(contender, problem)
            call = contender.prepare(own)(problem.batch(max(batch, 1), 1))
            expected = own.results(operation, max(batch, 1))
            check(contender.name, contender.read(call(), own), expected)
            check(contender.name, contender.read(call(), own), expected)


@pytest.mark.parametrize("operation", ["forward", "backward", "update"])
def test_a_result_with_one_wrong_entry_is_refused(operation):
    problem = Problem(TINY, 9, "float32")
    expected = problem.results(operation, 9)
    for name in expected:
        right = {what: exact.copy() for what, (exact, _) in expected.items()}
        check("right", right, expected)
        if operation == "update":
            wrong = {"mask": ~right["mask"].astype(bool)}
        else:
            wrong = {**right, name: right[name].copy()}
            wrong[name][-1, -1] *= 1 + 1e-3
            wrong[name][-1, -1] += 1e-3
        with pytest.raises(WrongResultError, match=rf"wrong: {name} is wrong at"):
            check("wrong", wrong, expected)
        missing = {**right, name: right[name][1:]}
        with pytest.raises(WrongResultError, match=r"has shape"):
            check("short", missing, expected)
        with pytest.raises(WrongResultError, match=r"nan"):
            check("nan", {**right, name: np.full_like(right[name], np.nan)}, expected)


def test_the_bound_is_much_smaller_than_a_term_of_a_product():
    problem = Problem(Layer.random(*HEADLINE, 0.9), 4, "float32")
    _, bound = problem.forward_results["y"]
    terms = np.abs(problem.batch(4, 1).x[:, None, problem.weight.indices[0]])
    terms = terms * np.abs(problem.weight.values[0])
    assert np.median(terms) > 5 * bound[:, 0].max()


def test_an_update_has_no_ties():
    for array in Problem(Layer(300, 200, 30, 200), 1, "float32").update_inputs[:2]:
        magnitudes = np.abs(array[array != 0])
        assert np.unique(magnitudes).size == magnitudes.size


def test_another_seed_is_another_weight_of_the_same_numbers():
    one, other = (Problem(TINY, 2, "float32", seed=seed) for seed in (0, 1))
    assert one.weight != other.weight
    assert one.weight.fan_in == other.weight.fan_in
    np.testing.assert_array_equal(one.batch(2, 1).x, other.batch(2, 1).x)


def test_a_library_that_is_not_installed_is_listed_with_its_install_line(monkeypatch):
    real = contender_modules.importlib.import_module

    def without_torch(name):
        if name.endswith(".pytorch"):
            raise ModuleNotFoundError("No module named 'torch'")
        return real(name)

    monkeypatch.setattr(contender_modules.importlib, "import_module", without_torch)
    contenders, absent = load_contenders()
    (torch,) = [dataclasses.asdict(missing) for missing in absent if "torch" in missing.reason]
    assert torch == {
        "library": "PyTorch",
        "reason": "No module named 'torch'",
        "install": "pip install torch",
    }
    assert not [c for c in contenders if "torch" in c.name]
    assert {"NumPy x @ W.T", "SciPy CSR", OURS} <= {c.name for c in contenders}


# How it is timed


class FakeMachine:
    """A clock that only calls advance, and a record of what was called."""

    def __init__(self):
        self.now, self.record = 0.0, []

    def clock(self):
        return self.now

    def call(self, name, *costs):
        def run():
            self.record.append(name)
            self.now += costs[self.record.count(name) % len(costs)]

        return run


def test_contenders_are_timed_in_turns_and_each_round_begins_with_another():
    machine = FakeMachine()
    names = ("a", "b", "c")
    runs = {name: Hot(machine.call(name, 0.003)) for name in names}
    timings = interleaved(
        runs, seconds=0, rest=lambda: machine.record.append("rest"), clock=machine.clock
    )
    turns = "".join(machine.record).split("rest")[1:]
    assert all(len(set(turn)) == 1 for turn in turns)
    order = "".join(turn[0] for turn in turns)
    assert order == "abc" + "abcbcacababcbca"
    for timing in timings.values():
        assert timing.median == pytest.approx(0.003)
        assert (timing.rounds, timing.calls) == (5, 1)


def test_a_time_is_the_median_over_rounds_of_each_rounds_median():
    machine = FakeMachine()
    timing = interleaved(
        {"only": Hot(machine.call("only", 0.001, 0.001, 0.5))}, seconds=0.1, clock=machine.clock
    )["only"]
    assert timing.median == timing.lower == pytest.approx(0.001)


def test_more_rounds_are_made_while_there_is_time_and_no_more_than_fifteen():
    rounds = []
    for seconds in (0.0, 0.3, 100.0):
        machine = FakeMachine()
        timing = interleaved(
            {"only": Hot(machine.call("only", 0.02))}, seconds=seconds, clock=machine.clock
        )["only"]
        rounds.append(timing.rounds)
        if 0 < seconds < 100:
            assert machine.now <= seconds
    assert rounds[0] == 5
    assert 5 < rounds[1] < 15
    assert rounds[2] == 15


def test_a_contender_that_takes_seconds_is_called_three_times():
    machine = FakeMachine()
    runs = {"slow": Hot(machine.call("slow", 4.0)), "fast": Hot(machine.call("fast", 1e-4))}
    timings = interleaved(runs, seconds=1, clock=machine.clock)
    assert machine.record.count("slow") == timings["slow"].rounds == 3
    assert timings["slow"].median == pytest.approx(4.0)
    assert timings["fast"].median == pytest.approx(1e-4)
    assert timings["fast"].calls > 10


def test_before_a_cold_call_the_caches_are_flushed_and_other_weights_are_used():
    machine = FakeMachine()
    cold = Cold(
        machine.call("call", 0.001), machine.call("other", 0.01), machine.call("flush", 0.1)
    )
    timing = interleaved({"only": cold}, seconds=0, clock=machine.clock)["only"]
    assert timing.median == pytest.approx(0.001)
    record = machine.record
    assert record == ["flush", "other", "call"] * (len(record) // 3)


def test_a_rest_ends_when_no_thread_runs():
    rest()  # would otherwise run into the time-out


def test_a_flush_reads_twice_the_largest_cache():
    flush = Flush(2)
    flush()
    assert flush.nbytes >= 2 * max(cache_sizes().values(), default=0)


def test_cache_sizes_are_read_from_the_system(tmp_path):
    for number, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("3", "Unified", "16384K")]
    ):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert cache_sizes(tmp_path) == {"L1": 48 << 10, "L3": 16 << 20}
    assert cache_sizes(tmp_path / "none") == {}


def test_threads_beyond_the_cores_are_refused():
    check_threads(1)
    for threads in (0, 10_000):
        with pytest.raises(SriglError, match=rf"threads={threads} is out of range"):
            check_threads(threads)


def test_avx2_holds_every_library_back_and_native_none():
    assert environment(2, "avx2")["NUMBA_CPU_NAME"] == "haswell"
    assert "NUMBA_CPU_NAME" not in environment(2, "native")
    assert environment(3, "native")["NUMBA_NUM_THREADS"] == "3"


# The machine's limits


def test_limits_are_measured(monkeypatch):
    monkeypatch.setattr(limits, "WORKING_SETS", (1 << 14, 1 << 16))
    monkeypatch.setattr(limits, "_SAMPLE_SECONDS", 1e-4)
    found = limits.measure_limits(1)
    assert found.multiply_adds > 0
    assert found.loads > 0
    assert [size for size, _ in found.bandwidth] == [1 << 14, 1 << 16]


def test_the_read_loop_reads_every_vector():
    buffer = np.zeros(limits.VECTOR_BYTES * 64, np.uint8)
    start = -buffer.ctypes.data % limits.VECTOR_BYTES
    part = buffer[start : start + limits.VECTOR_BYTES * 32]
    assert limits._read(part, 1) == 0
    for vector in range(32):
        part[:] = 0
        part[vector * limits.VECTOR_BYTES] = 1
        assert limits._read(part, 1) == 1


def test_bandwidth_between_two_sizes_is_between_their_bandwidths():
    found = limits.Limits(1, 64, 1.0, 1.0, ((1000, 8.0), (100_000, 2.0)))
    assert found.bandwidth_at(1) == found.bandwidth_at(1000) == 8.0
    assert found.bandwidth_at(10_000) == pytest.approx(5.0)
    assert found.bandwidth_at(1e9) == 2.0


def test_needs_are_values_mask_inputs_results_and_multiply_adds():
    numbers = {"n_in": 8, "n_out": 4, "n_active": 3, "fan_in": 2, "itemsize": 4}
    mask = 3 * math.log2(math.comb(8, 2)) / 8
    forward = limits.needs("forward", batch=5, **numbers)
    assert forward.read == pytest.approx(6 * 4 + mask + 5 * 8 * 4 + 5 * 4 * 4 + 4 * 4)
    assert forward.multiply_adds == 6 * 5
    backward = limits.needs("backward", batch=5, **numbers)
    assert backward.read == pytest.approx(2 * 6 * 4 + mask + 2 * 5 * 8 * 4 + 5 * 4 * 4)
    assert backward.multiply_adds == 2 * 6 * 5
    update = limits.needs("update", batch=0, **numbers)
    assert update.read == 8 * 4 * (3 * 4 + 2)


def test_the_least_time_is_that_of_the_scarcest_resource():
    found = limits.Limits(1, 64, 1600.0, 50.0, ((1000, 1e9), (100_000, 100.0)))
    small = limits.Needs(read=10.0, multiply_adds=1600.0)
    assert limits.least_seconds(small, found, cold=False) == (2.0, "loads")
    assert limits.least_seconds(limits.Needs(500.0, 16.0), found, cold=True) == (5.0, "bandwidth")
    many = dataclasses.replace(found, loads=1e9)
    assert limits.least_seconds(small, many, cold=False) == (1.0, "multiply-adds")


# Cliffs


def smooth(batch):
    return 10.0 + batch


class FakeTimes:
    """A measuring function: of an odd batch one time after the other, then all are smooth."""

    def __init__(self, odd):
        self.odd = {batch: iter(times) for batch, times in odd.items()}
        self.measured = []

    def __call__(self, batches):
        self.measured.append(sorted(batches))
        return {batch: next(self.odd.get(batch, iter(())), smooth(batch)) for batch in batches}


def test_smooth_times_have_no_cliff():
    assert find_cliffs({batch: smooth(batch) for batch in BATCHES}) == []


def test_a_jump_is_a_cliff():
    times = {batch: smooth(batch) for batch in BATCHES}
    times[63] = 120
    (found,) = find_cliffs(times)
    assert str(found) == "batch 63 takes 1.62 times as long as 64"
    steps = {batch: float(128 * -(-batch // 128)) for batch in BATCHES}
    words = [str(cliff) for cliff in find_cliffs(steps)]
    assert "a row of batch 128 takes 0.56 times as long as one of 144" in words


def test_a_batch_may_take_a_tenth_longer_than_a_larger_one():
    assert find_cliffs({20: 110.0, 36: 100.0}) == []
    assert find_cliffs({20: 110.1, 36: 100.0})
    assert find_cliffs({20: 110.1, 37: 100.0}) == []


def test_smooth_times_are_measured_once():
    measure = FakeTimes({})
    times, repeats = confirmed_times(measure)
    assert times == {batch: smooth(batch) for batch in BATCHES}
    assert repeats == 0
    assert measure.measured == [list(BATCHES)]


@pytest.mark.parametrize(("odd", "pair"), [(63, [63, 64]), (160, [144, 160])], ids=["whole", "row"])
def test_a_batch_that_is_slow_once_is_no_cliff(odd, pair):
    measure = FakeTimes({odd: [300.0]})
    times, repeats = confirmed_times(measure)
    assert times == {batch: smooth(batch) for batch in BATCHES}
    assert repeats == 1
    assert measure.measured == [list(BATCHES), pair]


def test_a_batch_that_is_slow_each_time_stays_a_cliff_of_its_least_time():
    measure = FakeTimes({20: [90.0], 63: [120.0, 119.0, 130.0, 125.0]})
    times, repeats = confirmed_times(measure)
    assert [str(cliff) for cliff in find_cliffs(times)] == [
        "batch 63 takes 1.61 times as long as 64"
    ]
    assert repeats == MOST_REPEATS
    assert measure.measured[1:] == [[20, 21, 63, 64], *[[63, 64]] * (MOST_REPEATS - 1)]


def test_the_result_says_how_often_suspects_were_measured_again(monkeypatch):
    measure = FakeTimes({7: [300.0] * 9, 99: [300.0] * 2})

    def timings(runs, *, seconds):
        times = measure([int(name) for name in runs])
        return {str(batch): SimpleNamespace(median=1e-6 * time) for batch, time in times.items()}

    calls = {"interleaved": timings, "product": lambda name: lambda problem: lambda batch: list}
    for name, call in calls.items():
        monkeypatch.setattr(f"srigl_core.benchmarks.cliffs.{name}", call)
    result = json.loads(json.dumps(measure_cliffs(1)))
    assert result["repeats"] == len(measure.measured) - 1 == MOST_REPEATS
    assert result["found"] == ["batch 7 takes 16.67 times as long as 8"]
    assert result["median_us"][99 - 1] == smooth(99)


# What is made of a result


def made_case(ours, dense, csr, **more):
    def entry(family, median):
        around = {"lower_us": 0.9 * median, "upper_us": 1.1 * median}
        return {"family": family, "median_us": median, **around, "rounds": 5, "calls": 9}

    case = {
        "operation": "forward",
        "n_in": 3072,
        "n_out": 768,
        "sparsity": 0.9,
        "fan_in": 307,
        "n_active": 768,
        "mask": "random",
        "batch": 1,
        "threads": 1,
        "weights": "hot",
        "dtype": "float32",
        "instructions": "native",
        "least_us": 12.0,
        "limited_by": "bandwidth",
        "contenders": {
            OURS: entry("ours", ours),
            "slow dense": entry("dense", 2 * dense),
            "fast dense": entry("dense", dense),
            "fewer": entry("fewer neurons", dense / 2),
            "a csr": entry("csr", csr),
        },
    }
    return case | more


def made_results():
    bandwidth = [[1 << 14, 4e11], [1 << 22, 1e11], [1 << 28, 3e10]]
    limit = {"vector_bytes": 64, "multiply_adds": 6e10, "loads": 4e9, "bandwidth": bandwidth}
    cases = [
        made_case(5.0, 1.0, 2.0, n_in=16, n_out=16, sparsity=0.88, fan_in=2, n_active=16),
        made_case(20.0, 120.0, 90.0),
        made_case(15.0, 60.0, 50.0, threads=2),
        made_case(70.0, 340.0, 200.0, weights="cold"),
        made_case(1200.0, 6000.0, 7000.0, batch=256),
        made_case(10.0, 110.0, 9.0, sparsity=0.99, fan_in=31),
        made_case(7.0, 30.0, 40.0, n_in=768, mask="learned: srigl-90 fc2", n_active=750),
        made_case(4000.0, 9000.0, 8000.0, operation="backward", batch=256),
        made_case(9000.0, 1.0, 1.0, operation="update", batch=0, threads=2),
    ]
    update = cases[-1]["contenders"]
    cases[-1]["contenders"] = {OURS: update[OURS], "srigl reference": update["fewer"]}
    process = {
        "instructions": "native",
        "environment": {"OMP_NUM_THREADS": "2"},
        "versions": {"python": "3.11.7", "numpy": "2.4.6"},
        "libraries": [{"prefix": "libopenblas", "version": "0.3", "architecture": "Zen"}],
        "absent": [{"library": "PyTorch", "reason": "none", "install": "pip install torch"}],
        "limits": [{"threads": n, **limit} for n in (1, 2)],
        "cases": cases,
        "cliffs": [
            {
                "n_in": 3072,
                "n_out": 768,
                "sparsity": 0.9,
                "threads": 1,
                "batches": [1, 2],
                "median_us": [20.0, 22.0],
                "found": ["batch 3 takes 2.00 times as long as 4"],
            }
        ],
    }
    content = {
        "format": 1,
        "benchmark": "cpu",
        "started": "2026-01-02T03:04:05+00:00",
        "machine": {
            "cpu": "Some CPU",
            "cores": 2,
            "system": "Linux",
            "caches": {"L1": 32768},
            "load": 0.1,
        },
        "settings": {"quick": False},
        "processes": [process],
        "seconds": 9.0,
    }
    return Results(content)


def test_results_are_read_as_they_were_written(tmp_path):
    save_results(tmp_path / "cpu.json", made_results())
    assert load_results(tmp_path / "cpu.json") == made_results()


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1}'])
def test_another_file_is_no_result(tmp_path, text):
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(FileFormatError, match="run srigl bench cpu"):
        load_results(tmp_path / "cpu.json")


def test_ratios_are_to_the_best_of_each_family_and_fewer_neurons_are_not_dense():
    row = Row(made_case(20.0, 120.0, 90.0))
    assert row.best("dense") == ("fast dense", 120.0)
    assert row.ratio("dense") == pytest.approx(6.0)
    assert row.ratio("csr") == pytest.approx(4.5)
    assert row.ratio("gather") is None
    assert row.ratio("dense", "nobody") is None
    assert row.fraction == pytest.approx(0.6)


def test_the_page_shows_every_case_and_says_where_ours_loses():
    text = page(made_results(), "cpu.png")
    for words in (
        "| 3072→768, k = 307 | 90% | 1 | hot | 20.0 (18.0 to 22.0) | 120 fast dense | 6.00x |",
        "| 3072→768, k = 307 | 90% | 1 | cold |",
        "| 3072→768, k = 31 | 99% | 1 | hot | 10.0 (9.00 to 11.0) | 110 fast dense | 11.00x "
        "| 9.00 a csr | 0.90x |",
        "learned: srigl-90 fc2, 18 ablated",
        "## Backward, 1 thread",
        "## Mask update, 2 threads",
        "`pip install torch`",
        "5.00 µs",
        "batch 3 takes 2.00 times as long as 4",
        "![Times and ratios of the layer 3072→768](cpu.png)",
    ):
        assert words in text, words
    widths = [{line.count("|") for line in part.splitlines()} for part in tables(text)]
    assert all(len(width) == 1 for width in widths)


def tables(text):
    return [part for part in text.split("\n\n") if part.startswith("|")]


def test_page_and_picture_are_made_from_the_json_alone(tmp_path):
    save_results(tmp_path / "cpu.json", made_results())
    result = CliRunner().invoke(app, ["bench", "report", str(tmp_path / "cpu.json")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "cpu.md").read_text() == page(made_results(), "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_few_cases_has_no_holes(tmp_path):
    results = made_results()
    results.processes[0]["cases"][:] = results.processes[0]["cases"][:1]
    results.processes[0]["cliffs"][:] = []
    write_report(results, tmp_path)
    assert "Not measured." in (tmp_path / "cpu.md").read_text()


def test_goals_are_met_missed_or_not_measured():
    found = {(verdict.name, verdict.asked): verdict for verdict in verdicts(made_results())}
    dense = found["90%, batch 1", "5.5 times the best dense"]
    assert (dense.reached, dense.met) == ("6.00 (fast dense)", True)
    assert found["90%, batch 1", "4.8 times the best CSR"].met is False
    assert found["99%, batch 1", "2.4 times the best CSR"].met is False
    assert found["80%, batch 1", "3.2 times the best dense"].met is None
    assert found["mask update, two threads", "under 10 ms"].met is True
    assert found["90%, batch 1, bfloat16 values", "7.5 times the best dense"].met is None
    (cliffs,) = [verdict for verdict in found.values() if verdict.name.startswith("no cliffs")]
    assert cliffs.met is False


def test_goals_are_printed_row_by_row(tmp_path):
    save_results(tmp_path / "cpu.json", made_results())
    result = CliRunner().invoke(app, ["bench", "goals", str(tmp_path / "cpu.json")])
    assert result.exit_code == 0, result.output
    assert "6.00 (fast dense)" in result.output
    assert "not measured" in result.output


# The README


PAGE = f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n"


def test_the_readme_gets_the_figures_between_its_markers_and_keeps_the_rest(tmp_path):
    save_results(tmp_path / "cpu.json", made_results())
    (tmp_path / "README.md").write_text(PAGE)
    arguments = ["bench", "readme", str(tmp_path / "cpu.json"), str(tmp_path / "README.md")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n| layer |")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "stale" not in text
    assert "| 3072→768 | 90% | 1 | 20.0 | 6.0x | 4.5x | 15.0 | 4.0x | 3.3x |" in text
    assert "| 768→768, learned mask | 90% | 1 | 7.0 |" in text
    assert "rows measured, 0 are slower than the best dense and 1 slower than the best CSR" in text
    assert readme.replaced(text, made_results()) == text


@pytest.mark.parametrize("page", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}", PAGE + PAGE])
def test_a_page_without_one_pair_of_markers_is_refused(page):
    with pytest.raises(FileFormatError, match="must have one"):
        readme.replaced(page, made_results())


def test_the_readmes_figures_are_those_of_the_committed_result():
    text = (ROOT / "README.md").read_text()
    if COMMITTED.exists():
        assert readme.replaced(text, load_results(COMMITTED)) == text
    else:
        assert readme.BEGIN not in text


def test_the_committed_page_is_made_of_the_committed_result():
    written = COMMITTED.with_suffix(".md")
    assert written.exists() == COMMITTED.exists()
    if COMMITTED.exists():
        assert written.read_text() == page(load_results(COMMITTED), "cpu.png")


# The command


def test_a_run_writes_json_page_and_picture(tmp_path):
    command = [sys.executable, "-m", "srigl_core.cli", "bench", "cpu", "--out", "out"]
    command += ["--quick", "--threads", "1", "--only", "16-16", "--seconds", "0"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[1/1] forward 16-16" in done.stdout
    results = load_results(tmp_path / "out" / "cpu.json")
    (row,) = results.rows
    assert row.ours > 0
    assert row.ratio("dense") > 0
    assert row.ratio("csr") > 0
    assert results.native["environment"]["NUMBA_NUM_THREADS"] == "1"
    for name, found in row.contenders.items():
        lower, upper = row.spread(name)
        assert lower <= found["median_us"] <= upper
        assert found["rounds"] >= 3
    assert (tmp_path / "out" / "cpu.md").read_text() == page(results, "cpu.png")
    assert (tmp_path / "out" / "cpu.png").exists()
    assert str(Path.home()) not in (tmp_path / "out" / "cpu.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "two"], "threads='two' is no list of numbers"),
        (["--threads", "100000"], "threads=100000 is out of range"),
        (["--only", "nothing"], "leaves no case to measure"),
        (["--masks", "nowhere"], "holds no float32 layer"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, tmp_path):
    out = ["--quick", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["bench", "cpu", *out, *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_without_its_extra_the_benchmark_prints_the_install_line(tmp_path):
    for package in ("matplotlib", "threadpoolctl"):
        code = (
            f"import sys; sys.modules[{package!r}] = None\n"
            f"sys.argv = ['srigl', 'bench', 'cpu', '--out', {str(tmp_path / 'out')!r}]\n"
            "from srigl_core.cli import main\nmain()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1
        assert 'pip install "srigl-core[bench]"' in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_cliffs_alone_are_looked_for_on_demand(tmp_path, monkeypatch):
    from srigl_core.benchmarks import cpu

    process = made_results().content["processes"][0] | {"cases": []}
    asked = []

    def measured(settings):
        asked.append(settings)
        return process

    monkeypatch.setattr(cpu, "_measured", measured)
    result = CliRunner().invoke(app, ["bench", "cpu", "--cliffs", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "threads 1: batch 3 takes 2.00 times as long as 4\n" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-cliffs.json"]
    (settings,) = asked
    assert settings.cliffs
    assert cpu.chosen(settings) == []


def test_a_process_that_fails_is_an_error_and_writes_nothing(tmp_path, monkeypatch):
    from srigl_core.benchmarks import cpu

    failed = SimpleNamespace(run=lambda *args, **kwargs: SimpleNamespace(returncode=3))
    monkeypatch.setattr(cpu, "subprocess", failed)
    with pytest.raises(SriglError, match="ended with code 3"):
        cpu.run_cpu(cpu.Settings(quick=True, threads=(1,), cliffs=False), tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_in_a_result_have_four_digits():
    from srigl_core.benchmarks.measure import _rounded

    for number in (123456.0, 0.0012345, 3.0):
        assert _rounded(number) == pytest.approx(number, rel=5e-4)
        assert len(json.dumps(_rounded(number))) <= 9


GUEST = """
import numpy as np
from srigl_core.testing import KernelCapabilities, declare

def kernel(x, values, indices):
    return np.stack([x[:, i] @ v for v, i in zip(values, indices)], axis=1)

def wrong(x, values, indices):
    return kernel(x, values, indices) * 2

@declare(capabilities=KernelCapabilities(value_dtypes={"float16"}))
def narrow(x, values, indices):
    return kernel(x, values, indices)
"""


def bench_guest(tmp_path, monkeypatch, name):
    (tmp_path / "guests.py").write_text(GUEST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    few = ["--quick", "--seconds", "0", "--only", "99%", "--only", "batch=1"]
    return CliRunner().invoke(app, ["bench", f"guests:{name}", *few, "--out", "out"])


def test_a_kernel_of_somebody_elses_stands_beside_ours(tmp_path, monkeypatch):
    result = bench_guest(tmp_path, monkeypatch, "kernel")
    assert result.exit_code == 0, result.output
    (row,) = load_results(tmp_path / "out" / "kernel.json").rows
    assert row.operation == "forward"
    assert row.contenders["kernel"]["family"] == "guest"
    assert row.ours is not None
    page = (tmp_path / "out" / "kernel.md").read_text()
    assert "kernel, µs | vs ours |" in page
    assert f"{row.ours / row.time('kernel'):.2f}x |" in page
    assert "kernel, us" in result.output


def test_a_wrong_kernel_is_not_measured(tmp_path, monkeypatch, capfd):
    result = bench_guest(tmp_path, monkeypatch, "wrong")
    assert result.exit_code == 1
    assert "wrong" in capfd.readouterr().err
    assert not (tmp_path / "out" / "kernel.json").exists()


def test_of_a_kernel_that_no_case_fits_nothing_is_measured(tmp_path, monkeypatch):
    result = bench_guest(tmp_path, monkeypatch, "narrow")
    assert result.exit_code == 1
    assert "no case" in result.output
    assert "condensed_matmul of float16" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
