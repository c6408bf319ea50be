"""The page of a GPU run, made from the JSON alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from srigl_core.benchmarks.goals import forwards, verdicts
from srigl_core.benchmarks.results import OURS_ON_GPU, Results, Row
from srigl_core.benchmarks.tables import number, table, time_cell

__all__ = ["crossovers", "page"]

_FAMILIES = {
    "dense": "dense float32",
    "tf32": "dense TF32",
    "fp16": "dense float16",
    "bf16": "dense bfloat16",
    "csr": "CSR",
    "gather": "gather",
    "other": "2:4 float16",
    "fewer neurons": "fewer neurons, float32",
    "fewer neurons, tf32": "fewer neurons, TF32",
    "fewer neurons, fp16": "fewer neurons, float16",
    "fewer neurons, bf16": "fewer neurons, bfloat16",
}
"""What ours is compared with, the best of each, and how the page calls it."""

_CROSSING = {
    "dense": OURS_ON_GPU,
    "tf32": OURS_ON_GPU,
    "fp16": f"{OURS_ON_GPU} float16",
    "bf16": f"{OURS_ON_GPU} bfloat16",
}
"""Which of ours a dense family is held against for the crossover."""

_METHOD = """\
Each row is one case, timed in one process with all contenders in turns: every round times each of
them a few calls, and begins with another one. A time is the median of {runs} runs after warm-up,
fewer where a call takes over 20 ms, in microseconds; in parentheses are the quartiles. It is the
time between two events of the device before and after the call: while the calls are
submitted the device spins, so that it never waits for Python. *Host* is the median of what
submitting a call takes there; where that is more than the time, a program that makes one call after
the other waits for the host. A call that itself waits for the device is timed by the host's clock,
from an idle device to an idle one, and marked "host clock".

Ours is the public `plan(x, bias)` on CuPy's arrays, which cost the host least: its checks, its
transposing of x, and the result's allocation are included. The others have their best reasonable
form, with bias too; weights are prepared beforehand for all. Four copies of the inputs are taken in
turns. *Dense float32* is cuBLAS with TF32 off; reduced-precision sums are off for the 16-bit types.
*2:4* has another mask, half of the weights. *Fewer neurons* is dense on the active neurons alone,
where 40% are ablated. Every contender's result was compared with float64 before it was timed, entry
by entry, on the first copy and the last. Columns of ratios say how many times as long as ours the
best of a family takes; below 1, ours loses.

*L2 warm*: calls one after the other, with what they leave in the second-level cache. *L2 cold*:
before each call twice what that cache holds is written, and read.

*GB/s* and *of the floor* count the bytes of the condensed format (each value and its column
number), of inputs, bias and results, each moved once. The floor is the largest of three quotients,
each a need over a rate measured in the same run: these bytes over the bandwidth of a copy, memory
to memory; the bytes of x that the multiply-adds read, one number each since sparse rows share no
inputs, over the bandwidth of all shared memory; the multiply-adds over those of float32 a second.
Warm, bytes may come from the second-level cache: more than 100% is possible.

The backward pass is dx and dvalues; a dense layer needs the whole gradient of its weight. An update
is `update_mask` with its checks.
"""


def page(results: Results) -> str:
    """Return the page in Markdown."""
    parts = [
        "# GPU kernels, measured",
        "Made by `srigl bench gpu` from the JSON beside it; `srigl bench report` makes it again.",
        _incomplete(results),
        _machine(results),
        "## Goals",
        _goals(results),
        "## From which batch on dense is quicker",
        _crossover_table(results),
        "## How it was measured",
        _METHOD.strip().format(runs=results.content["settings"]["runs"]),
        "## The device's limits",
        _limits(results),
        *_sections(results),
        "## Not measured",
        _missing(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def crossovers(results: Results) -> list[tuple[Row, dict[str, str]]]:
    """Return for each layer from which measured batch on each dense family is quicker than ours.

    Returns
    -------
    list of (Row, dict of str to str)
        A row of the layer, and for each family the batch, in words where there is none. Against
        ours in the same type; float32 for TF32.
    """
    layers: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        if row.operation == "forward" and row.l2 == "warm":
            key = (row.n_in, row.n_out, row.fan_in, row.n_active)
            layers.setdefault(key, []).append(row)
    return [
        (rows[0], {family: _crossing(rows, family, ours) for family, ours in _CROSSING.items()})
        for rows in layers.values()
    ]


def _crossing(rows: Iterable[Row], family: str, ours: str) -> str:
    found = ((row.batch, row.ratio(family, ours)) for row in rows)
    ratios = sorted((batch, ratio) for batch, ratio in found if ratio is not None)
    if not ratios:
        return "not measured"
    start = len(ratios)
    while start and ratios[start - 1][1] < 1:
        start -= 1
    before = [str(batch) for batch, ratio in ratios[:start] if ratio < 1]
    also = f", also at {', '.join(before)}" if before else ""
    if start == len(ratios):
        return f"not up to {ratios[-1][0]}{also}"
    return f"{ratios[start][0]}{also}"


def _crossover_table(results: Results) -> str:
    found = crossovers(results)
    if not found:
        return "Not measured."
    head = ("layer", "sparsity", *(_FAMILIES[family] for family in _CROSSING))
    rows = [(_layer(row), f"{row.sparsity:.0%}", *words.values()) for row, words in found]
    says = (
        "The first measured batch from which on dense takes less time than ours in the same type "
        "(TF32: than ours in float32), at all larger batches too; L2 warm."
    )
    return f"{says}\n\n{table(head, rows)}"


def _incomplete(results: Results) -> str:
    return (
        "**Incomplete**: the run ended early, and what is missing was not measured."
        if results.content.get("incomplete")
        else ""
    )


def _machine(results: Results) -> str:
    content, process = results.content, results.native
    machine = dict(content["machine"])
    name, memory, l2 = machine.pop("gpu"), machine.pop("memory"), machine.pop("L2")
    facts = ", ".join(f"{fact} {value}" for fact, value in machine.items())
    versions = ", ".join(f"{name} {version}" for name, version in process["versions"].items())
    return "\n".join(
        [
            f"- {name}, {memory / 2**30:.0f} GiB, L2 {l2 / 2**20:.0f} MiB; {facts}",
            f"- {versions}",
            f"- {content['started']}, {content['seconds']:.0f} s, {len(results.rows)} cases",
        ]
    )


def _goals(results: Results) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [(v.name, v.asked, v.reached, words[v.met]) for v in verdicts(results)]
    return table(("case", "goal", "reached", "met"), rows)


def _limits(results: Results) -> str:
    found = results.native["limits"][0]
    rows = [
        ("copy, bytes read and written", f"{found['copy_bandwidth'] / 1e9:,.0f} GB/s"),
        ("reads of shared memory", f"{found['shared_bandwidth'] / 1e9:,.0f} GB/s"),
        ("float32", f"{2 * found['multiply_adds'] / 1e12:.1f} TFLOP/s"),
        ("two events with nothing between", f"{found['between_marks'] * 1e6:.2f} µs"),
    ]
    return table(("what", "most"), rows)


def _sections(results: Results) -> Iterator[str]:
    """Yield a heading and its tables for each operation and shape of layer."""
    for operation, title in (("forward", "Forward"), ("backward", "Backward")):
        rows = [row for row in results.rows if row.operation == operation]
        for shape in dict.fromkeys((row.layer, row.ablated > 0) for row in rows):
            own = [row for row in rows if (row.layer, row.ablated > 0) == shape]
            yield f"## {title}, {shape[0]}{', 40% of the neurons ablated' * shape[1]}"
            yield _ours(own, results)
            yield "Every other contender, µs:"
            yield _others(own)
    updates = [row for row in results.rows if row.operation == "update"]
    if updates:
        yield "## Mask update"
        yield _updates(updates)


def _ours(rows: Sequence[Row], results: Results) -> str:
    """Return a table of ours: a line for each case and each of our types."""
    families = {
        family: label
        for family, label in _FAMILIES.items()
        if any(row.best(family) is not None for row in rows)
    }
    is_backward = rows[0].operation == "backward"
    head = (
        *("k", "sparsity", "batch", "L2", "ours", "µs", "host, µs"),
        *(["forward passes"] if is_backward else []),
        *("GB/s", "of the floor", *families.values()),
    )
    lines = []
    for row in rows:
        for name in _names(row, ours=True):
            cells = [*_case_cells(row), name.removeprefix(OURS_ON_GPU).lstrip(", ") or "float32"]
            cells += [_cell(row, name), _host(row, name)]
            if is_backward:
                times = forwards(row, results, name)
                cells.append("" if times is None else f"{times:.2f}")
            moved, share = row.bandwidth(name), row.share_of_floor(name)
            cells.append("" if moved is None else number(moved / 1e9))
            cells.append("" if share is None else f"{share[0]:.0%} {share[1]}")
            ratios = (row.ratio(family, name) for family in families)
            lines.append((*cells, *("" if r is None else f"{r:.2f}x" for r in ratios)))
    return table(head, lines)


def _others(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in _names(row, ours=False)))
    lines = [(*_case_cells(row), *(_cell(row, name) for name in names)) for row in rows]
    return table(("k", "sparsity", "batch", "L2", *names), lines)


def _updates(rows: Sequence[Row]) -> str:
    names = list(
        dict.fromkeys(n for row in rows for own in (True, False) for n in _names(row, own))
    )
    lines = []
    for row in rows:
        share = row.share_of_floor(OURS_ON_GPU)
        of_floor = "" if share is None else f"{share[0]:.0%} {share[1]}"
        times = (_cell(row, name) for name in names)
        lines.append((_layer(row), f"{row.sparsity:.0%}", *times, of_floor))
    return table(("layer", "sparsity", *(f"{name}, µs" for name in names), "of the floor"), lines)


def _names(row: Row, ours: bool) -> list[str]:
    """Return the contenders of a row that were to be measured, ours or the others."""
    tried = [*row.contenders, *row.failed, *row.wrong]
    return [name for name in tried if name.startswith(OURS_ON_GPU) == ours]


def _case_cells(row: Row) -> tuple[str, ...]:
    return (str(row.fan_in), f"{row.sparsity:.0%}", str(row.batch), str(row.l2))


def _cell(row: Row, name: str) -> str:
    """Return a contender's time, or in a word why there is none."""
    for what in ("failed", "wrong"):
        if name in row.case[what]:
            return f"**{what}**"
    by_host = row.contenders.get(name, {}).get("clock") == "host"
    return f"{time_cell(row, name)}{', host clock' if by_host else ''}"


def _host(row: Row, name: str) -> str:
    found = row.contenders.get(name)
    return "" if found is None else number(found["host_us"])


def _layer(row: Row) -> str:
    ablated = f", {row.ablated} ablated" if row.ablated else ""
    return f"{row.layer}, k = {row.fan_in}{ablated}"


def _missing(results: Results) -> str:
    """Return what was left out and why: libraries, contenders that do not fit, errors."""
    lines = [
        f"- {library['library']}: {library['reason']}; `{library['install']}`"
        for library in results.native["absent"]
    ]
    for what, words in (("wrong", "**wrong**: "), ("failed", "failed: "), ("unfit", "")):
        for (name, why), count in _counted(row.case[what] for row in results.rows).items():
            cases = f"{count} case{'s' * (count > 1)}"
            lines.append(f"- {words}{name}, {cases}: {why}")
    return "\n".join(lines) or "Everything took part everywhere."


def _counted(each: Iterable[Mapping[str, str]]) -> Counter[tuple[str, str]]:
    return Counter((name, why) for found in each for name, why in found.items())
