"""The report as sections of text and rows, and their two renderings: terminal and page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from report import Report
from rich import box
from rich.console import Console
from rich.table import Table

LEFT_ALIGNED = ("method", "file", "backend", "contender")
NOTE_STYLES = {"holds": "", "DOES NOT HOLD": "bold red"}
"""Styles in the terminal of notes that begin so; other notes are dim."""

PAGE_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
img { max-width: 100% }
"""


class Section(NamedTuple):
    """A title, a table whose rows are grouped by their first cell, and notes below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def training_sections(report: Report) -> list[Section]:
    """Return what is known after training: budgets, accuracies and checks."""
    return [_budgets(report), _accuracies(report)]


def deployment_sections(report: Report) -> list[Section]:
    """Return what is known of the saved networks: predictions of every backend, and latencies."""
    parts = dict.fromkeys(entry["what"] for entry in report["latency"])
    sections = [_predictions(report), *(_latencies(report, part) for part in parts)]
    machine, versions = report["machine"], report["versions"]
    sections[-1].notes.append(
        f"2.00x is twice as fast, 0.50x half as fast. Dense NumPy and SciPy CSR are called bare, "
        f"each in its best layout; the others are the backends, through the public API. "
        f"{machine['cpu']}, {machine['cores']} cores, one thread used; NumPy {versions['numpy']}, "
        f"SciPy {versions['scipy']}."
    )
    return sections


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
    return Section(
        "Weights of each layer: what ERK gives, and what every sparse method gets",
        ["sparse", *layers, "all"],
        rows,
        [
            "Constant fan-in needs whole rows, so ERK's budget is rounded down; "
            "the other methods get no more."
        ],
    )


def _accuracies(report: Report) -> Section:
    settings, entries = report["settings"], report["training"]
    labels: dict[str, list[str]] = {}
    for entry in {entry["method"]: entry for entry in entries}.values():
        labels.setdefault(entry["form"], []).append(entry["label"])
    stored = ", ".join(f"{' and '.join(names)} as {form}" for form, names in labels.items())
    return Section(
        f"Test accuracy on {settings['test_images']} handwritten digits, mean ± standard error "
        f"of {len(settings['seeds'])} seeds",
        ["sparse", "method", "accuracy %", "weights", "KiB", "active neurons"],
        [
            [
                f"{entry['sparsity']:.0%}" if entry["sparsity"] else "-",
                entry["label"],
                f"{100 * entry['accuracy']:.2f} ± {100 * entry['standard_error']:.2f}",
                "-".join(f"{n:,}" for n in sorted({min(entry["weights"]), max(entry["weights"])})),
                f"{entry['memory_bytes'] / 1024:,.0f}",
                " / ".join(f"{count:.0f}" for count in entry["active_neurons"].values()),
            ]
            for entry in entries
        ],
        [
            f"Active neurons of {' / '.join(entries[0]['active_neurons'])}, "
            f"out of {' / '.join(str(n) for n in settings['widths'][1:])}; means of the seeds.",
            f"KiB of weights and biases, stored: {stored}.",
            *report["remarks"],
            *(
                f"{'holds' if check['holds'] else 'DOES NOT HOLD'}: {check['statement']} "
                f"(difference {check['difference']:+.2f} ± {check['standard_error']:.2f} points, "
                f"allowed {check['allowed']:+.2f})"
                for check in report["checks"]
            ),
        ],
    )


def _predictions(report: Report) -> Section:
    return Section(
        "SRigL networks, saved, loaded again, and run on every available backend",
        ["file", "backend", "accuracy %", "same predictions", "logits differ"],
        [
            [
                network["file"],
                backend["backend"],
                f"{100 * backend['accuracy']:.2f}",
                f"{backend['n_same']} of {backend['n_images']}",
                f"{backend['largest_difference']:.1e}",
            ]
            for network in report["networks"]
            for backend in network["backends"]
        ],
        ["Compared with the masked dense network, as trained."],
    )


def _latencies(report: Report, part: str) -> Section:
    rows: dict[tuple[str, str], list[str]] = {}
    columns = ["sparse", "contender"]
    for entry in report["latency"]:
        if entry["what"] != part:
            continue
        if f"batch {entry['batch']}" not in columns:
            columns += [f"batch {entry['batch']}", "vs dense", "vs CSR"]
        sparsity, contender, us = f"{entry['sparsity']:.0%}", entry["contender"], entry["median_us"]
        rows.setdefault((sparsity, contender), [sparsity, contender]).extend(
            (
                f"{us:,.1f} µs" if us < 1000 else f"{us / 1000:,.2f} ms",
                f"{entry['times_faster_than_dense']:.2f}x",
                f"{entry['times_faster_than_csr']:.2f}x",
            )
        )
    return Section(
        f"Inference, {part}: median latency on one thread", columns, list(rows.values()), []
    )


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
        for note in section.notes:
            console.print(note, style=NOTE_STYLES.get(note.partition(":")[0], "dim"))
        console.print()


def save_page(report: Report, pictures: Sequence[Path], path: Path) -> None:
    """Write the sections and PNG pictures to one HTML page that needs no other file."""
    settings = report["settings"]
    parts = [
        "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>srigl-core demo</title>",
        f"<style>{PAGE_STYLE}</style><h1>Handwritten digits, dense and sparse</h1>",
        f"<p>A ReLU network {'-'.join(map(str, settings['widths']))}, "
        f"{settings['epochs']} epochs, {settings['train_images']} training and "
        f"{settings['test_images']} test images, {len(settings['seeds'])} seeds.</p>",
    ]
    for section in training_sections(report) + deployment_sections(report):
        parts.append(f"<h2>{escape(section.title)}</h2><table>")
        parts.append(_page_row("th", section.columns))
        parts.extend(_page_row("td", row) for row in section.rows)
        parts.append("</table>")
        parts.extend(f"<p>{escape(note)}</p>" for note in section.notes)
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        parts.append(f"<p><img alt='{picture.stem}' src='data:image/png;base64,{data}'></p>")
    path.write_text("\n".join([*parts, "</html>"]), encoding="utf-8")


def _page_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
