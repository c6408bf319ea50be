"""The plot of a run on a CPU: times by batch, and ratios to dense and CSR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from srigl_core._install import install_command
from srigl_core.benchmarks.cases import HEADLINE
from srigl_core.benchmarks.results import Results, Row
from srigl_core.errors import BackendUnavailableError

__all__ = ["check_matplotlib", "save_plot"]

# The palette of Okabe and Ito, which colour-blind readers can distinguish.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def check_matplotlib() -> None:
    """Raise BackendUnavailableError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"the plot needs matplotlib, which cannot be imported ({error}); install it with: "
            f"{install_command('bench')}"
        ) from error


def save_plot(results: Results, path: Path) -> Path:
    """Write the plot of the headline layer, on the fewest threads measured, and return its path."""
    check_matplotlib()
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
    figure.suptitle(f"{n_in} to {n_out}, float32, {threads} thread{'s' * (threads > 1)}")
    _times(axes[0, 0], [row for row in rows if row.sparsity == 0.9])
    for axis, value, label in (
        (axes[0, 1], partial(Row.ratio, family="dense"), "times as fast as the best dense"),
        (axes[1, 0], partial(Row.ratio, family="csr"), "times as fast as the best CSR"),
        (axes[1, 1], _roofline_share, "share of the roofline"),
    ):
        _by_sparsity(axis, rows, value, label)
        axis.axhline(1, color="#999999", linewidth=1)
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    return path


def _times(axis: Any, rows: Sequence[Row]) -> None:
    """Draw our times and the best times of each family."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.ours is not None:
            lines.setdefault(row.main, []).append((row.batch, row.ours))
        for family in ("dense", "csr", "gather", "fewer neurons"):
            best = row.best(family)
            if best is not None:
                lines.setdefault(f"best {family}", []).append((row.batch, best[1]))
    for colour, (name, points) in zip(_COLOURS, lines.items(), strict=False):
        axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
    axis.set_yscale("log")
    axis.set_title("90% sparse")
    _finish(axis, "microseconds")


def _roofline_share(row: Row) -> float | None:
    share = row.roofline_share()
    return None if share is None else share[0]


def _by_sparsity(
    axis: Any, rows: Sequence[Row], value: Callable[[Row], float | None], label: str
) -> None:
    sparsities = sorted({row.sparsity for row in rows})
    for colour, sparsity in zip(_COLOURS, sparsities, strict=False):
        points = [
            (row.batch, number)
            for row in rows
            if row.sparsity == sparsity and (number := value(row)) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker="o", color=colour, label=f"{sparsity:.0%} sparse")
    _finish(axis, label)


def _finish(axis: Any, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlabel("batch")
    axis.set_ylabel(label)
    if axis.has_data():
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
