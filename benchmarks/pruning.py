"""Pruning in one shot beside SRigL: the accuracy of the demo's network.

``python -m srigl_core.benchmarks.pruning OUT.json``; it takes about a minute on two cores. In each
fold of the data a dense network is trained and pruned by each method, without further training, and
SRigL trains one network at each sparsity. Needs PyTorch and the extra ``reproduce``.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import chain, product
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from srigl_core._machine import cpu_name, package_versions
from srigl_core.benchmarks.reproduce.datasets import DATASETS, load_dataset
from srigl_core.benchmarks.reproduce.grid import DENSE_CELL, grid
from srigl_core.benchmarks.reproduce.runs import local_workers
from srigl_core.benchmarks.reproduce.settings import RunSpec
from srigl_core.benchmarks.reproduce.training import train
from srigl_core.benchmarks.tables import table

__all__ = ["SPARSITIES", "accuracies", "accuracy_table", "main"]

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
_DATA = "digits-noise"
_METHODS = {"srigl": "SRigL", "wanda": "wanda, one shot", "magnitude": "magnitude, one shot"}


def runs() -> list[RunSpec]:
    """Return the training runs: in each fold a dense one, and one of SRigL for each sparsity."""
    cells = [DENSE_CELL, *(("srigl", sparsity) for sparsity in SPARSITIES)]
    return grid(_DATA, "mlp", cells, [(fold, 0) for fold in range(DATASETS[_DATA].n_folds)])


def accuracies(run: RunSpec) -> list[dict[str, Any]]:
    """Train a network; if it is dense, prune it too.

    Returns
    -------
    list of dict
        Fold, method, sparsity and test accuracy: of the network, and of each pruned one.
    """
    result, kept = train(run, keep=True)
    assert kept is not None
    entry = {"fold": run.fold, "method": run.method, "sparsity": run.sparsity}
    found = [{**entry, "accuracy": result.accuracy}]
    if run.method != "dense":
        return found
    import torch

    from srigl_core.benchmarks.reproduce.torch_networks import mlp_in_torch, one_quick_thread
    from srigl_core.torch import prune_to_constant_fan_in
    from srigl_core.torch.pruning import METHODS

    data, dense = load_dataset(run.data, run.fold), mlp_in_torch(kept.network)
    calibration = torch.from_numpy(data.train_x)
    with one_quick_thread():
        for method, sparsity in product(METHODS, SPARSITIES):
            model = copy.deepcopy(dense)
            inputs = calibration if method == "wanda" else None
            prune_to_constant_fan_in(model, sparsity, method=method, calibration=inputs)
            with torch.inference_mode():
                predicted = model(torch.from_numpy(data.test_x)).argmax(1).numpy()
            accuracy = float(np.mean(predicted == data.test_y))
            entry = {"fold": run.fold, "method": method, "sparsity": sparsity}
            found.append({**entry, "accuracy": accuracy})
    return found


def accuracy_table(results: Mapping[str, Any]) -> str:
    """Return the means over folds of a file of results, in percent, as a table in Markdown."""
    cells: dict[tuple[str, float], list[float]] = {}
    for entry in results["networks"]:
        key = (entry["method"], entry["sparsity"])
        cells.setdefault(key, []).append(100 * entry["accuracy"])
    means = {key: float(np.mean(values)) for key, values in cells.items()}
    rows = [
        (f"{sparsity:.0%}", *(f"{means[method, sparsity]:.1f}" for method in _METHODS))
        for sparsity in SPARSITIES
    ]
    dense = [("0%, dense", f"{means[DENSE_CELL]:.1f}", *[""] * (len(_METHODS) - 1))]
    return table(("sparsity", *_METHODS.values()), dense + rows)


def main(path: str) -> None:
    """Train, prune and test, and write the results."""
    with local_workers():
        parallel = joblib.Parallel(batch_size=1)
        found = parallel(joblib.delayed(accuracies)(run) for run in runs())
    networks = list(chain.from_iterable(found))
    results = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name()},
        "packages": package_versions("torch"),
        "networks": networks,
    }
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(accuracy_table(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
