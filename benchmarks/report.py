"""The page of a run, made from the JSON alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from srigl_core.benchmarks.cases import HEADLINE
from srigl_core.benchmarks.plot import save_plot
from srigl_core.benchmarks.results import FAMILIES, OURS, Results, Row
from srigl_core.benchmarks.tables import number, plural, table
from srigl_core.benchmarks.verdict import verdict

__all__ = ["page", "write_report"]

_MOST_CLIFFS = 5

_TITLES = {"forward": "Forward", "backward": "Backward", "update": "Mask update"}

_FAMILIES = {
    "cpu": {
        "external": "external kernel",
        **FAMILIES,
        "csr, x transposed": "CSR, x transposed beforehand",
    },
    "gpu": {
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
    },
}
"""Families that are compared with ours, and their names on the page."""

_CROSSING = {
    "dense": OURS["gpu"],
    "tf32": OURS["gpu"],
    "fp16": f"{OURS['gpu']} float16",
    "bf16": f"{OURS['gpu']} bfloat16",
}
"""For the crossover: dense families, and the contender of ours that each is compared with."""

_METHOD = """\
Each row is one case. Its contenders are timed in turns, in one process: each round times a few
calls of every contender, and begins with another one. Every contender's result was compared with
float64 before it was timed. srigl is the public `plan(x, bias)`, with its checks and the allocation
of the result. The others have their best reasonable form, also with bias. Weights are prepared
beforehand for all.

{statistic}

Ratios say how many times as long as srigl the best contender of a family takes, with the time and
the name of that contender in parentheses; below 1, srigl loses. {families}

{caches}

*Of the roofline*: the least time that the machine allows, divided by srigl's. The least time is the
largest of three quotients, each of the work and a peak rate measured in the same run:

{bounds}

The backward pass computes dx and dvalues; a dense layer needs the gradient of its whole weight. An
update is `update_mask` with its checks; it reads weight, gradient and mask, and writes weight and
mask.
"""

_DETAILS = {
    "cpu": {
        "statistic": """\
A time is the median over the rounds of the median of a round's calls, in microseconds; in
parentheses are the quartiles of the rounds.""",
        "caches": """\
*Hot*: the same call is repeated. *Cold*: before each call a buffer twice the size of the largest
cache is read on every core, and the same operation is called with another weight, so that only the
weight comes from memory. With several threads, the process sleeps before each contender until no
thread of another library spins any more.

*AVX2 only* is a separate process, in which the variables above restrict Numba, oneDNN (also
OpenVINO's), fbgemm, MKL, OpenBLAS and PyTorch to AVX2. MKL may ignore its variable on processors of
other vendors, and ONNX Runtime has none, so it has no such rows. SciPy's and sparselab's CSR are
compiled for any processor, so nothing has to be restricted.""",
        "bounds": """\
- bandwidth: the bytes of the values, the mask, the inputs, the bias and the results, each moved
  once, over the bandwidth of a working set of that size (cold: of memory). A mask takes the
  logarithm of the number of masks of its fan-in; no packing of indices takes less.
- loads: one vector of inputs for each vector of multiply-adds, since sparse rows share no inputs,
  over the loads a second from the first-level cache.
- multiply-adds, over the multiply-adds a second in registers.""",
        "families": """\
*Dense int8* rounds weights and inputs to int8; its results were compared within its own rounding.
"Fewer neurons" is a dense layer with 60% of the neurons; it does not count as dense. *Dense without
ablated rows* computes the active neurons alone, and then places them among the others' biases.
*CSR, x transposed beforehand* is given x as columns; it does not count as CSR.""",
    },
    "gpu": {
        "statistic": """\
A time is the median of {runs} calls after a warm-up, fewer where a call takes over 20 ms, in
microseconds; in parentheses are the quartiles. It is the time between two events of the device,
before and after the call. While the calls are submitted the device spins, so that it never waits
for Python. Four copies of the inputs are used in turns. Ours takes CuPy arrays, which cost the host
least. *Host* is the median time to submit a call; where that is the longer time, a program
that makes one call after the other waits for the host. A call that itself waits for the device is
timed with the host's clock, from an idle device to an idle device, and marked "host clock".""",
        "caches": """\
*Warm*: calls follow each other, with what they leave in the second-level cache. *Cold*: before each
call, twice the size of that cache is written, and then read.""",
        "bounds": """\
- memory: the bytes of the condensed format (each value with its column number), the inputs, the
  bias and the results, each moved once, over the bandwidth of a copy in memory. *GB/s* counts the
  same bytes. Warm bytes may come from the second-level cache, so that more than 100% is possible.
- shared memory: the bytes of x that the multiply-adds read, one number each since sparse rows share
  no inputs, over the bandwidth of all shared memory.
- multiply-adds, over the float32 multiply-adds a second.""",
        "families": """\
*Dense float32* is cuBLAS without TF32; sums in reduced precision are off for the 16-bit types.
*2:4* has another mask, of half the weights. *Fewer neurons* is dense on the active neurons alone,
where 40% are ablated.""",
    },
}


def write_report(results: Results, folder: Path, name: str) -> list[Path]:
    """Write the page and, for a CPU, the plot; `name` is that of the files without their suffix."""
    plots = [save_plot(results, folder / f"{name}.png")] if results.benchmark == "cpu" else []
    written = folder / f"{name}.md"
    written.write_text(page(results, *(plot.name for plot in plots)), encoding="utf-8")
    return [written, *plots]


def page(results: Results, picture: str = "") -> str:
    """Return the page in Markdown, with a link to the plot if there is one."""
    device = results.benchmark
    is_cpu = device == "cpu"
    details = {
        name: text.format(**results.content["settings"]) for name, text in _DETAILS[device].items()
    }
    parts = [
        f"# {device.upper()} kernels, measured",
        f"![Times and ratios of the layer 3072→768]({picture})" if picture else "",
        "**Incomplete**: the run ended early." if results.content.get("incomplete") else "",
        verdict(results),
        "## Where it was measured",
        f"`srigl bench {device}` and `srigl bench report` write this page from the JSON beside it.",
        _machine(results),
        *([] if is_cpu else ["## The batch from which dense is faster", _crossovers(results)]),
        "## How it was measured",
        _METHOD.format(**details).strip(),
        "## Peak rates",
        _cpu_peaks(results) if is_cpu else _gpu_peaks(results),
        *(["## An empty call", _empty_call(results)] if is_cpu else []),
        *_sections(results),
        "## Every contender",
        _every_contender(results),
        *(["## Cliffs", _cliffs(results)] if is_cpu else []),
        "## Not measured",
        _left_out(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _crossing(rows: Iterable[Row], family: str, ours: str) -> str:
    measured = ((row.batch, row.ratio(family, ours)) for row in rows)
    ratios = sorted((batch, ratio) for batch, ratio in measured if ratio is not None)
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


def _crossovers(results: Results) -> str:
    """Return the batch from which each dense family is faster than srigl, for each layer."""
    layers: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row.operation == "forward" and row.weights == "warm":
            layers.setdefault((_layer(row), f"{row.sparsity:.0%}"), []).append(row)
    if not layers:
        return "Not measured."
    lines = [
        (*layer, *(_crossing(rows, family, ours) for family, ours in _CROSSING.items()))
        for layer, rows in layers.items()
    ]
    head = ("layer", "sparsity", *(_FAMILIES["gpu"][family] for family in _CROSSING))
    return (
        f"The smallest measured batch from which dense takes less time than srigl in the same type "
        f"(TF32: than srigl in float32); warm.\n\n{table(head, lines)}"
    )


def _machine(results: Results) -> str:
    content, native = results.content, results.native
    machine = dict(content["machine"])
    machine |= {
        "caches": ", ".join(f"{k} {_size(v)}" for k, v in machine.get("caches", {}).items())
    }
    machine |= {name: _size(machine[name]) for name in ("memory", "L2") if name in machine}
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value != "")
    versions = ", ".join(f"{name} {version}" for name, version in native["versions"].items())
    n_cases = len(results.rows)
    lines = [facts, versions, f"{content['started']}, {content['seconds']:.0f} s, {n_cases} cases"]
    for process in results.processes:
        if "environment" in process:
            variables = ", ".join(f"`{k}={v}`" for k, v in sorted(process["environment"].items()))
            lines.append(f"{process['instructions']} instructions: {variables or 'nothing is set'}")
            kernels = {p["architecture"] for p in process["libraries"] if p.get("architecture")}
            if kernels:
                lines[-1] += f"; OpenBLAS chose {', '.join(sorted(kernels))}"
    return "\n".join(f"- {line}" for line in lines)


def _cpu_peaks(results: Results) -> str:
    rows = []
    for process in results.processes:
        for peaks in process["limits"]:
            rates = dict(peaks["bandwidth"])
            sizes = [size for size in rates if size in (1 << 15, 1 << 19, 1 << 22, 1 << 24)]
            bandwidths = (f"{_size(s)}: {rates[s] / 1e9:.0f}" for s in [*sizes, max(rates)])
            rows.append(
                (
                    process["instructions"],
                    str(peaks["threads"]),
                    f"{2 * peaks['multiply_adds'] / 1e9:.0f}",
                    f"{peaks['loads'] / 1e9:.2f} of {peaks['vector_bytes']} bytes",
                    ", ".join(bandwidths),
                )
            )
    head = ("instructions", "threads", "GFLOP/s", "10⁹ loads/s", "GB/s by working set")
    return table(head, rows)


def _gpu_peaks(results: Results) -> str:
    peaks = results.native["limits"][0]
    rows = [
        ("copy, bytes read and written", f"{peaks['copy_bandwidth'] / 1e9:,.0f} GB/s"),
        ("reads of shared memory", f"{peaks['shared_bandwidth'] / 1e9:,.0f} GB/s"),
        ("float32", f"{2 * peaks['multiply_adds'] / 1e12:.1f} TFLOP/s"),
        ("two events with nothing between them", f"{peaks['between_marks'] * 1e6:.2f} µs"),
    ]
    return table(("operation", "peak"), rows)


def _size(size: int) -> str:
    units = ("KiB", "MiB", "GiB")
    power = max(i for i in range(3) if i == 0 or size >= 1 << (10 * i + 10))
    return f"{size / (1 << (10 * power + 10)):.0f} {units[power]}"


def _empty_call(results: Results) -> str:
    row = next(results.find(n_in=16, n_out=16, threads=1), None)
    if row is None or row.ours is None:
        return "Not measured."
    others = ", ".join(
        f"{name} {row.time(name):.2f}" for name in row.contenders if name != row.main
    )
    return (
        f"A layer of 16 neurons with {row.fan_in} of 16 inputs each, batch 1, one thread: "
        f"{row.ours:.2f} µs. The others: {others}."
    )


def _sections(results: Results) -> Iterator[str]:
    """Yield a heading and a table for each operation, instruction set and number of threads."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in results.rows:
        if not row.is_empty:
            groups.setdefault((row.operation, row.instructions, row.threads), []).append(row)
    order = list(_TITLES)
    for operation, instructions, threads in sorted(
        groups, key=lambda key: (order.index(key[0]), key[1] == "avx2", key[2])
    ):
        rows = groups[operation, instructions, threads]
        only = ", AVX2 only" if instructions == "avx2" else ""
        yield f"## {_TITLES[operation]}{_threads(threads)}{only}"
        yield _updates(rows) if operation == "update" else _products(rows, results)


def _threads(threads: int) -> str:
    return f", {plural(threads, 'thread')}" if threads else ""


def _products(rows: Sequence[Row], results: Results) -> str:
    """Return a line for each case and each contender of ours; empty columns are left out."""
    families = _FAMILIES[results.benchmark]
    by_key = {row.key: row for row in results.rows}
    lines = []
    for row in rows:
        for name in _tried(row):
            if not name.startswith(row.main):
                continue
            forward = by_key.get(("forward", *row.key[1:])) if row.operation == "backward" else None
            ours, before = row.time(name), forward and forward.time(name)
            moved, share = row.bandwidth(name), row.roofline_share(name)
            host = row.contenders.get(name, {}).get("host_us")
            lines.append(
                {
                    "layer": _layer(row),
                    "sparsity": f"{row.sparsity:.0%}",
                    "batch": str(row.batch),
                    "weights": row.weights,
                    "type": name.removeprefix(row.main).lstrip(", ") or row.dtype,
                    "srigl, µs": _cell(row, name),
                    "host, µs": number(host) if host else "",
                    "forward passes": f"{ours / before:.2f}" if ours and before else "",
                    "GB/s": number(moved / 1e9) if moved else "",
                    "of the roofline": f"{share[0]:.0%} {share[1]}" if share else "",
                    **{
                        f"vs {label}": _ratio(row, family, name)
                        for family, label in families.items()
                    },
                }
            )
    head = [column for column in lines[0] if any(line[column] for line in lines)]
    return table(head, [[line[column] for column in head] for line in lines])


def _ratio(row: Row, family: str, ours: str) -> str:
    best, ratio = row.best(family), row.ratio(family, ours)
    return "" if best is None or ratio is None else f"{ratio:.2f}x ({number(best[1])} {best[0]})"


def _updates(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in _tried(row)))
    lines = []
    for row in rows:
        share = row.roofline_share()
        times = (_cell(row, name) for name in names)
        of_roofline = f"{share[0]:.0%} {share[1]}" if share else ""
        lines.append((_layer(row), f"{row.sparsity:.0%}", *times, of_roofline))
    head = ("layer", "sparsity", *(f"{name}, µs" for name in names), "of the roofline")
    return table(head, lines)


def _every_contender(results: Results) -> str:
    """Return the times of all contenders by batch; on a CPU for the headline layer at 90%."""
    rows: Iterable[Row] = (row for row in results.rows if row.operation != "update")
    if results.benchmark == "cpu":
        n_in, n_out = HEADLINE
        headline = {"operation": "forward", "n_in": n_in, "n_out": n_out, "sparsity": 0.9}
        ablated = sorted({row.ablated for row in results.rows if row.mask == "random"})
        rows = [row for n in ablated for row in results.find(**headline, ablated=n)]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        case = f"{_TITLES[row.operation]}, {_layer(row)}, {row.sparsity:.0%} sparse"
        groups.setdefault(f"{case}, {row.weights}{_threads(row.threads)}", []).append(row)
    parts = []
    for title, group in groups.items():
        names = dict.fromkeys(name for row in group for name in _tried(row))
        body = [
            (name, _family(group, name), *(_cell(row, name) for row in group)) for name in names
        ]
        head = ("contender", "family", *(f"batch {row.batch}" for row in group))
        parts.append(f"{title}, µs:\n\n{table(head, body)}")
    return "\n\n".join(parts) or "Not measured."


def _family(rows: Iterable[Row], name: str) -> str:
    entries = (row.contenders[name] for row in rows if name in row.contenders)
    family = next((str(entry["family"]) for entry in entries), "")
    return "srigl" if family == "ours" else family


def _tried(row: Row) -> list[str]:
    """Return the contenders of a row that were to be measured."""
    return [*row.contenders, *row.left_out("failed"), *row.left_out("wrong")]


def _cell(row: Row, name: str) -> str:
    """Return a contender's time, or a word that says why there is none."""
    for why in ("failed", "wrong"):
        if name in row.left_out(why):
            return f"**{why}**"
    by_host = row.contenders.get(name, {}).get("clock") == "host"
    return f"{row.times.get(name, '')}{', host clock' if by_host else ''}"


def _layer(row: Row) -> str:
    mask = "" if row.mask == "random" else f", {row.mask}"
    ablated = f", {row.ablated} ablated" if row.ablated else ""
    return f"{row.layer}, k = {row.fan_in}{mask}{ablated}"


def _cliffs(results: Results) -> str:
    lines = []
    for process in results.processes:
        for cliffs in process["cliffs"]:
            places = cliffs["found"]
            more = [f"and {len(places) - _MOST_CLIFFS} more"] if len(places) > _MOST_CLIFFS else []
            words = "; ".join([*places[:_MOST_CLIFFS], *more]) or "none"
            lines.append(f"- {plural(cliffs['threads'], 'thread')}: {words}")
    return "\n".join(lines) or "Not measured."


def _left_out(results: Results) -> str:
    """Return the missing libraries, and the contenders that failed, were wrong or do not fit."""
    lines = [
        f"- {library['library']}: {library['reason']}; `{library['install']}`"
        for library in results.native["absent"]
    ]
    for why, words in (("wrong", "**wrong**: "), ("failed", "failed: "), ("unfit", "")):
        reasons: Counter[Any] = Counter(
            item for row in results.rows for item in row.left_out(why).items()
        )
        for (name, reason), count in reasons.items():
            lines.append(f"- {words}{name}, {plural(count, 'case')}: {reason}")
    return "\n".join(lines) or "No library is missing, and no contender failed."
