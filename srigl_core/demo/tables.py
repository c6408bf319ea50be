"""The report as tables in the terminal, each at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["print_budgets", "print_checks", "print_latency", "print_networks", "print_training"]

Report = dict[str, Any]

TRAINING_HEADER = ("", "method", "accuracy %", "weights", "KiB", "active neurons")


def print_budgets(report: Report, console: Console) -> None:
    """Print how many weights each layer may have."""
    console.print(
        "Weights of each layer: what ERK gives, and what every sparse method gets",
        style="bold",
        soft_wrap=True,
    )
    table = _table()
    table.add_column("", justify="right")
    for layer in report["budgets"][0]["layers"]:
        table.add_column(f"{layer['layer']} {_shape(layer)}", justify="right")
    table.add_column("all", justify="right")
    for entry in report["budgets"]:
        pairs = [(layer["erk"], layer["shared"]) for layer in entry["layers"]]
        pairs.append((sum(erk for erk, _ in pairs), sum(shared for _, shared in pairs)))
        cells = [f"{erk:,} -> {shared:,}" for erk, shared in pairs]
        table.add_row(f"{entry['sparsity']:.0%}", *cells)
    console.print(table)
    console.print(
        "Constant fan-in needs whole rows, so ERK's budget is rounded down; "
        "the other methods get no more.\n",
        style="dim",
    )


def print_training(report: Report, console: Console) -> None:
    """Print accuracy, weights, memory and active neurons of every method."""
    settings = report["settings"]
    console.print(
        f"Test accuracy on {settings['test_images']} handwritten digits, mean ± standard error "
        f"of {len(settings['seeds'])} seeds",
        style="bold",
        soft_wrap=True,
    )
    table = _table()
    for name in TRAINING_HEADER:
        table.add_column(name, justify="left" if name == "method" else "right")
    for _, entries in groupby(report["training"], key=lambda entry: entry["sparsity"]):
        for entry in entries:
            table.add_row(*training_row(entry))
        table.add_section()
    console.print(table)
    console.print(
        f"Active neurons of {' / '.join(report['training'][0]['active_neurons'])}, "
        f"out of {' / '.join(str(n) for n in settings['widths'][1:])}; means of the seeds.",
        style="dim",
    )
    console.print(forms_sentence(report), style="dim")
    for remark in report["remarks"]:
        console.print(remark, style="dim")
    console.print()


def forms_sentence(report: Report) -> str:
    """Return in which form the weights of each method are stored."""
    forms: dict[str, list[str]] = {}
    for entry in report["training"]:
        labels = forms.setdefault(entry["form"], [])
        if entry["label"] not in labels:
            labels.append(entry["label"])
    stored = ", ".join(f"{' and '.join(labels)} as {form}" for form, labels in forms.items())
    return f"KiB of weights and biases, stored: {stored}."


def training_row(entry: Report) -> list[str]:
    """Return one method's cells of the training table."""
    return [
        f"{entry['sparsity']:.0%}" if entry["sparsity"] else "-",
        entry["label"],
        f"{100 * entry['accuracy']:.2f} ± {100 * entry['standard_error']:.2f}",
        _span(entry["weights"]),
        f"{entry['memory_bytes'] / 1024:,.0f}",
        " / ".join(f"{count:.0f}" for count in entry["active_neurons"].values()),
    ]


def print_checks(report: Report, console: Console) -> None:
    """Print the expectations and whether the numbers meet them."""
    for check in report["checks"]:
        console.print(check_sentence(check), style=None if check["holds"] else "bold red")
    console.print()


def check_sentence(check: Report) -> str:
    """Return an expectation, its outcome and its numbers."""
    return (
        f"{'holds' if check['holds'] else 'DOES NOT HOLD'}: {check['statement']} "
        f"(difference {check['difference']:+.2f} ± {check['standard_error']:.2f} points, "
        f"allowed {check['allowed']:+.2f})"
    )


def print_networks(report: Report, console: Console) -> None:
    """Print the files, and what every backend makes of them."""
    console.print(
        "SRigL networks, saved, loaded again, and run on every available backend",
        style="bold",
        soft_wrap=True,
    )
    table = _table()
    for name in ("file", "backend", "accuracy %", "same predictions", "logits differ"):
        table.add_column(name, justify="left" if name in ("file", "backend") else "right")
    for network in report["networks"]:
        for backend in network["backends"]:
            table.add_row(
                network["file"],
                backend["backend"],
                f"{100 * backend['accuracy']:.2f}",
                f"{backend['n_same']} of {backend['n_images']}",
                f"{backend['largest_difference']:.1e}",
            )
        table.add_section()
    console.print(table)
    console.print("Compared with the masked dense network, as trained.\n", style="dim")


def print_latency(report: Report, console: Console) -> None:
    """Print the latencies, one table for each part of the network that was timed."""
    for what in dict.fromkeys(entry["what"] for entry in report["latency"]):
        entries = [entry for entry in report["latency"] if entry["what"] == what]
        batches = sorted({entry["batch"] for entry in entries})
        console.print(f"Inference, {what}: median latency on one thread", style="bold")
        table = _table()
        table.add_column("", justify="right")
        table.add_column("")
        for batch in batches:
            table.add_column(f"batch {batch}", justify="right")
            table.add_column("vs dense", justify="right")
            table.add_column("vs CSR", justify="right")
        for row, ends_section in latency_rows(entries, batches):
            table.add_row(*row, end_section=ends_section)
        console.print(table)
        console.print()
    console.print(
        f"2.00x is twice as fast, 0.50x half as fast. Dense NumPy and SciPy CSR are called bare, "
        f"each in its best layout; the others are the backends, through the public API. "
        f"{report['machine']['cpu']}, {report['machine']['cores']} cores, one thread used; NumPy "
        f"{report['versions']['numpy']}, SciPy {report['versions']['scipy']}.\n",
        style="dim",
    )


def latency_rows(entries: Sequence[Report], batches: Sequence[int]) -> list[tuple[list[str], bool]]:
    """Return the rows of a latency table, and of each whether it is its sparsity's last."""
    rows = []
    for sparsity, group in groupby(entries, key=lambda entry: entry["sparsity"]):
        found = {(entry["contender"], entry["batch"]): entry for entry in group}
        names = list(dict.fromkeys(name for name, _ in found))
        for name in names:
            row = [f"{sparsity:.0%}", name]
            for batch in batches:
                entry = found[name, batch]
                row.append(_microseconds(entry["median_us"]))
                row.append(f"{entry['times_faster_than_dense']:.2f}x")
                row.append(f"{entry['times_faster_than_csr']:.2f}x")
            rows.append((row, name == names[-1]))
    return rows


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _shape(layer: Report) -> str:
    return "x".join(str(length) for length in layer["shape"])


def _span(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"


def _microseconds(value: float) -> str:
    return f"{value:,.1f} µs" if value < 1000 else f"{value / 1000:,.2f} ms"
