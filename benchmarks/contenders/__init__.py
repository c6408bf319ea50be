"""Everything that computes the same operations: ours, dense products, CSR, gathers."""

from __future__ import annotations

import importlib

from srigl_core._install import install_command
from srigl_core.benchmarks.contenders.contender import Contender

__all__ = ["Contender", "load_contenders"]


_LIBRARIES = {
    "cpu": (
        ("ours", "srigl-core", "pip install numba"),
        ("numpy_blas", "NumPy", "pip install numpy"),
        ("scipy_csr", "SciPy", "pip install scipy"),
        ("pytorch", "PyTorch", "pip install torch"),
        ("pytorch_int8", "PyTorch's int8", "pip install torch"),
        ("onnxruntime_int8", "ONNX Runtime", "pip install onnxruntime onnx"),
        ("openvino_int8", "OpenVINO", "pip install openvino"),
        ("mkl_csr", "MKL", "pip install mkl"),
        ("sparselab_csr", "sparselab", "pip install sparselab"),
        ("jax_brainevent", "brainevent", "pip install brainevent jax"),
        ("c_source", "a C compiler", "apt install gcc"),
    ),
    "gpu": (
        ("ours", "srigl-core", install_command("cupy")),
        ("pytorch", "PyTorch", "pip install torch"),
        ("cupyx_csr", "CuPy's sparse matrices", "pip install cupy-cuda13x scipy"),
    ),
}
"""Module in this package, name of the library, and the command that installs it."""


def load_contenders(device: str) -> tuple[list[Contender], list[dict[str, str]]]:
    """Return the installed contenders for a device, and the libraries that are not installed.

    Parameters
    ----------
    device : {"cpu", "gpu"}
    """
    contenders: list[Contender] = []
    absent = []
    for module, library, install in _LIBRARIES[device]:
        try:
            loaded = importlib.import_module(f"{__name__}.{module}")
            contenders += loaded.contenders(device)
        except ImportError as error:
            absent.append({"library": library, "reason": str(error), "install": install})
    return contenders, absent
