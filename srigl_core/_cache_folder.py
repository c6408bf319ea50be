"""Folders that keep compiled kernels between processes.

Below a root folder there is one folder for each cache version: a hash of a backend's sources and of
the tools that compile them. An edit of any source makes a new version, so that a kernel is never
loaded from an older cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["cache_version", "find_cache"]

VARIABLE = "SRIGL_CACHE_DIR"

VERSIONS_KEPT = 16
"""Beyond this number, the least recently used versions are deleted."""

_PREFIX = "kernels-"


def cache_version(sources: Iterable[Path], tools: tuple[object, ...]) -> str | None:
    """Return the name of the cache folder of these sources, or None if they are not files.

    Parameters
    ----------
    sources : iterable of Path
        Source files below one folder, at any depth.
    tools : tuple
        Versions and options of the tools that compile them.
    """
    files = sorted(file for file in sources if file.is_file())
    if not files:
        return None
    folder = os.path.commonpath([file.parent for file in files])
    digest = hashlib.sha256(repr(tools).encode())
    for file in files:
        digest.update(repr((os.path.relpath(file, folder), file.read_bytes())).encode())
    return _PREFIX + digest.hexdigest()[:16]


def find_cache(version: str | None, trusted: str = "") -> tuple[Path | None, str]:
    """Return the folder of a cache version, and a description of it.

    Parameters
    ----------
    version : str or None
        From `cache_version`.
    trusted : str
        A folder that the user named for a backend's compiler, or "". It is tried before the
        system's folders.

    Returns
    -------
    folder : Path or None
        It exists. None if no kernel can be kept.
    description : str
        The path, or the reason why there is none.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked.lower() == "off":
        return None, f"off ({VARIABLE})"
    if version is None:
        return None, "none: the kernels' sources cannot be read"
    if asked:
        folder = _opened(Path(asked), version)
        if folder is None:
            warnings.warn(
                f"{VARIABLE}={asked!r} is not a writable folder; each process compiles "
                f"the kernels again. Name another one, or switch the cache off: {VARIABLE}=off",
                RuntimeWarning,
                stacklevel=2,
            )
            return None, f"none: {VARIABLE}={asked} cannot be written"
        return folder, f"{folder}" if _is_writable(folder) else f"{folder} (read-only)"
    for root, is_private in _default_roots(trusted):
        folder = _opened(root, version, is_private=is_private)
        if folder is not None and _is_writable(folder):
            return folder, str(folder)
    return None, "none that can be written; each process compiles again"


def _default_roots(trusted: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders to try, and for each whether it must belong to this user alone.

    Files of a cache are executed. A folder that the user named is trusted. Any other folder must
    not belong to another user: everybody can write to the temporary folder, and under sudo the home
    may be another user's.
    """
    if trusted:
        yield Path(trusted) / "srigl-core", False
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        caches = os.path.expanduser("~/Library/Caches")
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(caches):  # false if the user has no home
        yield Path(caches) / "srigl-core", True
    with suppress(OSError):  # there may be no temporary folder
        if hasattr(os, "geteuid"):
            yield Path(tempfile.gettempdir()) / f"srigl-core-{os.geteuid()}", True


def _opened(root: Path, version: str, *, is_private: bool = False) -> Path | None:
    """Return the folder of `version` below `root`, or None if it cannot be made."""
    folder = Path(os.path.abspath(os.path.expanduser(root))) / version
    try:
        folder.parent.mkdir(mode=0o700 if is_private else 0o777, parents=True, exist_ok=True)
        if is_private and not _is_private(folder.parent):
            return None
        is_new = not folder.exists()
        folder.mkdir(exist_ok=True)
    except OSError:
        return None
    with suppress(OSError):
        os.utime(folder)
        if is_new:
            _prune(folder.parent)
    return folder


def _is_private(folder: Path) -> bool:
    """Return whether `folder` is no link, belongs to this user, and is writable by nobody else."""
    if not hasattr(os, "geteuid"):
        return True
    status = folder.lstat()
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _prune(root: Path) -> None:
    versions = [(f.stat().st_mtime, f) for f in root.glob(_PREFIX + "[0-9a-f]" * 16)]
    for _, folder in sorted(versions, reverse=True)[VERSIONS_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
