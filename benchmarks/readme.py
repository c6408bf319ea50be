"""``srigl bench readme``: the README's table and picture, made from the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from srigl_core.benchmarks.cases import HEADLINE
from srigl_core.benchmarks.pictures import speedup
from srigl_core.benchmarks.results import FAMILIES, Results, Row, load_results
from srigl_core.errors import FileFormatError

__all__ = ["BEGIN", "END", "PICTURE", "block", "long_table", "replaced", "write_readme"]

BEGIN, END = "<!-- cpu-table:begin -->", "<!-- cpu-table:end -->"

PICTURE = "speedup.svg"
"""The name of the picture, beside the JSON."""

_HEADLINE_ROWS = (
    *((0.9, batch) for batch in (1, 2, 4, 8, 16, 64, 256, 2048)),
    *((sparsity, batch) for sparsity in (0.8, 0.95, 0.99) for batch in (1, 256)),
)
_OTHER_LAYERS = ((768, 3072, 0.9), (4096, 4096, 0.9), (1024, 1024, 0.9), (768, 100_000, 0.96))
_INT8 = ", int8 weights and inputs"
"""What the names of our int8 product and of its rows end with."""
_README_ROWS = frozenset(
    {
        ("3072→768", 0.9, 1),
        ("3072→768", 0.9, 8),
        ("3072→768", 0.9, 256),
        ("3072→768", 0.99, 1),
        (f"3072→768{_INT8}", 0.9, 1),
        (f"3072→768{_INT8}", 0.9, 8),
        ("3072→768, weights cold", 0.9, 1),
        ("3072→768, backward", 0.9, 256),
    }
)
"""The rows of the long table that the README has too, on one thread."""
_THREADS = (1, 2)


def block(results: Results) -> str:
    """Return the lines between the markers: a short table, and where it was measured."""
    shown = [
        (label, [row])
        for label, (row, *_) in _rows(results)
        if row is not None and (label, row.sparsity, row.batch) in _README_ROWS
    ]
    return f"{_table(shown, ['srigl, µs'])}\n\n{_caption(results)}"


def long_table(results: Results) -> str:
    """Return the table of the site, with two numbers of threads, and where it was measured."""
    table = _table(list(_rows(results)), ["srigl, µs", "2 threads, µs"])
    return f"{table}\n\n{_caption(results)}"


def replaced(page: str, results: Results) -> str:
    """Return `page` with a new table between its markers, of which it must have one pair."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise FileFormatError(f"the page must have one {BEGIN} and, below, one {END}")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{block(results)}\n{END}{after}"


def write_readme(results: Path, page: Path) -> None:
    """Write the table of `results` into `page`, and the picture beside the results."""
    loaded = load_results(results)
    if loaded.benchmark != "cpu":
        raise FileFormatError(
            f"{str(results)!r} was measured on a {loaded.benchmark}; run srigl bench cpu"
        )
    made = replaced(page.read_text(encoding="utf-8"), loaded)
    page.write_text(made, encoding="utf-8")
    results.with_name(PICTURE).write_text(speedup(loaded), encoding="utf-8", newline="\n")


def _rows(results: Results) -> Iterator[tuple[str, list[Row | None]]]:
    """Yield the cases that were measured: a name, and a row for each number of threads."""
    layers = [(*HEADLINE, s, b) for s, b in _HEADLINE_ROWS]
    layers += [(*layer, b) for layer in _OTHER_LAYERS for b in (1, 256)]
    keys = ("n_in", "n_out", "sparsity", "batch")
    cases = [{"operation": "forward", **dict(zip(keys, v, strict=True))} for v in layers]
    some = {batch: {**cases[0], "batch": batch} for batch in (1, 8, 64, 256)}
    ablated = sorted({row.ablated for row in results.rows if row.mask == "random"} - {0})
    labelled = [
        *(("", case) for case in cases),
        *((_INT8, case) for case in some.values()),
        (", weights cold", {**some[1], "weights": "cold"}),
        *((", AVX2 only", {**case, "instructions": "avx2"}) for case in some.values()),
        (", backward", {**some[256], "operation": "backward"}),
        *((f", {n} ablated", {**case, "ablated": n}) for n in ablated for case in some.values()),
        *((", learned mask", case) for case in _learned(results)),
    ]
    for label, case in labelled:
        rows = [next(results.find(threads=n, **case), None) for n in _THREADS]
        if any(rows):
            yield f"{case['n_in']}→{case['n_out']}{label}", rows


def _table(lines: Sequence[tuple[str, Sequence[Row | None]]], ours: Sequence[str]) -> str:
    """Return a table with our time and the ratios to each family that the rows have."""
    measured = [row for _, rows in lines for row in rows if row is not None]
    families = [family for family in FAMILIES if any(row.best(family) for row in measured)]
    head = ["layer", "sparsity", "batch"]
    for title in ours:
        head += [title, *(FAMILIES[family] for family in families)]
    rule = ["-", *["-:"] * (len(head) - 1)]
    parts = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    for label, rows in lines:
        case = next(row for row in rows if row is not None)
        cells = [label, f"{case.sparsity:.0%}", str(case.batch)]
        for row in rows:
            cells += _cells(row, families, _INT8 if label.endswith(_INT8) else "")
        parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts)


def _learned(results: Results) -> list[dict[str, Any]]:
    """Return the largest learned layer of each file, at batch 1."""
    largest: dict[str, Row] = {}
    for row in results.rows:
        if row.mask != "random" and row.batch == 1:
            file = row.mask.split()[1]
            size = row.n_in * row.n_out
            if file not in largest or size > largest[file].n_in * largest[file].n_out:
                largest[file] = row
    keys = ("operation", "n_in", "n_out", "sparsity", "batch", "mask", "ablated")
    return [{key: getattr(row, key) for key in keys} for row in largest.values()]


def _cells(row: Row | None, families: Sequence[str], kind: str) -> list[str]:
    """Return our time and the ratio to the best of each family, which is named if it is int8.

    The name of our contender ends with `kind`.
    """
    ours = None if row is None else row.time(row.main + kind)
    if row is None or ours is None:
        return [""] * (1 + len(families))
    cells = [f"{ours:.1f}" if ours < 100 else f"{ours:,.0f}"]
    for family in families:
        best, ratio = row.best(family), row.ratio(family, row.main + kind)
        name = f" {best[0].replace(' int8', '')}" if best and family == "int8" else ""
        cells.append("" if ratio is None else f"{ratio:.1f}x{name}")
    return cells


def _caption(results: Results) -> str:
    """Return the machine, and the number of rows in which ours is slower."""
    rows = [row for row in results.rows if row.operation == "forward" and not row.is_empty]
    lost = []
    for family, name in FAMILIES.items():
        ratios = [ratio for row in rows if (ratio := row.ratio(family)) is not None]
        if ratios:
            lost.append(f"the best {name} in {sum(x < 1 for x in ratios)} of {len(ratios)}")
    machine = results.content["machine"]
    return (
        f"Times are medians of `plan(x, bias)`, in float32 or as the row says, with AVX-512 VBMI "
        f"where nothing else is said. The other columns say how many times as long the best "
        f"contender of a kind takes; dense and CSR are float32 in all rows. Cold weights come from "
        f"memory. With a known range, the scale of the inputs is fixed before the call. Measured "
        f"on {machine['cpu']}, {machine['cores']} cores, {results.content['started'][:10]}. "
        f"In float32 and float64, and in layers larger than 16x16, srigl is slower than "
        f"{', '.join(lost[:-1])} and {lost[-1]} cases."
    )
