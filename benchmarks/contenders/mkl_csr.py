"""CSR products of MKL's inspector-executor, which looks at a matrix before it multiplies."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender, unless, unless_long
from srigl_core.benchmarks.contenders.scipy_csr import csr_matrix
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders"]

# Names of mkl_spblas.h.
_NON_TRANSPOSE, _GENERAL, _ROW_MAJOR, _AGGRESSIVE = 10, 20, 101, 81
_EXPECTED_CALLS = 100_000
_ONE = ctypes.c_float(1)


class _Description(ctypes.Structure):
    """MKL's ``struct matrix_descr``."""

    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int))


def contenders(device: str) -> list[Contender]:
    """Return the product, and another one that is given x as columns.

    MKL is fastest if the numbers of an input lie together, so each call transposes x first. A
    caller whose x lies so already saves that: this is a family of its own, since our kernels and
    the others take x as rows.
    """
    _library()
    is_float32 = unless(lambda case: case.dtype == "float32", "float32 is measured")
    has_rows = unless(lambda case: case.batch != 1, "one row need not be transposed")
    name = "MKL inspector-executor"
    return [
        Contender(name, "csr", "forward", _product(copies=True), unfit=is_float32),
        Contender(
            f"{name}, x transposed beforehand",
            "csr, x transposed",
            "forward",
            _product(copies=False),
            unfit=lambda case: is_float32(case) or has_rows(case) or unless_long(case),
        ),
    ]


def _library() -> ctypes.CDLL:
    """Load MKL, of the package mkl or of the system; ImportError if there is none."""
    folders = [Path(sys.prefix, "lib"), Path(sys.prefix, "Library", "bin")]
    files = [file for folder in folders for file in folder.glob("*mkl_rt*")]
    found = str(files[0]) if files else ctypes.util.find_library("mkl_rt")
    if found is None:
        raise ImportError("mkl_rt is neither in this environment nor in the system")
    try:
        return ctypes.CDLL(found)
    except OSError as error:
        raise ImportError(str(error)) from error


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"MKL returned status {status}")


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class _Matrix:
    """A CSR matrix of MKL, inspected for vectors, or for batches of one size."""

    def __init__(self, problem: Problem, batch: int) -> None:
        self.mkl, self._handle = _library(), ctypes.c_void_p()
        csr = csr_matrix(problem.weight)
        self.shape = csr.shape
        self._arrays = starts, columns, values = csr.indptr, csr.indices, csr.data  # MKL keeps them
        pointers = (_pointer(starts), _pointer(starts[1:]), _pointer(columns), _pointer(values))
        create, handle = self.mkl.mkl_sparse_s_create_csr, ctypes.byref(self._handle)
        _checked(create(handle, 0, *map(ctypes.c_int, self.shape), *pointers))
        self.arguments = (_NON_TRANSPOSE, _ONE, self._handle, _Description(_GENERAL, 0, 0))
        hint = (_NON_TRANSPOSE, _Description(_GENERAL, 0, 0))
        if batch == 1:
            _checked(self.mkl.mkl_sparse_set_mv_hint(self._handle, *hint, _EXPECTED_CALLS))
        else:
            shape = (_ROW_MAJOR, batch, _EXPECTED_CALLS)
            _checked(self.mkl.mkl_sparse_set_mm_hint(self._handle, *hint, *shape))
        _checked(self.mkl.mkl_sparse_set_memory_hint(self._handle, _AGGRESSIVE))
        _checked(self.mkl.mkl_sparse_optimize(self._handle))

    def __del__(self) -> None:
        self.mkl.mkl_sparse_destroy(self._handle)


def _product(*, copies: bool) -> Callable[[Problem], Bind]:
    """Return the product; it transposes x with each call if `copies`, else once."""

    def prepare(problem: Problem) -> Bind:
        bias = problem.bias

        def bind(batch: Batch) -> Call:
            matrix, x, n = _Matrix(problem, len(batch.x)), batch.x, len(batch.x)
            multiply = matrix.mkl.mkl_sparse_s_mm

            def vector() -> object:
                y = bias.copy()
                _checked(
                    matrix.mkl.mkl_sparse_s_mv(*matrix.arguments, _pointer(x), _ONE, _pointer(y))
                )
                return y

            def product(columns: NDArray[np.float32]) -> object:
                y = np.empty((len(bias), n), np.float32)
                y[:] = bias[:, None]
                arrays = (_pointer(columns), n, n, _ONE, _pointer(y), n)
                _checked(multiply(*matrix.arguments, _ROW_MAJOR, *arrays))
                return y.T

            if n == 1:
                return vector
            if copies:
                return lambda: product(np.ascontiguousarray(x.T))
            transposed = np.ascontiguousarray(x.T)
            return lambda: product(transposed)

        return bind

    return prepare
