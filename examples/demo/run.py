"""The demo from the data to the page: train, save, load, compare, time, report."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

from digits import load_digits
from experiment import Cell, Experiment, run_experiment
from latency import contenders, interleaved
from network import CondensedMlp
from plots import save_plots
from report import Report, latency_entries, network_entry, training_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tables import deployment_sections, print_sections, save_page, training_sections
from training import METHODS

from srigl_core import SriglError

BATCHES = (1, 256)


def main() -> None:
    """Run the demo with the options of the command line; exit with 1 if a backend disagrees."""
    parser = argparse.ArgumentParser(
        prog="python examples/demo",
        description="Train on handwritten digits, dense and sparse; save, load and time them.",
    )
    parser.add_argument("--full", action="store_true", help="also SET, and twice the seeds")
    parser.add_argument(
        "--out", type=Path, default=Path("srigl-demo"), help="folder for the report"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    options = parser.parse_args()
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
    except BrokenProcessPool:
        sys.exit("error: a training process was killed, perhaps for lack of memory; free some")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    backends = [backend for network in report["networks"] for backend in network["backends"]]
    wrong = sorted({backend["backend"] for backend in backends if not backend["agrees"]})
    if wrong:
        sys.exit(f"predictions differ from the dense network's: {', '.join(wrong)}")


def run_demo(experiment: Experiment, out: Path, *, console: Console, rounds: int = 30) -> Report:
    """Run the experiment, print the tables, and write report, pictures and networks to `out`."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    cells = train_all(experiment, console)
    training_seconds = time.perf_counter() - started
    report = training_report(experiment, cells)
    print_sections(training_sections(report), console)
    for cell in cells:
        with console.status(f"timing the inference at {cell.sparsity:.0%} sparsity"):
            deploy(report, cell, out, rounds)
    print_sections(deployment_sections(report), console)
    report["seconds"] = {"training": training_seconds, "all": time.perf_counter() - started}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    save_page(report, save_plots(report, out), out / "report.html")
    written = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"{time.perf_counter() - started:.0f} s. In {out}: {written}", soft_wrap=True)
    return report


def train_all(experiment: Experiment, console: Console) -> list[Cell]:
    """Run the experiment, with a bar that moves at every run and a line for every cell."""
    recipe, n_runs = experiment.recipe, len(experiment.runs())
    console.print(
        f"Training {n_runs} networks {'-'.join(map(str, recipe.widths))} on "
        f"{load_digits().train_y.size} handwritten digits: {recipe.epochs} epochs, a mask update "
        f"every {recipe.delta_t} steps, {experiment.workers} processes\n",
        soft_wrap=True,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    cells = {key: Cell(*key, []) for key in experiment.cells()}
    with (
        Progress(*columns, console=console, transient=True) as progress,
        closing(run_experiment(experiment)) as runs,
    ):
        task = progress.add_task("networks", total=n_runs)
        for run in runs:
            label, cell = METHODS[run.spec.method].label, cells[run.spec.method, run.spec.sparsity]
            progress.update(task, description=f"{label}: {run.accuracy:.1%}", advance=1)
            cell.runs.append(run)
            if len(cell.runs) == len(experiment.seeds):
                cell.runs.sort(key=lambda run: run.spec.seed)
                sparsity = f"{cell.sparsity:.0%}" if cell.sparsity else ""
                progress.console.print(
                    f"{label:<20}{sparsity:>5}"
                    f"{100 * cell.accuracy:>8.2f} ± {100 * cell.standard_error:.2f} %"
                )
    console.print()
    return list(cells.values())


def deploy(report: Report, cell: Cell, out: Path, rounds: int) -> None:
    """Save the network that a cell kept, load it, compare the backends, and time its inference."""
    run = cell.runs[0]
    if run.network is None or run.masks is None:
        return
    path = out / f"srigl-{100 * cell.sparsity:g}.safetensors"
    CondensedMlp.from_masked(run.network, run.masks).save(path)
    loaded = CondensedMlp.load(path, list(run.network.weights))
    report["networks"].append(network_entry(cell, path, loaded, run.network))
    report["latency"] += latencies(cell.sparsity, loaded, rounds)


def latencies(sparsity: float, network: CondensedMlp, rounds: int) -> list[Report]:
    """Time the whole network, and its largest layer on the activations that it gets."""
    layer = max(network.weights, key=lambda name: network.weights[name].memory_report().dense)
    n_out, n_in = network.weights[layer].shape
    masked, position = network.to_masked(), list(network.weights).index(layer)
    entries = []
    for batch in BATCHES:
        images = load_digits().test_x[:batch]
        entering = masked.forward(images)[position]
        for what, part, x in (
            ("whole network", network, images),
            (f"{layer}, {n_in} to {n_out}", network.layer(layer), entering),
        ):
            samples = interleaved(contenders(part, x), rounds=rounds)
            entries += latency_entries(sparsity, what, batch, samples)
    return entries
