"""Small Hugging Face models: each family is trained sparse, saved and loaded in both modes."""

import json
from pathlib import Path

import pytest

from srigl_core.benchmarks import huggingface

pytest.importorskip("torch")
pytest.importorskip("transformers")

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "huggingface.json"


@pytest.mark.filterwarnings("ignore")  # what transformers says of itself
@pytest.mark.parametrize("mode", huggingface.MODES)
@pytest.mark.parametrize("name", huggingface.FAMILIES)
def test_a_family_is_trained_evaluated_saved_and_loaded(name, mode):
    found = huggingface.check(huggingface.FAMILIES[name], mode)
    recorded = json.loads(RESULTS.read_text())["families"][name][mode]
    assert found["sparse"] == recorded["sparse"]
    assert found["left"].keys() == recorded["left"].keys()


def test_the_table_has_a_row_for_each_family():
    page = huggingface.page(json.loads(RESULTS.read_text()))
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["family", *huggingface.FAMILIES]
