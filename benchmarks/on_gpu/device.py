"""A CUDA device as the benchmark uses it: a queue of work, and marks in it that tell the time."""

from __future__ import annotations

import subprocess
from typing import Any, Protocol

from srigl_core import get_backend
from srigl_core._machine import cpu_name, n_cores
from srigl_core.errors import BackendUnavailableError

__all__ = ["CudaDevice", "Device"]

_SPIN_CYCLES = 20_000_000
_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
_SMI_SECONDS = 20


class Device(Protocol):
    """What timing and measuring ask of a device."""

    def mark(self) -> Any:
        """Put a mark behind all that was submitted, and return it."""
        ...

    def has_passed(self, mark: Any) -> bool:
        """Whether the device has come to a mark."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Return the time between two marks that it has come to."""
        ...

    def spin(self, seconds: float) -> None:
        """Submit work that does nothing for so long."""
        ...

    def flush(self) -> None:
        """Submit work after which the second-level cache holds nothing of what was used."""
        ...

    def wait(self) -> None:
        """Wait until all that was submitted is done."""
        ...

    def release(self) -> None:
        """Give unused memory back to the device."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what the file says of the machine."""
        ...


class CudaDevice:
    """The current device of PyTorch and CuPy, and the stream that both use by default.

    Raises
    ------
    BackendUnavailableError
        If PyTorch or CuPy is missing, or there is no device.
    """

    def __init__(self) -> None:
        try:
            import torch  # before CuPy: both then use the libraries that PyTorch was built with
        except (ImportError, OSError) as error:
            get_backend("cupy")  # without a device, that is what to say
            raise BackendUnavailableError(
                f"the GPU benchmark needs PyTorch, which cannot be imported ({error}); install it "
                f"with: pip install torch"
            ) from error
        get_backend("cupy")
        if not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"PyTorch {torch.__version__} finds no CUDA device; install one built for CUDA, "
                f"with: pip install torch"
            )
        import cupy

        self._torch, self._cupy = torch, cupy
        self.number = cupy.cuda.runtime.getDevice()
        torch.cuda.set_device(self.number)
        self.name = f"cuda:{self.number}"
        self.properties = torch.cuda.get_device_properties(self.number)
        numbers = 2 * int(self.properties.L2_cache_size) // 4
        self._flushed = torch.ones(numbers, dtype=torch.float32, device=self.name)
        self._cycles_a_second = self._measured_clock()

    def mark(self) -> Any:
        """Put a mark behind all that was submitted, and return it."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, mark: Any) -> bool:
        """Whether the device has come to a mark."""
        return bool(mark.query())

    def seconds(self, first: Any, last: Any) -> float:
        """Return the time between two marks that it has come to."""
        return float(first.elapsed_time(last)) / 1e3

    def spin(self, seconds: float) -> None:
        """Submit work that does nothing for so long."""
        self._torch.cuda._sleep(int(seconds * self._cycles_a_second))

    def flush(self) -> None:
        """Write twice what the second-level cache holds, and read it.

        Reading leaves no line that would have to be written back while the next call runs.
        """
        self._flushed.fill_(1.0)
        self._flushed.sum()

    def wait(self) -> None:
        """Wait until all that was submitted is done."""
        self._torch.cuda.synchronize()

    def release(self) -> None:
        """Give unused memory of both libraries back to the device."""
        self._torch.cuda.empty_cache()
        self._cupy.get_default_memory_pool().free_all_blocks()

    def facts(self) -> dict[str, Any]:
        """Return what the file says of the machine."""
        properties, runtime = self.properties, self._cupy.cuda.runtime
        return {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": properties.L2_cache_size,
            "CUDA driver": runtime.driverGetVersion(),
            "CUDA runtime of CuPy": runtime.runtimeGetVersion(),
            "CUDA of PyTorch": self._torch.version.cuda,
            **_smi(),
            "cpu": cpu_name(),
            "cores": n_cores(),
        }

    def _measured_clock(self) -> float:
        """Return the cycles in a second, once the device runs at its pace."""
        for _ in range(5):
            first = self.mark()
            self._torch.cuda._sleep(_SPIN_CYCLES)
            last = self.mark()
            self.wait()
        return _SPIN_CYCLES / self.seconds(first, last)


def _smi() -> dict[str, str]:
    """Return the driver's version and the clocks, where ``nvidia-smi`` says them of one device."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if len(lines) == 1 else []
    return dict(zip(_SMI, values, strict=True)) if len(values) == len(_SMI) else {}
