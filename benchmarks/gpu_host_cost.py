"""The time of the host in a call of the GPU backend, without a device.

``python -m srigl_core.benchmarks.gpu_host_cost OUT.json``. The arrays are NumPy's, and a launch
does nothing, so that what is left is the time of the backend and of the plan. A device adds the
time of CuPy's launches and allocations.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import srigl_core
from srigl_core._arrays.operations import HostArrays
from srigl_core._machine import cpu_name, n_cores, package_versions
from srigl_core.backends.cupy_gpu.device import DeviceProperties
from srigl_core.backends.cupy_gpu.gpu_backend import GpuBackend
from srigl_core.benchmarks.predict import GPUS
from srigl_core.benchmarks.timing import median_times
from srigl_core.contract import Capabilities, MatmulGradients

__all__ = ["IdleDevice", "main"]

SHAPE, FAN_IN, BATCHES = (768, 3072), 307, (1, 256)
SECONDS = 5.0


class IdleDevice:
    """A device that launches nothing, with arrays of NumPy."""

    properties: DeviceProperties = next(
        gpu.properties for gpu in GPUS if gpu.properties.name == "H200"
    )

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return an uninitialised array."""
        return np.empty(shape, dtype)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Return an array of zeros."""
        return np.zeros(shape, dtype)

    def upload(self, array: Any) -> Any:
        """Return a copy."""
        return array.copy()

    def download(self, array: Any) -> Any:
        """Return a copy."""
        return array.copy()

    def contiguous(self, array: Any) -> Any:
        """Return the array in C order."""
        return np.ascontiguousarray(array)

    def number(self) -> int:
        """Return the only device's."""
        return 0

    def launch(self, *arguments: Any) -> None:
        """Do nothing."""

    def load(self, variant: Any) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def fitting_blocks(self, variant: Any, threads: int, shared_bytes: int) -> int:
        """Return four for each multiprocessor."""
        return 4 * self.properties.processors

    def is_capturing(self) -> bool:
        """Return False."""
        return False


def main(out: Path) -> None:
    """Measure, print a line for each call, and write the JSON."""
    backend: Any = GpuBackend(IdleDevice(), "idle", Capabilities())
    backend.arrays = HostArrays()
    weight = srigl_core.CondensedWeight.random(SHAPE, fan_in=FAN_IN, rng=0)
    plan = srigl_core.prepare(weight, backend=backend)
    calls: dict[str, Any] = {}
    for batch in BATCHES:
        x, grad = (np.ones((batch, n), np.float32) for n in reversed(SHAPE))
        y, bias = np.empty_like(grad), np.ones(SHAPE[0], np.float32)
        into = MatmulGradients(np.empty_like(x), np.empty_like(weight.values), bias.copy())
        calls |= {
            f"plan, batch {batch}": lambda x=x: plan(x),
            f"plan with bias and out, batch {batch}": lambda x=x, b=bias, y=y: plan(x, b, out=y),
            f"plan.backward with out, batch {batch}": lambda g=grad, x=x, i=into: plan.backward(
                g, x, out=i
            ),
            f"the backend's own product, batch {batch}": lambda x=x, y=y: plan.write_product(
                x, None, activation="none", out=y, threads=None
            ),
        }
    medians = median_times(calls, SECONDS)
    for name, median in medians.items():
        print(f"{name:<45}{median:8.2f} us")
    content = {
        "benchmark": "host cost of the GPU backend, without a device",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": n_cores()},
        "versions": package_versions(),
        "layer": f"{SHAPE[1]} inputs, {SHAPE[0]} neurons, {FAN_IN} connections each, float32",
        "median_us": medians,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
