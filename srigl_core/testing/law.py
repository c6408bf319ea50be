"""What a law is, and how one is checked on a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from srigl_core._format.weight import CondensedWeight
from srigl_core.contract import Backend
from srigl_core.testing.kernel_capabilities import KernelCapabilities, capabilities_of
from srigl_core.testing.problem_sources import DataSource
from srigl_core.testing.product_problems import MatmulProblem
from srigl_core.testing.quantized_problems import QuantizedProblem

__all__ = ["Law", "LawViolation", "NotApplicable", "check", "law_decorator"]

Holds = TypeVar("Holds", bound=Callable[[Backend, Any], None])
Build = Callable[[DataSource, KernelCapabilities], Any]


class LawViolation(AssertionError):  # noqa: N818 - pytest shows an AssertionError as a failure
    """A backend breaks a law; the message says where, what was expected, and the result."""


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
    tolerance : str
        How far the result may be from that, such as "bit for bit".
    operation : str
        The operation that the law is about, one of those that
        `srigl_core.testing.FunctionBackend` names.
    build : callable
        Takes a `DataSource` and a kernel's capabilities; returns a problem within these.
    holds : callable
        Takes a backend and a problem; raises `LawViolation` or `NotApplicable`.
    inputs : str or None
        Of the operation "quantized_matmul", the product that the law is about, one of
        `srigl_core.contract.QUANTIZED_INPUTS`; None is each that a backend declares.
    """

    name: str
    statement: str
    against: str
    tolerance: str
    operation: str
    build: Build
    holds: Callable[[Backend, Any], None]
    inputs: str | None = None

    def not_offered(self, capabilities: KernelCapabilities) -> str:
        """Return what a kernel does not offer that the law is about; "" if it offers all."""
        if self.operation not in capabilities.operations:
            return f"it does not offer {self.operation}"
        if self.inputs is not None and self.inputs not in capabilities.quantized_inputs:
            return f"it does not take {self.inputs} inputs"
        return ""


def law_decorator(
    laws: list[Law], operation: str, build: Build
) -> Callable[..., Callable[[Holds], Holds]]:
    """Return a decorator that appends a function to `laws`.

    The decorator takes `against` and `tolerance`, and another `build` and `inputs` if the law needs
    them. The function's docstring is the law's statement.
    """
    default_build = build

    def law(
        against: str, tolerance: str, *, build: Build = default_build, inputs: str | None = None
    ) -> Any:
        def register(holds: Holds) -> Holds:
            statement = (holds.__doc__ or "").strip()
            about = (holds.__name__, statement, against, tolerance, operation)
            laws.append(Law(*about, build, holds, inputs))
            return holds

        return register

    return law


def check(backend: Backend, law: Law, problem: Any) -> None:
    """Raise `LawViolation` if a law does not hold for a problem, or `NotApplicable`."""
    capabilities = capabilities_of(backend)
    if missing := law.not_offered(capabilities):
        raise NotApplicable(missing)
    dtypes = {"values": problem.weight.dtype}
    if isinstance(problem, MatmulProblem):
        dtypes["inputs"] = problem.x.dtype
    if isinstance(problem.weight, CondensedWeight):
        dtypes["indices"] = problem.weight.indices.dtype
    for what, dtype in dtypes.items():
        taken = capabilities.value_dtypes | capabilities.index_dtypes
        if dtype.name not in taken:
            raise NotApplicable(f"{backend.name!r} does not take {what} of {dtype}")
    if isinstance(problem, QuantizedProblem) and (
        problem.inputs not in capabilities.quantized_inputs
    ):
        raise NotApplicable(f"{backend.name!r} does not take {problem.inputs} inputs")
    law.holds(backend, problem)
