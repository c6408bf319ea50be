"""Where compiled kernels are kept between processes.

Below a root folder each generation of kernels has a folder of its own, named by a hash of a
backend's sources and of what compiles them, so that an edited helper is never served from an older
cache.
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

__all__ = ["find_cache", "generation_of"]

VARIABLE = "SRIGL_CACHE_DIR"

GENERATIONS_KEPT = 16
"""The least recently used are deleted beyond so many."""

_PREFIX = "kernels-"


def generation_of(sources: Iterable[Path], tools: tuple[object, ...]) -> str | None:
    """Return the name of the folder for kernels of these sources, or None if they are not files.

    Parameters
    ----------
    sources : iterable of Path
        Of one folder, at any depth.
    tools : tuple
        What compiles them: versions and options.
    """
    files = sorted(file for file in sources if file.is_file())
    if not files:
        return None
    folder = os.path.commonpath([file.parent for file in files])
    digest = hashlib.sha256(repr(tools).encode())
    for file in files:
        digest.update(repr((os.path.relpath(file, folder), file.read_bytes())).encode())
    return _PREFIX + digest.hexdigest()[:16]


def find_cache(generation: str | None, trusted: str = "") -> tuple[Path | None, str]:
    """Return the folder of a generation, made if need be, and what to say of it.

    Parameters
    ----------
    generation : str or None
        As from `generation_of`.
    trusted : str
        A folder that the user named for a backend's compiler, tried before those of the system;
        "" is none.

    Returns
    -------
    tuple of Path or None, and str
        None where nothing can be kept; then the text says why.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked.lower() == "off":
        return None, f"off ({VARIABLE})"
    if generation is None:
        return None, "none: the kernels' sources cannot be read"
    if asked:
        folder = _opened(Path(asked), generation)
        if folder is None:
            warnings.warn(
                f"{VARIABLE}={asked!r} is no folder that can be written; each process compiles "
                f"the kernels anew. Name another one, or switch the cache off: {VARIABLE}=off",
                RuntimeWarning,
                stacklevel=2,
            )
            return None, f"none: {VARIABLE}={asked} cannot be written"
        return folder, f"{folder}" if _is_writable(folder) else f"{folder} (read-only)"
    for root, is_private in _default_roots(trusted):
        folder = _opened(root, generation, is_private=is_private)
        if folder is not None and _is_writable(folder):
            return folder, str(folder)
    return None, "none that can be written; each process compiles anew"


def _default_roots(trusted: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders to try, and whether it must be this user's alone.

    What lies in a cache is run. A folder that the user named is trusted, one that is found must not
    be another user's: the temporary folder is everybody's, and under sudo so may be the home.
    """
    if trusted:
        yield Path(trusted) / "srigl-core", False
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        caches = os.path.expanduser("~/Library/Caches")
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(caches):  # not where there is no home
        yield Path(caches) / "srigl-core", True
    with suppress(OSError):  # there need not be one
        if hasattr(os, "geteuid"):
            yield Path(tempfile.gettempdir()) / f"srigl-core-{os.geteuid()}", True


def _opened(root: Path, generation: str, *, is_private: bool = False) -> Path | None:
    """Return the folder of `generation` below `root`, made if need be, or None if it cannot be."""
    folder = Path(os.path.abspath(os.path.expanduser(root))) / generation
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
    """Return whether `folder` is a folder itself, this user's, and nobody else may write to it."""
    if not hasattr(os, "geteuid"):
        return True
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return own and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _prune(root: Path) -> None:
    generations = [(f.stat().st_mtime, f) for f in root.glob(_PREFIX + "[0-9a-f]" * 16)]
    for _, folder in sorted(generations, reverse=True)[GENERATIONS_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
