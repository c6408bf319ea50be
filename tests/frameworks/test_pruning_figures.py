"""The accuracy after pruning: each method is tested, and the guide shows the recorded runs."""

import json
from pathlib import Path

import pytest

for package in ("torch", "joblib", "sklearn"):
    pytest.importorskip(package)

from srigl_core.benchmarks import pruning  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "pruning.json").read_text())


def test_a_dense_network_is_pruned_by_each_method_at_each_sparsity():
    run = next(run for run in pruning.runs() if run.method == "dense")
    found = pruning.accuracies(run.changed(epochs=2))
    accuracy = {(entry["method"], entry["sparsity"]): entry["accuracy"] for entry in found}
    assert len(accuracy) == len(found) == 1 + 2 * len(pruning.SPARSITIES)
    assert accuracy["dense", 0.0] > 0.5
    assert accuracy["wanda", 0.8] > accuracy["wanda", 0.99]


def test_the_guide_shows_the_recorded_runs():
    assert len(RESULTS["networks"]) == sum(
        1 + 2 * len(pruning.SPARSITIES) * (run.method == "dense") for run in pruning.runs()
    )
    assert pruning.accuracy_table(RESULTS) in (ROOT / "docs" / "guides" / "prune.md").read_text()
