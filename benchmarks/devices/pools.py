"""The thread pools of the libraries in one process: their sizes, and when their threads sleep.

The threads of a pool spin for a while after a call, in case another one follows: 8 ms with GNU's
OpenMP, 30 ms and more with OpenBLAS. Where there are no more cores than threads, they delay the
next contender, whose time then doubles, or becomes a time slice of the scheduler. Before a
contender is timed on several threads, the process therefore sleeps until no thread runs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from srigl_core._machine import n_cores
from srigl_core.errors import SriglError

__all__ = [
    "at_once",
    "check_threads",
    "environment",
    "relevant_environment",
    "rest",
    "thread_limit",
]

_WINDOW_SECONDS = 0.008
"""Two ticks of Linux's clock, which counts the time of running threads."""

_LONGEST_REST_SECONDS = 0.25
_SPINNING = 0.15
"""Share of a window below which the process counts as asleep."""

_SIZES = tuple(f"{library}_NUM_THREADS" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"))
_AVX2_FEATURES = "sse,sse2,sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe"
_AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    # The name alone leaves Numba all features of this machine.
    "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in _AVX2_FEATURES.split(",")),
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "ATEN_CPU_CAPABILITY": "avx2",
}
_LIMITS = (*_AVX2, "DNNL_MAX_CPU_ISA", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE", "MKL_CBWR")
"""Variables that may keep a library from its best kernel."""


def check_threads(threads: int) -> None:
    """Raise SriglError if the process has fewer cores."""
    cores = n_cores()
    if not 1 <= threads <= cores:
        raise SriglError(f"threads={threads} is out of range: this process may use {cores} cores")


def environment(threads: int, instructions: str) -> dict[str, str]:
    """Return the environment of a process that measures on at most `threads` threads.

    It is that of this process without the limits that are set here, so that "native" is the best
    kernel of each library.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _LIMITS}
    variables |= {name: str(threads) for name in _SIZES}
    variables["OPENBLAS_THREAD_TIMEOUT"] = "18"  # spin for 2**18 cycles, not 2**26
    return variables | (_AVX2 if instructions == "avx2" else {})


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Hold BLAS and PyTorch to this many threads; our kernels take the number with each call."""
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    with threadpool_limits(threads, user_api="blas"):
        if torch is not None:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch is not None:
                torch.set_num_threads(before)


def at_once(calls: Sequence[Callable[[], object]]) -> None:
    """Make calls at the same time, each in a thread that ends with it; the first in this one."""
    others = [threading.Thread(target=call) for call in calls[1:]]
    for thread in others:
        thread.start()
    calls[0]()
    for thread in others:
        thread.join()


def rest() -> None:
    """Sleep until no thread of this process runs, at most for a quarter of a second."""
    ends = time.perf_counter() + _LONGEST_REST_SECONDS
    while time.perf_counter() < ends:
        started, used = time.perf_counter(), time.process_time()
        time.sleep(_WINDOW_SECONDS)
        used, passed = time.process_time() - used, time.perf_counter() - started
        if used < _SPINNING * passed:
            return


def relevant_environment() -> dict[str, str]:
    """Return the environment variables that are set and affect the libraries."""
    pools = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "NUMBA_THREADING_LAYER")
    names = (*_SIZES, "OPENBLAS_THREAD_TIMEOUT", *pools, *_LIMITS)
    return {name: os.environ[name] for name in names if name in os.environ}
