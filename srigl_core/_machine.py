"""Facts about this installation and this machine."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from srigl_core import get_backend, list_backends

__all__ = ["backend_facts", "cpu_name", "machine_facts", "n_cores", "package_versions"]

PACKAGES = ("srigl-core", "numpy", "scipy", "numba", "ml_dtypes", "safetensors")


def package_versions(*others: str) -> dict[str, str]:
    """Return the versions of Python, this library, its dependencies, and `others` if installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    for package in others:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def machine_facts() -> dict[str, str | int]:
    """Return the processor, the number of cores this process may use, and the system."""
    return {"cpu": cpu_name(), "cores": n_cores(), "system": platform.platform(terse=True)}


def cpu_name() -> str:
    """Return the processor's name, or its architecture where the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def backend_facts() -> dict[str, dict[str, object]]:
    """Return the runtime information of each available backend, such as threads and caches.

    It comes from the backend's method ``runtime_info()``, which is optional.
    """
    facts = {}
    for status in list_backends():
        if not status.available:
            continue
        describe = getattr(get_backend(status.name), "runtime_info", None)
        if describe is not None:
            facts[status.name] = dict(describe())
    return facts
