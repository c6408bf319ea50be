"""Files: written as a whole, and checked before they are read."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from srigl_core.errors import FileFormatError, SriglError, ValueTypeError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "check_archive",
    "check_replaceable",
    "checked_path",
    "file_errors",
    "parse_json",
    "regular_file",
    "write_whole",
]

_TEMPORARY = re.compile(r"\.srigl-core-[0-9a-f]{16}\.tmp")

_SECONDS_TO_WRITE = 3600
"""Where files cannot be locked, a temporary file of this age was left by a process that ended."""

_SECONDS_TO_READ = 2
"""As long Windows may refuse to replace a file, since another process reads it."""

_FILE_TYPES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


class _NotAFileError(SriglError, OSError):
    """A path names something other than a regular file."""


def checked_path(path: object) -> Path:
    """Return a path-like object, a string or bytes as a path.

    Raises
    ------
    ValueTypeError
        If it is something else.
    SriglError
        If no file can have this name.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise ValueTypeError(f"path must be a path, got {type(path).__name__}")
    name = os.fsdecode(path)
    try:
        is_possible = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        is_possible = False
    if not is_possible:
        raise SriglError(f"path {name!r} has characters that no file's name may have")
    return Path(name)


def regular_file(path: object) -> Path:
    """Return the path of a regular file; to open a FIFO would wait for its writer.

    Raises
    ------
    ValueTypeError
        If `path` is no path.
    OSError
        If there is no such file, or it is no regular file.
    """
    path = checked_path(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no file", os.fspath(path)) from None
    _check_regular(path, status)
    return path


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
        raise _NotAFileError(
            f"{os.fspath(path)!r} is {found}, not a regular file; name another path"
        )


def check_replaceable(path: Path) -> os.stat_result | None:
    """Return the status of the file that `path` names, or None if there is none.

    Raises
    ------
    OSError
        If the path names something else than a regular file, or cannot be looked at.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    _check_regular(path, status)
    return status


def write_whole(path: object, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file as a whole; an existing file stays as it is if that fails.

    A symbolic link stays, and the file that it names is replaced. A file that is replaced keeps its
    mode and, where the system permits it, its owner.

    Parameters
    ----------
    path : path-like
    content : bytes
    mode : int
        Mode of a new file, from which the process's umask is taken.

    Raises
    ------
    ValueTypeError
        If `path` is no path.
    OSError
        If the file cannot be written, or the path names something else than a regular file.
    """
    path = checked_path(path)
    old = check_replaceable(path)
    target = Path(os.path.realpath(path))
    try:
        _remove_abandoned(target.parent)
        # Nobody may read the new content who may not read the old one.
        _write(target, content, old, mode if old is None else 0o600)
    except OSError as error:
        if error.errno is None:
            raise
        # The system names the temporary file, which the caller does not know.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _write(target: Path, content: bytes, old: os.stat_result | None, mode: int) -> None:
    temporary, locked = _new_temporary(target.parent, mode)
    try:
        with locked:
            temporary.write_bytes(content)
            if old is not None:
                _copy_owner(temporary, old)
                temporary.chmod(stat.S_IMODE(old.st_mode))
            if fcntl is None:
                locked.close()  # Windows does not rename an open file
            _replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(temporary: Path, target: Path) -> None:
    end = time.monotonic() + _SECONDS_TO_READ
    while True:
        try:
            temporary.replace(target)
            return
        except PermissionError:
            if fcntl is not None or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _copy_owner(temporary: Path, old: os.stat_result) -> None:
    own = temporary.stat()
    if hasattr(os, "chown") and (own.st_uid, own.st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):
            os.chown(temporary, old.st_uid, old.st_gid)


def _new_temporary(folder: Path, mode: int) -> tuple[Path, BinaryIO]:
    """Return a new file and its path. It is locked while it is open, where files can be locked."""
    while True:
        path = folder / f".srigl-core-{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags, mode), "wb")
        # Another process may have taken the file for an abandoned one before it was locked.
        if not _is_locked_by_another(file) and (fcntl is None or os.fstat(file.fileno()).st_nlink):
            return path, file
        file.close()


def _is_locked_by_another(file: BinaryIO) -> bool:
    """Lock an open file if that is possible, and return whether another process has locked it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False


def _remove_abandoned(folder: Path) -> None:
    """Remove this user's temporary files that a process left when it was killed."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    _remove_if_abandoned(folder / name)


def _remove_if_abandoned(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return
    if fcntl is None:
        if time.time() - status.st_mtime > _SECONDS_TO_WRITE:
            path.unlink()
        return
    if os.geteuid() not in (0, status.st_uid):
        return
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


# ---------------------------------------------------------------- reading

_DEFLATE_RATIO = 1032
"""A byte of compressed data gives this many bytes at most."""


@contextmanager
def file_errors(path: Path, what: str, hint: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a `FileFormatError`.

    Readers of other packages raise many kinds of errors for files that are damaged. Errors of the
    system, such as that of a disk, stay what they are.

    Parameters
    ----------
    path : Path
    what, hint : str
        What the file is then, such as "no trace", and what to do.
    """
    try:
        yield
    except FileFormatError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FileFormatError(f"{os.fspath(path)!r} is {what} ({reason}); {hint}") from error


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Check what a zip archive says of its entries, before memory is asked for.

    Parameters
    ----------
    archive : zipfile.ZipFile
    size : int
        Bytes of the file.

    Raises
    ------
    ValueError
        If two entries share a name, one is encrypted or compressed by another method than deflate,
        or the entries are larger than what the file can hold.
    """
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        raise ValueError(f"it has several entries {twice[0]!r}")
    if sum(entry.compress_size for entry in entries) > size:
        raise ValueError(f"its entries claim more than the file's {size:,} bytes")
    for entry in entries:
        if entry.flag_bits & 1:
            raise ValueError(f"entry {entry.filename!r} is encrypted")
        largest = {
            zipfile.ZIP_STORED: entry.compress_size,
            zipfile.ZIP_DEFLATED: entry.compress_size * _DEFLATE_RATIO,
        }.get(entry.compress_type)
        if largest is None:
            raise ValueError(
                f"entry {entry.filename!r} is compressed by method {entry.compress_type}, which is "
                f"not supported"
            )
        if entry.file_size > largest:
            raise ValueError(f"entry {entry.filename!r} claims {entry.file_size:,} bytes")


def parse_json(text: str | bytes) -> Any:
    """Return what a text of JSON describes.

    Raises
    ------
    ValueError
        If it is not JSON, is nested too deeply, or an object has a name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("an object has two members of one name")
    return members
