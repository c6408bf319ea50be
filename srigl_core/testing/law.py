"""What a law is, and how one is checked on one problem."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from srigl_core.contract import Backend
from srigl_core.testing.kernel_capabilities import KernelCapabilities, capabilities_of
from srigl_core.testing.problems import Chooser, MatmulProblem

__all__ = ["Law", "LawViolation", "NotApplicable", "check", "registering"]

Holds = TypeVar("Holds", bound=Callable[[Backend, Any], None])
Build = Callable[[Chooser, KernelCapabilities], Any]


class LawViolation(AssertionError):  # noqa: N818 - what pytest users expect of a failed law
    """A backend breaks a law; the message has the place, what was expected and what was given."""


class NotApplicable(Exception):  # noqa: N818 - an outcome, not an error
    """A law has nothing to check here; the message says why."""


@dataclass(frozen=True)
class Law:
    """One law.

    Parameters
    ----------
    name : str
    statement : str
        One sentence.
    against : str
        What a result is compared with.
    within : str
        How far it may be from that.
    operation : str
        The operation it is about, one of `srigl_core.contract.OPERATIONS`.
    build : callable
        Makes a problem of a `Chooser`, within a kernel's capabilities.
    holds : callable
        Takes a backend and a problem.
    """

    name: str
    statement: str
    against: str
    within: str
    operation: str
    build: Build
    holds: Callable[[Backend, Any], None]


class LawDecorator(Protocol):
    """Makes laws of functions."""

    def __call__(
        self, *, against: str, within: str, build: Build | None = None
    ) -> Callable[[Holds], Holds]:
        """Return a decorator for a law that differs in what it is compared with, or built of."""
        ...


def registering(laws: list[Law], operation: str, build: Build) -> LawDecorator:
    """Return a decorator that adds a function to `laws`; its docstring is the law's statement."""
    usual = build

    def law(*, against: str, within: str, build: Build | None = None) -> Callable[[Holds], Holds]:
        def register(holds: Holds) -> Holds:
            statement = (holds.__doc__ or "").strip()
            made = build or usual
            laws.append(Law(holds.__name__, statement, against, within, operation, made, holds))
            return holds

        return register

    return law


def check(backend: Backend, law: Law, problem: Any) -> None:
    """Check one law on one problem.

    Raises
    ------
    LawViolation
        If it does not hold.
    NotApplicable
        If the backend does not offer the operation or the dtypes, or the problem has nothing to
        check.
    """
    able = capabilities_of(backend)
    if law.operation not in able.operations:
        raise NotApplicable(f"{backend.name!r} does not offer {law.operation}")
    taken = (
        (problem.weight.dtype, problem.x.dtype)
        if isinstance(problem, MatmulProblem)
        else (problem.weight.dtype,)
    )
    for dtype in taken:
        if dtype.name not in able.value_dtypes:
            raise NotApplicable(f"{backend.name!r} does not take {dtype.name}")
    if isinstance(problem, MatmulProblem):
        kind = problem.weight.indices.dtype.name
        if kind not in able.index_dtypes:
            raise NotApplicable(f"{backend.name!r} does not take indices of {kind}")
    try:
        law.holds(backend, problem)
    except NotApplicable as error:
        *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
        raised_by = frame.f_globals.get("__name__", "")
        if raised_by != law.holds.__module__ and not raised_by.startswith("srigl_core.testing."):
            raise LawViolation(f"the kernel raised NotApplicable: {error}") from error
        raise
