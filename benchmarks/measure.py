"""The process that measures: ``python -m srigl_core.benchmarks.measure SETTINGS RESULT``.

It is a process of its own because the libraries read their variables when they are loaded, and
because what else an interpreter has running would take part.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srigl_core.benchmarks.caches import Flush
from srigl_core.benchmarks.cases import Case, avx2_cases, chosen_cases, matching
from srigl_core.benchmarks.cliffs import measure_cliffs
from srigl_core.benchmarks.contenders import Contender, guest, load_contenders
from srigl_core.benchmarks.contenders.contender import Bind
from srigl_core.benchmarks.limits import Limits, least_seconds, measure_limits, needs
from srigl_core.benchmarks.pools import relevant_environment, rest, thread_limit
from srigl_core.benchmarks.problems import Problem, check
from srigl_core.benchmarks.results import Row, microseconds
from srigl_core.benchmarks.results import rounded as _rounded
from srigl_core.benchmarks.timing import Cold, Hot, interleaved
from srigl_core.benchmarks.versions import versions
from srigl_core.errors import SriglError
from srigl_core.testing.targets import as_backend

__all__ = ["Settings", "chosen", "measure"]

_OTHER_PACKAGES = ("torch", "jax", "brainevent", "threadpoolctl")
_MICRO = 1e6


@dataclass(frozen=True)
class Settings:
    """What one process measures.

    Parameters
    ----------
    quick : bool
    threads : tuple of int
    only : tuple of str
        See `srigl_core.benchmarks.cases.matching`.
    masks : str
        Folder of learned layers; "" is none.
    seconds : float
        For each case, about.
    cliffs : bool
        Whether to measure the batches one by one, too.
    instructions : {"native", "avx2"}
    kernel : str
        Somebody else's, ``module:attribute`` or a registered name, to be measured beside ours; ""
        is none. Cases that it does not declare to take on are left out.
    """

    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    only: tuple[str, ...] = ()
    masks: str = ""
    seconds: float = 0.6
    cliffs: bool = True
    instructions: str = "native"
    kernel: str = ""


def chosen(settings: Settings) -> list[Case]:
    """Return the cases that `settings` asks for."""
    if settings.instructions == "avx2":
        cases = avx2_cases(settings.threads)
    else:
        masks = Path(settings.masks) if settings.masks else None
        cases = chosen_cases(quick=settings.quick, threads=settings.threads, masks=masks)
    if settings.kernel:
        backend = as_backend(settings.kernel)
        cases = [case for case in cases if guest.takes(backend, case)]
    return matching(cases, settings.only, settings.instructions)


def measure(settings: Settings) -> dict[str, Any]:
    """Measure everything that `settings` asks for, in this process.

    Returns
    -------
    dict
        What the JSON holds of this process: its environment, limits, cases and cliffs.

    Raises
    ------
    WrongResultError
        If a contender computes something else than the reference.
    """
    contenders, absent = load_contenders()
    if settings.kernel:
        contenders += guest.contenders(as_backend(settings.kernel))
    limits = {n: measure_limits(n) for n in settings.threads}
    cases = chosen(settings)
    session = _Session(contenders, limits, settings)
    measured: list[dict[str, Any]] = []
    for _, group in itertools.groupby(cases, key=lambda case: (case.layer, case.dtype)):
        measured += session.measure_layer(list(group), len(measured), len(cases))
    cliffs = [measure_cliffs(n) for n in settings.threads] if settings.cliffs else []
    return {
        "instructions": settings.instructions,
        "environment": relevant_environment(),
        "versions": versions(*_OTHER_PACKAGES),
        "libraries": _libraries(),
        "absent": [dataclasses.asdict(library) for library in absent],
        "limits": [dataclasses.asdict(found) for found in limits.values()],
        "cases": measured,
        "cliffs": cliffs,
    }


class _Session:
    """What stays the same from layer to layer."""

    def __init__(
        self, contenders: Sequence[Contender], limits: dict[int, Limits], settings: Settings
    ) -> None:
        self._contenders, self._limits, self._settings = contenders, limits, settings

    def measure_layer(self, cases: Sequence[Case], done: int, n_cases: int) -> list[dict[str, Any]]:
        """Measure the cases of one layer, all of one dtype."""
        largest = max(max(case.batch for case in cases), 1)
        layer = _PreparedLayer(cases[0], largest)
        records = []
        for number, case in enumerate(cases, done + 1):
            with thread_limit(case.threads):
                records.append(self._measure_case(layer, case))
            print(f"[{number}/{n_cases}] {_line(case, records[-1])}", flush=True)
        return records

    def _measure_case(self, layer: _PreparedLayer, case: Case) -> dict[str, Any]:
        rest()
        batch = layer.problem.batch(max(case.batch, 1), case.threads)
        flush = Flush(case.threads) if case.cold else None
        runs: dict[str, Hot | Cold] = {}
        families = {}
        for contender in self._contenders:
            if contender.operation != case.operation or contender.unfit(case):
                continue
            call = layer.bind(contender)(batch)
            layer.check(contender, call(), case)
            families[contender.name] = contender.family
            if flush is None:
                runs[contender.name] = Hot(call)
            else:
                other = layer.bind(contender, other=True)(batch)
                other()
                runs[contender.name] = Cold(call, other, flush)
        timings = interleaved(
            runs,
            seconds=self._settings.seconds,
            rest=rest if case.threads > 1 else lambda: None,
        )
        seconds, resource = self._least(case)
        return {
            **_described(case, self._settings.instructions),
            "least_us": _rounded(seconds * _MICRO),
            "limited_by": resource,
            "contenders": {
                name: {"family": families[name], **microseconds(timing)}
                for name, timing in timings.items()
            },
        }

    def _least(self, case: Case) -> tuple[float, str]:
        layer = case.layer
        need = needs(
            case.operation,
            n_in=layer.n_in,
            n_out=layer.n_out,
            n_active=layer.n_active,
            fan_in=layer.fan_in,
            batch=case.batch,
            itemsize=8 if case.dtype == "float64" else 4,
        )
        return least_seconds(need, self._limits[case.threads], cold=case.cold)


class _PreparedLayer:
    """A layer's problem, and what each contender made of its weight, when first needed."""

    def __init__(self, case: Case, largest_batch: int) -> None:
        self._arguments = (case.layer, largest_batch, case.dtype)
        self.problem = Problem(*self._arguments)
        self._problems = {("", 1.0, False): self.problem}
        self._bound: dict[tuple[Contender, bool], Bind] = {}

    def bind(self, contender: Contender, *, other: bool = False) -> Bind:
        """Return what makes a contender's call, for this weight or another of the same numbers."""
        key = (contender, other)
        if key not in self._bound:
            self._bound[key] = contender.prepare(self._problem(contender, other))
        return self._bound[key]

    def check(self, contender: Contender, result: Any, case: Case) -> None:
        """Raise WrongResultError if a result is not what it should be."""
        problem = self._problem(contender, False)
        expected = problem.results(case.operation, max(case.batch, 1))
        check(contender.name, contender.read(result, problem), expected)

    def _problem(self, contender: Contender, other: bool) -> Problem:
        key = (contender.values, contender.share, other)
        if key not in self._problems:
            problem = self.problem
            if other:
                whole = ("", 1.0, True)
                if whole not in self._problems:
                    self._problems[whole] = Problem(*self._arguments, seed=1)
                problem = self._problems[whole]
            if contender.values:
                problem = problem.narrowed(contender.values)
            if contender.share < 1:
                problem = problem.cut(contender.share)
            self._problems[key] = problem
        return self._problems[key]


def _described(case: Case, instructions: str) -> dict[str, Any]:
    return {
        **case.facts(),
        "threads": case.threads,
        "weights": "cold" if case.cold else "hot",
        "instructions": instructions,
    }


def _line(case: Case, record: dict[str, Any]) -> str:
    """Return one line of progress: the case, our time, and how many times slower others are."""
    return f"{' '.join(case.words())}: {Row(record).summary('dense', 'csr')}"


def _libraries() -> list[dict[str, Any]]:
    """Return the libraries with threads, and which kernels BLAS chose; no paths."""
    from threadpoolctl import threadpool_info

    known = ("internal_api", "prefix", "version", "threading_layer", "architecture", "num_threads")
    return [{name: pool[name] for name in known if name in pool} for pool in threadpool_info()]


def main(settings_file: str, result_file: str) -> None:
    """Read the settings, measure, and write what was found."""
    given = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    try:
        result = measure(Settings(**given))
    except SriglError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
