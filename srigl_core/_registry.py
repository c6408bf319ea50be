"""Find backends by entry point, and refuse what one does not offer.

Nothing is imported before it is asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeGuard

import numpy as np

from srigl_core.contract import Backend, Capabilities
from srigl_core.errors import BackendUnavailableError, SriglError, ValueTypeError

__all__ = ["BackendStatus", "check_dtype", "get_backend", "is_backend", "list_backends"]

ENTRY_POINT_GROUP = "srigl_core.backends"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a registered backend can run here.

    Parameters
    ----------
    name : str
    available : bool
    reason : str
        Why it cannot run and what to install; empty where it can.
    capabilities : Capabilities or None
        None where it cannot run.
    """

    name: str
    available: bool
    reason: str = ""
    capabilities: Capabilities | None = None


def list_backends() -> list[BackendStatus]:
    """Say of every registered backend whether it can run here, the preferred one first.

    Returns
    -------
    list of BackendStatus

    Notes
    -----
    Loads every backend, and so imports what each needs.
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
    backend: str | Backend | None = None, *, operation: str | None = None, device: str = "cpu"
) -> Backend:
    """Return the backend asked for, or the preferred one that can run here.

    Parameters
    ----------
    backend : str, Backend or None
        A registered name, an object that implements `Backend`, or None for the available backend
        of highest priority on `device`.
    operation : str or None
        What it has to offer, one of `srigl_core.contract.OPERATIONS`; None, nothing in
        particular.
    device : {"cpu", "cuda"}
        Where the arrays are; looked at only where no backend is named.

    Returns
    -------
    Backend

    Raises
    ------
    BackendUnavailableError
        If the one asked for cannot run here; never replaced silently.
    SriglError
        If no backend has that name, or it does not offer `operation`.
    ValueTypeError
        If `backend` is neither a name nor a backend.
    """
    if backend is None:
        return _preferred(operation or "condensed_matmul", device)
    found = _load(backend) if isinstance(backend, str) else backend
    if not is_backend(found):
        raise ValueTypeError(
            f"backend must be a name ({', '.join(_registered())}), an object with the methods of "
            f"srigl_core.contract.Backend, or None; got {type(backend).__name__}"
        )
    if operation is not None and operation not in found.capabilities.operations:
        able = [
            status.name
            for status in list_backends()
            if status.capabilities and operation in status.capabilities.operations
        ]
        raise SriglError(
            f"backend {found.name!r} does not offer {operation}; use one of: {', '.join(able)}"
        )
    return found


def is_backend(found: object) -> TypeGuard[Backend]:
    """Whether an object is a backend: it has the methods of the operations that it declares."""
    able = getattr(found, "capabilities", None)
    if isinstance(found, type) or not isinstance(able, Capabilities) or not hasattr(found, "name"):
        return False
    needed = {"update_mask" if name == "update_mask" else "prepare" for name in able.operations}
    return all(callable(getattr(found, name, None)) for name in needed)


def check_dtype(backend: Backend, what: str, dtype: np.dtype[Any]) -> None:
    """Check that `backend` takes `what` of that dtype.

    Parameters
    ----------
    backend : Backend
    what : str
        Its name, for the error message.
    dtype : numpy.dtype
        A value type, or that of indices.

    Raises
    ------
    ValueTypeError
        If it does not.
    """
    able = backend.capabilities
    taken = able.index_dtypes if dtype.kind == "u" else able.value_dtypes
    if dtype.name not in taken:
        raise ValueTypeError(
            f"backend {backend.name!r} does not take {what} of dtype {dtype.name}; it takes "
            f"{', '.join(sorted(taken))}"
        )


@functools.cache
def _preferred(operation: str, device: str) -> Backend:
    for status in list_backends():
        able = status.capabilities
        if able and able.device == device and operation in able.operations:
            return _load(status.name)
    if device != "cpu":
        reasons = "; ".join(s.reason for s in list_backends() if not s.available) or "none is known"
        raise BackendUnavailableError(
            f"the arrays are on a {device} device, and no backend for one can run here: {reasons}"
        )
    raise BackendUnavailableError(
        f"no backend that offers {operation} is installed; is srigl-core itself installed? "
        f"A source folder on the path has no entry points: pip install srigl-core"
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
                f"({type(error).__name__}: {error}); install or mend what that names"
            ) from error
        return backend
    raise SriglError(
        f"no backend is called {name!r}; registered here: {', '.join(_registered()) or 'none'}"
    )


def _registered() -> list[str]:
    return sorted({entry_point.name for entry_point in entry_points(group=ENTRY_POINT_GROUP)})
