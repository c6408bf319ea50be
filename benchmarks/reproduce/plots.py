"""Accuracy against sparsity, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from srigl_core.benchmarks.reproduce.comparison import Cell
from srigl_core.benchmarks.reproduce.settings import METHODS

__all__ = ["COLOURS", "draw_accuracy", "save_accuracies"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "dense": "#000000",
    "static": "#999999",
    "static-fan-in": "#CC79A7",
    "set": "#56B4E9",
    "rigl": "#E69F00",
    "srigl-no-ablation": "#009E73",
    "srigl": "#D55E00",
}


def draw_accuracy(axes: Any, cells: Mapping[tuple[str, float], Cell]) -> None:
    """Draw mean test accuracy over sparsity, with standard errors; dense is a line."""
    sparsities = sorted({sparsity for _, sparsity in cells if sparsity})
    places = {sparsity: place for place, sparsity in enumerate(sparsities)}
    methods = [method for method in METHODS if any(name == method for name, _ in cells)]
    for i, method in enumerate(methods):
        chosen = [cell for (name, _), cell in sorted(cells.items()) if name == method]
        style = {"color": COLOURS[method], "label": METHODS[method].label}
        if method == "dense":
            (cell,) = chosen
            axes.axhline(cell.accuracy, linewidth=1, **style)
            low, high = cell.accuracy - cell.error, cell.accuracy + cell.error
            axes.axhspan(low, high, color=COLOURS[method], alpha=0.1)
            continue
        shift = 0.06 * (i - (len(methods) - 1) / 2)  # so that error bars can be told apart
        axes.errorbar(
            [places[cell.sparsity] + shift for cell in chosen],
            [cell.accuracy for cell in chosen],
            [cell.error for cell in chosen],
            marker="o",
            capsize=3,
            linewidth=2.5 if method == "srigl" else 1.2,
            **style,
        )
    axes.set_xticks(range(len(sparsities)), [f"{sparsity:.0%}" for sparsity in sparsities])
    axes.set_xlabel("sparsity")
    axes.set_ylabel("test accuracy, %")


def save_accuracies(panels: Mapping[str, Mapping[tuple[str, float], Cell]], path: Path) -> None:
    """Write a PNG with one panel for each dataset and network."""
    n_columns = min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(4.2 * n_columns, 3.6 * n_rows), layout="constrained")
    grid = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axes, (title, cells) in zip(grid, panels.items(), strict=False):
        draw_accuracy(axes, cells)
        axes.set_title(title)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
