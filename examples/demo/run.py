"""The demo from the data to the page: train, save, load, compare, time, report."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from joblib.externals.loky.process_executor import TerminatedWorkerError
from latency import contenders, interleaved
from network import CondensedMlp
from plots import save_plots
from report import DATA, Experiment, Report, latency_entry, network_entry, training_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tables import deployment_sections, example, print_sections, save_page, training_sections

from srigl_core import SriglError
from srigl_core._workers import end_with_parent
from srigl_core.benchmarks.reproduce.comparison import Cell, cells_of
from srigl_core.benchmarks.reproduce.datasets import load_dataset
from srigl_core.benchmarks.reproduce.runs import local_workers, run_all
from srigl_core.benchmarks.reproduce.settings import METHODS
from srigl_core.benchmarks.reproduce.training import Kept, RunResult

BATCHES = (1, 256)


def main() -> None:
    """Run the demo with the options of the command line; exit with 1 if a backend disagrees."""
    parser = argparse.ArgumentParser(
        prog="python examples/demo",
        description="Train on handwritten digits, dense and sparse; save, load and time them.",
    )
    parser.add_argument("--full", action="store_true", help="all methods, and six seeds")
    parser.add_argument(
        "--out", type=Path, default=Path("srigl-demo"), help="folder for the report"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    options = parser.parse_args()
    if "SRIGL_ENDS_WITH_PARENT" in os.environ:  # make sets it
        end_with_parent()
    if options.seed < 0:
        parser.error(f"--seed {options.seed} is negative; seeds are 0 or more")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a file has no width of its own
    try:
        experiment = Experiment.of_size(options.seed, full=options.full)
        report = run_demo(experiment, options.out, console=console)
    except (SriglError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except TerminatedWorkerError:
        sys.exit("error: a training process was killed, perhaps for lack of memory; free some")
    backends = [backend for network in report["networks"] for backend in network["backends"]]
    wrong = sorted({backend["backend"] for backend in backends if not backend["agrees"]})
    if wrong:
        sys.exit(f"predictions differ from the dense network's: {', '.join(wrong)}")


def run_demo(experiment: Experiment, out: Path, *, console: Console, rounds: int = 30) -> Report:
    """Run the experiment, print the tables, and write report, pictures and networks to `out`."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    cells, kept = train_all(experiment, console)
    training_seconds = time.perf_counter() - started
    report = training_report(experiment, cells, kept)
    print_sections(training_sections(report), console)
    data = load_dataset(DATA, 0)
    np.savez(out / "test.npz", x=data.unscaled_test_x, y=data.test_y)
    for sparsity, trained in kept.items():
        with console.status(f"timing the inference at {sparsity:.0%} sparsity"):
            deploy(report, sparsity, trained, out, rounds)
    print_sections(deployment_sections(report), console)
    report["seconds"] = {"training": training_seconds, "all": time.perf_counter() - started}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    save_page(report, save_plots(report, cells, out), out / "report.html")
    console.print("Load a network, and predict", style="bold")
    console.print(example(report, out), soft_wrap=True, markup=False)
    written = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"{time.perf_counter() - started:.0f} s. In {out}: {written}", soft_wrap=True)
    return report


def train_all(
    experiment: Experiment, console: Console
) -> tuple[Mapping[tuple[str, float], Cell], Mapping[float, Kept]]:
    """Return the trained cells, and the kept networks by sparsity; a bar moves at every run."""
    runs, to_keep = experiment.runs(), experiment.kept()
    n_each = sum(run.method == "dense" for run in runs)
    console.print(
        f"Training {len(runs)} networks on handwritten digits among noise: "
        f"{runs[0].recipe.epochs} epochs, a mask update every {runs[0].recipe.delta_t} steps\n",
        soft_wrap=True,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results: list[RunResult] = []
    kept: dict[float, Kept] = {}
    with Progress(*columns, console=console, transient=True) as progress, local_workers():
        task = progress.add_task("networks", total=len(runs))
        for result, network in run_all(runs, to_keep):
            results.append(result)
            key = (result.spec.method, result.spec.sparsity)
            if network is not None:
                kept[result.spec.sparsity] = network
            label = METHODS[result.spec.method].label
            progress.update(task, description=f"{label}: {result.accuracy:.1%}", advance=1)
            cell = cells_of(results)[key]
            if len(cell.runs) == n_each:
                sparsity = f"{cell.sparsity:.0%}" if cell.sparsity else ""
                progress.console.print(
                    f"{label:<20}{sparsity:>5}{cell.accuracy:>7.1f} ± {cell.error:.1f} %"
                )
    console.print()
    cells = cells_of(results)
    order = list(dict.fromkeys((run.method, run.sparsity) for run in runs))
    return {key: cells[key] for key in order}, dict(sorted(kept.items()))


def deploy(report: Report, sparsity: float, trained: Kept, out: Path, rounds: int) -> None:
    """Save a network, load it, compare the backends, and time its inference."""
    path = out / f"srigl-{100 * sparsity:g}.safetensors"
    data = load_dataset(DATA, 0)
    CondensedMlp.from_masked(trained.network, trained.masks, data).save(path)
    loaded = CondensedMlp.load(path)
    report["networks"].append(network_entry(sparsity, path, loaded, trained.network))
    for batch in BATCHES:
        samples = interleaved(contenders(loaded, data.test_x[:batch]), rounds=rounds)
        report["latency"].append(latency_entry(sparsity, batch, samples))
