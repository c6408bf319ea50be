"""Train the grid, or a part of it, and write the page: ``make reproduce``.

Needs the extra ``reproduce``; the ConvNet and the transformer need PyTorch, too.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from srigl_core._workers import end_with_parent
from srigl_core.errors import SriglError

_PACKAGES = ("joblib", "matplotlib", "mlxtend", "rich", "sklearn", "threadpoolctl")


def main() -> None:
    """Run what is missing from the file of results, and write the page of what is there."""
    parser = argparse.ArgumentParser(
        prog="python -m srigl_core.benchmarks.reproduce",
        description="Train networks as in the paper, on small data, and compare the methods. "
        "Results are kept: the same command, given again, goes on where it was interrupted.",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="three minutes on two cores, not 60")
    part.add_argument(
        "--choose",
        action="store_true",
        help="the runs on validation parts from which learning rate and weight decay were chosen",
    )
    parser.add_argument("--out", type=Path, default=Path("srigl-reproduce"), help="a folder")
    parser.add_argument("--processes", type=int, help="all cores, if not given")
    parser.add_argument("--dask", metavar="ADDRESS", help="of a Dask scheduler, to run there")
    options = parser.parse_args()
    needed = _PACKAGES if options.quick else (*_PACKAGES, "mnist1d", "torch")
    missing = [name for name in needed if not find_spec(name)]
    if missing:
        sys.exit(
            f"error: {', '.join(missing)} cannot be imported; install PyTorch, and: "
            f'pip install -e ".[reproduce]"'
        )
    if "SRIGL_ENDS_WITH_PARENT" in os.environ:  # make sets it
        end_with_parent()
    # Workers whose memory has grown are replaced between runs.
    warnings.filterwarnings("ignore", "A worker stopped", UserWarning)
    try:
        _reproduce(options)
    except (SriglError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _reproduce(options: argparse.Namespace) -> None:
    from srigl_core.benchmarks.reproduce.grid import choice_runs, quick_runs, whole_runs
    from srigl_core.benchmarks.reproduce.page import page, panels
    from srigl_core.benchmarks.reproduce.plots import save_accuracies
    from srigl_core.benchmarks.reproduce.results import read_results

    name, runs = "reproduce", whole_runs()
    if options.quick:
        name, runs = "quick", quick_runs()
    elif options.choose:
        name, runs = "choice", choice_runs()
    path = options.out / f"{name}.jsonl"
    with _workers(options):
        _run_with_progress(runs, path)
    if options.choose:
        print(f"written: {path}")
        return
    wanted = {run.key for run in runs}
    results = [result for result in read_results(path) if result.spec.key in wanted]
    text = page(results, f"{name}.png")
    (options.out / f"{name}.md").write_text(text, encoding="utf-8")
    save_accuracies(panels(results), options.out / f"{name}.png")
    print(text.partition("## ")[0])
    print(f"In {options.out}: {name}.jsonl, {name}.md, {name}.png")


def _workers(options: argparse.Namespace) -> AbstractContextManager[Any]:
    from srigl_core.benchmarks.reproduce.runs import dask_workers, local_workers

    return dask_workers(options.dask) if options.dask else local_workers(options.processes)


def _run_with_progress(runs: Sequence[Any], path: Path) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from srigl_core.benchmarks.reproduce.results import read_results
    from srigl_core.benchmarks.reproduce.runs import run_missing

    done = {result.spec.key for result in read_results(path)}
    n_done = sum(run.key in done for run in runs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[n_done]} of {task.fields[n_runs]} runs,"),
        TimeElapsedColumn(),
        TextColumn("so far, left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=300) as progress:
        # Runs differ in length; the time left is estimated from their costs.
        cost = sum(run.cost for run in runs if run.key not in done)
        task = progress.add_task("training", total=cost, n_done=n_done, n_runs=len(runs))
        for result in run_missing(runs, path):
            n_done += 1
            progress.update(task, advance=result.spec.cost, n_done=n_done)


if __name__ == "__main__":
    main()
