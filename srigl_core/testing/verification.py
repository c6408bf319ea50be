"""Try the laws on a kernel, and shrink what fails (extra ``test``)."""

from __future__ import annotations

import difflib
import math
import os
import secrets
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from srigl_core._arrays.checks import check_integer
from srigl_core._install import install_command
from srigl_core.contract import Backend, Capabilities
from srigl_core.errors import BackendUnavailableError, SriglError, ValueTypeError
from srigl_core.testing import laws as all_laws
from srigl_core.testing.coverage import Coverage, Trait, traits_of
from srigl_core.testing.function_backend import FunctionBackend
from srigl_core.testing.kernel_capabilities import capabilities_of, left_out
from srigl_core.testing.law import Law, LawViolation, NotApplicable, check
from srigl_core.testing.problem_sources import DataSource, RecordedSource, SeededSource
from srigl_core.testing.report import ConformanceError, Failure, LawResult, Report
from srigl_core.testing.reproduction import kernel_code, reproduction
from srigl_core.testing.targets import as_backend

if TYPE_CHECKING:
    from hypothesis.database import ExampleDatabase

__all__ = ["check_kernel", "check_law", "law_named", "source_of", "try_law", "verify"]


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
    >>> capabilities = KernelCapabilities(value_dtypes=frozenset({"float32", "float64"}))
    >>> check_kernel(product, capabilities=capabilities, max_examples=5).counts["failed"]
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
        Only the laws of this operation, one of `srigl_core.contract.OPERATIONS`. For a function,
        the operation that it computes.
    laws : sequence of Law, or None
        None is all of `LAWS`, or all of `op`.
    max_examples : int
        Problems for each law.
    seed : int
        Seed of the problems.
    xfails : mapping of str to str, or None
        The laws that are expected to fail, each with a reason; added to the kernel's own, its
        attribute ``xfails``. The report says which of them pass.
    shrink : bool
        Whether to look for the smallest problem that fails.
    progress : callable
        Called with each law before it is tried.

    Returns
    -------
    Report
        A law is not tried any further once it has failed.

    Raises
    ------
    SriglError
        If a name is unknown, `op` differs from the operation that a function was declared with,
        or another argument is not valid.
    BackendUnavailableError
        If the kernel cannot run here, or Hypothesis is missing.
    """
    seed = check_integer(seed, "seed", least=0)
    max_examples = check_integer(max_examples, "max_examples", least=1)
    if not isinstance(xfails or {}, Mapping):
        raise ValueTypeError(f"xfails={xfails!r} must map names of laws to reasons")
    backend = as_backend(kernel, op)
    if isinstance(backend, FunctionBackend):
        (own,) = backend.capabilities.operations
        if op not in (None, own):
            raise SriglError(f"{backend.name!r} is a function for {own}, not for {op}")
        op = own
    reasons = {**getattr(backend, "xfails", {}), **(xfails or {})}
    for name in reasons:
        law_named(name)
    options: dict[str, Any] = {"max_examples": max_examples, "seed": seed, "shrink": shrink}
    options["code"] = kernel_code(kernel, backend)
    results = []
    for law in laws or [law for law in all_laws.LAWS if op in (None, law.operation)]:
        progress(law)
        results.append(try_law(backend, law, xfail=reasons.get(law.name), **options))
    capabilities = capabilities_of(backend)
    return Report(
        *(backend.name, tuple(results), max_examples, seed, tuple(left_out(capabilities))),
        Coverage.of(sum((result.traits for result in results), Counter()), capabilities),
        has_threads=_has_threads(backend),
    )


def _has_threads(backend: Backend) -> bool:
    """Whether a call may have more than one thread, as far as the backend says."""
    if isinstance(backend, FunctionBackend):
        return backend.takes_threads and (os.cpu_count() or 1) > 1
    facts: dict[str, Any] = getattr(backend, "runtime_info", dict)()
    return int(facts.get("threads", 1)) > 1


def try_law(
    backend: Backend,
    law: Law,
    *,
    max_examples: int = 100,
    seed: int | None = 0,
    xfail: str | None = None,
    shrink: bool = True,
    code: str | None = None,
    database: ExampleDatabase | None = None,
) -> LawResult:
    """Try one law on a backend; the arguments that it shares with `verify` are explained there.

    A `seed` of None draws other problems each time. `xfail` is why the law is expected to fail,
    `code` Python that makes the backend. `database`, of Hypothesis, keeps failures, which are tried
    first the next time.
    """
    capabilities = capabilities_of(backend)
    if missing := law.not_offered(capabilities):
        return LawResult(law, "not applicable", 0, missing)
    needed = ["value_dtypes"]
    if law.operation != "update_mask":
        needed.append("index_dtypes")
    if law.operation.endswith("matmul") or law.operation in ("condensed_matmul_backward", "chain"):
        needed.append("activations")
    if law.operation == "quantized_matmul":
        needed.append("quantized_inputs")
    for name in needed:
        if not getattr(capabilities, name):
            return LawResult(law, "not applicable", 0, f"it declares no {name}")
    attempts = _Attempts(backend, law)
    _search(attempts, max_examples, seed, shrink, database)
    if attempts.error is not None:
        failure = attempts.failure(code or repr(backend.name))
        status = "failed" if xfail is None else "expected failure"
        return LawResult(law, status, failure.examples, xfail or "", failure, attempts.traits)
    if not attempts.examples:
        return LawResult(law, "not applicable", 0, attempts.reason)
    status = "passed" if xfail is None else "unexpected pass"
    return LawResult(law, status, attempts.examples, xfail or "", traits=attempts.traits)


def check_law(kernel: Any, law: str | Law, problem: Any) -> None:
    """Check one law on one problem.

    Parameters
    ----------
    kernel : str, Backend, class or function
        As in `as_backend`.
    law : str or Law
    problem : a problem, or list of int
        The problem, such as a `MatmulProblem`, or the integers that it is built from, as a report
        shows them.

    Raises
    ------
    LawViolation
        If the law does not hold.
    NotApplicable
        If the problem has nothing to check, or exceeds the kernel's capabilities.
    SriglError
        If there is no such law.
    """
    law = law_named(law) if isinstance(law, str) else law
    backend = as_backend(kernel, law.operation)
    if isinstance(problem, Sequence):
        problem = law.build(RecordedSource(problem), capabilities_of(backend))
    check(backend, law, problem)


def law_named(name: str) -> Law:
    """Return a law by its name."""
    by_name = {law.name: law for law in all_laws.LAWS}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=3) or list(by_name)
        raise SriglError(f"no law is called {name!r}; there are {', '.join(near)}")
    return by_name[name]


def source_of(law: Law, seed: int, number: int) -> SeededSource:
    """Return the source of the problem that has a number in the run of a seed."""
    return SeededSource(seed, zlib.crc32(law.name.encode()), number)


_COMPARED = 5
"""How many failures are collected; the one with the smallest layer is shrunk."""


@dataclass
class _Attempts:
    """The problems that a law was tried on, and the last one that failed."""

    backend: Backend
    law: Law
    examples: int = 0
    reason: str = ""
    error: Exception | None = None
    first_failure: int = 0
    tried: int = 0
    number: int = 0  # of the first failure
    problem: Any = None
    drawn: list[int] = field(default_factory=list)
    traits: Counter[Trait] = field(default_factory=Counter)

    def __call__(self, source: DataSource) -> None:
        """Build a problem and check it; keep its error and raise it."""
        problem = self.law.build(source, capabilities_of(self.backend))
        self.tried += 1
        try:
            with np.errstate(all="ignore"):
                check(self.backend, self.law, problem)
            self.examples += 1
            self.traits.update(traits_of(problem))
        except NotApplicable as nothing:
            self.reason = str(nothing)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as raised:
            if isinstance(raised, Exception):
                error: Exception = raised
                cause = raised.__cause__
            else:  # SystemExit, a panic of Rust, pytest's skip
                error = RuntimeError(f"the kernel would have ended Python: {raised!r}")
                cause = raised  # its traceback says where
            if not self.first_failure:
                self.first_failure, self.number = self.examples + 1, self.tried - 1
            self.error, self.problem, self.drawn = error, problem, list(source.drawn)
            raise error from cause

    def failure(self, code: str) -> Failure:
        message = str(self.error)
        if not isinstance(self.error, LawViolation):
            message = "".join(traceback.format_exception(self.error, limit=-4)).rstrip()
        shape = tuple(self.problem.weight.shape)
        code = reproduction(self.law, self.problem, self.drawn, code)
        return Failure(message, code, shape, self.first_failure, self.number)


def _search(
    attempts: _Attempts,
    max_examples: int,
    seed: int | None,
    shrink: bool,
    database: ExampleDatabase | None,
) -> None:
    """Try earlier failures, then seeded random problems; shrink the first failures.

    Hypothesis only shrinks: its own search repeats choices, and can miss a whole value type or all
    subnormal numbers in 100 examples.
    """
    try:
        from srigl_core.testing.shrinking import replay_and_shrink
    except ImportError as error:
        raise BackendUnavailableError(
            f"the laws are tried with Hypothesis, which is not installed; {install_command('test')}"
        ) from error

    if database is not None:
        replay_and_shrink(attempts, database)
        if attempts.error is not None:
            return
    seed = secrets.randbits(32) if seed is None else seed
    failures: list[tuple[int, list[int]]] = []
    for number in range(max_examples):
        try:
            attempts(source_of(attempts.law, seed, number))
        except Exception as error:
            if error is not attempts.error:
                raise  # not the kernel's: the problem could not be built
            failures.append((math.prod(attempts.problem.weight.shape), attempts.drawn))
            if len(failures) == (_COMPARED if shrink else 1):
                break
    if failures and shrink:
        replay_and_shrink(attempts, database, min(failures)[1])
