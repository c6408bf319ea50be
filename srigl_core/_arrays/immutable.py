"""Arrays that nobody can make writeable."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["immutable"]


def immutable(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy in C order that stays read-only.

    Kernels do not check again what was checked when an object was made. If an array owns its
    memory, ``setflags(write=True)`` makes it writeable again. The memory of this copy belongs to a
    bytes object, for which NumPy refuses that.
    """
    return np.ndarray(array.shape, array.dtype, buffer=array.tobytes())
