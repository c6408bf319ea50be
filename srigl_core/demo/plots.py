"""Three pictures of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from srigl_core.demo.latency import CSR, DENSE
from srigl_core.errors import BackendUnavailableError

__all__ = ["PLOTS", "check_matplotlib", "save_plots"]

Report = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = {
    "dense": "#000000",
    "static": "#999999",
    "set": "#56B4E9",
    "rigl": "#E69F00",
    "srigl-no-ablation": "#009E73",
    "srigl": "#D55E00",
}
_CONTENDER_COLOURS = ("#000000", "#999999", "#D55E00", "#0072B2", "#CC79A7", "#E69F00")


def check_matplotlib() -> None:
    """Raise BackendUnavailableError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"the plots need matplotlib, which cannot be imported ({error}); install it with: "
            f'pip install "srigl-core[demo]"'
        ) from error


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Write the pictures of `PLOTS` as PNG files.

    Parameters
    ----------
    report : dict
    folder : Path

    Returns
    -------
    list of Path
    """
    # A figure of its own needs no pyplot, and so no display and no global state.
    from matplotlib.figure import Figure

    paths = []
    for name, draw in PLOTS.items():
        figure = Figure(figsize=(9, 4), layout="constrained")
        draw(figure, report)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def draw_accuracy(figure: Any, report: Report) -> None:
    """Draw test accuracy over sparsity, with standard errors."""
    axes = figure.subplots()
    sparsities = [entry["sparsity"] for entry in report["budgets"]]
    methods = list(dict.fromkeys(entry["method"] for entry in report["training"]))
    sparse = [method for method in methods if method != "dense"]
    for entry in report["training"]:
        if entry["method"] == "dense":
            mean, error = 100 * entry["accuracy"], 100 * entry["standard_error"]
            axes.axhline(mean, color=_COLOURS["dense"], label="dense", linewidth=1)
            axes.axhspan(mean - error, mean + error, color=_COLOURS["dense"], alpha=0.1)
    for i, method in enumerate(sparse):
        entries = [entry for entry in report["training"] if entry["method"] == method]
        axes.errorbar(
            np.arange(len(entries)) + 0.06 * (i - (len(sparse) - 1) / 2),
            [100 * entry["accuracy"] for entry in entries],
            [100 * entry["standard_error"] for entry in entries],
            color=_COLOURS[method],
            label=entries[0]["label"],
            marker="o",
            capsize=3,
        )
    axes.set_xticks(range(len(sparsities)), [f"{s:.0%}" for s in sparsities])
    axes.set_xlabel("sparsity")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Accuracy, mean ± standard error of {len(report['settings']['seeds'])} seeds")
    axes.legend(loc="lower left")


def draw_neurons(figure: Any, report: Report) -> None:
    """Draw the active neurons of each hidden layer at the end of training."""
    widths = report["settings"]["widths"]
    layers = list(report["training"][0]["active_neurons"])[:-1]
    sparsities = [entry["sparsity"] for entry in report["budgets"]]
    entries = [entry for entry in report["training"] if entry["method"] != "dense"]
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    all_axes = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axes, layer, n_out in zip(all_axes, layers, widths[1:], strict=False):
        for i, method in enumerate(methods):
            mine = [entry for entry in entries if entry["method"] == method]
            axes.bar(
                np.arange(len(mine)) + 0.8 * (i + 0.5) / len(methods) - 0.4,
                [entry["active_neurons"][layer] for entry in mine],
                0.8 / len(methods),
                color=_COLOURS[method],
                label=mine[0]["label"],
            )
        axes.axhline(n_out, color="black", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(sparsities)), [f"{s:.0%}" for s in sparsities])
        axes.set_xlabel("sparsity")
        axes.set_title(f"{layer}, {n_out} neurons")
    all_axes[0].set_ylabel("active neurons after training")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right upper")


def draw_latency(figure: Any, report: Report) -> None:
    """Draw the median latency of the whole network, a logarithmic bar for each contender."""
    whole = report["latency"][0]["what"]
    entries = [entry for entry in report["latency"] if entry["what"] == whole]
    batches = sorted({entry["batch"] for entry in entries})
    sparsities = [entry["sparsity"] for entry in report["budgets"]]
    names = list(dict.fromkeys(entry["contender"] for entry in entries))
    names.sort(key=lambda name: (name != DENSE, name != CSR))
    all_axes = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(all_axes, batches, strict=True):
        for i, name in enumerate(names):
            mine = [e for e in entries if e["contender"] == name and e["batch"] == batch]
            axes.bar(
                np.arange(len(mine)) + 0.8 * (i + 0.5) / len(names) - 0.4,
                [entry["median_us"] for entry in mine],
                0.8 / len(names),
                color=_CONTENDER_COLOURS[i % len(_CONTENDER_COLOURS)],
                label=name,
            )
        axes.set_yscale("log")
        axes.set_xticks(range(len(sparsities)), [f"{s:.0%}" for s in sparsities])
        axes.set_xlabel("sparsity")
        axes.set_title(f"{whole}, batch {batch}")
    all_axes[0].set_ylabel("median latency, µs (one thread)")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right upper")


PLOTS: dict[str, Callable[[Any, Report], None]] = {
    "accuracy": draw_accuracy,
    "neurons": draw_neurons,
    "latency": draw_latency,
}
