"""What a run wrote: the JSON read again, and the numbers that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srigl_core.benchmarks.timing import Timing
from srigl_core.errors import FileFormatError

__all__ = [
    "FORMAT",
    "OURS",
    "OURS_ON_GPU",
    "Results",
    "Row",
    "load_results",
    "microseconds",
    "rounded",
    "save_results",
]

FORMAT = 1
OURS, OURS_ON_GPU = "srigl numba", "srigl cupy"
_OURS = {"cpu": OURS, "gpu": OURS_ON_GPU}
_USUAL: dict[str, dict[str, Any]] = {
    "cpu": {"weights": "hot", "dtype": "float32", "mask": "random", "instructions": "native"},
    "gpu": {"l2": "warm", "mask": "random", "ablated": 0},
}
_EMPTY = 1 << 8
_MICRO = 1e6
_KEYS = ("benchmark", "machine", "processes", "settings", "started", "seconds")


@dataclass(frozen=True)
class Row:
    """One case and the times of its contenders, in microseconds.

    Parameters
    ----------
    case : mapping
        As in the file.
    main : str
        Which contender is ours.
    """

    case: Mapping[str, Any]
    main: str = OURS

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
    def is_empty(self) -> bool:
        """Whether the layer is so small that only the call is measured."""
        return bool(self.case["n_in"] * self.case["n_out"] <= _EMPTY)

    @property
    def ours(self) -> float | None:
        """Our time, or None if it was not measured."""
        return self.time(self.main)

    def time(self, contender: str) -> float | None:
        """Return a contender's median, or None if it did not take part."""
        found = self.case["contenders"].get(contender)
        return None if found is None else float(found["median_us"])

    def spread(self, contender: str) -> tuple[float, float]:
        """Return the quartiles around a contender's median."""
        found = self.case["contenders"][contender]
        return float(found["lower_us"]), float(found["upper_us"])

    def family(self, family: str) -> dict[str, float]:
        """Return the medians of one family's contenders, the best first."""
        medians = {
            name: float(found["median_us"])
            for name, found in self.case["contenders"].items()
            if found["family"] == family
        }
        return dict(sorted(medians.items(), key=lambda item: item[1]))

    def best(self, family: str) -> tuple[str, float] | None:
        """Return the name and the time of the best of a family, or None if it has none here."""
        return next(iter(self.family(family).items()), None)

    def ratio(self, family: str, contender: str | None = None) -> float | None:
        """Return how many times as long as `contender`, or ours, the best of a family takes."""
        best, time = self.best(family), self.time(contender or self.main)
        return None if best is None or time is None else best[1] / time

    @property
    def fraction(self) -> float | None:
        """The least time that the machine allows, as a share of ours."""
        return None if self.ours is None else float(self.case["least_us"]) / self.ours

    def bandwidth(self, contender: str) -> float | None:
        """Return the bytes a second that a contender moves, or None if that is not known."""
        found = self.case["contenders"].get(contender, {})
        return 1e6 * found["bytes"] / found["median_us"] if "bytes" in found else None

    def share_of_floor(self, contender: str) -> tuple[float, str] | None:
        """Return the least time there can be as a share of a contender's, and what sets it."""
        found = self.case["contenders"].get(contender, {})
        if "least_us" not in found:
            return None
        return found["least_us"] / found["median_us"], found["limited_by"]

    def summary(self, *families: str) -> str:
        """Return our time, and how many times as long the best of each family takes."""
        if self.ours is None:
            return "ours was not measured"
        ratios = ((family, self.ratio(family)) for family in families)
        said = [f"{ratio:.2f}x {family}" for family, ratio in ratios if ratio is not None]
        return ", ".join([f"{self.ours:.4g} us", *said])


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
        """Return "cpu" or "gpu"."""
        return str(self.content["benchmark"])

    @property
    def ours(self) -> str:
        """Which contender is ours."""
        return _OURS[self.benchmark]

    @property
    def rows(self) -> list[Row]:
        """Every case of every process."""
        return [Row(case, self.ours) for process in self.processes for case in process["cases"]]

    @property
    def processes(self) -> Sequence[Mapping[str, Any]]:
        """One for each set of instructions; one alone on a GPU."""
        found: Sequence[Mapping[str, Any]] = self.content["processes"]
        return found

    @property
    def native(self) -> Mapping[str, Any]:
        """The process that was held to nothing."""
        return next(p for p in self.processes if p["instructions"] != "avx2")

    def find(self, **wanted: Any) -> Iterator[Row]:
        """Yield the rows whose case has these values.

        Where nothing else is asked for: hot weights, float32, a random mask, all instructions;
        on a GPU a warm second-level cache, and no neuron ablated.
        """
        case = {**_USUAL[self.benchmark], **wanted}
        for row in self.rows:
            if all(row.case[name] == value for name, value in case.items()):
                yield row


def load_results(path: Path) -> Results:
    """Read what `save_results` wrote.

    Raises
    ------
    FileFormatError
        If it is something else, or of another format.
    OSError
        If it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r} is no JSON ({error}); run srigl bench cpu") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FileFormatError(
            f"{str(path)!r} is no result of srigl bench in format {FORMAT}; run srigl bench cpu"
        )
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise FileFormatError(f"{str(path)!r} lacks {', '.join(missing)}; run srigl bench cpu")
    if content["benchmark"] not in _OURS:
        raise FileFormatError(
            f"{str(path)!r} holds a benchmark {content['benchmark']!r}, which is none of "
            f"{', '.join(_OURS)}; run srigl bench cpu"
        )
    return Results(content)


def save_results(path: Path, results: Results) -> None:
    """Write the results as JSON, one case to a line; a file that is there is replaced at once."""
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
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def microseconds(timing: Timing) -> dict[str, float]:
    """Return a timing as the file has it."""
    return {
        "median_us": rounded(timing.median * _MICRO),
        "lower_us": rounded(timing.lower * _MICRO),
        "upper_us": rounded(timing.upper * _MICRO),
        "rounds": timing.rounds,
        "calls": timing.calls,
    }


def rounded(number: float) -> float:
    """Return four digits."""
    return float(f"{number:.4g}")


def _lines(value: Any) -> str:
    """Return a list with a line for each of its items, and anything else on one line."""
    if isinstance(value, list) and value:
        return _braced("[]", [json.dumps(item, ensure_ascii=False) for item in value])
    return json.dumps(value, ensure_ascii=False)


def _braced(braces: str, items: Sequence[str]) -> str:
    return "\n".join([braces[0], ",\n".join(items), braces[1]])
