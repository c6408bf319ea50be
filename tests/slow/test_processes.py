"""Processes that are killed: workers end with the one that started them, and files stay whole."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from srigl_core import CondensedWeight, load_condensed, save_condensed

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
"""After which a worker that is still there is one that was left. It takes a fraction of one."""

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

STARTERS = {
    "demo": [ROOT / "examples" / "demo", "--out", "out"],
    "fuzz": [ROOT / "tests/fuzz/backends.py", "--backends", "reference", "--processes", "2"],
    "mutants": [ROOT / "tests/mutants/table.py", "--only", "reference"],
    "benchmark": ["-m", "srigl_core.cli", "bench", "cpu", "--threads", "1", "--out", "out"],
    "first use": ["-m", "srigl_core.cli", "info", "--timing"],
    "frameworks": [ROOT / "examples" / "frameworks" / "train_digits.py"],
}
MAKE = ["make", "-f", str(ROOT / "Makefile"), "demo", f"PYTHON={sys.executable}"]
NEEDS = {
    "make": ("sklearn", "matplotlib", "rich", "joblib"),
    "demo": ("sklearn", "matplotlib", "rich", "joblib"),
    "benchmark": ("typer", "matplotlib", "threadpoolctl"),
    "first use": ("typer", "numba"),
    "frameworks": ("torch", "sklearn", "rich"),
}


def processes():
    """Return parents by process, without those that have ended."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split() for line in listed.splitlines())
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def descendants(pid):
    parents, found = processes(), []
    for child in (child for child, parent in parents.items() if parent == pid):
        found += [child, *descendants(child)]
    return found


def alive(pids):
    running = processes()
    return [pid for pid in pids if pid in running]


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a program, and returns it when it has started workers."""
    started = []

    def start(name, n_workers=1):
        for package in NEEDS.get(name, ()):
            pytest.importorskip(package)
        if name == "make":
            (tmp_path / "examples").symlink_to(ROOT / "examples")
        path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "tests" / "gpu")))
        process = subprocess.Popen(
            MAKE if name == "make" else [sys.executable, *map(str, STARTERS[name])],
            cwd=tmp_path,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        end = time.monotonic() + 60
        while len(descendants(process.pid)) < n_workers:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(1.5)  # until they work
        workers = descendants(process.pid)
        started.extend(workers)
        return process, workers

    yield start
    for each in started:
        try:
            if isinstance(each, subprocess.Popen):
                each.kill()
                each.communicate()
            else:
                os.kill(each, signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            pass


def wait_for_end(workers):
    begin = time.monotonic()
    while alive(workers) and time.monotonic() < begin + SECONDS:
        time.sleep(0.05)
    assert not alive(workers)


@posix
@pytest.mark.parametrize("name", STARTERS)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(start, name, how):
    process, workers = start(name)
    assert workers
    os.kill(process.pid, how)
    process.wait(SECONDS)
    wait_for_end(workers)


@posix
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_make_demo_ends_with_make(start, how):
    process, workers = start("make", n_workers=3)
    os.kill(process.pid, how)
    process.wait(SECONDS)
    wait_for_end(workers)


@posix
@pytest.mark.parametrize("name", ["demo", "fuzz", "mutants"])
@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "one process"])
def test_ctrl_c_ends_everything_at_once(start, name, whole_group):
    process, workers = start(name, n_workers=2)
    begin = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    process.wait(SECONDS)
    seconds = time.monotonic() - begin
    wait_for_end(workers)
    assert process.returncode != 0
    assert seconds < 2 * (1 + os.getloadavg()[0] / os.cpu_count())  # 2 s on an idle machine
    if name == "demo":
        assert process.returncode == 128 + signal.SIGINT
        assert "Traceback" not in process.stderr.read()


POOL = """
import sys, time
from pathlib import Path
from srigl_core._workers import worker_pool

if __name__ == "__main__":
    with worker_pool(2) as pool:
        running = [pool.submit(time.sleep, 100) for _ in range(6)]
        assert pool.submit(abs, -1) is not None
        time.sleep(1)
        raise ValueError("no more work")
"""


def test_an_error_of_the_block_ends_the_workers(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, tmp_path / "pool.py"], capture_output=True, text=True, timeout=60
    )
    assert "ValueError: no more work" in done.stderr
    assert time.monotonic() - begin < 30


def test_a_pool_that_is_not_disturbed_gives_all_results(tmp_path):
    (tmp_path / "pool.py").write_text(
        "from srigl_core._workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(2) as pool:\n"
        "        print(sum(pool.map(abs, range(-50, 0))))\n"
        "        late = pool.submit(abs, -7)\n"
        "    print(late.result())\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "pool.py"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "1275\n7\n", done.stderr


# ---------------------------------------------------------------- files

SAVE_FOR_EVER = """
import itertools, sys
import numpy as np
from srigl_core import save_condensed
array = np.zeros(2_000_000)
for number in itertools.count():
    array[:] = number
    save_condensed(sys.argv[1], {"a": array})
"""

KILLED_BEFORE_IT_RENAMES = """
import os, signal, sys
import numpy as np
from srigl_core import save_condensed
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
save_condensed(sys.argv[1], {"a": np.zeros(10)})
"""


@posix
def test_a_writer_that_is_killed_leaves_a_whole_file_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "a"
    save_condensed(path, {"a": np.zeros(1)})
    for seconds in (0.0, 0.01, 0.02):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, path])
        before = path.stat().st_ino
        while path.stat().st_ino == before:
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.wait()
        assert len(set(load_condensed(path)["a"])) == 1
    done = subprocess.run([sys.executable, "-c", KILLED_BEFORE_IT_RENAMES, path])
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) > 1
    weight = CondensedWeight.random((4, 6), fan_in=2, rng=0)
    save_condensed(path, weight)
    assert os.listdir(tmp_path) == ["a"]
    assert load_condensed(path)["weight"] == weight
