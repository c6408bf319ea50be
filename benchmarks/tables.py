"""Numbers and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["number", "plural", "table"]


def number(value: float) -> str:
    """Return a number with three digits, or all digits before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plural(count: int, word: str) -> str:
    """Return the number and the word, with an s unless it is one."""
    return f"{count} {word}{'s' * (count != 1)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
