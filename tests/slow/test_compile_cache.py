"""Compiled kernels on disk: where they are kept, and that none is served in another's place."""

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from typer.testing import CliRunner

import srigl_core
import srigl_core.backends
import srigl_core.reference
from srigl_core import _cache_folder as cache_folder

HELPER = """
from srigl_core.backends.numba_cpu.compiling import kernel

@kernel()
def scaled(number):
    return 2 * number
"""

KERNELS = """
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.some_helper import scaled

SHIFT = 1

@kernel()
def shifted(number):
    return scaled(number) + SHIFT

def multiplier(factor):
    @kernel()
    def multiply(number):
        return factor * number
    return multiply

def adder(much):
    if much:
        @kernel()
        def add(number):
            return number + 200
    else:
        @kernel()
        def add(number):
            return number + 10
    return add

def caller(inner):
    @kernel()
    def call(number):
        return inner(number)
    return call

def product_and_sum(reorder):
    @kernel(reorder=reorder)
    def combine(numbers):
        total = numbers[0]
        for number in numbers[1:]:
            total += number
        return total
    return combine
"""

PREAMBLE = """
import json
import numpy as np
from srigl_core.backends.numba_cpu import some_kernels as ours
from srigl_core.backends.numba_cpu.compiling import cache_directory

def tell(*kernels):
    '''Print how many of the kernels' results were compiled here, and loaded.'''
    print(json.dumps([
        sum(sum(getattr(kernel.stats, counts).values()) for kernel in kernels)
        for counts in ("cache_misses", "cache_hits")
    ]))
"""


@pytest.fixture(autouse=True)
def _numba_is_under_test(backend_names):
    if "numba" not in backend_names("update_mask"):
        pytest.skip("the numba backend is not under test")


def fresh_process(program, **environment):
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a script on a copy of the package with two modules more."""
    for package in (srigl_core, srigl_core.reference, srigl_core.backends):
        folder = tmp_path.joinpath("package", *package.__name__.split("."))
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package.__path__[0], folder, ignore=ignore, dirs_exist_ok=True)
    kernels = tmp_path / "package" / "srigl_core" / "backends" / "numba_cpu"
    (kernels / ".#lock.py").symlink_to("nowhere")  # as some editors leave beside an open file
    (kernels / "some_helper.py").write_text(HELPER)
    (kernels / "some_kernels.py").write_text(KERNELS)

    def run(script, before="", **environment):
        return fresh_process(
            before + PREAMBLE + textwrap.dedent(script),
            **{
                "PYTHONPATH": str(tmp_path / "package"),
                "PYTHONDONTWRITEBYTECODE": "1",  # an edit within a second would not be seen
                "SRIGL_CACHE_DIR": str(tmp_path / "cache"),
                **environment,
            },
        )

    run.kernels, run.folder = kernels, tmp_path
    run.kept = lambda: sorted((tmp_path / "cache").rglob("*.kernel"))
    return run


def printed(process):
    return [json.loads(line) for line in process.stdout.splitlines()]


SHIFTED = "print(ours.shifted(20)); tell(ours.shifted)"


def test_a_second_process_loads_what_the_first_compiled(run):
    assert printed(run(SHIFTED)) == [41, [1, 0]]
    kept = {file: file.read_bytes() for file in run.kept()}
    assert len(kept) == 2
    assert printed(run(SHIFTED)) == [41, [0, 1]]
    assert {file: file.read_bytes() for file in run.kept()} == kept


def test_an_edited_helper_is_compiled_anew(run):
    assert printed(run(SHIFTED)) == [41, [1, 0]]
    (run.kernels / "some_helper.py").write_text(HELPER.replace("2 *", "3 *"))
    assert printed(run(SHIFTED)) == [61, [1, 0]]
    (run.kernels / "some_helper.py").write_text(HELPER)
    assert printed(run(SHIFTED)) == [41, [0, 1]]


def test_an_edited_function_that_writes_a_kernels_code_is_compiled_in_anew(run):
    (run.kernels / "some_intrinsic.py").write_text("""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.some_helper import constant

@intrinsic
def answer(typing_context):
    return types.int64(), lambda context, builder, signature, args: ir.IntType(64)(constant())

@kernel()
def ask():
    return answer()
""")
    script = "from srigl_core.backends.numba_cpu.some_intrinsic import ask; print(ask()); tell(ask)"
    for number, counts in ((41, [1, 0]), (42, [1, 0]), (41, [0, 1])):
        helper = f"{HELPER}\ndef constant():\n    return {number}\n"
        (run.kernels / "some_helper.py").write_text(helper)
        assert printed(run(script)) == [number, counts]


def test_kernels_of_one_factory_are_kept_apart(run):
    script = """
    kernels = [ours.multiplier(2), ours.multiplier(3), ours.adder(False), ours.adder(True)]
    callers = [ours.caller(kernel) for kernel in kernels]
    for made in (kernels, callers):
        print([kernel(7) for kernel in made])
        tell(*made)
    """
    for counts in ([4, 0], [0, 4]):
        assert printed(run(script)) == [[14, 21, 17, 207], counts] * 2


def test_a_kernel_is_kept_apart_from_itself_under_other_options(run):
    script = """
    numbers = np.ones(3, np.float32)
    kernels = [ours.product_and_sum(reorder) for reorder in (False, True)]
    for kernel in (*kernels, *map(ours.caller, kernels)):
        kernel(numbers)
        tell(kernel)
    """
    assert printed(run(script)) == [[1, 0]] * 4
    assert printed(run(script)) == [[0, 1]] * 4


def test_a_constant_changed_before_compiling_is_not_kept_as_the_source_has_it(run):
    changed = "ours.SHIFT = 5; " + SHIFTED
    assert printed(run(changed)) == [45, [1, 0]]
    assert printed(run(SHIFTED)) == [41, [1, 0]]
    assert printed(run(changed)) == [45, [0, 1]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
    ],
    ids=["emptied", "cut off", "one bit"],
)
def test_a_damaged_file_is_compiled_anew_and_replaced(run, damage):
    assert printed(run(SHIFTED)) == [41, [1, 0]]
    for file in run.kept():
        file.write_bytes(damage(file.read_bytes()))
    assert printed(run(SHIFTED)) == [41, [1, 0]]
    assert printed(run(SHIFTED)) == [41, [0, 1]]


def test_a_file_with_the_right_hash_and_other_content_is_compiled_anew(run):
    assert printed(run(SHIFTED)) == [41, [1, 0]]
    files = run.kept()
    kept = [cache_folder.kept_kernel(file) for file in files]
    contents = [b"", b"hello", pickle.dumps(None), pickle.dumps(("a", "b"))]
    for content in [*contents, pickle.dumps(({},) * 12), kept[0][:-100]]:
        for file in files:
            assert cache_folder.keep_kernel(file, content)
        assert printed(run(SHIFTED)) == [41, [1, 0]]


def test_a_kernel_under_the_name_of_another_is_not_loaded(run):
    script = "print(ours.multiplier(2)(7)); tell(ours.multiplier(2), ours.multiplier(3))"
    assert printed(run(script + "; print(ours.multiplier(3)(7))"))[::2] == [14, 21]
    files = run.kept()
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)
    assert printed(run(script + "; print(ours.multiplier(3)(7))"))[::2] == [14, 21]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this platform has no user numbers")
@pytest.mark.parametrize("fault", ["all may write", "its group may write", "another's"])
def test_a_file_that_others_could_have_written_is_not_loaded(run, fault):
    if fault == "another's" and os.geteuid():
        pytest.skip("only root gives files away")
    assert printed(run(SHIFTED)) == [41, [1, 0]]
    for file in run.kept():
        if fault == "another's":
            os.chown(file, 12345, 12345)
        else:
            file.chmod(0o666 if fault == "all may write" else 0o660)
    assert printed(run(SHIFTED)) == [41, [1, 0]]
    assert printed(run(SHIFTED)) == [41, [0, 1]]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_kept_can_be_loaded_whatever_the_umask(run, umask):
    script = f"import os; os.umask({umask}); {SHIFTED}"
    environment = {"SRIGL_CACHE_DIR": str(run.folder / "a" / "b")}
    assert printed(run(script, **environment)) == [41, [1, 0]]
    assert printed(run(script, **environment)) == [41, [0, 1]]


@pytest.mark.parametrize("variable", ["SRIGL_CACHE_DIR", "NUMBA_CACHE_DIR"])
def test_in_a_folder_that_was_deleted_kernels_compile(run, tmp_path, variable):
    (tmp_path / "gone").mkdir()
    process = run(
        "print(ours.shifted(20), cache_directory())",
        **{"SRIGL_CACHE_DIR": "", variable: "kernels", "XDG_CACHE_HOME": str(tmp_path / "home")},
        before=f"import os; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd())",
    )
    assert process.stdout.startswith("41 ")
    assert process.stderr.count("RuntimeWarning") == (variable == "SRIGL_CACHE_DIR")


@pytest.mark.parametrize("instead", ["None", "open(folder, 'w').close()"])
def test_a_folder_lost_on_the_way_costs_the_cache_alone(run, instead):
    process = run(f"""
    import shutil
    folder = cache_directory()
    shutil.rmtree(folder)
    {instead}
    print(ours.shifted(20), ours.shifted(20.5))
    """)
    assert process.stdout == "41 42.0\n"
    assert not process.stderr


def test_a_disk_that_fills_up_leaves_nothing_half_written(run):
    process = run("""
    import os, pathlib
    write = pathlib.Path.write_bytes
    def fill_up(path, data):
        write(path, data[:100])
        raise OSError(28, "No space left on device")
    pathlib.Path.write_bytes = fill_up
    print(ours.shifted(20))
    print(json.dumps(os.listdir(cache_directory())))
    """)
    assert printed(process) == [41, []]


def test_a_kernel_of_another_package_is_compiled_in_each_process(run, tmp_path):
    (tmp_path / "package" / "mine.py").write_text(HELPER)
    for _ in range(2):
        process = run("import mine; print(mine.scaled(21)); print(mine.scaled.stats.cache_path)")
        assert process.stdout == "42\nNone\n"
    assert not run.kept()


def test_switched_off_nothing_is_written(run, tmp_path):
    process = run(
        """
        from srigl_core.backends.numba_cpu.cache_folder import describe_cache
        print(ours.shifted(20), cache_directory(), describe_cache())
        """,
        SRIGL_CACHE_DIR="off",
        XDG_CACHE_HOME=str(tmp_path / "caches"),
    )
    assert process.stdout == "41 None off (SRIGL_CACHE_DIR)\n"
    assert not (tmp_path / "caches").exists()
    assert not run.kept()


def test_a_folder_asked_for_that_cannot_be_written_is_said_once_and_not_replaced(run, tmp_path):
    """A file in its place stands for a folder that cannot be written: root may write to any."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    process = run(
        "print(ours.shifted(20), ours.shifted(20.5), cache_directory())",
        SRIGL_CACHE_DIR=str(blocked),
        XDG_CACHE_HOME=str(tmp_path / "caches"),
    )
    assert process.stdout == "41 42.0 None\n"
    assert process.stderr.count(f"RuntimeWarning: SRIGL_CACHE_DIR='{blocked}'") == 1
    assert not (tmp_path / "caches").exists()


def test_kernels_compile_where_nothing_can_be_written(run, tmp_path):
    """A file in place of each folder stands for one that cannot be written."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    process = run(
        f"""
        import tempfile
        tempfile.tempdir = {str(blocked)!r}
        print(ours.shifted(20), cache_directory())
        """,
        SRIGL_CACHE_DIR="",
        NUMBA_CACHE_DIR=str(blocked),
        HOME=str(blocked),
        XDG_CACHE_HOME=str(blocked),
    )
    assert process.stdout == "41 None\n"
    assert not process.stderr


class Places:
    """The folders that are tried, in this process, all below one."""

    def __init__(self, folder, monkeypatch):
        import tempfile

        import numba

        from srigl_core.backends.numba_cpu import cache_folder

        self.rules = cache_folder
        self.asked, self.numba = folder / "asked", folder / "numba"
        self.user, self.temporary = folder / "user", folder / "temporary"
        self.temporary.mkdir()
        monkeypatch.delenv("SRIGL_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.user))
        monkeypatch.setattr(numba.config, "CACHE_DIR", "")
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(tempfile, "tempdir", str(self.temporary))

    @property
    def own(self):
        """The folder below the temporary one."""
        return self.temporary / f"srigl-core-{os.geteuid()}"

    def root(self):
        """Return the folder chosen, without the cache version."""
        self.rules._cache.cache_clear()
        folder = self.rules.cache_directory()
        return folder and type(self.user)(folder).parent


@pytest.fixture
def places(tmp_path, monkeypatch):
    places = Places(tmp_path, monkeypatch)
    yield places
    places.rules._cache.cache_clear()


def test_the_first_folder_that_can_be_written_is_taken(places, monkeypatch):
    import numba

    assert places.root() == places.user / "srigl-core"
    assert places.rules.describe_cache() == places.rules.cache_directory()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(places.numba))
    assert places.root() == places.numba / "srigl-core"
    monkeypatch.setenv("SRIGL_CACHE_DIR", str(places.asked))
    assert places.root() == places.asked


def test_a_home_that_cannot_be_written_leads_to_a_private_temporary_folder(places):
    places.user.write_text("")
    assert places.root() == places.own
    assert places.own.stat().st_mode & 0o777 == 0o700


def test_without_a_home_no_folder_of_that_name_is_made(places, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert places.root() == places.own
    assert not (tmp_path / "~").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this platform has no user numbers")
@pytest.mark.parametrize("fault", ["all may write", "its group may write", "a link", "another's"])
@pytest.mark.parametrize("place", ["user", "temporary"])
def test_a_folder_that_others_can_write_to_is_never_used(places, monkeypatch, place, fault):
    folder = places.own
    if place == "user":
        places.temporary.rmdir()
        places.temporary.write_text("")
        folder = places.user / "srigl-core"
    else:
        places.user.write_text("")
    folder.mkdir(mode=0o700, parents=True)
    assert places.root() == folder
    if fault == "a link":
        shutil.rmtree(folder)
        (elsewhere := places.numba).mkdir(mode=0o700)
        folder.symlink_to(elsewhere)
    elif fault == "another's":
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        if place == "temporary":
            folder.rename(places.own)
    else:
        folder.chmod(0o777 if fault == "all may write" else 0o770)
    assert places.root() is None
    assert places.rules.describe_cache().startswith("none that can be written")


NAMED = {"SRIGL_CACHE_DIR": "asked", "NUMBA_CACHE_DIR": "numba"}


@pytest.fixture(params=NAMED)
def named(request, places, monkeypatch):
    """The root below a folder that the user names, and the name of the variable."""
    import numba

    folder = getattr(places, NAMED[request.param])
    if request.param == "NUMBA_CACHE_DIR":
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
        return folder / "srigl-core", request.param
    monkeypatch.setenv(request.param, str(folder))
    return folder, request.param


def make_unsafe(folder, fault, monkeypatch):
    if fault == "all may write":
        folder.chmod(0o777)
    elif fault == "all may write, though not delete":
        folder.chmod(0o1777)
    elif fault == "its group may write":
        folder.chmod(0o770)
    elif os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)


FAULTS = (
    "all may write",
    "all may write, though not delete",
    "its group may write",
    "another's",
)
needs_users = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no user numbers here")


@needs_users
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("which", ["root", "version"])
def test_a_named_folder_that_others_can_write_to_is_not_used_and_said(
    places, named, monkeypatch, which, fault
):
    root, variable = named
    assert places.root() == root
    version = type(root)(places.rules.cache_directory())
    make_unsafe(root if which == "root" else version, fault, monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"{variable}=.* is not used.* SRIGL_CACHE_DIR=off"):
        assert places.root() is None
    assert places.rules.describe_cache().startswith(f"none: {variable}=")


@needs_users
@pytest.mark.parametrize("fault", ["all may write", "another's"])
def test_a_named_folder_that_others_could_exchange_is_not_used(places, named, monkeypatch, fault):
    root, variable = named
    assert places.root() == root
    above = root.parent if variable == "NUMBA_CACHE_DIR" else root / "more"
    if variable == "SRIGL_CACHE_DIR":
        monkeypatch.setenv(variable, str(root / "more" / "kernels"))
        assert places.root() == root / "more" / "kernels"
    make_unsafe(above, fault, monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"{variable}=.* is not used"):
        assert places.root() is None


@needs_users
def test_the_users_own_group_may_write_above_the_folder_but_not_the_one_group_of_macos(
    places, monkeypatch
):
    kernels = places.asked / "kernels"
    places.asked.mkdir()
    places.asked.chmod(0o770)
    monkeypatch.setenv("SRIGL_CACHE_DIR", str(kernels))
    assert places.root() == kernels
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.warns(RuntimeWarning, match="is not used.* other users can write to .*asked"):
        assert places.root() is None


@needs_users
def test_a_folder_below_one_that_all_may_write_to_but_not_delete_is_used(places, named):
    """As the system's temporary folder is."""
    root, _ = named
    root.parent.mkdir(exist_ok=True)
    mode = root.parent.stat().st_mode
    root.parent.chmod(0o1777)
    try:
        assert places.root() == root
    finally:
        root.parent.chmod(mode)


@needs_users
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root gives links away")
@pytest.mark.parametrize("whose", ["the link is", "its target is"])
def test_a_link_of_another_user_or_to_a_folder_of_another_is_not_followed(
    places, named, tmp_path, whose
):
    root, variable = named
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    root.parent.mkdir(exist_ok=True)
    root.symlink_to(target)
    assert places.root() == root
    if whose == "the link is":
        os.chown(root, 12345, 12345, follow_symlinks=False)
    else:
        os.chown(target, 12345, 12345)
    with pytest.warns(RuntimeWarning, match=f"{variable}=.* is not used.* belongs to another user"):
        assert places.root() is None


@needs_users
def test_a_link_to_a_folder_that_others_can_write_to_is_not_followed(places, named, tmp_path):
    root, _ = named
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "target").mkdir()
    root.parent.mkdir(exist_ok=True)
    root.symlink_to(tmp_path / "open" / "target")
    with pytest.warns(RuntimeWarning, match="other users can write to .*open"):
        assert places.root() is None
    (tmp_path / "open").chmod(0o755)
    assert places.root() == root


@needs_users
def test_a_version_that_is_a_link_is_not_used(places, named, tmp_path):
    root, _ = named
    assert places.root() == root
    version = type(root)(places.rules.cache_directory())
    version.rename(tmp_path / "elsewhere")
    version.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="is not a folder"):
        assert places.root() is None


@needs_users
def test_a_folder_of_root_that_can_only_be_read_is_read(places, monkeypatch):
    """As in a container image."""
    monkeypatch.setenv("SRIGL_CACHE_DIR", str(places.asked))
    assert places.root() == places.asked
    if os.geteuid():
        pytest.skip("only root owns folders of root")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert places.root() is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert places.root() == places.asked


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_folders_that_are_made_are_used_again_whatever_the_umask(places, monkeypatch, umask):
    monkeypatch.setenv("SRIGL_CACHE_DIR", str(places.asked / "new" / "kernels"))
    old = os.umask(umask)
    try:
        for _ in range(2):
            assert places.root() == places.asked / "new" / "kernels"
            monkeypatch.delenv("SRIGL_CACHE_DIR", raising=False)
            assert places.root() == places.user / "srigl-core"
            monkeypatch.setenv("SRIGL_CACHE_DIR", str(places.asked / "new" / "kernels"))
    finally:
        os.umask(old)


def test_a_folder_asked_for_is_read_where_it_cannot_be_written(places, monkeypatch):
    monkeypatch.setenv("SRIGL_CACHE_DIR", str(places.asked))
    assert places.root() == places.asked
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert places.root() == places.asked
    assert places.rules.describe_cache() == f"{places.rules.cache_directory()} (read-only)"
    monkeypatch.delenv("SRIGL_CACHE_DIR")
    assert places.root() is None


def test_a_relative_folder_stays_where_the_process_was(places, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SRIGL_CACHE_DIR", "asked")
    assert places.root() == places.asked


def test_a_folder_asked_for_may_be_below_the_home(places, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SRIGL_CACHE_DIR", "~/asked")
    assert places.root() == places.asked


def test_of_old_cache_versions_the_latest_used_are_left(places):
    root = places.user / "srigl-core"
    most = cache_folder.VERSIONS_KEPT
    old = [root / f"kernels-{number:016x}" for number in range(most + 3)]
    for age, folder in enumerate(old):
        folder.mkdir(parents=True, mode=0o700)
        (folder / "a.kernel").write_text("")
        os.utime(folder, (10**9 - age, 10**9 - age))
    root.chmod(0o700)
    others = {root / "kernels-of-mine", root / "notes"}
    for folder in others:
        folder.mkdir()
    places.root()
    mine = type(root)(places.rules.cache_directory())
    assert set(root.iterdir()) == {mine, *old[: most - 1], *others}
    os.utime(mine, (0, 0))
    places.root()
    assert mine.stat().st_mtime > 10**9


def test_every_kernel_of_the_backend_is_kept():
    """With the cache of all other tests, since to compile every kernel takes long."""
    program = """
import srigl_core
from numba.core import event
with event.install_recorder("numba:compile") as compiled:
    srigl_core.warmup(batch=(1, 64), backward=True, update=True, backend="numba")
print(len(compiled.buffer))
"""
    fresh_process(program, SRIGL_CACHE_DIR="")
    assert printed(fresh_process(program, SRIGL_CACHE_DIR="")) == [0]


def test_info_measures_first_results(monkeypatch):
    from srigl_core.cli import first_use
    from srigl_core.cli.app import app

    monkeypatch.setattr(first_use, "REPEATS", 1)
    monkeypatch.setattr(first_use, "BATCHES", (1,))
    result = CliRunner().invoke(app, ["info", "--timing"])
    assert result.exit_code == 0, result.output
    lines = [line.strip().rsplit(maxsplit=1) for line in result.output.splitlines()]
    rows = dict(line for line in lines if len(line) == 2)  # a long row has a second line
    empty, warm = rows["first result, empty cache"], rows["first result, warm cache"]
    assert 0 < float(rows["second result"]) < float(warm) < float(empty)
    assert 0 < float(rows["import srigl_core, after numba"]) < float(warm)
    assert float(rows["import numba"]) > 0


def test_info_says_in_one_line_that_a_measurement_failed(monkeypatch):
    from srigl_core.cli import first_use
    from srigl_core.cli.app import app

    monkeypatch.setattr(first_use, "_PROCESS", "raise SystemExit('no luck')")
    result = CliRunner().invoke(app, ["info", "--timing"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "error: a fresh process gave no first result: no luck"


def test_kernels_of_one_factory_have_symbols_that_differ_by_more_than_a_count():
    """Else two that were kept by two processes could be run one in place of the other."""

    def symbol(lanes):
        x, u = np.zeros(256, np.float32), np.uint64
        arguments = (x, u(16), u(0), u(15), u(0), u(16), np.zeros(16 * lanes, np.float32))
        types = tuple(typeof(argument) for argument in arguments)
        stage = stager(lanes)
        stage.compile(types)
        compiled = stage.overloads[types]
        count = r"B\d+v\d+"  # as numba tags it
        return re.sub(count, "", compiled.fndesc.mangled_name)

    typeof = importlib.import_module("numba").typeof
    stager = importlib.import_module("srigl_core.backends.numba_cpu.batch_tiles").stager
    assert symbol(8) != symbol(16)
