"""The plot of a run on a CPU: times by batch, and ratios to dense and CSR."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from srigl_core._install import install_command
from srigl_core.benchmarks.cases import HEADLINE
from srigl_core.benchmarks.results import Results, Row
from srigl_core.benchmarks.tables import plural
from srigl_core.errors import BackendUnavailableError

__all__ = ["check_package", "save_plot"]

# The palette of Okabe and Ito, which colour-blind readers can distinguish.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def check_package(package: str, user: str = "the plot") -> None:
    """Raise BackendUnavailableError if a package, which `user` needs, is not installed."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise BackendUnavailableError(
            f"{user} needs {package}, which cannot be imported ({error}); install it with: "
            f"{install_command('bench')}"
        ) from error


def save_plot(results: Results, path: Path) -> Path:
    """Write the plot of the headline layer, on the fewest threads measured, and return its path."""
    check_package("matplotlib")
    # A bare figure needs no pyplot, and therefore no display and no global state.
    from matplotlib.figure import Figure

    n_in, n_out = HEADLINE
    threads = min((row.threads for row in results.rows), default=1)
    rows = sorted(
        results.find(operation="forward", n_in=n_in, n_out=n_out, threads=threads),
        key=lambda row: (row.sparsity, row.batch),
    )
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(f"{n_in} to {n_out}, float32, {plural(threads, 'thread')}")
    times = [
        (name, row.batch, time)
        for row in rows
        if row.sparsity == 0.9
        for name, time in _best_times(row).items()
    ]
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_title("90% sparse")
    _draw(axes[0, 0], times, "microseconds")
    for axis, value, label in (
        (axes[0, 1], partial(Row.ratio, family="dense"), "times as fast as the best dense"),
        (axes[1, 0], partial(Row.ratio, family="csr"), "times as fast as the best CSR"),
        (axes[1, 1], _roofline_share, "share of the roofline"),
    ):
        _draw(axis, [(f"{row.sparsity:.0%} sparse", row.batch, value(row)) for row in rows], label)
        axis.axhline(1, color="#999999", linewidth=1)
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    return path


def _best_times(row: Row) -> dict[str, float | None]:
    """Return our time and the best time of each family."""
    families = ("dense", "int8", "csr", "gather", "fewer neurons")
    bests = {f"best {family}": row.best(family) for family in families}
    return {row.main: row.ours, **{name: best and best[1] for name, best in bests.items()}}


def _roofline_share(row: Row) -> float | None:
    share = row.roofline_share()
    return None if share is None else share[0]


def _draw(axis: Any, points: Iterable[tuple[str, int, float | None]], label: str) -> None:
    """Draw a line for each name among `points`, which are name, batch and value."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, batch, value in points:
        if value is not None:
            lines.setdefault(name, []).append((batch, value))
    for colour, (name, line) in zip(_COLOURS, lines.items(), strict=False):
        axis.plot(*zip(*line, strict=True), marker="o", color=colour, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("batch")
    axis.set_ylabel(label)
    if lines:
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
