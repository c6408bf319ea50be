"""Three pictures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latency import CSR, DENSE
from matplotlib.figure import Figure
from report import Report

# Okabe and Ito's colours, which colour-blind readers can tell apart.
METHOD_COLOURS = {
    "dense": "#000000",
    "static": "#999999",
    "set": "#56B4E9",
    "rigl": "#E69F00",
    "srigl-no-ablation": "#009E73",
    "srigl": "#D55E00",
}
CONTENDER_COLOURS = ("#000000", "#999999", "#D55E00", "#0072B2", "#CC79A7", "#E69F00")


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Write accuracy.png, neurons.png and latency.png, and return their paths."""
    paths = []
    for draw in (accuracy, neurons, latency):
        # A figure made without pyplot needs no display and has no global state.
        figure = Figure(figsize=(9, 4), layout="constrained")
        draw(figure, report)
        paths.append(folder / f"{draw.__name__}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def accuracy(figure: Figure, report: Report) -> None:
    """Draw test accuracy over sparsity, with standard errors."""
    axes = figure.subplots()
    groups = _grouped(report["training"], "method")
    for entry in groups.pop("dense", []):
        mean, error = 100 * entry["accuracy"], 100 * entry["standard_error"]
        axes.axhline(mean, color=METHOD_COLOURS["dense"], label="dense", linewidth=1)
        axes.axhspan(mean - error, mean + error, color=METHOD_COLOURS["dense"], alpha=0.1)
    for i, (method, entries) in enumerate(groups.items()):
        axes.errorbar(
            np.arange(len(entries)) + 0.06 * (i - (len(groups) - 1) / 2),
            [100 * entry["accuracy"] for entry in entries],
            [100 * entry["standard_error"] for entry in entries],
            color=METHOD_COLOURS[method],
            label=entries[0]["label"],
            marker="o",
            capsize=3,
        )
    _label_sparsities(axes, report)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Accuracy, mean ± standard error of {len(report['settings']['seeds'])} seeds")
    axes.legend(loc="lower left")


def neurons(figure: Figure, report: Report) -> None:
    """Draw the active neurons of each hidden layer at the end of training."""
    layers = list(report["training"][0]["active_neurons"])[:-1]
    groups = _grouped(report["training"], "method")
    groups.pop("dense", None)
    all_axes = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axes, layer, width in zip(all_axes, layers, report["settings"]["widths"][1:], strict=False):
        for i, (method, entries) in enumerate(groups.items()):
            counts = [entry["active_neurons"][layer] for entry in entries]
            _bars(axes, i, len(groups), counts, METHOD_COLOURS[method], entries[0]["label"])
        axes.axhline(width, color="black", linewidth=0.8, linestyle=":")
        _label_sparsities(axes, report)
        axes.set_title(f"{layer}, {width} neurons")
    all_axes[0].set_ylabel("active neurons after training")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right upper")


def latency(figure: Figure, report: Report) -> None:
    """Draw the median latency of the whole network, a logarithmic bar for each contender."""
    whole = report["latency"][0]["what"]
    batches = _grouped(report["latency"], "batch")
    all_axes = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, (batch, entries) in zip(all_axes, batches.items(), strict=True):
        groups = _grouped([e for e in entries if e["what"] == whole], "contender")
        names = sorted(groups, key=lambda name: (name != DENSE, name != CSR))
        for i, name in enumerate(names):
            medians = [entry["median_us"] for entry in groups[name]]
            colour = CONTENDER_COLOURS[i % len(CONTENDER_COLOURS)]
            _bars(axes, i, len(names), medians, colour, name)
        axes.set_yscale("log")
        _label_sparsities(axes, report)
        axes.set_title(f"{whole}, batch {batch}")
    all_axes[0].set_ylabel("median latency, µs (one thread)")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right upper")


def _grouped(entries: Sequence[Report], key: str) -> dict[Any, list[Report]]:
    groups: dict[Any, list[Report]] = {}
    for entry in entries:
        groups.setdefault(entry[key], []).append(entry)
    return groups


def _bars(axes: Any, i: int, n_groups: int, heights: list[float], colour: str, label: str) -> None:
    """Draw bar `i` of `n_groups` at each sparsity."""
    places = np.arange(len(heights)) + 0.8 * (i + 0.5) / n_groups - 0.4
    axes.bar(places, heights, 0.8 / n_groups, color=colour, label=label)


def _label_sparsities(axes: Any, report: Report) -> None:
    sparsities = [f"{entry['sparsity']:.0%}" for entry in report["budgets"]]
    axes.set_xticks(range(len(sparsities)), sparsities)
    axes.set_xlabel("sparsity")
