"""The demo in `examples/demo`, in a configuration that takes seconds."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError, list_backends

REASON = 'the demo needs its packages: pip install -e ".[demo]"'
for package in ("rich", "sklearn", "matplotlib"):
    pytest.importorskip(package, reason=REASON)

import run  # noqa: E402
from digits import load_digits  # noqa: E402
from experiment import Cell, Experiment, run_experiment  # noqa: E402
from latency import CSR, DENSE, contenders, interleaved  # noqa: E402
from network import CondensedMlp, Mlp, layer_shapes  # noqa: E402
from report import agreements, checks  # noqa: E402
from rich.console import Console  # noqa: E402
from tables import deployment_sections, training_sections  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402
from training import METHODS, Recipe, RunResult, RunSpec, make_trainer, train  # noqa: E402

DEMO = Path(__file__).parents[2] / "examples" / "demo"
SMALL = Recipe(widths=(64, 40, 32, 10), epochs=4, delta_t=5)


pytestmark = pytest.mark.filterwarnings("ignore:UpdateSchedule.* mask updates:UserWarning")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The report, the folder and the printed text of one small demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=200)
    experiment = Experiment(sparsities=(0.8, 0.9), seeds=(3, 4), recipe=SMALL)
    with threadpool_limits(1):
        report = run.run_demo(experiment, folder, console=console, rounds=3)
    return report, folder, console.file.getvalue()


@pytest.fixture(scope="module")
def trained():
    """One run of each method."""
    return {method: train(spec_of(method)) for method in METHODS}


def spec_of(method, **changes):
    sparsity = 0.0 if method == "dense" else 0.9
    return replace(RunSpec(method, sparsity, 0, SMALL, keep_network=True), **changes)


def test_the_split_is_fixed_stratified_and_standardised():
    digits, again = load_digits(), load_digits.__wrapped__()
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

    def loss_at(array, place, value):
        before, array[place] = array[place], value
        logits = network.forward(x)[-1]
        array[place] = before
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(7), labels])

    gradients = network.gradients(x, labels)
    for arrays, slopes in (
        (network.weights, gradients.weights),
        (network.biases, gradients.biases),
    ):
        for name, array in arrays.items():
            place = tuple(rng.integers(0, length) for length in array.shape)
            above, below = (loss_at(array, place, array[place] + step) for step in (1e-6, -1e-6))
            assert slopes[name][place] == pytest.approx((above - below) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("method", ["rigl", "srigl"])
def test_the_same_seed_gives_the_same_network(trained, method):
    first, second = trained[method], train(spec_of(method))
    other = train(spec_of(method, seed=1))
    assert first.accuracy == second.accuracy
    for name, weight in first.network.weights.items():
        np.testing.assert_array_equal(weight, second.network.weights[name])
        assert not np.array_equal(weight, other.network.weights[name])


@pytest.mark.parametrize("method", METHODS)
def test_inactive_weights_stay_zero_and_masks_are_updated(trained, method):
    result = trained[method]
    for name, mask in result.masks.items():
        assert not result.network.weights[name][~mask].any()
        assert result.nnz[name] == np.count_nonzero(mask)
    fixed = method in ("dense", "static")
    # 4 epochs of 42 steps; due at 5, 10, ... 125, below 126, three quarters of them.
    assert result.n_updates == (0 if method == "dense" else 25)
    density = sum(result.nnz.values()) / sum(mask.size for mask in result.masks.values())
    assert (result.itop > density) != fixed
    assert result.accuracy > 0.5


def test_sparse_methods_share_a_budget_and_only_ablation_may_end_below_it(trained):
    budget = make_trainer(spec_of("static"), 100).nnz
    assert budget["hidden1"] % 40 == 0
    for method, result in trained.items():
        if method == "dense":
            assert sum(result.nnz.values()) == 64 * 40 + 40 * 32 + 32 * 10
        else:
            assert make_trainer(spec_of(method), 100).nnz == budget
            assert all(result.nnz[name] <= budget[name] for name in budget)
            assert result.nnz == budget or method == "srigl"


def test_the_network_survives_saving_and_every_backend_agrees(trained, tmp_path):
    result = trained["srigl"]
    saved = CondensedMlp.from_masked(result.network, result.masks)
    saved.save(tmp_path / "network.safetensors")
    loaded = CondensedMlp.load(tmp_path / "network.safetensors", list(saved.weights))
    assert loaded.weights == saved.weights
    entries = agreements(loaded, result.network)
    assert {entry["backend"] for entry in entries} == {
        status.name
        for status in list_backends()
        if status.available and status.capabilities.device == "cpu"
    }
    for entry in entries:
        assert entry["agrees"]
        assert entry["accuracy"] == result.accuracy
    wrong = Mlp(result.network.weights, {n: -b for n, b in result.network.biases.items()})
    assert not any(entry["agrees"] for entry in agreements(loaded, wrong))


@pytest.mark.parametrize("batch", [1, 5])
def test_every_contender_computes_the_same(batch):
    rng = np.random.default_rng(0)
    weights = {
        "hidden1": CondensedWeight.random((9, 64), fan_in=5, n_active=7, rng=rng),
        "output": CondensedWeight.random((4, 9), fan_in=3, rng=rng),
    }
    biases = {n: rng.standard_normal(w.shape[0], np.float32) for n, w in weights.items()}
    network, x = CondensedMlp(weights, biases), load_digits().test_x[:batch]
    expected = network.to_masked().forward(x)[-1]
    calls = contenders(network, x)
    assert {DENSE, CSR} < set(calls)
    for name, call in calls.items():
        result = call().T if name == CSR else call()
        np.testing.assert_allclose(
            np.reshape(result, expected.shape), expected, rtol=1e-4, atol=1e-5
        )


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleaved(calls, rounds=4)
    runs = re.sub(r"(.)\1*", r"\1", "".join(order))
    assert runs.endswith("abcbcacababc")
    assert all(len(seconds) == 4 for seconds in samples.values())


def cell_of(method, sparsity, accuracies):
    runs = [
        RunResult(RunSpec(method, sparsity, i, SMALL), a, {}, {}, 0, 0, 0.0, 0.0)
        for i, a in enumerate(accuracies)
    ]
    return Cell(method, sparsity, runs)


def test_checks_compare_with_the_standard_error_of_the_difference():
    dense = cell_of("dense", 0.0, [0.98, 0.96])
    assert dense.standard_error == pytest.approx(0.01)
    near, far = cell_of("srigl", 0.9, [0.948, 0.948]), cell_of("srigl", 0.9, [0.952, 0.952])
    (fails,), (holds,) = checks([dense, near]), checks([dense, far])
    assert fails["allowed"] == holds["allowed"] == pytest.approx(-2.0)
    assert holds["difference"] == pytest.approx(-1.8)
    assert (fails["holds"], holds["holds"]) == (False, True)
    with_ablation = cell_of("srigl", 0.99, [0.90, 0.94])
    without = cell_of("srigl-no-ablation", 0.99, [0.93, 0.97])
    (check,) = checks([with_ablation, without])
    assert check["standard_error"] == pytest.approx(2 * 2**0.5)
    assert check["difference"] == pytest.approx(-3)
    assert not check["holds"]


def test_an_error_in_a_worker_reaches_the_caller_as_it_is():
    experiment = Experiment(("srigl",), (0.99,), seeds=(0, 1), recipe=SMALL, workers=1)
    with pytest.raises(SriglError, match="layer 'hidden1'"):
        list(run_experiment(experiment))


def test_full_adds_set_and_seeds():
    short, full = (Experiment.of_size(7, full=full) for full in (False, True))
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
        error = np.std(entry["accuracies"], ddof=1) / 2**0.5
        assert entry["standard_error"] == pytest.approx(error)
    assert [network["sparsity"] for network in report["networks"]] == [0.8, 0.9]
    assert all(backend["agrees"] for net in report["networks"] for backend in net["backends"])
    for name in ("accuracy.png", "neurons.png", "latency.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_terminal_and_page_show_the_reports_numbers(demo):
    report, folder, text = demo
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)='(?!data:)", page)
    sections = training_sections(report) + deployment_sections(report)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for section in sections:
        for row in section.rows:
            assert " ".join(row) in lines
            cells = "</td><td>".join(row).replace("->", "-&gt;")
            assert f"<tr><td>{cells}</td></tr>" in page
    shown = [cell for section in sections for row in section.rows for cell in row]
    for entry in report["training"]:
        assert f"{100 * entry['accuracy']:.2f} ± {100 * entry['standard_error']:.2f}" in shown
    for budget in report["budgets"]:
        for layer in budget["layers"]:
            assert f"{layer['erk']:,} -> {layer['shared']:,}" in shown
    assert len(report["checks"]) == 1
    for shown_in in (text, page):
        assert report["checks"][0]["statement"] in shown_in


def test_the_numbers_do_not_depend_on_the_number_of_workers(demo):
    experiment = Experiment(("rigl", "srigl"), (0.9,), seeds=(3, 4), recipe=SMALL, workers=1)
    accuracies = {(r.spec.method, r.spec.seed): r.accuracy for r in run_experiment(experiment)}
    for entry in demo[0]["training"]:
        if entry["sparsity"] == 0.9 and entry["method"] in experiment.methods:
            assert entry["accuracies"] == [accuracies[entry["method"], seed] for seed in (3, 4)]


def test_latencies_name_every_contender_and_their_ratios_add_up(demo):
    report, _, text = demo
    by_table = {}
    for entry in report["latency"]:
        key = entry["sparsity"], entry["what"], entry["batch"]
        by_table.setdefault(key, {})[entry["contender"]] = entry
    assert {key[2] for key in by_table} == {1, 256}
    assert {key[1] for key in by_table} == {"whole network", "hidden1, 64 to 40"}
    for entries in by_table.values():
        assert {DENSE, CSR, "reference"} <= set(entries)
        for entry in entries.values():
            ratio = entries[DENSE]["median_us"] / entry["median_us"]
            assert entry["times_faster_than_dense"] == pytest.approx(ratio)
            assert f"{entry['times_faster_than_dense']:.2f}x" in text
            lower, upper = entry["quartiles_us"]
            assert lower <= entry["median_us"] <= upper


def test_the_command_writes_the_report(monkeypatch, tmp_path):
    small = Experiment(("dense", "srigl"), (0.9,), seeds=(0, 1), recipe=SMALL)
    monkeypatch.setattr(Experiment, "of_size", lambda seed, full: small)
    monkeypatch.setattr(run, "BATCHES", (1,))
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "out")])
    run.main()
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_command_fails_where_a_backend_disagrees(monkeypatch, tmp_path):
    networks = [{"backends": [{"backend": "scipy", "agrees": False}]}]
    monkeypatch.setattr(run, "run_demo", lambda *args, **kwargs: {"networks": networks})
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(SystemExit, match=r"differ from the dense network's: scipy"):
        run.main()


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        ("sys.modules['sklearn'] = None", r'sklearn; .* pip install -e "\.\[demo\]"'),
        ("sys.modules['matplotlib'] = None", r'matplotlib; .* pip install -e "\.\[demo\]"'),
        ("sys.argv += ['--out', sys.argv[0]]", "File exists"),
        ("sys.argv += ['--seed', '-1']", "--seed -1 is negative"),
    ],
)
def test_what_the_user_can_fix_is_one_line(prelude, message, tmp_path):
    (tmp_path / "file").write_text("")
    program = (
        f"import runpy, sys; sys.argv = ['file']; {prelude}; "
        f"runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"error: .*{message}", last), done.stderr
    assert "Traceback" not in done.stderr
