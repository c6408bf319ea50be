"""Python code that reproduces a failure."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from srigl_core._format.weight import CondensedWeight
from srigl_core.contract import Backend
from srigl_core.testing.function_backend import FunctionBackend
from srigl_core.testing.kernel_capabilities import completed
from srigl_core.testing.law import Law
from srigl_core.testing.product_problems import MatmulProblem
from srigl_core.testing.quantized_problems import QuantizedProblem
from srigl_core.testing.update_problems import CondensedUpdateProblem, UpdateProblem

__all__ = ["kernel_code", "reproduction"]

_MOST_NUMBERS = 16
"""The largest array that is written out; larger problems are given by the integers drawn."""

_IMPORTED = (
    *("CondensedUpdateProblem", "CondensedWeight", "FunctionBackend", "KernelCapabilities"),
    *("MatmulProblem", "QuantizedProblem", "UpdateProblem", "UpdateSettings"),
    *("array_of", "value_dtype", "check_law"),
)
_WRITTEN = (MatmulProblem, QuantizedProblem, UpdateProblem, CondensedUpdateProblem)
_LAYOUTS = {"x": "layout", "grad": "grad_layout", "bias": "bias_layout"}


def reproduction(law: Law, problem: Any, drawn: Sequence[int], kernel: str) -> str:
    """Return Python that checks a law on a problem again.

    `drawn` are the integers that the problem was built from; `kernel` is Python that makes the
    kernel, as `kernel_code` returns it.
    """
    *imports, kernel = kernel.splitlines()
    arrays = {name: part for name, part in vars(problem).items() if hasattr(part, "dtype")}
    sizes = [a.nnz if isinstance(a, CondensedWeight) else a.size for a in arrays.values()]
    if type(problem) in _WRITTEN and max(sizes) <= _MOST_NUMBERS:
        lines = [f"problem = {type(problem).__name__}(", *_arguments(problem), ")"]
    else:
        outline = ", ".join(f"{name} {part.shape} {part.dtype}" for name, part in arrays.items())
        lines = [f"# Built from these integers: {outline}.", f"problem = {list(drawn)}"]
    code = "\n".join([*lines, f'check_law({kernel}, "{law.name}", problem)'])
    names = ", ".join(name for name in _IMPORTED if re.search(rf"\b{name}\(", code))
    head = ["from numpy import inf, nan", f"from srigl_core.testing import {names}", *imports]
    return "\n".join([*head, "", code])


def _arguments(problem: Any) -> Iterator[str]:
    for part in fields(problem):
        value = getattr(problem, part.name)
        if value is not part.default:
            layout = getattr(problem, _LAYOUTS.get(part.name, ""), "C")
            yield f"    {part.name}={_expression(value, layout)},"


def _expression(value: Any, layout: str = "C") -> str:
    if isinstance(value, CondensedWeight):
        connections = f"{value.indices.tolist()}, {value.active.tolist()}, {value.shape}"
        return f"CondensedWeight({_expression(value.values)}, {connections})"
    if isinstance(value, np.dtype):
        return f"value_dtype({value.name!r})"
    if not isinstance(value, np.ndarray):
        return repr(value)
    numbers = value if value.dtype == np.bool_ else value.astype(np.float64)
    arguments = [str(numbers.tolist()), repr(value.dtype.name)]
    arguments += [] if layout == "C" else [f"layout={layout!r}"]
    arguments += [] if value.size else [f"shape={value.shape}"]
    return f"array_of({', '.join(arguments)})"


def kernel_code(kernel: Any, backend: Backend) -> str:
    """Return Python that makes a kernel again: imports, then an expression on the last line.

    `backend` is what `as_backend` makes of the kernel.
    """
    if isinstance(kernel, str):
        return repr(kernel)
    if not isinstance(backend, FunctionBackend):
        return "\n".join(_imported(kernel, "kernel = ...  # put your backend here"))
    options = backend.options
    line, name = _imported(backend.function, "kernel = ...  # put your function here")
    if hasattr(backend.function, "declared") and not options:
        return f"{line}\n{name}"
    (operation,) = backend.capabilities.operations
    imports, arguments = [line], [name, f'"{operation}"']
    if "capabilities" in options:
        arguments.append(f"capabilities={completed(options['capabilities'])!r}")
    if "asarray" in options:
        line, name = _imported(options["asarray"], "asarray = ...  # put your conversion here")
        imports.append(line)
        arguments.append(f"asarray={name}")
    if "index_dtype" in options:
        arguments.append(f"index_dtype={np.dtype(options['index_dtype']).name!r}")
    return "\n".join([*imports, f"FunctionBackend({', '.join(arguments)})"])


def _imported(named: Any, otherwise: str) -> tuple[str, str]:
    """Return an import and the name that it binds, or else a line to fill in and its name."""
    home = sys.modules.get(getattr(named, "__module__", None) or "")
    module, name = getattr(home, "__name__", ""), getattr(named, "__qualname__", "")
    if module == "__main__":  # a script, which other code imports by the name of its file
        module = Path(getattr(home, "__file__", None) or "").stem
    if not module or getattr(home, name, None) is not named:
        return otherwise, otherwise.partition(" ")[0]
    return f"from {module} import {name}", name
