"""Files are written as a whole, where a path leads, and to regular files only."""

import os
import re
import socket
import stat
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError, ValueTypeError, load_condensed, save_condensed
from srigl_core import _files as files
from srigl_core._files import write_whole
from srigl_core.benchmarks.results import Results, save_results
from srigl_core.testing import UpdateTrace, check_trace

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes of files")


def save_trace(path):
    ones, mask = np.ones((1, 2)), np.array([[True, False]])
    trace = UpdateTrace()
    trace.add("fc", ones, ones, mask, mask, nnz_budget=1, drop_fraction=0.1)
    trace.save(path)


WRITERS = {
    "condensed": lambda path: save_condensed(path, CondensedWeight.random((4, 6), fan_in=2, rng=0)),
    "trace": save_trace,
    "benchmark": lambda path: save_results(path, Results({"processes": []})),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def left_over(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


@posix
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_stays_and_what_it_names_is_replaced(tmp_path, write, relative):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "target"
    target.write_bytes(b"old")
    link, second = tmp_path / "link", tmp_path / "second"
    link.symlink_to("there/target" if relative else target)
    second.symlink_to(link)
    write(second)
    assert second.is_symlink()
    assert link.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() not in (b"", b"old")
    assert sorted(os.listdir(tmp_path)) == ["link", "second", "there"]
    assert os.listdir(tmp_path / "there") == ["target"]


@posix
def test_a_link_to_a_file_that_is_not_there_makes_it(tmp_path, write):
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").is_file()


@posix
def test_links_in_a_circle_are_the_systems_error(tmp_path, write):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OSError, match="link"):
        write(tmp_path / "link")
    assert os.listdir(tmp_path) == ["link"]


def fifo(path):
    os.mkfifo(path)


def bound_socket(path):
    where = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(where)


def device(path):
    if os.geteuid():
        pytest.skip("only root makes devices")
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this system makes no devices")


@posix
@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize(
    ("make", "found"),
    [(fifo, "a FIFO"), (bound_socket, "a socket"), (Path.mkdir, "a directory"), (device, "device")],
)
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, write, make, found, through_a_link):
    path = special = tmp_path / "special"
    make(special)
    if through_a_link:
        path = tmp_path / "link"
        path.symlink_to(special)
    before = special.lstat()
    with pytest.raises(SriglError, match=f"{found}, not a regular file") as caught:
        write(path)
    assert isinstance(caught.value, OSError)
    assert special.lstat().st_mode == before.st_mode
    assert special.lstat().st_ino == before.st_ino
    assert not left_over(tmp_path)


@posix
@pytest.mark.parametrize("path", ["/dev/null", b"/dev/null", Path("/dev/stdout")])
def test_a_systems_device_is_refused(path):
    before = os.stat("/dev/null")
    if not stat.S_ISREG(os.stat(path).st_mode):  # stdout may be a file
        with pytest.raises(SriglError, match="not a regular file"):
            write_whole(path, b"new")
    assert os.stat("/dev/null").st_mode == before.st_mode


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, write, mode):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert mode_of(path) == mode


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, write, umask):
    old = os.umask(umask)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(old)
    assert mode_of(tmp_path / "a") == 0o666 & ~umask


@posix
def test_what_replaces_a_private_file_is_never_readable_by_others(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o600)
    modes, chmod = [], Path.chmod
    monkeypatch.setattr(
        Path, "chmod", lambda self, mode: (modes.append(mode_of(self)), chmod(self, mode))
    )
    write_whole(path, b"new")
    assert modes == [0o600]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root gives files away")
def test_a_file_that_is_replaced_keeps_its_owner(tmp_path, write):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    os.chown(path, 12345, 23456)
    path.chmod(0o640)
    write(path)
    status = path.stat()
    assert (status.st_uid, status.st_gid, mode_of(path)) == (12345, 23456, 0o640)


@posix
def test_an_owner_that_cannot_be_kept_is_no_error(tmp_path, monkeypatch):
    def refused(*arguments):
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "a"
    path.write_bytes(b"old")
    own = Path.stat

    def of_another(self, **options):
        status = list(own(self, **options))
        status[4] += 1 if self.name.startswith(".srigl-core-") else 0
        return os.stat_result(status)

    monkeypatch.setattr(Path, "stat", of_another)
    monkeypatch.setattr(os, "chown", refused)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_temporary_file_of_a_process_that_was_killed_is_removed(tmp_path, write):
    abandoned = tmp_path / ".srigl-core-0123456789abcdef.tmp"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    others = [".srigl-core-0123.tmp", ".0123456789abcdef.tmp", "srigl-core.tmp", ".hidden"]
    for name in others:
        (tmp_path / name).write_bytes(b"of the user")
    write(tmp_path / "a")
    assert set(os.listdir(tmp_path)) == {"a", *others}


@pytest.mark.skipif(files.fcntl is None, reason="files cannot be locked here")
def test_a_temporary_file_that_is_being_written_is_not_removed(tmp_path):
    path, locked = files._new_temporary(tmp_path, 0o600)
    with locked:
        write_whole(tmp_path / "a", b"new")
        assert path.exists()
    write_whole(tmp_path / "a", b"newer")
    assert os.listdir(tmp_path) == ["a"]


@posix
def test_what_only_looks_like_a_temporary_file_is_left(tmp_path):
    name = ".srigl-core-{}.tmp".format
    os.mkfifo(tmp_path / name("0" * 16))  # to open it would wait for ever
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / name("1" * 16)).symlink_to("mine")
    (tmp_path / name("2" * 16)).mkdir()
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert len(os.listdir(tmp_path)) == 5


def test_writers_at_once_leave_one_of_their_files(tmp_path):
    contents = [bytes([65 + i]) * 50_000 for i in range(4)]

    def many(content):
        for _ in range(25):
            write_whole(tmp_path / "a", content)

    threads = [threading.Thread(target=many, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        with suppress(FileNotFoundError, PermissionError):  # not yet there; Windows replaces it
            seen.add((tmp_path / "a").read_bytes())
    for thread in threads:
        thread.join()
    assert seen <= set(contents)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("refusals", [3, 10**9])
def test_where_a_file_that_is_read_cannot_be_replaced_the_writer_waits(
    tmp_path, monkeypatch, refusals
):
    """As under Windows, which has no locks of this kind either."""
    refused, replace = iter(range(refusals)), Path.replace

    def as_windows(self, target):
        if next(refused, None) is not None:
            raise PermissionError(13, "Access is denied", str(self), 5, str(target))
        return replace(self, target)

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "_SECONDS_TO_READ", 0.2)
    monkeypatch.setattr(Path, "replace", as_windows)
    if refusals == 3:
        write_whole(tmp_path / "a", b"new")
    else:
        with pytest.raises(PermissionError, match=r"Access is denied.*a'"):
            write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == (b"new" if refusals == 3 else b"old")
    assert os.listdir(tmp_path) == ["a"]


def test_the_error_names_the_path_that_was_asked_for(tmp_path, monkeypatch, write):
    def read_only(*arguments):
        raise PermissionError(13, "Permission denied", str(arguments[0]))

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(PermissionError, match=re.escape(f"{str(tmp_path / 'a')!r}")):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root writes anywhere")
def test_a_folder_that_is_read_only_is_an_error(tmp_path, write):
    (tmp_path / "a").write_bytes(b"old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"/a'"):
            write(tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits the whole path")
def test_a_name_of_the_longest_kind_can_be_written(tmp_path, write):
    write(tmp_path / ("a" * 255))
    assert len(os.listdir(tmp_path)) == 1


class PathLike:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


@pytest.mark.parametrize("kind", [str, os.fsencode, PathLike, lambda p: PathLike(os.fsencode(p))])
def test_paths_of_every_kind_are_taken(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for name in ("a", str(tmp_path / "b"), "./c", "ü"):
        weight = CondensedWeight.random((4, 6), fan_in=2, rng=0)
        save_condensed(kind(name), weight)
        assert load_condensed(kind(name))["weight"] == weight
    save_trace(kind("t"))
    assert all(check_trace(kind("t")))


@pytest.mark.parametrize("reader", [load_condensed, check_trace])
@pytest.mark.parametrize("path", [None, 3, 1.5, ["a"], object(), b"a\0b", "a\0b", "\ud800\0"])
def test_what_is_no_path_is_an_error(reader, path):
    is_path = isinstance(path, str | bytes)
    with pytest.raises(SriglError if is_path else ValueTypeError, match="path"):
        reader(path)
    with pytest.raises(SriglError if is_path else ValueTypeError, match="path"):
        write_whole(path, b"")


@posix
@pytest.mark.timeout(20)
@pytest.mark.parametrize("reader", [load_condensed, check_trace])
@pytest.mark.parametrize("make", [fifo, bound_socket, Path.mkdir])
def test_readers_refuse_what_is_no_regular_file(tmp_path, reader, make):
    make(tmp_path / "special")
    with pytest.raises(OSError, match="not a regular file"):
        reader(tmp_path / "special")
    with pytest.raises(FileNotFoundError, match="none"):
        reader(tmp_path / "none")
