"""The report: a dictionary of the computed numbers, which tables, plots and page show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from digits import load_digits
from experiment import Cell, Experiment
from latency import CSR, DENSE
from network import CondensedMlp, Mlp, cpu_backends, layer_shapes
from training import METHODS, RunSpec, make_trainer

from srigl_core import SparseTrainer, TrainingConfig
from srigl_core._machine import machine_facts, package_versions

Report = dict[str, Any]

EXPECTATIONS = (
    (
        "SRigL at 90% is within 1 point and 1 standard error of dense",
        ("srigl", 0.9),
        ("dense", 0.0),
        1.0,
    ),
    (
        "SRigL at 99% is within 1 standard error of SRigL without ablation, or better",
        ("srigl", 0.99),
        ("srigl-no-ablation", 0.99),
        0.0,
    ),
)
"""What the paper lets one expect: two cells, and by how many points the first may be worse."""


def training_report(experiment: Experiment, cells: Sequence[Cell]) -> Report:
    """Return the report after training, ready for JSON; networks and latencies are still empty."""
    data = load_digits()
    return {
        "machine": machine_facts(),
        "versions": package_versions(),
        "settings": {
            **asdict(experiment.recipe),
            "seeds": list(experiment.seeds),
            "workers": experiment.workers,
            "train_images": data.train_y.size,
            "test_images": data.test_y.size,
        },
        "budgets": [_budgets(experiment, sparsity) for sparsity in experiment.sparsities],
        "training": [_cell_entry(cell) for cell in cells],
        "remarks": _remarks(cells),
        "checks": checks(cells),
        "networks": [],
        "latency": [],
    }


def _budgets(experiment: Experiment, sparsity: float) -> Report:
    """Return ERK's number of weights for each layer, and the number that all methods share."""
    shapes = layer_shapes(experiment.recipe.widths)
    n_steps = 2  # any number: budgets do not depend on it
    erk = SparseTrainer(
        shapes, sparsity=sparsity, schedule=n_steps, config=TrainingConfig(method="static")
    ).nnz
    shared = make_trainer(RunSpec("static", sparsity, 0, experiment.recipe), n_steps).nnz
    layers = [
        {"layer": name, "shape": shape, "erk": erk[name], "shared": shared[name]}
        for name, shape in shapes.items()
    ]
    return {"sparsity": sparsity, "layers": layers}


def _cell_entry(cell: Cell) -> Report:
    method = METHODS[cell.method]
    return {
        "method": cell.method,
        "label": method.label,
        "sparsity": cell.sparsity,
        "accuracies": cell.accuracies,
        "accuracy": cell.accuracy,
        "standard_error": cell.standard_error,
        "weights": [sum(run.nnz.values()) for run in cell.runs],
        "weights_per_layer": _means(run.nnz for run in cell.runs),
        "active_neurons": _means(run.n_active for run in cell.runs),
        "form": method.form,
        "memory_bytes": statistics.fmean(run.memory for run in cell.runs),
        "mask_updates": cell.runs[0].n_updates,
        "itop_rate": statistics.fmean(run.itop for run in cell.runs),
        "seconds_per_run": statistics.fmean(run.seconds for run in cell.runs),
    }


def _means(counts: Iterable[Mapping[str, int]]) -> dict[str, float]:
    rows = list(counts)
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _remarks(cells: Sequence[Cell]) -> list[str]:
    """Say where SRigL with and without ablation are alike, and where their sizes differ."""
    by_key = {(cell.method, cell.sparsity): cell for cell in cells}
    remarks = []
    for cell in cells:
        other = by_key.get(("srigl-no-ablation", cell.sparsity))
        if cell.method != "srigl" or other is None:
            continue
        least = min(sum(run.nnz.values()) for run in cell.runs)
        most = max(sum(run.nnz.values()) for run in other.runs)
        if [run.n_active for run in cell.runs] == [run.n_active for run in other.runs]:
            remarks.append(
                f"At {cell.sparsity:.0%} sparsity no neuron is ablated at the end, so SRigL with "
                f"and without ablation are alike."
            )
        elif least < most:
            remarks.append(
                f"At {cell.sparsity:.0%} sparsity SRigL has up to {1 - least / most:.1%} fewer "
                f"weights than the others: where neurons are ablated, the budget is again rounded "
                f"down to whole rows."
            )
    return remarks


def checks(cells: Sequence[Cell]) -> list[Report]:
    """Compare the accuracies with those of `EXPECTATIONS` that these cells can decide.

    Accuracies are in percentage points, and the standard error is that of the difference.
    """
    by_key = {(cell.method, cell.sparsity): cell for cell in cells}
    decided = []
    for statement, first_key, second_key, points in EXPECTATIONS:
        if first_key in by_key and second_key in by_key:
            first, second = by_key[first_key], by_key[second_key]
            error = 100 * math.hypot(first.standard_error, second.standard_error)
            difference = 100 * (first.accuracy - second.accuracy)
            decided.append(
                {
                    "statement": statement,
                    "difference": difference,
                    "standard_error": error,
                    "allowed": -(points + error),
                    "holds": difference >= -(points + error),
                }
            )
    return decided


def network_entry(cell: Cell, path: Path, network: CondensedMlp, masked: Mlp) -> Report:
    """Describe a network as loaded from `path`, and compare it with the masked dense one."""
    return {
        "sparsity": cell.sparsity,
        "seed": cell.runs[0].spec.seed,
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "layers": [
            {
                "layer": name,
                "shape": weight.shape,
                "fan_in": weight.fan_in,
                "active_neurons": weight.n_active,
            }
            for name, weight in network.weights.items()
        ],
        "bytes": {form: network.nbytes(form) for form in ("dense", "csr", "condensed")},
        "backends": agreements(network, masked),
    }


def agreements(condensed: CondensedMlp, masked: Mlp) -> list[Report]:
    """Compare the predictions of every backend with those of the masked dense network."""
    data = load_digits()
    expected = masked.forward(data.test_x)[-1]
    entries = []
    for backend in cpu_backends():
        logits = condensed.on(backend)(data.test_x)
        predicted = np.argmax(logits, axis=1)
        n_same = int(np.count_nonzero(predicted == np.argmax(expected, axis=1)))
        entries.append(
            {
                "backend": backend.name,
                "accuracy": float(np.mean(predicted == data.test_y)),
                "n_same": n_same,
                "n_images": data.test_y.size,
                "largest_difference": float(np.abs(logits - expected).max()),
                "agrees": n_same == data.test_y.size,
            }
        )
    return entries


def latency_entries(
    sparsity: float, what: str, batch: int, samples: Mapping[str, Sequence[float]]
) -> list[Report]:
    """Return median and quartiles of each contender, and the ratios to both baselines."""
    quartiles = {
        name: statistics.quantiles(seconds, n=4, method="inclusive")
        for name, seconds in samples.items()
    }
    return [
        {
            "sparsity": sparsity,
            "what": what,
            "batch": batch,
            "contender": name,
            "median_us": 1e6 * median,
            "quartiles_us": [1e6 * lower, 1e6 * upper],
            "samples": len(samples[name]),
            "threads": 1,
            "times_faster_than_dense": quartiles[DENSE][1] / median,
            "times_faster_than_csr": quartiles[CSR][1] / median,
        }
        for name, (lower, median, upper) in quartiles.items()
    ]
