"""The main job, from the data to the page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from srigl_core.demo.dataset import Digits, load_digits
from srigl_core.demo.deployment import CondensedMlp, agreements
from srigl_core.demo.experiment import Cell, Experiment, run_experiment
from srigl_core.demo.latency import contenders, interleaved
from srigl_core.demo.page import save_page
from srigl_core.demo.plots import check_matplotlib, save_plots
from srigl_core.demo.report import latency_entries, network_entry, training_report
from srigl_core.demo.tables import (
    print_budgets,
    print_checks,
    print_latency,
    print_networks,
    print_training,
)
from srigl_core.demo.training import METHODS, RunResult

__all__ = ["run_demo"]

BATCHES = (1, 256)


def run_demo(
    experiment: Experiment, out: Path, *, console: Console, rounds: int = 30
) -> dict[str, Any]:
    """Train, save, load, run, time; print the tables and write the report.

    Parameters
    ----------
    experiment : Experiment
    out : Path
        Folder for ``report.json``, ``report.html``, the plots and the networks. Made if need be.
    console : Console
    rounds : int
        Samples of each latency.

    Returns
    -------
    dict
        What ``report.json`` holds.

    Raises
    ------
    BackendUnavailableError
        If scikit-learn or matplotlib is not installed.
    OSError
        If `out` cannot be written.

    Notes
    -----
    Starts worker processes by "spawn": call it from a script only under
    ``if __name__ == "__main__":``.
    """
    started = time.perf_counter()
    check_matplotlib()
    data = load_digits()
    out.mkdir(parents=True, exist_ok=True)
    cells = _train(experiment, data, console)
    seconds = {"training": time.perf_counter() - started}
    report = training_report(experiment, data, cells)
    print_budgets(report, console)
    print_training(report, console)
    print_checks(report, console)
    _deploy(report, cells, data, out, console, rounds)
    print_networks(report, console)
    print_latency(report, console)
    seconds["all"] = time.perf_counter() - started
    report["seconds"] = seconds
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    save_page(report, save_plots(report, out), out / "report.html")
    written = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"{time.perf_counter() - started:.0f} s. In {out}: {written}", soft_wrap=True)
    return report


def _train(experiment: Experiment, data: Digits, console: Console) -> list[Cell]:
    """Run the experiment, with a bar that moves at every run and a line for every cell."""
    recipe, n_runs = experiment.recipe, len(experiment.runs())
    console.print(
        f"Training {n_runs} networks {'-'.join(map(str, recipe.widths))} on "
        f"{data.train_y.size} handwritten digits: {recipe.epochs} epochs, a mask update every "
        f"{recipe.delta_t} steps, {experiment.workers} processes\n",
        soft_wrap=True,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("networks", total=n_runs)

        def on_run(run: RunResult) -> None:
            label = METHODS[run.spec.method].label
            progress.update(task, description=f"{label}: {run.accuracy:.1%}", advance=1)

        def on_cell(cell: Cell) -> None:
            progress.console.print(
                f"{METHODS[cell.method].label:<20}{_percent(cell.sparsity):>5}"
                f"{100 * cell.accuracy:>8.2f} ± {100 * cell.standard_error:.2f} %"
            )

        cells = run_experiment(experiment, data, on_run=on_run, on_cell=on_cell)
    console.print()
    return cells


def _percent(sparsity: float) -> str:
    return f"{sparsity:.0%}" if sparsity else ""


def _deploy(
    report: dict[str, Any],
    cells: Sequence[Cell],
    data: Digits,
    out: Path,
    console: Console,
    rounds: int,
) -> None:
    """Save SRigL's networks, load them again, compare the backends, and time the inference."""
    for cell in cells:
        kept = cell.runs[0]
        if kept.network is None or kept.masks is None:
            continue
        path = out / f"srigl-{100 * cell.sparsity:g}.safetensors"
        CondensedMlp.from_masked(kept.network, kept.masks).save(path)
        loaded = CondensedMlp.load(path, list(kept.network.weights))
        report["networks"].append(
            network_entry(
                cell.sparsity,
                kept.spec.seed,
                path.name,
                path.stat().st_size,
                loaded,
                agreements(loaded, kept.network, data),
            )
        )
        with console.status(f"timing the inference at {cell.sparsity:.0%} sparsity"):
            report["latency"] += _latencies(cell.sparsity, loaded, data, rounds)


def _latencies(
    sparsity: float, network: CondensedMlp, data: Digits, rounds: int
) -> list[dict[str, Any]]:
    """Time the whole network, and its largest layer on what reaches it in the network."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    sizes = {name: weight.memory_report().dense for name, weight in network.weights.items()}
    layer = max(sizes, key=lambda name: sizes[name])
    n_out, n_in = network.weights[layer].shape
    masked, position = network.to_masked(), list(sizes).index(layer)
    entries = []
    with threadpool_limits(1):
        for batch in BATCHES:
            images = data.test_x[:batch]
            entering = masked.forward(images)[position]
            for what, part, x in (
                ("whole network", network, images),
                (f"{layer}, {n_in} to {n_out}", network.layer(layer), entering),
            ):
                timings = interleaved(contenders(part, x), rounds=rounds)
                entries += latency_entries(sparsity, what, batch, timings)
    return entries
