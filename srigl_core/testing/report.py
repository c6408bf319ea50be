"""What became of the laws for one kernel."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    """How a kernel breaks a law.

    Parameters
    ----------
    message : str
        The first wrong element: what was expected, what was given, and the bound.
    code : str
        Python that shows it.
    shape : tuple of int
        (n_out, n_in) of the smallest problem found.
    examples : int
        Problems that were tried until one failed, that one included.
    """

    message: str
    code: str
    shape: tuple[int, int]
    examples: int


@dataclass(frozen=True)
class LawResult:
    """What became of one law.

    Parameters
    ----------
    law : Law
    status : str
        One of `STATUSES`.
    examples : int
        Problems on which it was checked, but for those tried to make a failure smaller.
    detail : str
        Why nothing was checked, or why a failure is expected.
    failure : Failure or None
    """

    law: Law
    status: str
    examples: int
    detail: str = ""
    failure: Failure | None = None

    def __str__(self) -> str:
        if self.failure is None:
            return f"{self.law.name}: {self.status}{self.detail and ': '}{self.detail}"
        return (
            f"{self.law.name}: {self.law.statement}\n"
            f"Compared with {self.law.against}, within {self.law.within}.\n\n"
            f"{textwrap.indent(self.failure.message, '    ')}\n\n"
            f"{textwrap.indent(self.failure.code, '    ')}"
        )

    @property
    def in_a_line(self) -> str:
        """The failure's message; of a traceback its last line."""
        assert self.failure is not None
        return self.failure.message.splitlines()[-1]


@dataclass(frozen=True)
class Report:
    """What became of the laws for one kernel; prints as a table, with the failures below.

    Parameters
    ----------
    kernel : str
    results : tuple of LawResult
    max_examples, seed : int
    left_out : tuple of str
        What no problem had, as the kernel does not declare it.
    """

    kernel: str
    results: tuple[LawResult, ...]
    max_examples: int
    seed: int
    left_out: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many laws had each of `STATUSES`."""
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in STATUSES}

    @property
    def n_run(self) -> int:
        """How many laws were checked."""
        return len(self.results) - self.counts["not applicable"]

    @property
    def examples(self) -> int:
        """Problems tried, of all laws."""
        return sum(result.examples for result in self.results)

    @property
    def failures(self) -> tuple[LawResult, ...]:
        """The laws that are broken, but for those expected to be."""
        return tuple(result for result in self.results if result.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether a law was checked, and none failed that was not expected to."""
        return self.n_run > 0 and not self.failures

    @property
    def summary(self) -> str:
        """The counts, in a line; and in another what was left out."""
        tally = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        if not self.n_run:
            return f"{self.kernel}: nothing was checked: {tally}"
        told = f"{self.kernel}: {self.n_run} checks run on {self.examples:,} examples: {tally}"
        if self.left_out:
            told += f"\nnot declared, so not tried: {', '.join(self.left_out)}"
        return told

    def __str__(self) -> str:
        width = max((len(result.law.name) for result in self.results), default=0)
        lines = [
            f"{result.law.name:<{width}}  {result.examples:>6,}  {result.status}"
            + (f": {result.detail}" if result.detail else "")
            for result in self.results
        ]
        return "\n\n".join(["\n".join(lines), self.summary, *self.failures_shown()])

    def failures_shown(self) -> Iterator[str]:
        """Yield the failures as text: each problem once, with all laws that it breaks."""
        by_problem: dict[str, list[LawResult]] = {}
        for result in self.failures:
            assert result.failure is not None
            problem = result.failure.code.replace(result.law.name, "")
            by_problem.setdefault(problem, []).append(result)
        for first, *others in by_problem.values():
            lines = [f"{other.law.name}: {other.in_a_line}" for other in others]
            more = f"\n\nThe same problem breaks\n{textwrap.indent(chr(10).join(lines), '    ')}"
            yield f"{first}{more if others else ''}"

    def as_json(self) -> dict[str, Any]:
        """Return all of it in types that JSON has."""
        return {
            "kernel": self.kernel,
            "ok": self.ok,
            "max_examples": self.max_examples,
            "seed": self.seed,
            "counts": self.counts,
            "left_out": self.left_out,
            "laws": [_as_json(result) for result in self.results],
        }


def _as_json(result: LawResult) -> dict[str, Any]:
    law, failure = result.law, result.failure
    found = {
        "law": law.name,
        "operation": law.operation,
        "statement": law.statement,
        "against": law.against,
        "within": law.within,
        "status": result.status,
        "examples": result.examples,
        "detail": result.detail,
    }
    if failure is not None:
        found["failure"] = {
            "message": failure.message,
            "code": failure.code,
            "shape": failure.shape,
            "examples": failure.examples,
        }
    return found
