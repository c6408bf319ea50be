"""Bar charts as SVG, made from the JSON alone, without a plotting library.

The text of a picture depends on nothing but the numbers, so that a test can compare it with the
committed file. The background is white also where a page is dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from srigl_core.benchmarks.cases import HEADLINE
from srigl_core.benchmarks.results import FAMILIES, Results
from srigl_core.benchmarks.tables import number, plural

__all__ = ["Bar", "bar_chart", "calls", "speedup"]

# The first of each family is drawn in the palette of Okabe and Ito, as in the plots.
_COLOURS = {"srigl": "#0072B2", "CSR": "#E69F00", "dense int8": "#CC79A7", "dense": "#8C8C8C"}
_BATCHES = (1, 8, 64, 256, 2048)
_WIDTH, _LABELS = 520, 96  # narrow, so that a phone shows letters that can be read
_BAR, _GAP, _LINE = 18, 10, 16
_LETTER = 8  # at most the mean width of a letter


class Bar(NamedTuple):
    """A bar: its family, which gives the colour, its length, and the text at its end."""

    family: str
    length: float
    text: str


def speedup(results: Results) -> str:
    """Return the times of srigl and of the best CSR, dense int8 and dense product, by batch.

    The layer is the headline layer at 90% sparsity on the fewest threads measured. In each batch a
    bar is as long as the time, in units of srigl's.
    """
    n_in, n_out = HEADLINE
    threads = min((row.threads for row in results.rows), default=1)
    where = {"operation": "forward", "n_in": n_in, "n_out": n_out, "sparsity": 0.9}
    groups = []
    for batch in _BATCHES:
        row = next(results.find(**where, threads=threads, batch=batch), None)
        if row is None or row.ours is None:
            continue
        bars = [Bar("srigl", 1.0, f"srigl {number(row.ours)} µs")]
        for family in ("csr", "int8", "dense"):
            best, ratio, name = row.best(family), row.ratio(family), FAMILIES[family]
            if best is not None and ratio is not None:
                text = f"best {name} {number(best[1])} µs, {ratio:.1f}x"
                bars.append(Bar(name, ratio, text))
        groups.append((f"batch {batch}", bars))
    machine = results.content["machine"]
    return bar_chart(
        "How long a sparse layer takes, by batch size",
        (
            f"{n_in} inputs, {n_out} neurons, 90% sparse, float32",
            f"{machine['cpu']}, {plural(threads, 'thread')}; shorter is better, srigl is 1",
        ),
        groups,
    )


def calls(content: Mapping[str, Any]) -> str:
    """Return the times of calls from each library, of `srigl_core.benchmarks.overhead`."""
    groups: dict[str, list[Bar]] = {}
    for call, time in content["median_us"].items():
        library, comma, name = call.partition(", ")
        if not comma:
            library, name = "kernel", call
        family = "dense" if name.startswith(("nn.Linear", "x + 1")) else "srigl"
        groups.setdefault(library, []).append(Bar(family, time, f"{time:.1f} µs, {name}"))
    return bar_chart(
        "What a call costs, before any work is done",
        (content["layer"], f"{content['machine']['cpu']}; blue: srigl, grey: the library's own"),
        groups.items(),
    )


def bar_chart(title: str, notes: Sequence[str], groups: Iterable[tuple[str, Sequence[Bar]]]) -> str:
    """Return an SVG of horizontal bars in labelled groups, below a title and lines of notes."""
    groups = list(groups)
    scale = min(
        (
            (_WIDTH - _LABELS - _LETTER * len(bar.text)) / bar.length
            for _, bars in groups
            for bar in bars
        ),
        default=1.0,
    )
    y = 34
    parts = [_text(16, 28, title, 'font-size="17" font-weight="600"')]
    for note in notes:
        y += _LINE
        parts.append(_text(16, y, note, 'font-size="12" fill="#555555"'))
    y += _LINE
    for label, bars in groups:
        middle = y + _BAR * len(bars) / 2 + 5
        parts.append(_text(_LABELS - 10, middle, label, 'text-anchor="end"'))
        for bar in bars:
            length = max(1.0, bar.length * scale)
            parts.append(
                f'<rect x="{_LABELS}" y="{y}" width="{length:.1f}" height="{_BAR - 3}" '
                f'fill="{_COLOURS[bar.family]}"/>'
            )
            weight = 'font-weight="600"' if bar.family == "srigl" else ""
            parts.append(_text(_LABELS + length + 6, y + _BAR - 6, bar.text, weight))
            y += _BAR
        y += _GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" '
        f'height="{y}" font-family="system-ui, sans-serif" font-size="13" fill="#222222" '
        'role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{y}" rx="8" fill="#FFFFFF"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {attributes}>{escape(text)}</text>'
