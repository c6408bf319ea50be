"""Numbers, cells and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from srigl_core.benchmarks.results import Row

__all__ = ["number", "spread_cell", "table", "time_cell"]


def time_cell(row: Row, contender: str) -> str:
    """Return a contender's median and quartiles, or "" if it was not measured."""
    time = row.time(contender)
    if time is None:
        return ""
    return spread_cell(time, *row.spread(contender))


def spread_cell(median: float, lower: float, upper: float) -> str:
    """Return a median and its quartiles."""
    return f"{number(median)} ({number(lower)} to {number(upper)})"


def number(value: float) -> str:
    """Return a number with three digits, or all digits before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
