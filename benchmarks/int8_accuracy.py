"""What int8 costs in accuracy: of trained networks, and of one product.

``python -m srigl_core.benchmarks.int8_accuracy OUT.json``; it takes about ten minutes on two cores.
Networks of `srigl_core.benchmarks.reproduce` are trained with SRigL. Each is tested in float32,
with int8 weights, with int8 weights and inputs, and as a dense network that PyTorch quantises.
Products of one layer are compared with float64, beside those of the dense int8 libraries that are
installed. Needs PyTorch and the extra ``reproduce``.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from srigl_core._machine import cpu_name, package_versions
from srigl_core.benchmarks.arrays import Arrays
from srigl_core.benchmarks.cases import HEADLINE, Case, Layer
from srigl_core.benchmarks.contenders import load_contenders
from srigl_core.benchmarks.problems import Problem
from srigl_core.benchmarks.reproduce.datasets import Dataset, load_dataset
from srigl_core.benchmarks.reproduce.grid import grid
from srigl_core.benchmarks.reproduce.settings import DATA_TITLES, NETWORK_TITLES, RunSpec
from srigl_core.benchmarks.tables import number, table

__all__ = ["FORMS", "SPARSITIES", "accuracies", "errors", "main", "page"]

FORMS = ("float32", "int8 weights", "int8 weights and inputs", "dense int8")
"""The forms of a network. Dense int8 is PyTorch's, of the same masked weights."""

SPARSITIES = (0.9, 0.95, 0.98, 0.99)
FOLDS = 3
BATCH = 64


def runs() -> list[RunSpec]:
    """Return the training runs: networks, sparsities and folds of the reproduction's grid."""
    cells = [
        *(("digits-noise", "mlp", s) for s in SPARSITIES),
        *(("mnist-5k", "mlp", s) for s in SPARSITIES),
        *(("mnist-1d", "mlp", s) for s in SPARSITIES[:-1]),  # as in the grid
        *(("mnist-5k", network, s) for network in ("convnet", "vit") for s in (0.9, 0.98)),
    ]
    repeats = [(fold, 0) for fold in range(FOLDS)]
    return [
        run
        for data, network, sparsity in cells
        for run in grid(data, network, [("srigl", sparsity)], repeats)
    ]


def accuracies(run: RunSpec) -> dict[str, Any]:
    """Train a network, and return the test accuracy of each of its forms.

    Returns
    -------
    dict
        Data, network, sparsity and fold; by form, the accuracy; and the share of predictions that
        are other than those in float32.
    """
    import torch

    from srigl_core.benchmarks.reproduce.torch_networks import one_quick_thread
    from srigl_core.torch.onnx import without_fast_attention

    data = load_dataset(run.data, run.fold)
    model, masks = _trained(run, data)
    x = torch.from_numpy(data.test_x)
    predicted = {}
    # PyTorch's fused attention takes no weights but tensors, and its int8 layers have other ones.
    with one_quick_thread(), without_fast_attention(), torch.inference_mode():
        for form in FORMS:
            predicted[form] = _form(model, masks, form)(x).argmax(1).numpy()
    whole = predicted[FORMS[0]]
    return {
        **{name: getattr(run, name) for name in ("data", "network", "sparsity", "fold")},
        "accuracy": {name: float(np.mean(each == data.test_y)) for name, each in predicted.items()},
        "changed": {name: float(np.mean(each != whole)) for name, each in predicted.items()},
    }


def _trained(run: RunSpec, data: Dataset) -> tuple[Any, Any]:
    """Return a trained PyTorch model in evaluation mode, and its masks as `condense` takes them."""
    from srigl_core.benchmarks.reproduce.torch_networks import mlp_in_torch, train_torch

    if run.network != "mlp":
        return train_torch(run, data)[1:]
    from srigl_core.benchmarks.reproduce.training import train

    kept = train(run, keep=True)[1]
    assert kept is not None
    masks = {str(2 * i): mask for i, mask in enumerate(kept.masks.values())}
    return mlp_in_torch(kept.network), masks


def _form(model: Any, masks: Any, form: str) -> Any:
    """Return a copy of a trained model in one of `FORMS`."""
    import torch

    from srigl_core.torch import condense, quantize

    model = copy.deepcopy(model)
    if form == "dense int8":
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    condense(model, masks)
    if form != "float32":
        quantize(model, inputs="int8" if form == "int8 weights and inputs" else "float")
    return model


def errors() -> dict[str, float]:
    """Return the errors of products in int8 of one layer, each with its own rounding.

    Returns
    -------
    dict of str to float
        By contender: the root of the mean square of the error, as a share of the standard deviation
        of the exact results.
    """
    case = Case("forward", Layer.random(*HEADLINE, 0.9), threads=1, batch=BATCH)
    problem = Problem(case.layer, Arrays())
    batch = problem.batch(BATCH, threads=1)
    weight, bias = (np.asarray(each, np.float64) for each in (problem.dense, problem.bias))
    exact = np.asarray(batch.x, np.float64) @ weight.T + bias
    found = {}
    for contender in load_contenders("cpu")[0]:
        if contender.precision.of_weights and not contender.unfit(case):
            result = np.asarray(contender.bind(problem.at(contender.precision))(batch)())
            found[contender.name] = float(np.sqrt(np.mean((result - exact) ** 2)) / exact.std())
    return found


def page(results: Mapping[str, Any]) -> str:
    """Return the page of a file of results, in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    return f"""\
# Accuracy in int8

Made on {results["started"][:10]} by `python -m srigl_core.benchmarks.int8_accuracy`, on
{results["machine"]["cpu"]}, with {packages}.

## Trained networks

Networks of [the reproduction](reproduce.md), trained with SRigL in float32; that of the demo is the
MLP for digits with noise. The first column has the test accuracy in percent, and the others what
int8 changes, in percentage points: means over {FOLDS} folds of the data. In parentheses is the
share of predictions that are other than those in float32. Nothing was trained further or
calibrated.

*int8 weights* is `srigl_core.torch.quantize(model)`, and *int8 weights and inputs* the same with
`inputs="int8"`. *Dense int8* is PyTorch's dynamic quantisation of the dense network with the same
weights; it leaves convolutions and the projections of attention in float32, and has one scale for
each layer's weights.

{_accuracy_table(results["networks"])}

## One product

The error of one product of {HEADLINE[0]} inputs and {HEADLINE[1]} neurons at 90% sparsity with
{BATCH} rows of normal numbers: the root of its mean square, as a share of the standard deviation of
the exact results.

{table(("product", "error"), [(name, f"{100 * error:.2f}%") for name, error in _sorted(results)])}
"""


def _sorted(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    return sorted(results["errors"].items(), key=lambda item: item[1])


def _accuracy_table(networks: Sequence[Mapping[str, Any]]) -> str:
    cells: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for entry in networks:
        key = (entry["data"], entry["network"], entry["sparsity"])
        cells.setdefault(key, []).append(entry)
    rows = []
    for (data, network, sparsity), entries in cells.items():
        mean = {
            (kind, form): float(np.mean([100 * entry[kind][form] for entry in entries]))
            for kind, form in product(("accuracy", "changed"), FORMS)
        }
        whole = mean["accuracy", FORMS[0]]
        changes = [
            f"{round(mean['accuracy', form] - whole, 2) + 0.0:+.2f} "
            f"({number(mean['changed', form])}%)"
            for form in FORMS[1:]
        ]
        title = f"{DATA_TITLES[data]}, {NETWORK_TITLES[network]}"
        rows.append((title, f"{sparsity:.0%}", f"{whole:.1f}", *changes))
    return table(("data, network", "sparsity", *FORMS), rows)


def main(path: str) -> None:
    """Train, test and compare, and write the results."""
    import joblib

    from srigl_core.benchmarks.reproduce.runs import local_workers

    networks = []
    with local_workers():
        parallel = joblib.Parallel(batch_size=1, return_as="generator")
        for entry in parallel(joblib.delayed(accuracies)(run) for run in runs()):
            networks.append(entry)
            words = (entry["data"], entry["network"], entry["sparsity"], entry["accuracy"])
            print(*words, flush=True)
    results = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name()},
        "packages": package_versions("torch", "onnxruntime", "openvino"),
        "networks": networks,
        "errors": errors(),
    }
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
