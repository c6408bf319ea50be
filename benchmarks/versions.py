"""Which versions of everything took part."""

from __future__ import annotations

import contextlib
from importlib.metadata import PackageNotFoundError, version

from srigl_core._machine import package_versions

__all__ = ["versions"]


def versions(*others: str) -> dict[str, str]:
    """Return those of Python, of this library and what it needs, and of `others` if installed."""
    found = package_versions()
    for package in others:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
