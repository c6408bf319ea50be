"""Everything that computes the same thing on a GPU."""

from __future__ import annotations

from srigl_core.benchmarks.contenders import Absent, contenders_of
from srigl_core.benchmarks.on_gpu.contenders.contender import DeviceContender

__all__ = ["DeviceContender", "load_device_contenders"]

_LIBRARIES = (
    ("ours", "srigl-core", "pip install 'srigl-core[cupy]'"),
    ("pytorch", "PyTorch", "pip install torch"),
    ("cupyx_csr", "CuPy's sparse matrices", "pip install cupy-cuda13x scipy"),
)


def load_device_contenders(device: str) -> tuple[list[DeviceContender], list[Absent]]:
    """Return the contenders that are installed, and the libraries that are not."""
    return contenders_of(_LIBRARIES, __name__, device)
