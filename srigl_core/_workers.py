"""Processes that end with the process that started them, however it ends.

A worker has a thread that waits for the other end of a pipe to be closed. The process that started
the worker holds that end. It closes it when the work is no longer wanted, and the system closes it
if that process is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

__all__ = ["END_WITH_STDIN", "end_with_parent", "worker_pool", "worker_stdin"]

END_WITH_STDIN = """
import os, sys, threading, time
def wait_for_end():
    if sys.platform == "win32":  # a read that waits there would stop the import of NumPy
        import _winapi, msvcrt
        try:
            while _winapi.PeekNamedPipe(msvcrt.get_osfhandle(0)):
                time.sleep(0.2)
        except OSError:
            os._exit(1)
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=wait_for_end, daemon=True).start()
"""
"""Begins the code of a ``python -c`` whose standard input is that of `worker_stdin`."""


@contextmanager
def worker_pool(
    processes: int, initializer: Callable[[], object] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Start a pool of spawned processes.

    If the block ends with an exception, such as that of Ctrl-C, the workers end at once, and what
    they compute is lost.

    Parameters
    ----------
    processes : int
    initializer : callable or None
        Called in each worker when it starts.
    """
    # A forked process would lack the threads that BLAS or Numba have started in this one.
    context = multiprocessing.get_context("spawn")
    waiting, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _start, (waiting, initializer))
    try:
        yield pool
    except BaseException:
        held.close()
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown()
        held.close()
        waiting.close()


def _start(pipe: Connection, initializer: Callable[[], object] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    if initializer is not None:
        initializer()


def _end_with(pipe: Connection) -> None:
    with suppress(OSError):
        pipe.poll(None)
    os._exit(1)


def end_with_parent(parent: int | None = None) -> None:
    """End this process soon after its parent, which holds no pipe, has ended; only on POSIX.

    Parameters
    ----------
    parent : int or None
        Its process number, if it may have ended already.
    """
    if parent is None:
        parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def worker_stdin() -> Iterator[int]:
    """Return the standard input of a process that begins with the code `END_WITH_STDIN`."""
    waiting, held = os.pipe()
    try:
        yield waiting
    finally:
        os.close(held)
        os.close(waiting)
