"""The result file: written, read again, and the figures that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from srigl_core._cost_model import ACTIVE_ROWS, DENSE, INT8
from srigl_core._files import parse_json, write_whole
from srigl_core.benchmarks.tables import number
from srigl_core.errors import FileFormatError

__all__ = [
    "FAMILIES",
    "FORMAT",
    "OURS",
    "Results",
    "Row",
    "Times",
    "load_results",
    "rounded",
    "save_results",
]

FORMAT = 1
OURS = {"cpu": "srigl numba", "gpu": "srigl cupy"}
"""Our contender on each device."""

FAMILIES = {"dense": DENSE, "active rows": ACTIVE_ROWS, "int8": INT8, "csr": "CSR"}
"""Families that compute the same product, and their names in tables. Int8 rounds the inputs."""

_USUAL: dict[str, dict[str, Any]] = {
    "cpu": {
        **{"weights": "hot", "dtype": "float32", "mask": "random", "ablated": 0},
        "instructions": "native",
    },
    "gpu": {"weights": "warm", "mask": "random", "ablated": 0},
}
_KEY = (
    *("operation", "n_in", "n_out", "fan_in", "n_active", "mask"),
    *("batch", "threads", "weights", "dtype", "instructions"),
)
_EMPTY = 1 << 8
_KEYS = ("benchmark", "machine", "processes", "settings", "started", "seconds")


class Times(NamedTuple):
    """Microseconds of a call; printing it gives a cell of a table."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        median, lower, upper = map(number, self)
        return f"{median} ({lower} to {upper})"


@dataclass(frozen=True)
class Row:
    """One case with the times of its contenders, in microseconds."""

    case: Mapping[str, Any]  # as in the file; its items are also attributes

    def __getattr__(self, name: str) -> Any:
        try:
            return self.case[name]
        except KeyError:
            raise AttributeError(f"a case has no {name!r}") from None

    @property
    def main(self) -> str:
        """Our contender."""
        return OURS["gpu" if self.instructions == "gpu" else "cpu"]

    @property
    def layer(self) -> str:
        """Inputs and outputs."""
        return f"{self.n_in}→{self.n_out}"

    @property
    def ablated(self) -> int:
        """Number of ablated neurons."""
        return int(self.n_out - self.n_active)

    @property
    def is_empty(self) -> bool:
        """Whether the layer is so small that only the call is measured."""
        return bool(self.n_in * self.n_out <= _EMPTY)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this case from the others of a file."""
        return tuple(self.case[name] for name in _KEY)

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

    @property
    def times(self) -> dict[str, Times]:
        """The median and the quartiles of each contender that was measured."""
        return {
            name: Times(entry["median_us"], entry["lower_us"], entry["upper_us"])
            for name, entry in self.contenders.items()
        }

    def time(self, contender: str) -> float | None:
        """Return a contender's median, or None if it was not measured."""
        times = self.times.get(contender)
        return None if times is None else times.median

    def best(self, family: str) -> tuple[str, float] | None:
        """Return the name and the time of the fastest of a family, or None if it has none here."""
        entries = self.contenders.items()
        times = [(name, e["median_us"]) for name, e in entries if e["family"] == family]
        return min(times, key=lambda item: item[1], default=None)

    def ratio(self, family: str, contender: str = "") -> float | None:
        """Return how many times as long as `contender`, or ours, the best of a family takes."""
        best, time = self.best(family), self.time(contender or self.main)
        return None if best is None or time is None else best[1] / time

    def roofline_share(self, contender: str = "") -> tuple[float, str] | None:
        """Return the least time as a share of that of `contender`, or ours, and what bounds it."""
        name = contender or self.main
        time, entry = self.time(name), self.contenders.get(name, {})
        bound = {**self.case, **entry} if name == self.main else entry
        if time is None or "least_us" not in bound:
            return None
        return bound["least_us"] / time, bound["limited_by"]

    def bandwidth(self, contender: str) -> float | None:
        """Return the bytes a second that a contender moves, or None if that is not recorded."""
        entry = self.contenders.get(contender, {})
        return 1e6 * entry["bytes"] / entry["median_us"] if "bytes" in entry else None

    def left_out(self, why: str) -> Mapping[str, str]:
        """Return the reasons by contender; `why` is "unfit", "failed" or "wrong"."""
        return dict(self.case.get(why, {}))

    def summary(self) -> str:
        """Return our time, and how many times as long the best of each family takes."""
        if self.ours is None:
            return "srigl was not measured"
        families = ("dense", "tf32", "fp16", *(family for family in FAMILIES if family != "dense"))
        ratios = ((family, self.ratio(family)) for family in families)
        words = [f"{ratio:.2f}x {family}" for family, ratio in ratios if ratio is not None]
        return ", ".join([f"{self.ours:.4g} us", *words])


@dataclass(frozen=True)
class Results:
    """A whole run."""

    content: Mapping[str, Any]  # as in the file

    @property
    def benchmark(self) -> str:
        """Either "cpu" or "gpu"."""
        return str(self.content["benchmark"])

    @property
    def rows(self) -> list[Row]:
        """Every case of every process."""
        return [Row(case) for process in self.processes for case in process["cases"]]

    @property
    def processes(self) -> Sequence[Mapping[str, Any]]:
        """On a CPU one process for each set of instructions; on a GPU one."""
        return list(self.content["processes"])

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

        Unless others are asked for: hot or warm weights, a random mask, no ablated neurons; on a
        CPU also float32 and all instructions.
        """
        case = {**_USUAL[self.benchmark], **wanted}
        for row in self.rows:
            if all(getattr(row, name) == value for name, value in case.items()):
                yield row


def load_results(path: Path) -> Results:
    """Read a file that `save_results` wrote; FileFormatError if it is another file or format."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        problem = _problem_of(content)
    except ValueError as error:
        problem = f"is not JSON ({error})"
    if problem:
        raise FileFormatError(f"{str(path)!r} {problem}; run srigl bench cpu")
    return Results(content)


def _problem_of(content: Any) -> str:
    """Return why a file cannot be read, or ""."""
    if not isinstance(content, dict) or not {"format", "benchmark"} <= set(content):
        return "is not a result of srigl bench"
    if content["format"] != FORMAT:
        return f"has format {content['format']!r}, but this version reads format {FORMAT}"
    if content["benchmark"] not in tuple(OURS):  # it may be no text
        return f"has benchmark={content['benchmark']!r}, which is not one of {', '.join(OURS)}"
    missing = [key for key in _KEYS if key not in content]
    return f"lacks {', '.join(missing)}" if missing else ""


def save_results(path: Path, results: Results) -> None:
    """Write the results as JSON, one case a line, and replace an existing file at once."""
    write_whole(path, (_json(results.content) + "\n").encode())


def _json(value: Any, depth: int = 0) -> str:
    """Return JSON with an item a line in the run, its processes, and the lists of a process."""
    opened = list if depth % 2 else dict
    if depth > 3 or not value or not isinstance(value, opened):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_json(each, depth + 1)}" for key, each in value.items()]
    else:
        items = [_json(each, depth + 1) for each in value]
    first, last = "{}" if opened is dict else "[]"
    return "\n".join([first, ",\n".join(items), last])


def rounded(number: float) -> float:
    """Return a number rounded to four digits."""
    return float(f"{number:.4g}")
