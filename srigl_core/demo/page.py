"""The report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from srigl_core.demo.tables import (
    TRAINING_HEADER,
    check_sentence,
    forms_sentence,
    latency_rows,
    training_row,
)

__all__ = ["save_page"]

Report = dict[str, Any]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
img { max-width: 100% }
"""


def save_page(report: Report, pictures: Sequence[Path], path: Path) -> None:
    """Write tables and pictures to one page.

    Parameters
    ----------
    report : dict
    pictures : sequence of Path
        PNG files, put into the page.
    path : Path
    """
    settings, machine = report["settings"], report["machine"]
    training = [training_row(entry) for entry in report["training"]]
    parts = [
        "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>srigl demo</title>",
        f"<style>{_STYLE}</style><h1>Handwritten digits, dense and sparse</h1>",
        f"<p>A ReLU network {escape('-'.join(map(str, settings['widths'])))}, "
        f"{settings['epochs']} epochs, {settings['train_images']} training and "
        f"{settings['test_images']} test images, {len(settings['seeds'])} seeds.</p>",
        *(f"<p>{escape(check_sentence(check))}</p>" for check in report["checks"]),
        _table(TRAINING_HEADER, training),
        f"<p>{escape(forms_sentence(report))}</p>",
        *(f"<p>{escape(remark)}</p>" for remark in report["remarks"]),
        *_latency_tables(report),
        f"<p>{escape(str(machine['cpu']))}, one thread; medians of calls taken in turns.</p>",
        *(_picture(picture) for picture in pictures),
        "</html>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _latency_tables(report: Report) -> list[str]:
    parts = []
    for what in dict.fromkeys(entry["what"] for entry in report["latency"]):
        entries = [entry for entry in report["latency"] if entry["what"] == what]
        batches = sorted({entry["batch"] for entry in entries})
        header = ["sparsity", ""]
        for batch in batches:
            header += [f"batch {batch}", "vs dense", "vs CSR"]
        parts.append(f"<h2>Inference, {escape(what)}</h2>")
        parts.append(_table(header, [row for row, _ in latency_rows(entries, batches)]))
    return parts


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"<p><img alt='{escape(path.stem)}' src='data:image/png;base64,{data}'></p>"
