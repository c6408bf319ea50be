"""Problems as Python that makes them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.weight import CondensedWeight
from srigl_core.testing.law import Law
from srigl_core.testing.problems import MatmulProblem, UpdateProblem

__all__ = ["code_for"]

_MOST_SHOWN = 16
"""Numbers in an array that are written out; a larger problem is told by the choices made for it."""


def code_for(law: Law, problem: Any, choices: Sequence[int], kernel: str) -> str:
    """Return Python that checks a law on a problem again.

    Parameters
    ----------
    law : Law
    problem : MatmulProblem or UpdateProblem
    choices : sequence of int
        Those that the problem was made of.
    kernel : str
        Python for the kernel; lines before the last one import what that needs.
    """
    *imports, name = kernel.splitlines()
    call = f'check_law({name}, "{law.name}", problem)'
    if type(problem) is MatmulProblem and _size(problem) <= _MOST_SHOWN:
        wanted, code = _matmul_code(problem)
    elif type(problem) is UpdateProblem and _size(problem) <= _MOST_SHOWN:
        wanted, code = _update_code(problem)
    else:
        wanted = []
        code = f"# The choices that a problem is made of: {_outline(problem)}.\nproblem = "
        code += repr(list(choices))
    if name.startswith("FunctionBackend"):
        wanted = ["FunctionBackend", *wanted]
    names = ", ".join([*sorted(wanted), "check_law"])
    head = ["from numpy import inf, nan", f"from srigl_core.testing import {names}", *imports]
    return "\n".join([*head, "", code, call])


def _outline(problem: Any) -> str:
    """Return shapes and dtypes."""
    parts = {name: part for name, part in vars(problem).items() if hasattr(part, "dtype")}
    return ", ".join(f"{name} {part.shape} {part.dtype}" for name, part in parts.items())


def _size(problem: Any) -> int:
    weight = problem.weight
    sizes = [part.size for part in vars(problem).values() if isinstance(part, np.ndarray)]
    return max([*sizes, weight.nnz if isinstance(weight, CondensedWeight) else weight.size])


def _matmul_code(problem: MatmulProblem) -> tuple[list[str], str]:
    weight, bias = problem.weight, problem.bias
    values = _array(weight.values)
    names = [part.name for part in fields(problem) if part.name.endswith("layout")]
    layouts = {name: getattr(problem, name) for name in names}
    lines = [
        f"weight = CondensedWeight({values}, {weight.indices.tolist()}, "
        f"{weight.active.tolist()}, {weight.shape})",
        "problem = MatmulProblem(",
        "    weight,",
        f"    x={_array(problem.x, problem.layout)},",
        f"    grad={_array(problem.grad, problem.grad_layout)},",
        f"    bias={'None' if bias is None else _array(bias, problem.bias_layout)},",
        f"    activation={problem.activation!r},",
        f"    out_dtype=value_dtype({problem.out_dtype.name!r}),",
        *(f"    {name}={laid!r}," for name, laid in layouts.items() if laid != "C"),
        ")",
    ]
    return ["CondensedWeight", "MatmulProblem", "array_of", "value_dtype"], "\n".join(lines)


def _update_code(problem: UpdateProblem) -> tuple[list[str], str]:
    settings = ", ".join(
        f"{part.name}={getattr(problem.settings, part.name)!r}" for part in fields(problem.settings)
    )
    lines = [
        "problem = UpdateProblem(",
        f"    weight={_array(problem.weight)},",
        f"    grad={_array(problem.grad)},",
        f"    mask={_array(problem.mask)},",
        f"    settings=UpdateSettings({settings}),",
        ")",
    ]
    return ["UpdateProblem", "UpdateSettings", "array_of"], "\n".join(lines)


def _array(array: NDArray[Any], layout: str = "C") -> str:
    numbers = array.tolist() if array.dtype == np.bool_ else array.astype(np.float64).tolist()
    shape = "" if array.size else f", shape={array.shape}"
    laid = "" if layout == "C" else f", layout={layout!r}"
    return f"array_of({numbers}, {array.dtype.name!r}{laid}{shape})"
