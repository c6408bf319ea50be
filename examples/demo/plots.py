"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from latency import CSR, DENSE, OURS
from matplotlib.figure import Figure
from report import N_PIXELS, Report

from srigl_core.benchmarks.reproduce.comparison import Cell
from srigl_core.benchmarks.reproduce.plots import COLOURS, draw_accuracy

_FORM_COLOURS = {DENSE: "#000000", CSR: "#999999", OURS: COLOURS["srigl"]}


def save_plots(report: Report, cells: Mapping[tuple[str, float], Cell], folder: Path) -> list[Path]:
    """Write accuracy.png, mask.png and latency.png, and return their paths."""
    figures = {
        "accuracy": _accuracy(report, cells),
        "mask": _mask(report["first_layer"]),
        "latency": _latency(report),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _accuracy(report: Report, cells: Mapping[tuple[str, float], Cell]) -> Figure:
    # A figure made without pyplot needs no display and has no global state.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_accuracy(axes, cells)
    n_runs = len(report["training"][0]["accuracies"])
    axes.set_title(f"Accuracy, mean ± standard error of {n_runs} runs")
    axes.legend(loc="lower left")
    return figure


def _mask(entries: Sequence[Report]) -> Figure:
    """Draw the share of the first layer's connections on pixels, and those of each input."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
    axes = left.subplots()
    for entry, shade in zip(entries, np.linspace(0.4, 1, len(entries)), strict=True):
        shares = entry["shares_on_pixels"]
        label = f"{entry['sparsity']:.0%} sparse"
        axes.plot(100 * np.array(shares), color=COLOURS["srigl"], alpha=shade, label=label)
    n_inputs = len(entries[-1]["before"])
    chance = 100 * N_PIXELS / n_inputs
    axes.axhline(chance, color="black", linewidth=0.8, linestyle=":", label="chance")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("mask updates")
    axes.set_ylabel("first layer's connections on pixels, %")
    axes.set_title("The mask finds the pixels")
    axes.legend(loc="lower right")
    last = entries[-1]
    most = max(*last["before"], *last["after"])
    all_axes = right.subplots(2, 1)
    for axes, when in zip(all_axes, ("before", "after"), strict=True):
        shown = axes.imshow(_image(last[when]), vmin=0, vmax=most, cmap="magma")
        axes.axvline(7.5, color="white", linewidth=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{when} training")
    all_axes[-1].set_xlabel("left of the line 8 x 8 pixels, right of it 448 inputs of noise")
    right.colorbar(shown, ax=all_axes, label="connections of an input", shrink=0.7)
    right.suptitle(f"First layer at {last['sparsity']:.0%} sparsity")
    return figure


def _image(counts: Sequence[int]) -> np.ndarray:
    """Return the counts in squares of 8 x 8 inputs, side by side: the pixels are the first."""
    return np.hstack(np.reshape(counts, (-1, 8, 8)))


def _latency(report: Report) -> Figure:
    """Draw the latency of one example, a bar for each form, beside the network's accuracy."""
    entries = [entry for entry in report["latency"] if entry["batch"] == 1]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    dense = next(e for e in report["training"] if e["method"] == "dense")
    left.axvline(dense["accuracy"], color="black", linewidth=1, label="dense")
    labels = []
    for place, entry in enumerate(entries):
        sparsity = entry["sparsity"]
        trained = next(
            e for e in report["training"] if (e["method"], e["sparsity"]) == ("srigl", sparsity)
        )
        left.errorbar(
            trained["accuracy"],
            place,
            xerr=trained["standard_error"],
            marker="o",
            capsize=3,
            color=COLOURS["srigl"],
            label=None if place else "SRigL",
        )
        for i, (form, colour) in enumerate(_FORM_COLOURS.items()):
            height = place + 0.26 * (1 - i)
            label = None if place else form
            bars = right.barh(height, entry["median_us"][form], 0.24, color=colour, label=label)
            right.bar_label(bars, fmt="%.1f", padding=3)
        labels.append(f"{sparsity:.0%}")
    left.set_yticks(range(len(labels)), labels)
    left.set_ylabel("sparsity")
    left.set_xlabel("test accuracy, %")
    left.legend(loc="best")
    right.margins(x=0.12)
    right.set_xlabel("median latency of one example, µs, one thread")
    right.legend(loc="best")
    figure.suptitle("Accuracy, and what one prediction costs")
    return figure
