"""The accuracy of networks in int8: each form is tested, and the table is of the recorded runs."""

import json
from pathlib import Path

import pytest

from srigl_core.benchmarks import int8_accuracy

for package in ("mlxtend", "sklearn"):
    pytest.importorskip(package)
torch = pytest.importorskip("torch")

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "int8.json"


@pytest.mark.filterwarnings("ignore")  # what torch.ao says of itself
@pytest.mark.parametrize("case", [("digits-noise", "mlp"), ("mnist-5k", "convnet")], ids="-".join)
def test_a_network_is_tested_in_each_form(case):
    run = next(run for run in int8_accuracy.runs() if (run.data, run.network) == case)
    n_threads = torch.get_num_threads()
    found = int8_accuracy.accuracies(run.changed(epochs=2))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.get_num_threads() == n_threads
    assert set(found["accuracy"]) == set(int8_accuracy.FORMS)
    assert all(accuracy > 0.5 for accuracy in found["accuracy"].values())  # chance is 0.1
    assert found["changed"]["float32"] == 0
    assert any(found["changed"].values())


def test_errors_grow_with_what_is_rounded_and_are_not_above_those_of_pytorch():
    pytest.importorskip("numba")
    found = int8_accuracy.errors()
    weights, both = (found[f"srigl numba, int8 weights{more}"] for more in ("", " and inputs"))
    assert 0 < weights < both
    assert all(both <= error for name, error in found.items() if name.startswith("torch"))


def test_the_table_has_a_row_for_each_network_and_sparsity():
    results = json.loads(RESULTS.read_text())
    cells = {(run.data, run.network, run.sparsity) for run in int8_accuracy.runs()}
    tested = {(each["data"], each["network"], each["sparsity"]) for each in results["networks"]}
    assert tested == cells
    assert int8_accuracy.page(results).count(" MLP |") == 11
