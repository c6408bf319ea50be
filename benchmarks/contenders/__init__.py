"""Everything that computes the same thing: ours, dense, CSR, gathers, and what else there is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from srigl_core.benchmarks.contenders.contender import Contender

__all__ = ["Absent", "Contender", "load_contenders"]


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
    contenders: list[Contender] = []
    absent = []
    for module, library, install in _LIBRARIES:
        try:
            found = importlib.import_module(f"{__name__}.{module}")
        except ImportError as error:
            absent.append(Absent(library, str(error), install))
        else:
            contenders += found.contenders()
    return contenders, absent
