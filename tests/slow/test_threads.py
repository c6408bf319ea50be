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

from srigl_core.backends.numba_cpu import threads as pool_rules

LEAST_WORK = pool_rules.SMALLEST_PARALLEL_WORK
pool_rules.SMALLEST_PARALLEL_WORK = 0  # so that every kernel below uses the pool

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
    process = run(probe, NUMBA_THREADING_LAYER=layer)
    if "No threading layer could be loaded" in process.stderr:
        pytest.skip(f"Numba's threading layer {layer!r} is not installed here")
    assert_clean(process)


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
        pool_rules.SMALLEST_PARALLEL_WORK = LEAST_WORK
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


def test_the_number_of_threads_is_restored_also_after_an_error():
    assert_clean(
        run(
            """
            numba.set_num_threads(3)
            work(2)
            assert numba.get_num_threads() == 3
            dense, mask = weight.to_dense(), weight.to_mask()
            try:
                srigl_core.update_mask(
                    dense, dense, mask, nnz_budget=1, drop_fraction=0.3, gamma_sal=None,
                    backend="numba", threads=2,
                )
            except srigl_core.SriglError:
                print("refused")
            assert numba.get_num_threads() == 3
            print("done")
            """,
            NUMBA_NUM_THREADS="4",
        )
    )


def test_openmp_is_taken_before_workqueue_and_the_reason_is_told():
    layer_or_skip("omp")
    assert_clean(
        run("""
        assert work(2) == work(1)
        assert numba.threading_layer() == "omp"
        assert pool_rules.describe_threads()["threading layer"] == "omp (the quickest to start)"
        print("done")
        """)
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NUMBA_THREADING_LAYER_PRIORITY", "workqueue omp tbb"),
        ("NUMBA_THREADING_LAYER", "workqueue"),
    ],
)
def test_a_layer_that_the_user_ordered_is_taken(variable, value):
    assert_clean(
        run(
            """
            assert work(2) == work(1)
            assert numba.threading_layer() == "workqueue"
            said = pool_rules.describe_threads()["threading layer"]
            assert said.startswith("workqueue (NUMBA_THREADING_LAYER"), said
            print("done")
            """,
            **{variable: value},
        )
    )


@pytest.mark.parametrize("layer", ["tbb", "bogus"])
def test_a_layer_that_cannot_be_loaded_is_an_error_with_a_remedy(layer):
    process = run(
        """
        assert work(1)
        try:
            work(2)
        except srigl_core.BackendUnavailableError as error:
            assert "threads=1" in str(error), error
        print("done")
        """,
        NUMBA_THREADING_LAYER=layer,
    )
    assert_clean(process)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_child_forked_while_another_thread_compiles_does_not_hang():
    assert_clean(
        run("""
        import time, warnings
        from numba.core.compiler_lock import global_compiler_lock
        warnings.simplefilter("ignore")
        expected = plan(x, threads=2).tobytes()
        holds, stop = threading.Event(), threading.Event()

        def compile_for_a_while():
            with global_compiler_lock:
                holds.set()
                stop.wait(1)

        compiler = threading.Thread(target=compile_for_a_while)
        compiler.start()
        holds.wait()
        child = os.fork()
        if child == 0:
            os._exit(0 if plan(x).tobytes() == expected else 3)
        for _ in range(600):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            time.sleep(0.1)
        else:
            os.kill(child, 9)
            raise AssertionError("the child hangs")
        assert os.waitstatus_to_exitcode(status) == 0
        compiler.join()
        print("done")
        """)
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

        def everything(threads):
            gradients = plan.backward(small, x * np.float32(1e-30), threads=threads)
            return (plan(small, threads=threads), plan(small[:1], threads=threads),
                    gradients.x, gradients.values)

        def same(results, expected):
            return all(a.tobytes() == b.tobytes() for a, b in zip(results, expected))

        expected = everything(1)
        for result in expected:
            assert (np.abs(result) < np.finfo(np.float32).tiny).all() and result.any()

        @numba.njit(parallel=True)
        def start_the_pool(n):
            total = 0
            for i in numba.prange(n):
                total += i
            return total

        with flushing_subnormals():
            start_the_pool(8)
            assert same(everything(2), expected)
        assert same(everything(2), expected)
        print("done")
        """)
    )
