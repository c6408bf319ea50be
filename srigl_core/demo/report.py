"""The report: one dictionary of computed numbers, which tables, plots and page only show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from srigl_core import SparseTrainer
from srigl_core._machine import machine_facts, package_versions
from srigl_core.demo.checks import checks
from srigl_core.demo.dataset import Digits
from srigl_core.demo.deployment import Agreement, CondensedMlp
from srigl_core.demo.experiment import Cell, Experiment
from srigl_core.demo.latency import CSR, DENSE, Timing
from srigl_core.demo.mlp import layer_shapes
from srigl_core.demo.training import METHODS, RunSpec, make_trainer

__all__ = ["latency_entries", "network_entry", "training_report"]

Report = dict[str, Any]


def training_report(experiment: Experiment, data: Digits, cells: Sequence[Cell]) -> Report:
    """Return all that is known after training; JSON takes it as it is.

    Parameters
    ----------
    experiment : Experiment
    data : Digits
    cells : sequence of Cell

    Returns
    -------
    dict
    """
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
        "checks": [{**asdict(check), "holds": check.holds} for check in checks(cells)],
        "networks": [],
        "latency": [],
    }


def _budgets(experiment: Experiment, sparsity: float) -> Report:
    """Return the weights ERK gives each layer, and what constant fan-in makes of them for all."""
    recipe = experiment.recipe
    shapes = layer_shapes(recipe.widths)
    n_steps = 2  # of a training that does not happen: budgets do not depend on it
    erk = SparseTrainer(shapes, sparsity=sparsity, schedule=n_steps, method="static").nnz
    shared = make_trainer(RunSpec("static", sparsity, 0, recipe), n_steps).nnz
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
        "weights_per_layer": _by_layer([run.nnz for run in cell.runs]),
        "active_neurons": _by_layer([run.n_active for run in cell.runs]),
        "form": method.form,
        "memory_bytes": statistics.fmean(run.memory for run in cell.runs),
        "mask_updates": cell.runs[0].n_updates,
        "itop_rate": statistics.fmean(run.itop for run in cell.runs),
        "seconds_per_run": statistics.fmean(run.seconds for run in cell.runs),
    }


def _remarks(cells: Sequence[Cell]) -> list[str]:
    """Return what a reader of the table would ask about the two rows of SRigL."""
    found = {(cell.method, cell.sparsity): cell for cell in cells}
    remarks = []
    for cell in cells:
        other = found.get(("srigl-no-ablation", cell.sparsity))
        if cell.method != "srigl" or other is None:
            continue
        at = f"At {cell.sparsity:.0%} sparsity"
        least = min(sum(run.nnz.values()) for run in cell.runs)
        most = max(sum(run.nnz.values()) for run in other.runs)
        if [run.n_active for run in cell.runs] == [run.n_active for run in other.runs]:
            remarks.append(
                f"{at} no neuron is ablated at the end, so SRigL with and without "
                f"ablation are alike."
            )
        elif least < most:
            remarks.append(
                f"{at} SRigL has up to {1 - least / most:.1%} fewer weights than the others: where "
                f"neurons are ablated, the budget is again rounded down to whole rows."
            )
    return remarks


def _by_layer(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    return {name: statistics.fmean(count[name] for count in counts) for name in counts[0]}


def network_entry(
    sparsity: float,
    seed: int,
    file: str,
    file_bytes: int,
    network: CondensedMlp,
    found: Sequence[Agreement],
) -> Report:
    """Return what is known of one network that was saved and loaded."""
    return {
        "sparsity": sparsity,
        "seed": seed,
        "file": file,
        "file_bytes": file_bytes,
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
        "backends": [{**asdict(entry), "agrees": entry.agrees} for entry in found],
    }


def latency_entries(
    sparsity: float, what: str, batch: int, timings: Mapping[str, Timing]
) -> list[Report]:
    """Return the timings of one network and batch size, with ratios to both baselines."""
    return [
        {
            "sparsity": sparsity,
            "what": what,
            "batch": batch,
            "contender": name,
            "median_us": 1e6 * timing.median,
            "quartiles_us": [1e6 * timing.lower, 1e6 * timing.upper],
            "samples": timing.samples,
            "threads": 1,
            "times_faster_than_dense": timings[DENSE].median / timing.median,
            "times_faster_than_csr": timings[CSR].median / timing.median,
        }
        for name, timing in timings.items()
    ]
