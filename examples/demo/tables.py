"""The report as sections of text and rows, and their two renderings: terminal and page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from report import OTHERS, Report
from rich import box
from rich.console import Console
from rich.table import Table

from srigl_core.benchmarks.reproduce.settings import METHODS

LEFT_ALIGNED = ("method", "file", "backend")
OUTCOME_STYLES = {"holds": "bold", "does not hold": "bold red", "undecided": ""}

PAGE_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
img { max-width: 100% }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
"""

CAPTIONS = {
    "accuracy": "The more weights are removed, the more it matters where the others are. Static "
    "masks cannot move; SRigL without ablation must keep all neurons.",
    "mask": "Only 64 of the 512 inputs are pixels. Left: the share of the first layer's "
    "connections that are on pixels, after each mask update. Right: the connections of each input. "
    "Neurons without a gradient grow connections to the first inputs, since ties go to the lowest "
    "index. These are pixels, so the shares at high sparsity are too large.",
    "latency": "Left: the accuracy of SRigL and of the dense network. Right: how long a prediction "
    "takes if the sparse network is stored as dense matrices, in CSR, and condensed.",
}

EXAMPLE = """\
import json
import numpy as np
import srigl_core
from safetensors import safe_open

path, test = "{folder}/{file}", np.load("{folder}/test.npz")

net, metadata = srigl_core.load_condensed(path), safe_open(path, "np").metadata()
x = (test["x"] - net["input.mean"]) / net["input.scale"]
for name, activation in json.loads(metadata["activations"]).items():
    x = srigl_core.condensed_matmul(x, net[name], net[name + ".bias"], activation=activation)
print(f"{{100 * np.mean(x.argmax(axis=1) == test['y']):.2f}} % correct")
"""
"""Prints the accuracy of a saved network."""


class Section(NamedTuple):
    """A title, a table whose rows are grouped by their first cell, and notes below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[tuple[str, str]]
    """Texts, and their styles in the terminal."""


def training_sections(report: Report) -> list[Section]:
    """Return what is known after training: accuracies, differences and verdicts, budgets."""
    return [_accuracies(report), _differences(report), _budgets(report)]


def deployment_sections(report: Report) -> list[Section]:
    """Return what is known of the saved networks: predictions of every backend, and latencies."""
    return [_predictions(report), _latencies(report)]


def _accuracies(report: Report) -> Section:
    settings, entries = report["settings"], report["training"]
    n_runs = len(entries[0]["accuracies"])
    rows = [
        [
            f"{entry['sparsity']:.0%}" if entry["sparsity"] else "-",
            entry["label"],
            f"{entry['accuracy']:.1f} ± {entry['standard_error']:.1f}",
            "-".join(f"{n:,}" for n in sorted({min(entry["weights"]), max(entry["weights"])})),
            " / ".join(f"{count:.0f}" for count in entry["active_neurons"].values()),
        ]
        for entry in entries
    ]
    note = (
        f"Active neurons of {' / '.join(entries[0]['active_neurons'])}, out of "
        f"{' / '.join(str(n) for n in settings['widths'][1:])}; means of the runs. Where neurons "
        f"are ablated, the budget is again rounded down to whole rows."
    )
    title = (
        f"Test accuracy, mean ± standard error of {n_runs} runs: {settings['folds']} folds, "
        f"{len(settings['seeds'])} seeds"
    )
    columns = ["sparse", "method", "accuracy %", "weights", "active neurons"]
    return Section(title, columns, rows, [(note, "dim")])


def _differences(report: Report) -> Section:
    found = {(entry["sparsity"], entry["other"]): entry for entry in report["differences"]}
    others = [other for other in OTHERS if any(key[1] == other for key in found)]
    rows = []
    for sparsity in dict.fromkeys(sparsity for sparsity, _ in found):
        entries = [found[sparsity, other] for other in others]
        cells = [f"{entry['mean']:+.1f} ± {entry['error']:.1f}" for entry in entries]
        rows.append([f"{sparsity:.0%}", *cells])
    notes = [
        (
            "Runs with the same data, first weights and batches are compared. A claim holds if the "
            "95% confidence interval of the difference is above zero; 'as accurate' allows half a "
            "point less.",
            "dim",
        ),
        *((each["text"], OUTCOME_STYLES[each["outcome"]]) for each in report["verdicts"]),
    ]
    columns = ["sparse", *(f"from {METHODS[other].label}" for other in others)]
    title = "What SRigL gains, in percentage points of accuracy: paired differences"
    return Section(title, columns, rows, notes)


def _budgets(report: Report) -> Section:
    layers = [
        f"{e['layer']} {'x'.join(map(str, e['shape']))}" for e in report["budgets"][0]["layers"]
    ]
    rows = []
    for budget in report["budgets"]:
        pairs = [(layer["erk"], layer["shared"]) for layer in budget["layers"]]
        pairs.append((sum(erk for erk, _ in pairs), sum(shared for _, shared in pairs)))
        cells = [f"{erk:,} -> {shared:,}" for erk, shared in pairs]
        rows.append([f"{budget['sparsity']:.0%}", *cells])
    note = (
        "Constant fan-in needs whole rows, so ERK's budget is rounded down; the other methods get "
        "no more."
    )
    title = "Weights of each layer: what ERK gives, and what every sparse method gets"
    return Section(title, ["sparse", *layers, "all"], rows, [(note, "dim")])


def _predictions(report: Report) -> Section:
    rows = [
        [
            network["file"],
            backend["backend"],
            f"{backend['accuracy']:.2f}",
            f"{backend['n_same']} of {backend['n_examples']}",
            f"{backend['largest_difference']:.1e}",
        ]
        for network in report["networks"]
        for backend in network["backends"]
    ]
    columns = ["file", "backend", "accuracy %", "same predictions", "logits differ"]
    note = "Compared with the masked dense network, as trained, on the test part of its fold."
    title = "SRigL networks, saved, loaded again, and run on every available backend"
    return Section(title, columns, rows, [(note, "dim")])


def _latencies(report: Report) -> Section:
    rows = [
        [
            f"{entry['sparsity']:.0%}",
            f"{entry['batch']}",
            *(f"{us:,.1f}" for us in entry["median_us"].values()),
            f"{entry['times_faster_than_dense']:.2f}x",
            f"{entry['times_faster_than_csr']:.2f}x",
        ]
        for entry in report["latency"]
    ]
    forms = [f"{form}, µs" for form in report["latency"][0]["median_us"]]
    machine, versions = report["machine"], report["versions"]
    note = (
        f"2.00x is twice as fast, 0.50x half as fast. Dense is NumPy's product and CSR is SciPy's, "
        f"each called bare and in its best layout; srigl is called through its public plans. "
        f"{machine['cpu']}, {machine['cores']} cores, one thread used; NumPy {versions['numpy']}, "
        f"SciPy {versions['scipy']}."
    )
    columns = ["sparse", "batch", *forms, "srigl vs dense", "srigl vs CSR"]
    title = "Inference of the whole network: median latency on one thread"
    return Section(title, columns, rows, [(note, "dim")])


def example(report: Report, folder: Path) -> str:
    """Return code that loads the sparsest network, and predicts."""
    return EXAMPLE.format(folder=folder.as_posix(), file=report["networks"][-1]["file"])


def print_sections(sections: Sequence[Section], console: Console) -> None:
    """Print sections in the terminal; tables are at most 80 columns wide."""
    for section in sections:
        console.print(section.title, style="bold", soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in section.columns:
            table.add_column(name, justify="left" if name in LEFT_ALIGNED else "right")
        groups = [list(rows) for _, rows in groupby(section.rows, key=lambda row: row[0])]
        for rows in groups:
            for row in rows:
                table.add_row(*row)
            if len(groups) < len(section.rows):
                table.add_section()
        console.print(table)
        for note, style in section.notes:
            console.print(note, style=style)
        console.print()


def save_page(report: Report, pictures: Sequence[Path], path: Path) -> None:
    """Write pictures, sections and the code that loads a network to one HTML page.

    It needs no other file.
    """
    settings = report["settings"]
    parts = [
        "<!DOCTYPE html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'><title>srigl-core demo</title>",
        f"<style>{PAGE_STYLE}</style><h1>Handwritten digits among noise, dense and sparse</h1>",
        f"<p>A ReLU network {'-'.join(map(str, settings['widths']))} reads images of 8 x 8 pixels "
        f"and 448 numbers of noise. {settings['epochs']} epochs, {settings['train_examples']} "
        f"training and {settings['test_examples']} test examples in each of {settings['folds']} "
        f"folds, {len(settings['seeds'])} seeds.</p><ul>",
        *(f"<li>{escape(each['text'])}</li>" for each in report["verdicts"]),
        "</ul>",
    ]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        parts.append(f"<p><img alt='{picture.stem}' src='data:image/png;base64,{data}'></p>")
        parts.append(f"<p>{escape(CAPTIONS[picture.stem])}</p>")
    for section in training_sections(report) + deployment_sections(report):
        parts.append(f"<h2>{escape(section.title)}</h2><table>")
        parts.append(_page_row("th", section.columns))
        parts.extend(_page_row("td", row) for row in section.rows)
        parts.append("</table>")
        parts.extend(f"<p>{escape(note)}</p>" for note, _ in section.notes)
    parts.append("<h2>Load a network, and predict</h2>")
    parts.append(f"<pre><code>{escape(example(report, path.parent))}</code></pre>")
    path.write_text("\n".join([*parts, "</html>"]), encoding="utf-8")


def _page_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
