"""Try the laws on a kernel, and make what fails as small as it gets (extra ``test``)."""

from __future__ import annotations

import difflib
import math
import secrets
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srigl_core.contract import Backend, Capabilities
from srigl_core.errors import BackendUnavailableError, SriglError, ValueTypeError
from srigl_core.testing import laws as all_laws
from srigl_core.testing.function_backend import FunctionBackend
from srigl_core.testing.kernel_capabilities import capabilities_of, in_full, left_out
from srigl_core.testing.law import Law, LawViolation, NotApplicable, check
from srigl_core.testing.problem_code import code_for
from srigl_core.testing.problems import RecordedChoices, SeededChooser
from srigl_core.testing.report import ConformanceError, Failure, LawResult, Report
from srigl_core.testing.targets import as_backend

if TYPE_CHECKING:
    from hypothesis.database import ExampleDatabase

__all__ = ["check_kernel", "check_law", "law_named", "try_law", "verify"]


def check_kernel(
    function: Callable[..., Any],
    op: str | None = None,
    *,
    capabilities: Capabilities | None = None,
    asarray: Callable[..., Any] | None = None,
    index_dtype: Any | None = None,
    max_examples: int = 100,
    seed: int = 0,
    xfails: Mapping[str, str] | None = None,
) -> Report:
    """Check that a function obeys the laws of an operation.

    Parameters
    ----------
    function, op, capabilities, asarray, index_dtype
        As in `FunctionBackend`, which says what the function is called with.
    max_examples, seed, xfails
        As in `verify`.

    Returns
    -------
    Report

    Raises
    ------
    ConformanceError
        If a law is broken, or none could be checked; the message is the report.

    Examples
    --------
    >>> from srigl_core.testing import KernelCapabilities
    >>> def product(x, values, indices):
    ...     return np.einsum("bnk,nk->bn", x[:, indices], values)
    >>> able = KernelCapabilities(value_dtypes=frozenset({"float32", "float64"}))
    >>> print(check_kernel(product, capabilities=able, max_examples=5).counts["failed"])
    0
    """
    backend = FunctionBackend(
        function, op, capabilities=capabilities, asarray=asarray, index_dtype=index_dtype
    )
    report = verify(backend, max_examples=max_examples, seed=seed, xfails=xfails)
    if not report.ok:
        raise ConformanceError(report)
    return report


def verify(
    kernel: Any,
    *,
    op: str | None = None,
    laws: Sequence[Law] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    xfails: Mapping[str, str] | None = None,
    shrink: bool = True,
    progress: Callable[[Law], object] = lambda law: None,
) -> Report:
    """Try laws on a kernel.

    Parameters
    ----------
    kernel : str, Backend, class or function
        As in `as_backend`.
    op : str or None
        Only the laws of this operation, one of `srigl_core.contract.OPERATIONS`; of a function,
        what it computes.
    laws : sequence of Law, or None
        None is all of `LAWS`, or all of `op`.
    max_examples : int
        Problems for each law.
    seed : int
        Of the problems.
    xfails : mapping of str to str, or None
        Laws that are expected to fail, and why; besides those of the kernel's attribute ``xfails``.
        One that passes all the same is reported.
    shrink : bool
        Whether to look for the smallest problem that fails.
    progress : callable
        Called with each law before it is tried.

    Returns
    -------
    Report
        A law's first failure ends it.

    Raises
    ------
    SriglError
        If a name is unknown, `op` is not what a function was declared with, or another argument
        cannot be.
    BackendUnavailableError
        If the kernel cannot run here, or Hypothesis is missing.
    """
    if seed < 0 or max_examples < 1:
        raise SriglError(
            f"seed={seed} and max_examples={max_examples} must be at least 0 and at least 1"
        )
    if not isinstance(xfails or {}, Mapping):
        raise ValueTypeError(f"xfails={xfails!r} must map names of laws to reasons")
    backend = as_backend(kernel, op)
    if isinstance(backend, FunctionBackend):
        (own,) = backend.capabilities.operations
        if op not in (None, own):
            raise SriglError(f"{backend.name!r} is a function for {own}, not for {op}")
        op = own
    expected = {**getattr(backend, "xfails", {}), **(xfails or {})}
    for name in expected:
        law_named(name)
    chosen = laws or [law for law in all_laws.LAWS if op in (None, law.operation)]
    results = []
    for law in chosen:
        progress(law)
        results.append(
            try_law(
                backend,
                law,
                max_examples=max_examples,
                seed=seed,
                expected=expected.get(law.name),
                shrink=shrink,
                source=_source(kernel, backend),
            )
        )
    able = capabilities_of(backend)
    return Report(backend.name, tuple(results), max_examples, seed, tuple(left_out(able)))


def try_law(
    backend: Backend,
    law: Law,
    *,
    max_examples: int = 100,
    seed: int | None = 0,
    expected: str | None = None,
    shrink: bool = True,
    source: str | None = None,
    database: ExampleDatabase | None = None,
) -> LawResult:
    """Try one law on a backend.

    Parameters
    ----------
    backend : Backend
    law : Law
    max_examples, shrink
        As in `verify`.
    seed : int or None
        None draws other problems each time.
    expected : str or None
        Why it is expected to fail.
    source : str or None
        Python that makes the backend; None is what its name tells.
    database : ExampleDatabase or None
        Hypothesis's, where failures are kept, and tried first the next time.

    Raises
    ------
    BackendUnavailableError
        If Hypothesis is missing.
    """
    if law.operation not in backend.capabilities.operations:
        return LawResult(law, "not applicable", 0, f"it does not offer {law.operation}")
    able = capabilities_of(backend)
    for what in _NEEDED[law.operation]:
        if not getattr(able, what):
            return LawResult(law, "not applicable", 0, f"it declares no {what}")
    tried = _Tried(backend, law)
    _run(tried, max_examples, seed, shrink, database)
    if tried.error is None:
        if not tried.examples:
            return LawResult(law, "not applicable", 0, tried.reason)
        status = "passed" if expected is None else "unexpected pass"
        return LawResult(law, status, tried.examples, expected or "")
    failure = tried.failure(source or repr(backend.name))
    status = "failed" if expected is None else "expected failure"
    return LawResult(law, status, failure.examples, expected or "", failure)


def check_law(kernel: Any, law: str | Law, problem: Any) -> None:
    """Check one law on one problem.

    Parameters
    ----------
    kernel : str, Backend, class or function
        As in `as_backend`.
    law : str or Law
    problem : MatmulProblem, UpdateProblem or sequence of int
        Or the choices that it is made of, as a report tells them.

    Raises
    ------
    LawViolation
        If it does not hold.
    NotApplicable
        If the problem has nothing to check, or the kernel does not take it on.
    SriglError
        If there is no such law.
    """
    found = law_named(law) if isinstance(law, str) else law
    backend = as_backend(kernel, found.operation)
    if isinstance(problem, Sequence):
        problem = found.build(RecordedChoices(problem), capabilities_of(backend))
    check(backend, found, problem)


def law_named(name: str) -> Law:
    """Return a law by its name.

    Raises
    ------
    SriglError
        If there is none; tells the nearest names.
    """
    by_name = {law.name: law for law in all_laws.LAWS}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=3) or list(by_name)
        raise SriglError(f"no law is called {name!r}; there are {', '.join(near)}")
    return by_name[name]


_NEEDED = {
    "condensed_matmul": ("value_dtypes", "index_dtypes", "activations"),
    "condensed_matmul_backward": ("value_dtypes", "index_dtypes"),
    "update_mask": ("value_dtypes",),
}
"""Capabilities without which an operation has no problems."""

_COMPARED = 5
"""Failures of which the one of the smallest layer is made smaller."""


@dataclass
class _Tried:
    """A law on its way: what was tried on a backend, and the last problem that failed."""

    backend: Backend
    law: Law
    examples: int = 0
    reason: str = ""
    error: Exception | None = None
    first: int = 0
    problem: Any = None
    choices: list[int] = field(default_factory=list)

    def attempt(self, chooser: Any) -> None:
        """Try a problem; a failure is kept, and raised."""
        problem = self.law.build(chooser, capabilities_of(self.backend))
        try:
            with np.errstate(all="ignore"):
                check(self.backend, self.law, problem)
        except NotApplicable as nothing:
            self.reason = str(nothing)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as raised:  # SystemExit, a panic of Rust, pytest's skip
            error = (
                raised
                if isinstance(raised, Exception)
                else RuntimeError(f"the kernel would have ended Python: {raised!r}")
            )
            self.first = self.first or self.examples + 1
            self.error, self.problem, self.choices = error, problem, list(chooser.made)
            raise error from raised.__cause__
        else:
            self.examples += 1

    def failure(self, source: str) -> Failure:
        message = str(self.error)
        if not isinstance(self.error, LawViolation):
            message = "".join(traceback.format_exception(self.error, limit=-4)).rstrip()
        code = code_for(self.law, self.problem, self.choices, source)
        weight = self.problem.weight
        return Failure(message, code, tuple(weight.shape), self.first)


def _run(
    tried: _Tried,
    max_examples: int,
    seed: int | None,
    shrink: bool,
    database: ExampleDatabase | None,
) -> None:
    """Try a law on what failed earlier, on problems of seeds, and on smaller ones if one fails.

    Hypothesis shrinks, and does not search: it likes to choose again what it chose before, and
    in a hundred problems has left out a value type, or all subnormal numbers.
    """
    try:
        from srigl_core.testing.shrinking import kept_failures, shrunk
    except ImportError as error:
        raise BackendUnavailableError(
            "the laws are tried with Hypothesis, which is not installed; "
            "pip install 'srigl-core[test]'"
        ) from error

    if database is not None:
        kept_failures(tried.attempt, database)
        if tried.error is not None:
            return
    seeds = secrets.randbits(32) if seed is None else seed, zlib.crc32(tried.law.name.encode())
    failures: list[tuple[int, list[int]]] = []
    for number in range(max_examples):
        try:
            tried.attempt(SeededChooser(*seeds, number))
        except Exception as error:
            if error is not tried.error:
                raise  # no kernel's: the problem could not be built
            failures.append((math.prod(tried.problem.weight.shape), tried.choices))
        if len(failures) == (_COMPARED if shrink else 1):
            break
    if failures and shrink:
        shrunk(tried.attempt, min(failures)[1], database)


def _source(kernel: Any, backend: Backend) -> str:
    """Return Python that makes the kernel again; its last line names it."""
    if isinstance(kernel, str):
        return repr(kernel)
    if not isinstance(backend, FunctionBackend):
        return "\n".join(_imported(kernel, "kernel = ...  # put your backend here"))
    given = backend.given
    line, name = _imported(backend.function, "kernel = ...  # put your function here")
    if hasattr(backend.function, "declared") and not given:
        return f"{line}\n{name}"
    (operation,) = backend.capabilities.operations
    imports, arguments = [line], [name, f'"{operation}"']
    if "capabilities" in given:
        imports.append("from srigl_core.testing import KernelCapabilities")
        arguments.append(f"capabilities={in_full(given['capabilities'])!r}")
    if "asarray" in given:
        line, name = _imported(given["asarray"], "asarray = ...  # put your conversion here")
        imports.append(line)
        arguments.append(f"asarray={name}")
    if "index_dtype" in given:
        arguments.append(f"index_dtype={np.dtype(given['index_dtype']).name!r}")
    return "\n".join([*imports, f"FunctionBackend({', '.join(arguments)})"])


def _imported(named: Any, otherwise: str) -> tuple[str, str]:
    """Return the line that imports something, or one to fill in, and the name that it gives."""
    home = sys.modules.get(getattr(named, "__module__", None) or "")
    module, name = getattr(home, "__name__", ""), getattr(named, "__qualname__", "")
    if module == "__main__":  # a script, which other code imports by the name of its file
        module = Path(getattr(home, "__file__", None) or "").stem
    if not module or getattr(home, name, None) is not named:
        return otherwise, otherwise.partition(" ")[0]
    return f"from {module} import {name}", name
