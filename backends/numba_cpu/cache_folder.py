"""Where Numba's kernels are kept between processes: their generation, and the folder for it."""

from __future__ import annotations

import functools
import importlib.machinery
from pathlib import Path

import llvmlite
import numba
import numpy as np

from srigl_core._cache_folder import find_cache, generation_of

__all__ = ["cache_directory", "describe_cache"]

# Now, since this is imported before the kernels are: a later edit is not what this process runs.
_GENERATION = generation_of(
    Path(__file__).parent.rglob("*.py"),
    (
        importlib.machinery.EXTENSION_SUFFIXES[0],  # Python's version, and platform
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        numba.config.BOUNDSCHECK,
    ),
)


def cache_directory() -> str | None:
    """Return the folder where compiled kernels are kept, or None if nowhere."""
    folder, _ = _found()
    return None if folder is None else str(folder)


def describe_cache() -> str:
    """Return the folder, or why there is none, for ``srigl info``."""
    return _found()[1]


@functools.cache
def _found() -> tuple[Path | None, str]:
    return find_cache(_GENERATION, numba.config.CACHE_DIR)
