"""A kernel in C, checked as a bare function and as a backend.

    python c_kernel.py [--quick] [--buggy]

README.md beside this file explains it; the loops are in condensed_matmul.c.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srigl_core import BackendUnavailableError, CondensedWeight
from srigl_core.contract import Capabilities, MatmulGradients, accumulator_dtype, round_to
from srigl_core.reference import activate
from srigl_core.testing import ConformanceError, KernelCapabilities, check_kernel, declare, verify

SOURCE = Path(__file__).with_name("condensed_matmul.c")
FLOATS = frozenset({"float32", "float64"})

# No -ffast-math: it lets the compiler assume that there is no NaN and no infinity, and with GCC
# before 13, loading such a library makes the thread flush subnormals to zero. The error bound
# allows a fused multiply-add.
FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-shared")

# ---------------------------------------------------------------- compile, load, call


def find_compiler() -> str:
    """Return the C compiler: $CC, else the one that Python was built with, else one in the path."""
    configured = (os.environ.get("CC"), sysconfig.get_config_var("CC"))
    names = [text.split()[0] for text in configured if text]  # "gcc" from "gcc -pthread"
    for name in (*names, "cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    install = {"Darwin": "xcode-select --install"}.get(platform.system(), "apt install gcc")
    raise BackendUnavailableError(
        f"there is no C compiler: neither $CC nor cc, gcc or clang is in the path; {install}, or "
        f"what installs GCC or Clang on your system"
    )


@functools.cache
def compiled(real: str, index: str, *, buggy: bool = False) -> ctypes.CDLL:
    """Compile the loops for a pair of types, and load them."""
    types = {"float32": "float", "float64": "double", "uint16": "uint16_t", "uint32": "uint32_t"}
    defines = [f"-DREAL={types[real]}", f"-DINDEX={types[index]}"] + ["-DWITH_A_BUG"] * buggy
    # Windows does not delete a library that is loaded.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "condensed_matmul.so"
        command = [find_compiler(), *FLAGS, *defines, str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendUnavailableError(f"{' '.join(command)} failed:\n{done.stderr}")
        return ctypes.CDLL(str(built))  # stays loaded after its file is deleted


def call(function: Any, *arguments: Any) -> None:
    """Call a function of the library with arrays, None and numbers."""
    function.restype = None
    function(*(a.ctypes if isinstance(a, np.ndarray) else _number(a) for a in arguments))


def _number(number: int | None) -> Any:
    return None if number is None else ctypes.c_int64(number)


def plain(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Return an array of `dtype` in C order, aligned; a copy if necessary."""
    return np.require(array, dtype, ["C", "A"])


# ---------------------------------------------------------------- 1: a function

CAPABILITIES = KernelCapabilities(value_dtypes=FLOATS)


@declare(capabilities=CAPABILITIES)
def c_matmul(x, values, indices, active, n_out, bias=None):
    """Return x @ W.T + bias, (batch, n_out), for float32 and float64, also mixed."""
    return _matmul(x, values, indices, active, n_out, bias, buggy=False)


@declare(capabilities=CAPABILITIES)
def c_matmul_with_a_bug(x, values, indices, active, n_out, bias=None):
    """Return the same, with a loop that ends too early."""
    return _matmul(x, values, indices, active, n_out, bias, buggy=True)


def _matmul(x, values, indices, active, n_out, bias, *, buggy):
    dtype = np.result_type(x, values)
    x, values = plain(x, dtype), plain(values, dtype)
    bias = None if bias is None else plain(bias, dtype)
    out = np.empty((len(x), n_out), dtype)
    c = compiled(dtype.name, indices.dtype.name, buggy=buggy)
    sizes = (len(x), x.shape[1], n_out, *values.shape)
    call(c.product, x, values, plain(indices, None), active, bias, out, *sizes)
    return out


# ---------------------------------------------------------------- 2: a backend


class CBackend:
    """The C loops as a backend: products and gradients, one thread."""

    name = "c"
    capabilities = Capabilities(
        operations=frozenset({"condensed_matmul", "condensed_matmul_backward"}),
        value_dtypes=FLOATS,
    )

    def __init__(self) -> None:
        find_compiler()  # raises if the backend cannot run here

    def prepare(self, weight: CondensedWeight) -> CPrepared:
        """Return `weight` unchanged: the kernel's layout is the condensed format."""
        return CPrepared(weight)


@dataclass(frozen=True, eq=False)
class CPrepared:
    """A weight for the C loops."""

    weight: CondensedWeight

    def describe(self) -> Mapping[str, object]:
        """Describe the layout."""
        return {"kernel": SOURCE.name, "layout": "condensed", "bytes": self.weight.nbytes}

    def with_values(self, weight: CondensedWeight) -> CPrepared:
        """Return the same layout for other values."""
        return CPrepared(weight)

    def matmul(
        self,
        x: np.ndarray,
        bias: np.ndarray | None,
        *,
        activation: str,
        compact: bool,
        out: np.ndarray,
        threads: int | None,
    ) -> None:
        """Write the product to `out`, rounded once."""
        weight = self.weight
        with np.errstate(all="ignore"):
            z = c_matmul(x, weight.values, weight.indices, weight.active, weight.shape[0], bias)
            z = z[:, weight.active] if compact else z
            if activation != "none":
                z = activate(z.astype(np.float64), activation)
            out[...] = round_to(z, out.dtype)

    def backward(
        self,
        grad: np.ndarray,
        x: np.ndarray | None,
        *,
        out: MatmulGradients,
        threads: int | None,
    ) -> None:
        """Write the gradients that `out` has arrays for."""
        weight = self.weight
        dtype = accumulator_dtype(weight.dtype, *(a.dtype for a in (grad, x) if a is not None))
        c = compiled(dtype.name, weight.indices.dtype.name)
        grad = plain(grad, dtype)
        sizes = (len(grad), weight.shape[1], weight.shape[0], *weight.values.shape)
        with np.errstate(all="ignore"):
            if out.x is not None:
                dx = np.empty(out.x.shape, dtype)
                values = plain(weight.values, dtype)
                call(c.gradient_of_x, grad, values, weight.indices, weight.active, dx, *sizes)
                out.x[...] = round_to(dx, out.x.dtype)
            if out.values is not None and x is not None:
                dvalues = np.empty(out.values.shape, dtype)
                x = plain(x, dtype)
                call(c.gradient_of_values, grad, x, weight.indices, weight.active, dvalues, *sizes)
                out.values[...] = round_to(dvalues, out.values.dtype)
            if out.bias is not None:
                out.bias[...] = round_to(grad.sum(axis=0), out.bias.dtype)


# ---------------------------------------------------------------- check both


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a kernel in C.")
    parser.add_argument("--quick", action="store_true", help="20 examples a law instead of 300")
    parser.add_argument("--buggy", action="store_true", help="check the function with a bug")
    chosen = parser.parse_args(arguments)
    max_examples = 20 if chosen.quick else 300
    function = c_matmul_with_a_bug if chosen.buggy else c_matmul
    try:
        print(check_kernel(function, max_examples=max_examples))
    except ConformanceError as error:
        print(error)
        return 1
    report = verify(CBackend(), max_examples=max_examples)
    print("\n", report, sep="")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
