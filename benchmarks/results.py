"""The result file: written, read again, and the figures that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srigl_core._files import write_whole
from srigl_core.benchmarks.timing import Timing
from srigl_core.errors import FileFormatError

__all__ = [
    "FORMAT",
    "OURS",
    "Results",
    "Row",
    "load_results",
    "microseconds",
    "rounded",
    "save_results",
]

FORMAT = 1
OURS = {"cpu": "srigl numba", "gpu": "srigl cupy"}
"""Our contender on each device."""

_USUAL: dict[str, dict[str, Any]] = {
    "cpu": {"weights": "hot", "dtype": "float32", "mask": "random", "instructions": "native"},
    "gpu": {"weights": "warm", "mask": "random", "ablated": 0},
}
_EMPTY = 1 << 8
_MICRO = 1e6
_KEYS = ("benchmark", "machine", "processes", "settings", "started", "seconds")


@dataclass(frozen=True)
class Row:
    """One case with the times of its contenders, in microseconds.

    Parameters
    ----------
    case : mapping
        As in the file; its items are also attributes.
    main : str
        Our contender.
    """

    case: Mapping[str, Any]
    main: str = OURS["cpu"]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.case[name]
        except KeyError:
            raise AttributeError(f"a case has no {name!r}") from None

    @property
    def layer(self) -> str:
        """Inputs and outputs."""
        return f"{self.case['n_in']}→{self.case['n_out']}"

    @property
    def ablated(self) -> int:
        """Number of ablated neurons."""
        return int(self.case["n_out"] - self.case["n_active"])

    @property
    def is_empty(self) -> bool:
        """Whether the layer is so small that only the call is measured."""
        return bool(self.case["n_in"] * self.case["n_out"] <= _EMPTY)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this case from the others of a file."""
        layer = (self.n_in, self.n_out, self.fan_in, self.n_active, self.mask)
        inputs = (self.batch, self.threads, self.weights, self.dtype, self.instructions)
        return (self.operation, *layer, *inputs)

    @property
    def label(self) -> str:
        """The case in words."""
        parts = [self.operation, self.layer, f"{self.sparsity:.0%}"]
        parts += [f"batch {self.batch}"] if self.batch else []
        parts += [f"threads {self.threads}"] if self.threads > 1 else []
        parts += [] if self.mask == "random" else [self.mask]
        parts += [f"{self.ablated} ablated"] if self.ablated else []
        parts += [word for word in (self.dtype, self.instructions) if word in ("float64", "avx2")]
        return " ".join([*parts, self.weights])

    @property
    def ours(self) -> float | None:
        """Our time, or None if it was not measured."""
        return self.time(self.main)

    def time(self, contender: str) -> float | None:
        """Return a contender's median, or None if it was not measured."""
        entry = self.case["contenders"].get(contender)
        return None if entry is None else float(entry["median_us"])

    def spread(self, contender: str) -> tuple[float, float]:
        """Return the quartiles of a contender's times."""
        entry = self.case["contenders"][contender]
        return float(entry["lower_us"]), float(entry["upper_us"])

    def best(self, family: str) -> tuple[str, float] | None:
        """Return the name and the time of the fastest of a family, or None if it has none here."""
        medians = [
            (name, float(entry["median_us"]))
            for name, entry in self.case["contenders"].items()
            if entry["family"] == family
        ]
        return min(medians, key=lambda item: item[1], default=None)

    def ratio(self, family: str, contender: str | None = None) -> float | None:
        """Return how many times as long as `contender`, or ours, the best of a family takes."""
        best, time = self.best(family), self.time(contender or self.main)
        return None if best is None or time is None else best[1] / time

    def roofline_share(self, contender: str | None = None) -> tuple[float, str] | None:
        """Return the least time as a share of that of `contender`, or ours, and what bounds it."""
        name = contender or self.main
        time, entry = self.time(name), self.case["contenders"].get(name, {})
        bound = {**self.case, **entry} if name == self.main else entry
        if time is None or "least_us" not in bound:
            return None
        return bound["least_us"] / time, bound["limited_by"]

    def bandwidth(self, contender: str) -> float | None:
        """Return the bytes a second that a contender moves, or None if that is not recorded."""
        entry = self.case["contenders"].get(contender, {})
        return 1e6 * entry["bytes"] / entry["median_us"] if "bytes" in entry else None

    def left_out(self, why: str) -> Mapping[str, str]:
        """Return the reasons by contender; `why` is "unfit", "failed" or "wrong"."""
        reasons: Mapping[str, str] = self.case.get(why, {})
        return reasons

    def summary(self) -> str:
        """Return our time, and how many times as long the best dense and CSR contenders take."""
        if self.ours is None:
            return "ours was not measured"
        ratios = ((family, self.ratio(family)) for family in ("dense", "tf32", "fp16", "csr"))
        words = [f"{ratio:.2f}x {family}" for family, ratio in ratios if ratio is not None]
        return ", ".join([f"{self.ours:.4g} us", *words])


@dataclass(frozen=True)
class Results:
    """A whole run.

    Parameters
    ----------
    content : mapping
        As in the file.
    """

    content: Mapping[str, Any]

    @property
    def benchmark(self) -> str:
        """Either "cpu" or "gpu"."""
        return str(self.content["benchmark"])

    @property
    def ours(self) -> str:
        """Our contender."""
        return OURS[self.benchmark]

    @property
    def rows(self) -> list[Row]:
        """Every case of every process."""
        return [Row(case, self.ours) for process in self.processes for case in process["cases"]]

    @property
    def processes(self) -> Sequence[Mapping[str, Any]]:
        """On a CPU one process for each set of instructions; on a GPU one."""
        processes: Sequence[Mapping[str, Any]] = self.content["processes"]
        return processes

    @property
    def native(self) -> Mapping[str, Any]:
        """The process that was not restricted to AVX2."""
        return next(p for p in self.processes if p["instructions"] != "avx2")

    @property
    def wrong(self) -> list[str]:
        """A line for each result that was wrong."""
        return [why for row in self.rows for why in row.left_out("wrong").values()]

    def find(self, **wanted: Any) -> Iterator[Row]:
        """Yield the rows whose case has these values.

        Unless others are asked for: hot or warm weights, float32, a random mask, all instructions;
        on a GPU also no ablated neurons.
        """
        case = {**_USUAL[self.benchmark], **wanted}
        for row in self.rows:
            if all(getattr(row, name) == value for name, value in case.items()):
                yield row


def load_results(path: Path) -> Results:
    """Read a file that `save_results` wrote.

    Raises
    ------
    FileFormatError
        If it is another file, or of another format.
    OSError
        If it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        content, problem = {}, f"is not JSON ({error})"
    else:
        problem = _problem_of(content)
    if problem:
        raise FileFormatError(f"{str(path)!r} {problem}; run srigl bench cpu")
    return Results(content)


def _problem_of(content: Any) -> str:
    """Return why a file cannot be read, or ""."""
    if not isinstance(content, dict) or not {"format", "benchmark"} <= set(content):
        return "is not a result of srigl bench"
    if content["format"] != FORMAT:
        return f"has format {content['format']!r}, but this version reads format {FORMAT}"
    if content["benchmark"] not in OURS:
        return f"has benchmark={content['benchmark']!r}, which is not one of {', '.join(OURS)}"
    missing = [key for key in _KEYS if key not in content]
    return f"lacks {', '.join(missing)}" if missing else ""


def save_results(path: Path, results: Results) -> None:
    """Write the results as JSON, one case a line, and replace an existing file at once."""
    processes = [
        _braced("{}", [f"{json.dumps(key)}: {_lines(value)}" for key, value in process.items()])
        for process in results.processes
    ]
    members = [
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in results.content.items()
        if key != "processes"
    ]
    text = _braced("{}", [*members, f'"processes": {_braced("[]", processes)}'])
    write_whole(path, f"{text}\n".encode())


def microseconds(timing: Timing) -> dict[str, Any]:
    """Return a timing as the file records it."""
    return {
        "median_us": rounded(timing.median * _MICRO),
        "lower_us": rounded(timing.lower * _MICRO),
        "upper_us": rounded(timing.upper * _MICRO),
        "rounds": timing.rounds,
        "calls": timing.calls,
        **timing.details,
    }


def rounded(number: float) -> float:
    """Return a number rounded to four digits."""
    return float(f"{number:.4g}")


def _lines(value: Any) -> str:
    """Return JSON of a list with one item a line, and of anything else on one line."""
    if isinstance(value, list) and value:
        return _braced("[]", [json.dumps(item, ensure_ascii=False) for item in value])
    return json.dumps(value, ensure_ascii=False)


def _braced(braces: str, items: Sequence[str]) -> str:
    return "\n".join([braces[0], ",\n".join(items), braces[1]])
