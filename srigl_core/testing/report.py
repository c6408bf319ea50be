"""The results of trying the laws on a kernel."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from srigl_core.testing.coverage import Coverage, Trait
from srigl_core.testing.law import Law

__all__ = ["STATUSES", "ConformanceError", "Failure", "LawResult", "Report"]

STATUSES = ("passed", "failed", "not applicable", "expected failure", "unexpected pass")


class ConformanceError(AssertionError):
    """A kernel breaks a law, or none could be checked; the message is the report.

    Attributes
    ----------
    report : Report
    """

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Failure:
    """A problem on which a kernel breaks a law.

    Parameters
    ----------
    message : str
        The first wrong element: the expected value, the result, and the bound.
    code : str
        Python that shows the failure again.
    shape : tuple of int
        (n_out, n_in) of the problem.
    examples : int
        Problems tried until the first one failed, including that one.
    """

    message: str
    code: str
    shape: tuple[int, int]
    examples: int


@dataclass(frozen=True)
class LawResult:
    """The result of trying one law.

    Parameters
    ----------
    law : Law
    status : str
        One of `STATUSES`.
    examples : int
        Problems on which the law was checked, without those tried to shrink a failure.
    detail : str
        Why nothing was checked, or why a failure is expected.
    failure : Failure or None
    traits : collections.Counter
        How many of the problems have which trait, for `Coverage`.
    """

    law: Law
    status: str
    examples: int
    detail: str = ""
    failure: Failure | None = None
    traits: Counter[Trait] = field(default_factory=Counter, repr=False)

    def __str__(self) -> str:
        if self.failure is None:
            return f"{self.law.name}: {self.status}{self.detail and ': '}{self.detail}"
        return (
            f"{self.law.name}: {self.law.statement}\n"
            f"Compared with {self.law.against}, {self.law.tolerance}.\n\n"
            f"{textwrap.indent(self.failure.message, '    ')}\n\n"
            f"{textwrap.indent(self.failure.code, '    ')}"
        )


@dataclass(frozen=True)
class Report:
    """The results of all laws for one kernel; prints as a table, followed by the failures.

    Parameters
    ----------
    kernel : str
    results : tuple of LawResult
    max_examples, seed : int
    left_out : tuple of str
        What the kernel does not declare, so that no problem has it.
    coverage : Coverage or None
        What the problems had.
    has_threads : bool
        Whether a call could have more than one thread.
    """

    kernel: str
    results: tuple[LawResult, ...]
    max_examples: int
    seed: int
    left_out: tuple[str, ...] = ()
    coverage: Coverage | None = None
    has_threads: bool = True

    @property
    def counts(self) -> dict[str, int]:
        """The number of laws with each status of `STATUSES`."""
        counts = Counter(result.status for result in self.results)
        return {status: counts[status] for status in STATUSES}

    @property
    def n_run(self) -> int:
        """The number of laws that were checked."""
        return len(self.results) - self.counts["not applicable"]

    @property
    def examples(self) -> int:
        """The number of problems tried, for all laws."""
        return sum(result.examples for result in self.results)

    @property
    def failures(self) -> tuple[LawResult, ...]:
        """The results of laws that are broken and not expected to be."""
        return tuple(result for result in self.results if result.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether at least one law was checked, and there are no `failures`."""
        return self.n_run > 0 and not self.failures

    @property
    def summary(self) -> str:
        """The counts in one line, and what was left out in another."""
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        if not self.n_run:
            return f"{self.kernel}: nothing was checked: {counts}"
        line = f"{self.kernel}: {self.n_run} checks run on {self.examples:,} examples: {counts}"
        if self.left_out:
            line += f"\nnot declared, so not tried: {', '.join(self.left_out)}"
        if not self.has_threads:
            line += "\nnot tried: more than one thread"
        return line

    @property
    def table(self) -> list[str]:
        """A line for each law: its name, the number of examples, the result."""
        width = max((len(result.law.name) for result in self.results), default=0)
        return [
            f"{result.law.name:<{width}}  {result.examples:>6,}  {result.status}"
            + (f": {result.detail}" if result.detail else "")
            for result in self.results
        ]

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(self.table), self.summary, *self.failures_shown()])

    def failures_shown(self) -> Iterator[str]:
        """Yield the failures as text: each problem once, with all laws that it breaks."""
        by_problem: dict[str, list[tuple[LawResult, str]]] = {}
        for result in self.failures:
            assert result.failure is not None
            problem = result.failure.code.replace(result.law.name, "")
            last_line = result.failure.message.splitlines()[-1]
            by_problem.setdefault(problem, []).append((result, last_line))
        for (first, _), *others in by_problem.values():
            lines = [f"\n    {other.law.name}: {line}" for other, line in others]
            yield f"{first}\n\nThe same problem breaks{''.join(lines)}" if lines else str(first)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        names = ("kernel", "ok", "max_examples", "seed", "counts", "left_out", "has_threads")
        content = {name: getattr(self, name) for name in names}
        if self.coverage is not None:
            content["coverage"] = asdict(self.coverage)
        return {**content, "laws": [_as_json(result) for result in self.results]}


def _as_json(result: LawResult) -> dict[str, Any]:
    law_names = ("operation", "statement", "against", "tolerance")
    content = {"law": result.law.name, **{name: getattr(result.law, name) for name in law_names}}
    content |= {name: getattr(result, name) for name in ("status", "examples", "detail")}
    if result.failure is not None:
        content["failure"] = asdict(result.failure)
    return content
