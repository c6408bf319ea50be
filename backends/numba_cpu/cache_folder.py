"""The folder that keeps this backend's kernels between processes."""

from __future__ import annotations

import functools
import importlib.machinery
from pathlib import Path

import llvmlite
import numba
import numpy as np

from srigl_core._cache_folder import cache_version, find_cache

__all__ = ["cache_directory", "describe_cache"]

# Hashed at import, before the kernels are imported: this process does not run later edits.
_VERSION = cache_version(
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
    """Return the folder that keeps compiled kernels, or None."""
    folder, _ = _cache()
    return None if folder is None else str(folder)


def describe_cache() -> str:
    """Return the folder, or why there is none, for ``srigl info``."""
    return _cache()[1]


@functools.cache
def _cache() -> tuple[Path | None, str]:
    return find_cache(_VERSION, variable="NUMBA_CACHE_DIR", named=numba.config.CACHE_DIR)
