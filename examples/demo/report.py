"""The report: a dictionary of the computed numbers, which tables, pictures and page show."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latency import CSR, DENSE, OURS
from network import CondensedMlp, cpu_backends

from srigl_core import SparseTrainer, TrainingConfig
from srigl_core._machine import machine_facts, package_versions
from srigl_core.benchmarks.reproduce.comparison import CLAIMS, Cell, difference, verdict
from srigl_core.benchmarks.reproduce.datasets import DATASETS, N_PIXELS, Dataset, load_dataset
from srigl_core.benchmarks.reproduce.grid import DENSE_CELL, grid
from srigl_core.benchmarks.reproduce.mlp import Mlp, layer_shapes
from srigl_core.benchmarks.reproduce.settings import METHODS, WIDTHS, RunSpec
from srigl_core.benchmarks.reproduce.training import Kept, mlp_trainer

Report = dict[str, Any]
Cells = Mapping[tuple[str, float], Cell]

DATA = "digits-noise"
OTHERS = ("dense", "static", "rigl", "srigl-no-ablation")
"""The methods that SRigL is compared with."""


@dataclass(frozen=True)
class Experiment:
    """Methods and sparsities of the demo, each trained with every fold and seed."""

    methods: tuple[str, ...] = ("static", "rigl", "srigl-no-ablation", "srigl")
    sparsities: tuple[float, ...] = (0.9, 0.98, 0.99)
    seeds: tuple[int, ...] = (0, 1, 2)
    changes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of_size(cls, seed: int, *, full: bool) -> Experiment:
        """Return the demo's, from `seed` on; if full, with more methods and seeds."""
        if not full:
            return cls(seeds=tuple(range(seed, seed + 3)))
        methods = tuple(method for method in METHODS if method != "dense")
        return cls(methods, seeds=tuple(range(seed, seed + 6)))

    def runs(self) -> list[RunSpec]:
        """Return all runs."""
        cells = [DENSE_CELL, *((m, s) for s in self.sparsities for m in self.methods)]
        folds = range(DATASETS[DATA].n_folds)
        repeats = [(fold, seed) for seed in self.seeds for fold in folds]
        return grid(DATA, "mlp", cells, repeats, **dict(self.changes))

    def kept(self) -> list[RunSpec]:
        """Return the runs whose networks are deployed: SRigL's first, at each sparsity."""
        first = (0, self.seeds[0])
        return [run for run in self.runs() if (run.method, run.fold, run.seed) == ("srigl", *first)]


def training_report(experiment: Experiment, cells: Cells, kept: Mapping[float, Kept]) -> Report:
    """Return the report after training, ready for JSON; networks and latencies are still empty."""
    data = load_dataset(DATA, 0)
    verdicts = [verdict(claim, s, cells) for s in experiment.sparsities for claim in CLAIMS]
    return {
        "machine": machine_facts(),
        "versions": package_versions("scikit-learn", "joblib"),
        "settings": {
            **asdict(experiment.runs()[0].recipe),
            "widths": WIDTHS[DATA],
            "folds": DATASETS[DATA].n_folds,
            "seeds": list(experiment.seeds),
            "train_examples": data.train_y.size,
            "test_examples": data.test_y.size,
        },
        "budgets": [_budgets(experiment, sparsity) for sparsity in experiment.sparsities],
        "training": [_cell_entry(cell) for cell in cells.values()],
        "differences": _differences(experiment, cells),
        "verdicts": [
            {
                "text": str(each),
                "claim": each.claim.text,
                "sparsity": each.sparsity,
                "outcome": each.outcome,
                **each.difference._asdict(),
            }
            for each in verdicts
            if each is not None
        ],
        "first_layer": [
            {
                "sparsity": sparsity,
                "shares_on_pixels": _shares_on_pixels(network),
                "before": network.input_counts[0].tolist(),
                "after": network.input_counts[-1].tolist(),
            }
            for sparsity, network in kept.items()
        ],
        "networks": [],
        "latency": [],
    }


def _budgets(experiment: Experiment, sparsity: float) -> Report:
    """Return ERK's number of weights for each layer, and the number that all methods share."""
    shapes = layer_shapes(WIDTHS[DATA])
    n_steps = 1000  # any number: budgets do not depend on it
    config = TrainingConfig(method="static")
    erk = SparseTrainer(shapes, sparsity=sparsity, schedule=n_steps, config=config).nnz
    run = next(run for run in experiment.kept() if run.sparsity == sparsity)
    shared = mlp_trainer(run, n_steps).nnz
    layers = [
        {"layer": name, "shape": shape, "erk": erk[name], "shared": shared[name]}
        for name, shape in shapes.items()
    ]
    return {"sparsity": sparsity, "layers": layers}


def _cell_entry(cell: Cell) -> Report:
    runs = cell.runs
    return {
        "method": cell.method,
        "label": METHODS[cell.method].label,
        "sparsity": cell.sparsity,
        "accuracies": [run.accuracy for run in runs],
        "accuracy": cell.accuracy,
        "standard_error": cell.error,
        "weights": [sum(run.nnz.values()) for run in runs],
        "active_neurons": _means(run.n_active for run in runs),
        "mask_updates": runs[0].n_updates,
        "itop_rate": statistics.fmean(run.itop for run in runs),
        "seconds_per_run": statistics.fmean(run.seconds for run in runs),
    }


def _means(counts: Iterable[Mapping[str, int]]) -> dict[str, float]:
    rows = list(counts)
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _differences(experiment: Experiment, cells: Cells) -> list[Report]:
    """Return SRigL's paired differences from the other methods, in percentage points."""
    entries = []
    for sparsity in experiment.sparsities:
        for other in OTHERS:
            second = cells.get((other, 0.0 if other == "dense" else sparsity))
            found = difference(cells["srigl", sparsity], second) if second else None
            if found:
                entries.append({"sparsity": sparsity, "other": other, **found._asdict()})
    return entries


def _shares_on_pixels(network: Kept) -> list[float]:
    """Return the share of the first layer's connections that are on pixels, after each update."""
    counts = network.input_counts
    return (counts[:, :N_PIXELS].sum(axis=1) / counts.sum(axis=1)).tolist()


def network_entry(sparsity: float, path: Path, network: CondensedMlp, masked: Mlp) -> Report:
    """Describe a network as loaded from `path`, and compare it with the masked dense one."""
    return {
        "sparsity": sparsity,
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
        "backends": agreements(network, masked, load_dataset(DATA, 0)),
    }


def agreements(condensed: CondensedMlp, masked: Mlp, data: Dataset) -> list[Report]:
    """Compare the predictions of every backend with those of the masked dense network."""
    expected = masked.forward(data.test_x)[-1]
    entries = []
    for backend in cpu_backends():
        logits = condensed.on(backend)(data.test_x)
        predicted = np.argmax(logits, axis=1)
        n_same = int(np.count_nonzero(predicted == np.argmax(expected, axis=1)))
        entries.append(
            {
                "backend": backend.name,
                "accuracy": 100 * float(np.mean(predicted == data.test_y)),
                "n_same": n_same,
                "n_examples": data.test_y.size,
                "largest_difference": float(np.abs(logits - expected).max()),
                "agrees": n_same == data.test_y.size,
            }
        )
    return entries


def latency_entry(sparsity: float, batch: int, samples: Mapping[str, Sequence[float]]) -> Report:
    """Return median and quartiles of each contender, and srigl's ratios to both baselines."""
    quartiles = {
        name: statistics.quantiles(seconds, n=4, method="inclusive")
        for name, seconds in samples.items()
    }
    medians = {name: median for name, (_, median, _) in quartiles.items()}
    return {
        "sparsity": sparsity,
        "batch": batch,
        "median_us": {name: 1e6 * median for name, median in medians.items()},
        "quartiles_us": {
            name: [1e6 * lower, 1e6 * upper] for name, (lower, _, upper) in quartiles.items()
        },
        "times_faster_than_dense": medians[DENSE] / medians[OURS],
        "times_faster_than_csr": medians[CSR] / medians[OURS],
    }
