"""Everything that computes the same thing: ours, dense, CSR, gathers, and what else there is."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from srigl_core.benchmarks.contenders.contender import Contender

__all__ = ["Absent", "Contender", "contenders_of", "load_contenders"]


@dataclass(frozen=True)
class Absent:
    """A library whose contenders cannot take part here."""

    library: str
    reason: str
    install: str


_LIBRARIES = (
    ("ours", "srigl-core", "pip install numba"),
    ("numpy_blas", "NumPy", "pip install numpy"),
    ("scipy_csr", "SciPy", "pip install scipy"),
    ("pytorch", "PyTorch", "pip install torch"),
    ("jax_brainevent", "brainevent", "pip install brainevent jax"),
)


def load_contenders() -> tuple[list[Contender], list[Absent]]:
    """Return the contenders that are installed, and the libraries that are not."""
    return contenders_of(_LIBRARIES, __name__)


def contenders_of(
    libraries: Sequence[tuple[str, str, str]], package: str, *arguments: Any
) -> tuple[list[Any], list[Absent]]:
    """Return the contenders of each library's module, and the libraries that are not installed.

    Parameters
    ----------
    libraries : sequence of (str, str, str)
        Module, name of the library, and the line that installs it.
    package : str
        That holds the modules; each has a function ``contenders(*arguments)``.
    """
    contenders: list[Any] = []
    absent = []
    for module, library, install in libraries:
        try:
            found = importlib.import_module(f"{package}.{module}")
        except ImportError as error:
            absent.append(Absent(library, str(error), install))
        else:
            contenders += found.contenders(*arguments)
    return contenders, absent
