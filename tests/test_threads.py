"""Threads, forks and concurrent calls of the Numba backend, each in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
import os, sys, threading
import numpy as np
import numba
import srigl_core

weight = srigl_core.CondensedWeight.random((512, 512), fan_in=64, rng=0)
x = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
grad = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
plan = srigl_core.prepare(weight, backend="numba")

def work(threads):
    gradients = plan.backward(grad, x, threads=threads)
    dense, mask = weight.to_dense(), weight.to_mask()
    update = srigl_core.update_mask(
        dense, dense[::-1], mask, nnz_budget=weight.nnz, drop_fraction=0.3, backend="numba",
        threads=threads,
    )
    results = (
        plan(x, threads=threads), plan(x[:1], threads=threads), gradients.x, gradients.values,
        update.mask, update.weight,
    )
    return b"".join(result.tobytes() for result in results)

def pool_is_running():
    try:
        numba.threading_layer()
    except ValueError:
        return False
    return True
"""


@pytest.fixture(autouse=True)
def _numba_is_under_test(backend_names):
    if "numba" not in backend_names("update_mask"):
        pytest.skip("the numba backend is not under test")


def run(script, **environment):
    """Run `script` after the preamble, with two pool threads unless `environment` says more."""
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        env={**os.environ, "NUMBA_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def assert_clean(process):
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split()[-1] == "done", process.stdout


def layer_or_skip(layer):
    probe = """
    from numba import njit, prange
    @njit(parallel=True)
    def touch(n):
        s = 0
        for i in prange(n):
            s += i
        return s
    touch(8)
    print("done")
    """
    if run(probe, NUMBA_THREADING_LAYER=layer).returncode != 0:
        pytest.skip(f"Numba's threading layer {layer!r} is not installed here")


def test_one_thread_never_starts_the_pool():
    assert_clean(
        run("""
        work(1)
        assert not pool_is_running()
        work(2)
        assert pool_is_running()
        print("done")
        """)
    )


def test_a_process_limited_to_one_thread_never_starts_the_pool():
    assert_clean(
        run(
            """
            work(None)
            assert not pool_is_running()
            print("done")
            """,
            NUMBA_NUM_THREADS="1",
        )
    )


def test_small_work_never_starts_the_pool():
    assert_clean(
        run("""
        small = srigl_core.CondensedWeight.random((8, 8), fan_in=2, rng=0)
        srigl_core.condensed_matmul(x[:1, :8], small, backend="numba", threads=2)
        assert not pool_is_running()
        print("done")
        """)
    )


@pytest.mark.parametrize("layer", ["omp", "tbb", "workqueue"])
def test_calls_from_many_threads_at_once_agree(layer):
    layer_or_skip(layer)
    assert_clean(
        run(
            """
            expected = work(1)
            assert work(2) == expected
            wrong = []
            def call():
                for _ in range(15):
                    if work(2) != expected:
                        wrong.append(1)
            callers = [threading.Thread(target=call) for _ in range(6)]
            for caller in callers: caller.start()
            for caller in callers: caller.join()
            assert not wrong
            print("done")
            """,
            NUMBA_THREADING_LAYER=layer,
        )
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.parametrize("layer", ["omp", "tbb", "workqueue"])
def test_a_forked_child_computes_like_its_parent(layer):
    layer_or_skip(layer)
    assert_clean(
        run(
            """
            import warnings
            warnings.simplefilter("ignore")  # Python warns of forking with threads
            expected = work(2)
            assert pool_is_running()
            child = os.fork()
            if child == 0:
                os._exit(0 if work(2) == expected and work(None) == expected else 3)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert work(2) == expected
            print("done")
            """,
            NUMBA_THREADING_LAYER=layer,
        )
    )


def test_a_pool_started_by_a_flushing_thread_honours_subnormals():
    assert_clean(
        run("""
        from srigl_core.testing.flush_mode import flushing_subnormals
        tiny = weight.with_values(weight.values * np.float32(1e-30))
        plan = srigl_core.prepare(tiny, backend="numba")
        small = x * np.float32(1e-10)
        expected = plan(small, threads=1)
        assert (np.abs(expected) < np.finfo(np.float32).tiny).all() and expected.any()

        @numba.njit(parallel=True)
        def start_the_pool(n):
            total = 0
            for i in numba.prange(n):
                total += i
            return total

        with flushing_subnormals():
            start_the_pool(8)
            assert plan(small, threads=2).tobytes() == expected.tobytes()
        assert plan(small, threads=2).tobytes() == expected.tobytes()
        print("done")
        """)
    )


def test_a_kernel_compiles_where_nothing_can_be_cached(tmp_path):
    """A file in place of each folder that Numba caches in stands for one it cannot write."""
    blocked = tmp_path / "__pycache__"
    blocked.write_text("")
    (tmp_path / "mine.py").write_text(
        "from srigl_core.backends.numba_cpu.compiling import kernel\n"
        "@kernel()\n"
        "def twice(number):\n"
        "    return 2 * number\n"
    )
    assert_clean(
        run(
            f"""
            sys.path.insert(0, {str(tmp_path)!r})
            import mine
            assert mine.twice(21) == 42
            print("done")
            """,
            NUMBA_CACHE_DIR=str(blocked / "below"),
            HOME=str(blocked),
            XDG_CACHE_HOME=str(blocked),
        )
    )
