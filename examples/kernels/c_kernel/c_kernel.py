"""A kernel in C, checked as a bare function and as a backend.

    python c_kernel.py [--quick] [--buggy]

The story is in README.md beside this file, the loops are in condensed_matmul.c.
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

from srigl_core import CondensedWeight
from srigl_core._arrays.dtypes import accumulator_dtype, round_to
from srigl_core.contract import Capabilities, MatmulGradients
from srigl_core.errors import BackendUnavailableError
from srigl_core.reference.activations import activate
from srigl_core.testing import ConformanceError, KernelCapabilities, check_kernel, declare, verify

SOURCE = Path(__file__).with_name("condensed_matmul.c")
FLOATS = frozenset({"float32", "float64"})

# No -ffast-math: it lets the compiler assume that there is no NaN and no infinity, and with GCC
# before 13 merely loading such a library has the thread flush subnormals to zero. The bound
# allows a fused multiply-add.
FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-shared")

# ---------------------------------------------------------------- compile, load, call


def find_compiler() -> str:
    """Return the C compiler: $CC, else Python's own, else what is in the path."""
    configured = (os.environ.get("CC"), sysconfig.get_config_var("CC"))
    names = [text.split()[0] for text in configured if text]  # of "gcc -pthread" the program
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
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "condensed_matmul.so"
        command = [find_compiler(), *FLAGS, *defines, str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendUnavailableError(f"{' '.join(command)} failed:\n{done.stderr}")
        return ctypes.CDLL(str(built))  # stays loaded when its file is gone


def call(function: Any, *arguments: Any) -> None:
    """Call a function of the library with arrays, None and numbers."""
    function.restype = None
    function(*(a.ctypes if isinstance(a, np.ndarray) else _number(a) for a in arguments))


def _number(given: int | None) -> Any:
    return None if given is None else ctypes.c_int64(given)


def plain(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Return an array as C can read it: of `dtype`, in C order, aligned; a copy if need be."""
    return np.require(array, dtype, ["C", "A"])


# ---------------------------------------------------------------- 1: a bare function

ABLE = KernelCapabilities(value_dtypes=FLOATS)


@declare(capabilities=ABLE)
def c_matmul(x, values, indices, active, n_out, bias=None):
    """Return x @ W.T + bias, (batch, n_out), for float32 and float64 in any mixture."""
    return _matmul(x, values, indices, active, n_out, bias, buggy=False)


@declare(capabilities=ABLE)
def c_matmul_with_a_bug(x, values, indices, active, n_out, bias=None):
    """Return the same, but for a loop that ends one too early."""
    return _matmul(x, values, indices, active, n_out, bias, buggy=True)


def _matmul(x, values, indices, active, n_out, bias, *, buggy):
    kind = np.result_type(x, values)
    x, values = plain(x, kind), plain(values, kind)
    bias = None if bias is None else plain(bias, kind)
    out = np.empty((len(x), n_out), kind)
    c = compiled(kind.name, indices.dtype.name, buggy=buggy)
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
        find_compiler()  # where it cannot run, making it is the error

    def prepare(self, weight: CondensedWeight) -> CPrepared:
        """Return `weight` as it is: the condensed form is this kernel's layout."""
        return CPrepared(weight)


@dataclass(frozen=True, eq=False)
class CPrepared:
    """A weight for the C loops."""

    weight: CondensedWeight

    def describe(self) -> Mapping[str, object]:
        """Return kernel, layout and bytes."""
        return {"kernel": SOURCE.name, "layout": "condensed", "bytes": self.weight.nbytes}

    def with_values(self, weight: CondensedWeight) -> CPrepared:
        """Return the same for other values."""
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
        kind = accumulator_dtype(weight.dtype, *(a.dtype for a in (grad, x) if a is not None))
        c = compiled(kind.name, weight.indices.dtype.name)
        grad = plain(grad, kind)
        sizes = (len(grad), weight.shape[1], weight.shape[0], *weight.values.shape)
        with np.errstate(all="ignore"):
            if out.x is not None:
                dx = np.empty(out.x.shape, kind)
                values = plain(weight.values, kind)
                call(c.gradient_of_x, grad, values, weight.indices, weight.active, dx, *sizes)
                out.x[...] = round_to(dx, out.x.dtype)
            if out.values is not None and x is not None:
                dvalues = np.empty(out.values.shape, kind)
                x = plain(x, kind)
                call(c.gradient_of_values, grad, x, weight.indices, weight.active, dvalues, *sizes)
                out.values[...] = round_to(dvalues, out.values.dtype)
            if out.bias is not None:
                out.bias[...] = round_to(grad.sum(axis=0), out.bias.dtype)


# ---------------------------------------------------------------- check both


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a kernel in C.")
    parser.add_argument("--quick", action="store_true", help="20 examples a law instead of 300")
    parser.add_argument("--buggy", action="store_true", help="the function with a bug in it")
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
