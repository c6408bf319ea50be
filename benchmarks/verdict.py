"""What is good and what is bad in a run, in words."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from srigl_core.benchmarks.results import FAMILIES, Results, Row
from srigl_core.benchmarks.tables import table

__all__ = ["counts", "verdict"]

Ratios = list[tuple[Row, float]]


def counts(results: Results) -> list[str]:
    """Return a sentence for each family: in how many cases srigl is faster, and by how much."""
    return [_count(name, ratios) for name, ratios in _ratios(results).items()]


def verdict(results: Results) -> str:
    """Return how often srigl is faster than the other forms of a layer, and where it is slower."""
    good = counts(results)
    if not good:
        return ""
    losses = [
        line
        for name, ratios in _ratios(results).items()
        for line in _losses(name, ((row, ratio) for row, ratio in ratios if ratio < 1))
    ]
    text = f"**Good**: srigl's forward product. {' '.join(good)}"
    if not losses:
        return f"{text}\n\n**Bad**: no forward product was measured in which srigl is slower."
    head = ("faster than srigl", "layer", "sparsity", "weights", "batch", "srigl takes at worst")
    return (
        f"{text}\n\n**Bad**: srigl is slower in the cases of this table. The last column is its "
        f"time, as a multiple of the other one's.\n\n{table(head, losses)}"
    )


def _ratios(results: Results) -> dict[str, Ratios]:
    """Return by the name of each family that was measured the ratios of the forward products."""
    rows = [row for row in results.rows if row.operation == "forward" and not row.is_empty]
    named = {
        name: [(row, ratio) for row in rows if (ratio := row.ratio(family)) is not None]
        for family, name in FAMILIES.items()
    }
    return {name: ratios for name, ratios in named.items() if ratios}


def _count(name: str, ratios: Ratios) -> str:
    won = sum(ratio >= 1 for _, ratio in ratios)
    typical = median(ratio for _, ratio in ratios)
    return (
        f"It is faster than the best {name} product in {won} of {len(ratios)} cases; in the "
        f"median, {name} takes {typical:.1f} times as long."
    )


def _losses(name: str, lost: Iterable[tuple[Row, float]]) -> list[tuple[str, ...]]:
    """Return a line for each layer and state of its weights."""
    groups: dict[tuple[str, str], list[tuple[Row, float]]] = {}
    for row, ratio in lost:
        groups.setdefault((row.layer, row.weights), []).append((row, ratio))
    lines: list[tuple[str, ...]] = []
    for (layer, weights), members in groups.items():
        sparsities = sorted({row.sparsity for row, _ in members})
        batches = sorted({row.batch for row, _ in members})
        worst = max(1 / ratio for _, ratio in members)
        cells = (", ".join(f"{s:.0%}" for s in sparsities), weights, ", ".join(map(str, batches)))
        lines.append((name, layer, *cells, f"{worst:.1f}x"))
    return lines
