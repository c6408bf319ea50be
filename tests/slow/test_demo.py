"""The demonstration, in a configuration of seconds."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from srigl_core import CondensedWeight, SriglError, list_backends
from srigl_core.cli.app import app
from srigl_core.demo.checks import checks
from srigl_core.demo.dataset import load_digits
from srigl_core.demo.deployment import CondensedMlp, agreements
from srigl_core.demo.experiment import Cell, Experiment, run_experiment
from srigl_core.demo.latency import CSR, DENSE, contenders, interleaved
from srigl_core.demo.mlp import Mlp, layer_shapes
from srigl_core.demo.run import run_demo
from srigl_core.demo.training import METHODS, Recipe, RunResult, RunSpec, make_trainer, train

REASON = 'the demonstration needs the extra: pip install "srigl-core[demo]"'
pytest.importorskip("sklearn", reason=REASON)
pytest.importorskip("matplotlib", reason=REASON)

SMALL = Recipe(widths=(64, 40, 32, 10), epochs=4, delta_t=5)
SPARSE = [method for method in METHODS if method != "dense"]


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The report, the folder and the printed text of one small demonstration."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    text = io.StringIO()
    experiment = Experiment(sparsities=(0.8, 0.9), seeds=(3, 4), recipe=SMALL)
    report = run_demo(experiment, folder, console=Console(file=text, width=200), rounds=3)
    return report, folder, text.getvalue()


def spec_of(method, **changes):
    sparsity = 0.0 if method == "dense" else 0.9
    return replace(RunSpec(method, sparsity, 0, SMALL, keep_network=True), **changes)


def test_the_split_is_fixed_stratified_and_standardised(digits):
    again = load_digits()
    np.testing.assert_array_equal(digits.test_x, again.test_x)
    np.testing.assert_array_equal(digits.test_y, again.test_y)
    assert digits.train_y.size + digits.test_y.size == 1797
    shares = np.bincount(digits.test_y) / np.bincount(np.r_[digits.train_y, digits.test_y])
    np.testing.assert_allclose(shares, 0.25, atol=0.01)
    np.testing.assert_allclose(digits.train_x.mean(axis=0), 0, atol=1e-5)
    deviations = digits.train_x.std(axis=0)
    assert np.all(deviations < 1.0001)
    assert np.count_nonzero(deviations > 0.9999) > 40


def test_gradients_are_the_slopes_of_the_loss():
    rng = np.random.default_rng(0)
    shapes = layer_shapes((6, 5, 4))
    network = Mlp(
        {name: rng.standard_normal(shape) for name, shape in shapes.items()},
        {name: rng.standard_normal(shape[0]) for name, shape in shapes.items()},
    )
    x, labels = rng.standard_normal((7, 6)), rng.integers(0, 4, 7)

    def loss():
        logits = network.forward(x)[-1]
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(7), labels])

    found = network.gradients(x, labels)
    for arrays, slopes in ((network.weights, found.weights), (network.biases, found.biases)):
        for name, array in arrays.items():
            place = tuple(rng.integers(0, length) for length in array.shape)
            before, step = array[place], 1e-6
            array[place] = before + step
            above = loss()
            array[place] = before - step
            below = loss()
            array[place] = before
            assert slopes[name][place] == pytest.approx((above - below) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("method", ["rigl", "srigl"])
def test_the_same_seed_gives_the_same_network(digits, method):
    first, second = (train(spec_of(method), digits) for _ in range(2))
    other = train(spec_of(method, seed=1), digits)
    assert first.accuracy == second.accuracy
    for name, weight in first.network.weights.items():
        np.testing.assert_array_equal(weight, second.network.weights[name])
        assert not np.array_equal(weight, other.network.weights[name])


@pytest.mark.parametrize("method", METHODS)
def test_inactive_weights_stay_zero_and_masks_are_updated(digits, method):
    run = train(spec_of(method), digits)
    for name, mask in run.masks.items():
        assert not run.network.weights[name][~mask].any()
        assert run.nnz[name] == np.count_nonzero(mask)
    static = method in ("dense", "static")
    # 4 epochs of 42 steps; due at 5, 10, ... 125, below 126, three quarters of them.
    assert run.n_updates == (0 if method == "dense" else 25)
    assert (run.itop > sum(run.nnz.values()) / sum(m.size for m in run.masks.values())) != static
    assert run.accuracy > 0.5


def test_every_sparse_method_starts_with_the_same_number_of_weights():
    counts = [make_trainer(spec_of(method), 100).nnz for method in SPARSE]
    assert all(count == counts[0] for count in counts)
    assert counts[0]["hidden1"] % 40 == 0
    assert sum(make_trainer(spec_of("dense"), 100).nnz.values()) == 64 * 40 + 40 * 32 + 32 * 10


def test_only_srigl_with_ablation_may_end_with_fewer_weights(digits):
    start = make_trainer(spec_of("static"), 100).nnz
    for method in SPARSE:
        end = train(spec_of(method), digits).nnz
        assert all(end[name] <= start[name] for name in start)
        assert end == start or method == "srigl"


def test_the_network_survives_saving_and_every_backend_agrees(digits, tmp_path):
    run = train(spec_of("srigl"), digits)
    path = tmp_path / "network.safetensors"
    saved = CondensedMlp.from_masked(run.network, run.masks)
    saved.save(path)
    loaded = CondensedMlp.load(path, list(saved.weights))
    assert loaded.weights == saved.weights
    found = agreements(loaded, run.network, digits)
    assert {entry.backend for entry in found} == {
        status.name
        for status in list_backends()
        if status.available and status.capabilities.device == "cpu"
    }
    for entry in found:
        assert entry.agrees
        assert entry.accuracy == run.accuracy


def test_a_disagreeing_network_is_noticed(digits):
    run = train(spec_of("srigl"), digits)
    wrong = Mlp(run.network.weights, {n: -b for n, b in run.network.biases.items()})
    found = agreements(CondensedMlp.from_masked(run.network, run.masks), wrong, digits)
    assert not any(entry.agrees for entry in found)


def test_a_file_without_a_layer_is_refused(digits, tmp_path):
    run = train(spec_of("srigl"), digits)
    network = CondensedMlp.from_masked(run.network, run.masks)
    network.save(tmp_path / "network.safetensors")
    with pytest.raises(SriglError, match="lacks the layer 'hidden9'"):
        CondensedMlp.load(tmp_path / "network.safetensors", ["hidden1", "hidden9"])


@pytest.mark.parametrize("batch", [1, 5])
def test_every_contender_computes_the_same(digits, batch):
    rng = np.random.default_rng(0)
    network = CondensedMlp(
        {
            "hidden1": CondensedWeight.random((9, 64), fan_in=5, n_active=7, rng=rng),
            "output": CondensedWeight.random((4, 9), fan_in=3, rng=rng),
        },
        {
            name: rng.standard_normal(n).astype(np.float32)
            for name, n in (("hidden1", 9), ("output", 4))
        },
    )
    x = digits.test_x[:batch]
    expected = network.to_masked().forward(x)[-1]
    calls = contenders(network, x)
    assert {DENSE, CSR} < set(calls)
    for name, call in calls.items():
        result = call()
        result = result.T if name == CSR else result
        np.testing.assert_allclose(
            np.reshape(result, expected.shape), expected, rtol=1e-4, atol=1e-5
        )


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleaved(calls, rounds=4)
    runs = re.sub(r"(.)\1*", r"\1", "".join(order))
    assert runs.endswith("abcbcacababc")
    assert all(timing.samples == 4 for timing in timings.values())
    assert all(timing.lower <= timing.median <= timing.upper for timing in timings.values())


def cell_of(method, sparsity, accuracies):
    runs = tuple(
        RunResult(RunSpec(method, sparsity, i, SMALL), a, {}, {}, 0, 0, 0.0, 0.0)
        for i, a in enumerate(accuracies)
    )
    return Cell(method, sparsity, runs)


def test_checks_compare_with_the_standard_error_of_the_difference():
    dense = cell_of("dense", 0.0, [0.98, 0.96])
    assert dense.standard_error == pytest.approx(0.01)
    near, far = cell_of("srigl", 0.9, [0.948, 0.948]), cell_of("srigl", 0.9, [0.952, 0.952])
    (fails,), (holds,) = checks([dense, near]), checks([dense, far])
    assert fails.allowed == holds.allowed == pytest.approx(-2.0)
    assert not fails.holds
    assert holds.holds
    assert holds.difference == pytest.approx(-1.8)
    with_ablation = cell_of("srigl", 0.99, [0.90, 0.94])
    without = cell_of("srigl-no-ablation", 0.99, [0.93, 0.97])
    (check,) = checks([with_ablation, without])
    assert check.standard_error == pytest.approx(2 * 2**0.5)
    assert check.difference == pytest.approx(-3)
    assert not check.holds


def test_one_seed_is_refused():
    with pytest.raises(SriglError, match="two at least"):
        Experiment(seeds=(1,))


@pytest.mark.parametrize("methods", [("dense", "rigl"), ("srigl", "magic")])
def test_unknown_methods_and_none_to_deploy_are_refused(methods):
    with pytest.raises(SriglError, match="'srigl' among them"):
        Experiment(methods=methods)


def test_an_error_in_a_worker_reaches_the_caller_as_it_is(digits):
    experiment = Experiment(
        methods=("srigl",), sparsities=(0.99,), seeds=(0, 1), recipe=SMALL, workers=1
    )
    with pytest.raises(SriglError, match="layer 'hidden1'"):
        run_experiment(experiment, digits)


def test_full_adds_set_and_seeds():
    short, full = Experiment.short(7), Experiment.full(7)
    assert short.seeds == (7, 8, 9, 10, 11)
    assert set(full.methods) - set(short.methods) == {"set"}
    assert set(short.seeds) < set(full.seeds)
    assert len(short.runs()) == 5 * (1 + 3 * 4)


def test_the_report_is_complete(demo):
    report, folder, _ = demo
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    cells = [(entry["method"], entry["sparsity"]) for entry in report["training"]]
    assert cells[0] == ("dense", 0.0)
    assert len(set(cells)) == len(cells) == 1 + 2 * 4
    for entry in report["training"]:
        assert entry["accuracy"] == pytest.approx(np.mean(entry["accuracies"]))
        assert entry["standard_error"] == pytest.approx(
            np.std(entry["accuracies"], ddof=1) / 2**0.5
        )
    assert [network["sparsity"] for network in report["networks"]] == [0.8, 0.9]
    assert all(backend["agrees"] for net in report["networks"] for backend in net["backends"])
    for name in ("accuracy.png", "neurons.png", "latency.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_the_reports_numbers(demo):
    report, _, text = demo
    for entry in report["training"]:
        shown = f"{100 * entry['accuracy']:.2f} ± {100 * entry['standard_error']:.2f}"
        assert any(entry["label"] in line and shown in line for line in text.splitlines())
    for budget in report["budgets"]:
        for layer in budget["layers"]:
            assert f"{layer['erk']:,} -> {layer['shared']:,}" in text
    assert len(report["checks"]) == 1
    assert report["checks"][0]["statement"] in text


def test_the_numbers_do_not_depend_on_the_number_of_workers(demo, digits):
    report, _, _ = demo
    experiment = Experiment(
        methods=("rigl", "srigl"), sparsities=(0.9,), seeds=(3, 4), recipe=SMALL, workers=1
    )
    found = {entry["method"]: entry for entry in report["training"] if entry["sparsity"] == 0.9}
    for cell in run_experiment(experiment, digits):
        assert found[cell.method]["accuracies"] == cell.accuracies


def test_latencies_name_every_contender_and_their_ratios_add_up(demo):
    report, _, text = demo
    by_table = {}
    for entry in report["latency"]:
        key = entry["sparsity"], entry["what"], entry["batch"]
        by_table.setdefault(key, {})[entry["contender"]] = entry
    assert {key[2] for key in by_table} == {1, 256}
    assert {key[1] for key in by_table} == {"whole network", "hidden1, 64 to 40"}
    for found in by_table.values():
        assert {DENSE, CSR, "reference"} <= set(found)
        for entry in found.values():
            ratio = found[DENSE]["median_us"] / entry["median_us"]
            assert entry["times_faster_than_dense"] == pytest.approx(ratio)
            assert f"{entry['times_faster_than_dense']:.2f}x" in text


def test_the_page_needs_no_other_file(demo):
    _, folder, _ = demo
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)='(?!data:)", page)


def test_the_command_runs_the_demonstration(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    small = Experiment(methods=("dense", "srigl"), sparsities=(0.9,), seeds=(0, 1), recipe=SMALL)
    monkeypatch.setattr(Experiment, "short", classmethod(lambda cls, seed: small))
    monkeypatch.setattr("srigl_core.demo.run.BATCHES", (1,))
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path):
    from typer.testing import CliRunner

    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert len(result.output.strip().splitlines()) == 1
