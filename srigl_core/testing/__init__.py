"""Property-test kernels: the laws that every backend obeys, and the problems they are tried on.

`check_kernel` tries a function and `verify` a backend; `BackendConformance` is a pytest class, and
``srigl verify`` a command. All need the extra ``test``. Hypothesis strategies are in
`srigl_core.testing.strategies`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from srigl_core._arrays.dtypes import value_dtype
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import UpdateSettings
from srigl_core.testing.function_backend import FunctionBackend, declare
from srigl_core.testing.kernel_capabilities import KernelCapabilities
from srigl_core.testing.law import Law, LawViolation, NotApplicable
from srigl_core.testing.laws import LAWS
from srigl_core.testing.problem_arrays import array_of
from srigl_core.testing.product_problems import MatmulProblem
from srigl_core.testing.quantized_problems import QuantizedProblem
from srigl_core.testing.report import ConformanceError, Failure, LawResult, Report
from srigl_core.testing.targets import as_backend
from srigl_core.testing.update_problems import CondensedUpdateProblem, UpdateProblem
from srigl_core.testing.update_trace import UpdateTrace, check_trace
from srigl_core.testing.verification import check_kernel, check_law, verify

if TYPE_CHECKING:
    from srigl_core.testing.conformance import BackendConformance

__all__ = [
    "LAWS",
    "BackendConformance",
    "CondensedUpdateProblem",
    "CondensedWeight",
    "ConformanceError",
    "Failure",
    "FunctionBackend",
    "KernelCapabilities",
    "Law",
    "LawResult",
    "LawViolation",
    "MatmulProblem",
    "NotApplicable",
    "QuantizedProblem",
    "Report",
    "UpdateProblem",
    "UpdateSettings",
    "UpdateTrace",
    "array_of",
    "as_backend",
    "check_kernel",
    "check_law",
    "check_trace",
    "declare",
    "value_dtype",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "BackendConformance":  # not imported above, since it imports pytest
        from srigl_core.testing.conformance import BackendConformance

        return BackendConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
