"""The registry of backends: they are found by entry point, and imported when first used."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeGuard

import numpy as np

from srigl_core._arrays.checks import check_choice
from srigl_core._install import INSTALL_CHECKOUT
from srigl_core._product_spec import QUANTIZED_INPUTS
from srigl_core.contract import OPERATIONS, Backend, Capabilities
from srigl_core.errors import BackendUnavailableError, SriglError, ValueTypeError

__all__ = ["BackendStatus", "check_dtype", "get_backend", "is_backend", "list_backends"]

ENTRY_POINT_GROUP = "srigl_core.backends"

_FASTEST = "numba"
"""The backend with the compiled kernels for CPUs. Where it cannot run, those of NumPy and SciPy are
used with a warning, and one of another package without."""

_METHODS = {
    "condensed_matmul": "prepare",
    "condensed_matmul_backward": "prepare",
    "quantized_matmul": "prepare_quantized",
}
"""The method of a backend for an operation, where it has another name."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a registered backend can run here.

    Parameters
    ----------
    name : str
    available : bool
    reason : str
        Why it cannot run and what to install; empty if it can.
    capabilities : Capabilities or None
        None if it cannot run.
    """

    name: str
    available: bool
    reason: str = ""
    capabilities: Capabilities | None = None


def list_backends() -> list[BackendStatus]:
    """Return the status of every registered backend, the preferred one first.

    Returns
    -------
    list of BackendStatus

    Notes
    -----
    This loads every backend, which imports the packages that it needs.
    """
    statuses = []
    for name in _registered():
        try:
            backend = _load(name)
        except BackendUnavailableError as error:
            statuses.append(BackendStatus(name, False, str(error)))
        else:
            statuses.append(BackendStatus(name, True, "", backend.capabilities))
    return sorted(
        statuses,
        key=lambda status: -status.capabilities.priority if status.capabilities else 1,
    )


def get_backend(
    backend: str | Backend | None = None,
    *,
    operation: str | None = None,
    device: str = "cpu",
    inputs: str = "float",
) -> Backend:
    """Return the named backend, or the preferred one that can run here.

    Parameters
    ----------
    backend : str, Backend or None
        A registered name, an object that implements `Backend`, or None for the available backend
        of highest priority on `device`.
    operation : str or None
        An operation that the backend must offer: one of `srigl_core.contract.OPERATIONS`.
    device : {"cpu", "cuda"}
        The device of the arrays. It is used only if no backend is named.
    inputs : {"float", "int8"}
        Of the operation "quantized_matmul", the product that the backend must offer.

    Returns
    -------
    Backend

    Warns
    -----
    RuntimeWarning
        Once, if none is named and "numba", the fastest one on CPUs, cannot run here.

    Raises
    ------
    BackendUnavailableError
        If the backend cannot run here. No other one is used instead.
    SriglError
        If no backend has that name, or it does not offer `operation`. If `operation` or `inputs` is
        unknown.
    ValueTypeError
        If `backend` is neither a name nor a backend.
    """
    if operation is not None:
        check_choice(operation, "operation", OPERATIONS)
    check_choice(inputs, "inputs", QUANTIZED_INPUTS)
    if backend is None:
        return _preferred(operation or "condensed_matmul", device, inputs)
    chosen = _load(backend) if isinstance(backend, str) else backend
    if not is_backend(chosen):
        raise ValueTypeError(
            f"backend must be a name ({', '.join(_registered())}), an object with the methods of "
            f"srigl_core.contract.Backend, or None; got {type(backend).__name__}"
        )
    if operation is not None and not _offers(chosen.capabilities, operation, inputs):
        offering = [
            status.name
            for status in list_backends()
            if status.capabilities and _offers(status.capabilities, operation, inputs)
        ]
        raise SriglError(
            f"backend {chosen.name!r} does not offer {_wanted(operation, inputs)}; use one of: "
            f"{', '.join(offering)}"
        )
    return chosen


def is_backend(candidate: object) -> TypeGuard[Backend]:
    """Return whether an object has the attributes and methods that its capabilities declare."""
    capabilities = getattr(candidate, "capabilities", None)
    if (
        isinstance(candidate, type)
        or not isinstance(capabilities, Capabilities)
        or not hasattr(candidate, "name")
    ):
        return False
    methods = {_METHODS.get(operation, operation) for operation in capabilities.operations}
    return all(callable(getattr(candidate, name, None)) for name in methods)


def check_dtype(backend: Backend, role: str, what: str, dtype: np.dtype[Any]) -> None:
    """Check that `backend` takes an argument of that dtype.

    Parameters
    ----------
    backend : Backend
    role : {"value", "input", "index"}
        Which of the backend's sets of dtypes applies.
    what : str
        The argument's name, for the error message.
    dtype : numpy.dtype

    Raises
    ------
    ValueTypeError
        If it does not.
    """
    dtypes: frozenset[str] = getattr(backend.capabilities, f"{role}_dtypes")
    if _name(dtype) not in dtypes:
        raise ValueTypeError(
            f"backend {backend.name!r} does not take {what} of dtype {dtype.name}; it takes "
            f"{', '.join(sorted(dtypes))}"
        )


@functools.cache
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # NumPy makes it anew each time, which takes microseconds


def _offers(capabilities: Capabilities, operation: str, inputs: str) -> bool:
    is_other_product = operation == "quantized_matmul" and (
        inputs not in capabilities.quantized_inputs
    )
    return operation in capabilities.operations and not is_other_product


def _wanted(operation: str, inputs: str) -> str:
    return operation if inputs == "float" else f"{operation} with inputs={inputs!r}"


@functools.cache
def _preferred(operation: str, device: str, inputs: str = "float") -> Backend:
    statuses = list_backends()
    for status in statuses:
        offered = status.capabilities
        if offered and offered.device == device and _offers(offered, operation, inputs):
            backend = _load(status.name)
            if device == "cpu" and type(backend).__module__.startswith(f"{__package__}."):
                _warn_if_slow({s.name: s.reason for s in statuses}.get(_FASTEST, ""))
            return backend
    if device != "cpu":
        reasons = "; ".join(s.reason for s in statuses if not s.available) or "none is known"
        raise BackendUnavailableError(
            f"no backend that can run here takes arrays on a {device} device and offers "
            f"{_wanted(operation, inputs)}; copy the arrays to the CPU, or use another machine. "
            f"Backends that cannot run here: {reasons}"
        )
    raise BackendUnavailableError(
        f"no backend that offers {operation} is installed; is srigl-core itself installed? "
        f"A source folder on the path has no entry points: {INSTALL_CHECKOUT}"
    )


@functools.cache
def _warn_if_slow(reason: str) -> None:
    if reason:
        warnings.warn(
            f"the compiled kernels cannot run here, so slower ones are used: {reason}. To use "
            f"others without this warning, name a backend, such as 'scipy'",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.cache
def _load(name: str) -> Backend:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            backend: Backend = entry_point.load()()
        except BackendUnavailableError:
            raise
        except Exception as error:
            raise BackendUnavailableError(
                f"backend {name!r} ({entry_point.value}) cannot be loaded "
                f"({type(error).__name__}: {error}); install or fix the package that this names"
            ) from error
        if not is_backend(backend):
            raise BackendUnavailableError(
                f"backend {name!r} ({entry_point.value}) is not a backend but a "
                f"{type(backend).__name__}: it needs a name, capabilities "
                f"(srigl_core.contract.Capabilities), and a method for each operation that they "
                f"declare; fix or uninstall its package"
            )
        return backend
    raise SriglError(
        f"no backend is called {name!r}; registered here: {', '.join(_registered()) or 'none'}"
    )


def _registered() -> list[str]:
    return sorted({entry_point.name for entry_point in entry_points(group=ENTRY_POINT_GROUP)})
