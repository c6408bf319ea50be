"""Folders that keep compiled kernels between processes.

Below a root folder there is one folder for each cache version: a hash of a backend's sources and of
the tools that compile them. An edit of any source makes a new version, so that a kernel is never
loaded from an older cache.

Kernels are code, and loading one runs it. So neither a folder nor a file is used that another user
could have written.
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

from srigl_core._files import write_whole

__all__ = ["cache_version", "find_cache", "keep_kernel", "kept_kernel"]

VARIABLE = "SRIGL_CACHE_DIR"

VERSIONS_KEPT = 16
"""Beyond this number, the least recently used versions are deleted."""

_PREFIX = "kernels-"

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

_DIGEST_BYTES = hashlib.sha256().digest_size


class _UnsafeFolderError(Exception):
    """Another user could put code into a folder; the message says why."""


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


def find_cache(
    version: str | None, *, variable: str = "", named: str = ""
) -> tuple[Path | None, str]:
    """Return the folder of a cache version, and a description of it.

    Parameters
    ----------
    version : str or None
        From `cache_version`.
    variable, named : str
        The variable with which the user names a folder for a backend's compiler, and that folder or
        "". It is tried before the system's folders.

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
        try:
            folder = _opened(Path(asked), version)
        except _UnsafeFolderError as fault:
            return _refused(VARIABLE, asked, fault)
        except OSError:
            _warn(f"{VARIABLE}={asked!r} is not a writable folder", "Name another one")
            return None, f"none: {VARIABLE}={asked} cannot be written"
        return folder, f"{folder}" if _is_writable(folder) else f"{folder} (read-only)"
    if named:
        try:
            folder = _opened(Path(named) / "srigl-core", version)
        except _UnsafeFolderError as fault:
            return _refused(variable, named, fault)
        except OSError:
            pass
        else:
            if _is_writable(folder):
                return folder, str(folder)
    for root in _default_roots():
        with suppress(OSError, _UnsafeFolderError):
            folder = _opened(root, version, is_private=True)
            if _is_writable(folder):
                return folder, str(folder)
    return None, "none that can be written by this user alone; each process compiles again"


def _refused(variable: str, named: str, fault: _UnsafeFolderError) -> tuple[None, str]:
    _warn(
        f"{variable}={named!r} is not used, since kernels are code: {fault}",
        "Name a folder that only you can write to",
    )
    return None, f"none: {variable}={named}: {fault}"


def _warn(reason: str, remedy: str) -> None:
    warnings.warn(
        f"{reason}; each process compiles the kernels again. {remedy}, or switch the cache off: "
        f"{VARIABLE}=off",
        RuntimeWarning,
        stacklevel=3,
    )


def _default_roots() -> Iterator[Path]:
    """Yield the folders to try if the user has named none."""
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        caches = os.path.expanduser("~/Library/Caches")
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(caches):  # false if the user has no home
        yield Path(caches) / "srigl-core"
    with suppress(OSError):  # there may be no temporary folder
        if hasattr(os, "geteuid"):
            yield Path(tempfile.gettempdir()) / f"srigl-core-{os.geteuid()}"


def _opened(root: Path, version: str, *, is_private: bool = False) -> Path:
    """Return the folder of `version` below `root`.

    A private root is this user's, and no link. One that the user named may be a link, or be the
    administrator's and read-only.

    Raises
    ------
    OSError
        If it cannot be made.
    _UnsafeFolderError
        If another user could write to it, or exchange it for another folder.
    """
    root = Path(os.path.abspath(os.path.expanduser(root)))
    _make(root, 0o700 if is_private else 0o755)
    if is_private:
        _check_private(root)
    for step in _steps(root):
        _check_owner(step)
    real = Path(os.path.realpath(root))
    _check_own_folder(real)
    folder = root / version
    is_new = not folder.exists()
    _make(folder, 0o755)
    _check_own_folder(folder)
    with suppress(OSError):
        os.utime(folder)
        if is_new:
            _prune(root)
    return folder


def _make(folder: Path, mode: int) -> None:
    """Make a folder and the folders above it; ``Path.mkdir`` would let all users write to those."""
    if folder.is_dir():
        return
    _make(folder.parent, mode)
    folder.mkdir(mode=mode, exist_ok=True)


def _steps(path: Path) -> Iterator[Path]:
    """Yield the folders and links that lead to a folder; each could be exchanged for another."""
    step = Path(path.anchor)
    yield step
    for part in path.parts[1:]:
        step /= part
        yield step
        if step.is_symlink():
            yield from _steps(step.parent / os.readlink(step))
            step = Path(os.path.realpath(step))


def _check_owner(step: Path) -> None:
    """Check that no other user could exchange what is in a folder, or where a link leads."""
    if not hasattr(os, "geteuid"):
        return
    status = step.lstat()
    if status.st_uid not in (os.geteuid(), 0, os.stat(step.anchor).st_uid):
        raise _UnsafeFolderError(f"{step} belongs to another user")
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_ISVTX:
        return
    # Where the usual umask is 002 each user has a group of his own. Under macOS all are in one.
    has_own_group = sys.platform != "darwin" and status.st_gid == os.getegid()
    own_group = stat.S_IWGRP if has_own_group else 0
    if status.st_mode & _WRITABLE_BY_OTHERS & ~own_group:
        raise _UnsafeFolderError(f"other users can write to {step}")


def _check_own_folder(folder: Path) -> None:
    """Check that a folder is no link and only this user can write to it, or only root."""
    if not hasattr(os, "geteuid"):
        return
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise _UnsafeFolderError(f"{folder} is not a folder")
    is_read_only_of_root = status.st_uid == 0 and not _is_writable(folder)
    if status.st_uid != os.geteuid() and not is_read_only_of_root:
        raise _UnsafeFolderError(f"{folder} belongs to another user")
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise _UnsafeFolderError(f"other users can write to {folder}")


def _check_private(folder: Path) -> None:
    if hasattr(os, "geteuid") and folder.lstat().st_uid != os.geteuid():
        raise _UnsafeFolderError(f"{folder} belongs to another user")
    if folder.is_symlink():
        raise _UnsafeFolderError(f"{folder} is a link")


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _prune(root: Path) -> None:
    versions = [(f.stat().st_mtime, f) for f in root.glob(_PREFIX + "[0-9a-f]" * 16)]
    for _, folder in sorted(versions, reverse=True)[VERSIONS_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- files of a cache


def keep_kernel(file: Path, data: bytes) -> bool:
    """Write a compiled kernel to a file of a cache, and return whether that worked."""
    with suppress(OSError):
        if not _is_own_file(file.lstat()):  # it would keep its mode, and never be loaded
            file.unlink()
    try:
        write_whole(file, _digest(file, data) + data, mode=0o644)
    except OSError:
        return False
    return True


def kept_kernel(file: Path) -> bytes | None:
    """Return what `keep_kernel` wrote to a file, or None if it is missing, damaged or another's."""
    try:
        with file.open("rb") as opened:
            if not _is_own_file(os.fstat(opened.fileno())):
                return None
            content = opened.read()
    except OSError:
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return data if _digest(file, data) == digest else None


def _digest(file: Path, data: bytes) -> bytes:
    """Return a hash of a kernel and of its file's name, under which no other kernel is loaded."""
    return hashlib.sha256(f"{file.name}\0".encode() + data).digest()


def _is_own_file(status: os.stat_result) -> bool:
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & _WRITABLE_BY_OTHERS
