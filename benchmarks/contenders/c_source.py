"""Our own layers as C source, which `srigl_core.export_c` writes and a C compiler compiles."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from srigl_core import export_c
from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender, unless_compiled
from srigl_core.benchmarks.problems import Batch, Problem
from srigl_core.errors import SriglError

__all__ = ["contenders"]

_FLAGS = ("-std=c11", "-O3", "-march=native", "-fPIC", "-shared")


def contenders(device: str) -> list[Contender]:
    """Return the product, which has one thread."""
    if _compiler() is None:
        raise ImportError("there is no C compiler: neither cc, gcc nor clang is in the path")
    return [Contender("C source", "other", "forward", _product, unfit=_unfit)]


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def _product(problem: Problem) -> Bind:
    # Windows does not delete a library that is loaded.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        layers = {"layer": (problem.weight, problem.bias, None)}
        source, _ = export_c(layers, folder, name="bench")
        built = Path(folder, "bench.so")
        command = [str(_compiler()), *_FLAGS, str(source), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SriglError(f"the compiler failed: {done.stderr.strip()}")
        function = ctypes.CDLL(str(built)).bench_layer  # stays loaded after its file is deleted
    function.restype = None
    n_out = problem.weight.shape[0]

    def bind(batch: Batch) -> Call:
        x = np.ascontiguousarray(batch.x)
        rows, place = ctypes.c_size_t(len(x)), ctypes.c_void_p(x.ctypes.data)

        def call() -> object:
            y = np.empty((len(x), n_out), x.dtype)
            function(rows, place, ctypes.c_void_p(y.ctypes.data))
            return y

        return call

    return bind


def _unfit(case: Case) -> str:
    if case.is_avx2:
        return "is compiled for this processor"
    return unless_compiled(case) or ("" if case.threads == 1 else "has one thread")
