"""Find a kernel by the name of a registered backend, or as ``module:attribute``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from srigl_core._arrays.checks import check_choice
from srigl_core._registry import get_backend, is_backend
from srigl_core.contract import Backend
from srigl_core.errors import BackendUnavailableError, SriglError, ValueTypeError
from srigl_core.testing.function_backend import PARAMETERS, FunctionBackend
from srigl_core.testing.kernel_capabilities import KERNEL_OPERATIONS

__all__ = ["as_backend"]


def as_backend(kernel: Any, op: str | None = None) -> Backend:
    """Return a kernel as a backend.

    Parameters
    ----------
    kernel : str, Backend, class or function
        A backend; the name of a registered one; ``module:attribute``, where the module is installed
        or in the working directory; a callable that makes a backend without arguments, such as a
        class or a `functools.partial` of one; or a function that computes an operation
        (`FunctionBackend`).
    op : str or None
        The operation that a function computes; None is the one that it was declared with, or
        "condensed_matmul".

    Raises
    ------
    SriglError
        If `kernel` cannot be found, imported or made, it is no kernel, or there is no operation
        `op`.
    """
    if op is not None:
        check_choice(op, "op", KERNEL_OPERATIONS)
    resolved = kernel
    if isinstance(kernel, str):
        if ":" not in kernel:
            try:
                return get_backend(kernel)
            except BackendUnavailableError:
                raise
            except SriglError as error:
                raise SriglError(
                    f"{error}; write a kernel of your own as module:attribute"
                ) from error
        resolved = _imported(kernel)
    if not is_backend(resolved) and callable(resolved) and _makes_a_backend(resolved):
        resolved = _made(resolved, kernel)
    if is_backend(resolved):
        return resolved
    if callable(resolved):
        return FunctionBackend(resolved, op)
    raise ValueTypeError(
        f"{kernel!r} is a {type(resolved).__name__}; name a backend, a class with the methods of "
        f"srigl_core.contract.Backend, or a function"
    )


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path[:1]:  # first, so that the file being edited hides an installed one
        sys.path.insert(0, here)
    try:
        if not module or module.startswith("."):
            raise ImportError("it names no module")
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:
        raise SriglError(
            f"{target!r} cannot be imported ({type(error).__name__}: {error}); write "
            f"module:attribute, of a module that is installed or in the working directory"
        ) from error
    return value


def _made(make: Callable[[], Any], kernel: Any) -> Any:
    try:
        return make()
    except SriglError:
        raise
    except Exception as error:
        raise SriglError(
            f"{kernel!r} cannot be made ({type(error).__name__}: {error}); name what makes a "
            f"backend without arguments, such as functools.partial(MyBackend, device=0)"
        ) from error


def _makes_a_backend(value: Any) -> bool:
    """Whether it is a class, or can be called without arguments and takes none of a kernel's."""
    if inspect.isclass(value):
        return True
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return False
    known = {name for names in PARAMETERS.values() for name in names}
    return all(part.default is not part.empty and part.name not in known for part in parameters)
