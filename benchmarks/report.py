"""A page and a picture, made from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from srigl_core.benchmarks.goals import verdicts
from srigl_core.benchmarks.on_gpu import report as gpu_report
from srigl_core.benchmarks.plot import save_plot
from srigl_core.benchmarks.results import OURS, Results, Row
from srigl_core.benchmarks.tables import number, table, time_cell

__all__ = ["page", "write_report"]

_MOST_CLIFFS = 5

_METHOD = """\
Each row is one case, timed in one process with all contenders in turns: every round times each of
them a few calls, and begins with another one. A time is the median over the rounds of the median
of a round's calls, in microseconds; in parentheses are the quartiles of the rounds. Ours is the
public `plan(x, bias)`, its checks and the result's allocation included; the others have their
best reasonable form, with bias too, and weights are prepared beforehand for all. Every contender's
result was compared with float64 before it was timed. The columns "vs dense" and "vs CSR" say how
many times as long as ours the best dense and the best CSR contender of that row take; below 1,
ours loses.

*Hot*: the same call again and again. *Cold*: before each call a buffer twice the largest cache is
read on every core, and the same operation is called with other weights, so that only the weights
come from memory. On several threads the process rests before each contender until no thread of
another library's pool is spinning any more.

*AVX2 only* is a process of its own, in which Numba, oneDNN, MKL, OpenBLAS and PyTorch are told by
the variables above to use no more. MKL need not heed its variable on processors of other makers;
SciPy's CSR is compiled for any processor, so there is nothing to hold back.

*Of the limit*: the least time that the machine allows, divided by ours. The least time is the
largest of three quotients, each a need over a rate measured in the same run:

- bandwidth: the bytes of the values, of the mask (log2 of the number of masks of that fan-in: no
  packing of indices takes less), of inputs, bias and results, each moved once, over the bandwidth
  at a working set of that size (cold: from memory);
- loads: one vector of inputs for each vector of multiply-adds, since sparse rows share no inputs,
  over the loads a second from the first-level cache;
- multiply-adds over the multiply-adds a second in registers.

The backward pass is dx and dvalues; a dense layer needs the whole gradient of its weight. An
update is `update_mask` with its checks; its limit is reading weight, gradient and mask and writing
weight and mask once. "Fewer neurons" is what removing whole neurons alone would give: dense, with
60% of them; it is not among the best dense.
"""


def write_report(results: Results, folder: Path, name: str = "cpu") -> list[Path]:
    """Write the page, and of a CPU the picture.

    Parameters
    ----------
    results : Results
    folder : Path
    name : str
        Of the files, without their ending.

    Returns
    -------
    list of Path

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed, and there is a picture.
    """
    written = folder / f"{name}.md"
    if results.benchmark == "gpu":
        written.write_text(gpu_report.page(results), encoding="utf-8")
        return [written]
    picture = save_plot(results, folder / f"{name}.png")
    written.write_text(page(results, picture.name), encoding="utf-8")
    return [written, picture]


def page(results: Results, picture: str) -> str:
    """Return the page in Markdown."""
    parts = [
        "# CPU kernels, measured",
        "Made by `srigl bench cpu` from the JSON beside it; `srigl bench report` makes it again.",
        _machine(results),
        f"![Times and ratios of the layer 3072→768]({picture})",
        "## Goals",
        _goals(results),
        "## How it was measured",
        _METHOD.strip(),
        "## The machine's limits",
        _limits(results),
        "## An empty call",
        _overhead(results),
        *_sections(results),
        "## Every contender, 3072→768 at 90%",
        _contenders(results),
        "## Cliffs",
        _cliffs(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(results: Results) -> str:
    content = results.content
    machine, native = content["machine"], results.native
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in machine["caches"].items())
    versions = ", ".join(f"{name} {number}" for name, number in native["versions"].items())
    lines = [
        f"- {machine['cpu']}, {machine['cores']} cores; {caches}; {machine['system']}; load "
        f"before the run {machine['load']}",
        f"- {versions}",
        f"- {content['started']}, {content['seconds']:.0f} s, "
        f"{sum(len(process['cases']) for process in results.processes)} cases",
    ]
    lines += [
        f"- not measured: {library['library']} ({library['reason']}); `{library['install']}`"
        for library in native["absent"]
    ]
    for process in results.processes:
        variables = ", ".join(f"`{k}={v}`" for k, v in sorted(process["environment"].items()))
        kernels = sorted({p["architecture"] for p in process["libraries"] if p.get("architecture")})
        lines.append(
            f"- {process['instructions']} instructions: {variables or 'nothing is set'}; OpenBLAS "
            f"chose {', '.join(kernels) or 'nothing, as it is not there'}"
        )
    return "\n".join(lines)


def _goals(results: Results) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [(v.name, v.asked, v.reached, words[v.met]) for v in verdicts(results)]
    return table(("case", "goal", "reached", "met"), rows)


def _limits(results: Results) -> str:
    rows = []
    for process in results.processes:
        for found in process["limits"]:
            rates = dict(found["bandwidth"])
            chosen = [size for size in rates if size in (1 << 15, 1 << 19, 1 << 22, 1 << 24)]
            chosen.append(max(rates))
            rows.append(
                (
                    process["instructions"],
                    str(found["threads"]),
                    f"{2 * found['multiply_adds'] / 1e9:.0f}",
                    f"{found['loads'] / 1e9:.2f} of {found['vector_bytes']} bytes",
                    ", ".join(f"{_size(size)}: {rates[size] / 1e9:.0f}" for size in chosen),
                )
            )
    head = ("instructions", "threads", "GFLOP/s", "10⁹ loads/s", "GB/s by working set")
    return table(head, rows)


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _overhead(results: Results) -> str:
    row = next(results.find(n_in=16, n_out=16, threads=1), None)
    if row is None or row.ours is None:
        return "Not measured."
    others = ", ".join(
        f"{name} {found['median_us']:.2f}" for name, found in row.contenders.items() if name != OURS
    )
    return (
        f"A layer of 16 neurons with {row.fan_in} of 16 inputs each, batch 1, one thread: "
        f"{row.ours:.2f} µs. The others: {others}."
    )


_TITLES = {"forward": "Forward", "backward": "Backward", "update": "Mask update"}


def _sections(results: Results) -> Iterable[str]:
    """Yield a heading and a table for each operation and number of threads."""
    for operation, title in _TITLES.items():
        for instructions in ("native", "avx2"):
            for threads in sorted({row.threads for row in results.rows}):
                rows = [
                    row
                    for row in results.rows
                    if (row.operation, row.instructions, row.threads)
                    == (operation, instructions, threads)
                    and not row.is_empty
                ]
                if rows:
                    words = "" if instructions == "native" else ", AVX2 only"
                    yield f"## {title}, {threads} thread{'s' * (threads > 1)}{words}"
                    yield _updates(rows) if operation == "update" else _products(rows)


def _products(rows: Sequence[Row]) -> str:
    head = [
        *("layer", "sparsity", "batch", "weights", "ours, µs", "best dense, µs", "vs dense"),
        *("best CSR, µs", "vs CSR", "of the limit"),
    ]
    cells = [_product_cells(row) for row in rows]
    guests = dict.fromkeys(name for row in rows for name in row.family("guest"))
    for guest in guests:
        head += [f"{guest}, µs", "vs ours"]
        cells = [
            (*found, *_guest_cells(row, guest)) for found, row in zip(cells, rows, strict=True)
        ]
    return table(head, cells)


def _guest_cells(row: Row, guest: str) -> tuple[str, str]:
    time = row.time(guest)
    if time is None or row.ours is None:
        return time_cell(row, guest), ""
    return time_cell(row, guest), f"{row.ours / time:.2f}x"


def _product_cells(row: Row) -> tuple[str, ...]:
    layer = f"{row.layer}, k = {row.fan_in}"
    if row.mask != "random":
        layer += f", {row.mask}"
    if row.n_active < row.n_out:
        layer += f", {row.n_out - row.n_active} ablated"
    weights = row.weights if row.dtype == "float32" else f"{row.weights}, {row.dtype}"
    cells = [layer, f"{row.sparsity:.0%}", str(row.batch), weights, time_cell(row, OURS)]
    for family in ("dense", "csr"):
        best, ratio = row.best(family), row.ratio(family)
        cells.append("" if best is None else f"{number(best[1])} {best[0]}")
        cells.append("" if ratio is None else f"{ratio:.2f}x")
    fraction = "" if row.fraction is None else f"{row.fraction:.0%} {row.limited_by}"
    return (*cells, fraction)


def _updates(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.contenders))
    head = ("layer", "sparsity", *(f"{name}, ms" for name in names), "of the limit")
    return table(head, [_update_cells(row, names) for row in rows])


def _update_cells(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    times = [row.time(name) for name in names]
    cells = ["" if time is None else f"{time / 1000:.2f}" for time in times]
    fraction = "" if row.fraction is None else f"{row.fraction:.0%}"
    return (row.layer, f"{row.sparsity:.0%}", *cells, fraction)


def _contenders(results: Results) -> str:
    """Return all times of the headline layer, a column for each batch."""
    tables = []
    for threads in sorted({row.threads for row in results.rows}):
        rows = list(
            results.find(operation="forward", n_in=3072, n_out=768, sparsity=0.9, threads=threads)
        )
        if not rows:
            continue
        names = list(dict.fromkeys(name for row in rows for name in row.contenders))
        body = []
        for name in names:
            family = next(r.contenders[name]["family"] for r in rows if name in r.contenders)
            times = [time_cell(row, name) for row in rows]
            body.append((name, family, *times))
        head = ("contender", "family", *(f"batch {row.batch}" for row in rows))
        tables.append(f"{threads} thread{'s' * (threads > 1)}, µs:\n\n{table(head, body)}")
    return "\n\n".join(tables) or "Not measured."


def _cliffs(results: Results) -> str:
    lines = []
    for process in results.processes:
        for cliffs in process["cliffs"]:
            n = cliffs["threads"]
            found = cliffs["found"]
            more = [f"and {len(found) - _MOST_CLIFFS} more"] if len(found) > _MOST_CLIFFS else []
            places = "; ".join([*found[:_MOST_CLIFFS], *more]) or "none"
            lines.append(f"- {n} thread{'s' * (n > 1)}: {places}")
    return "\n".join(lines) or "Not measured."
