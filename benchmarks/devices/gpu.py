"""A CUDA GPU as a device of the benchmark."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from srigl_core import get_backend
from srigl_core._machine import cpu_name, n_cores
from srigl_core.benchmarks.arrays import TorchArrays
from srigl_core.benchmarks.event_timing import EventRun
from srigl_core.benchmarks.roofline import GpuPeaks
from srigl_core.benchmarks.timing import Call, Context, Timing, interleaved
from srigl_core.errors import BackendUnavailableError

__all__ = ["KERNELS", "GpuDevice"]

KERNELS = Path(__file__).with_name("gpu_peaks.cu")

THREADS = 256
MULTIPLY_ADDS = 16 * 8
"""Multiply-adds of a thread in each repeat of its kernel."""

READ_BYTES = 8 * 16
"""Bytes of shared memory that a thread reads in each repeat of its kernel."""

_BLOCKS_A_PROCESSOR = 8
_COPIED_BYTES = 1 << 30
_FIRST_REPEATS = 500
_SAMPLE_SECONDS = 0.003
_SAMPLES = 7

_SPIN_CYCLES = 20_000_000
_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
_SMI_SECONDS = 20


class GpuDevice:
    """The current device of PyTorch and CuPy, with the stream that both use by default.

    Raises
    ------
    BackendUnavailableError
        If PyTorch or CuPy is missing, or there is no device.
    """

    name = "gpu"
    copies = 4  # as in a network, no call has the inputs of the last one
    packages = (
        *("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cublas", "nvidia-cusparse"),
        *("nvidia-cusparselt-cu13", "nvidia-cuda-nvrtc"),
    )

    def __init__(self) -> None:
        try:
            import torch  # before CuPy: both then use the libraries that PyTorch was built with
        except (ImportError, OSError) as error:
            get_backend("cupy")  # without a device, this error comes first
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
        self.place = f"cuda:{self.number}"
        self.arrays = TorchArrays(self.place)
        self.properties = torch.cuda.get_device_properties(self.number)
        numbers = 2 * int(self.properties.L2_cache_size) // 4
        self._flushed = torch.ones(numbers, dtype=torch.float32, device=self.place)
        self._cycles_a_second = self._measured_clock()

    def mark(self) -> Any:
        """Submit an event, and return it."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, mark: Any) -> bool:
        """Whether the device has reached an event."""
        return bool(mark.query())

    def seconds(self, first: Any, last: Any) -> float:
        """Return the time between two events that the device has reached."""
        return float(first.elapsed_time(last)) / 1e3

    def spin(self, seconds: float) -> None:
        """Submit work that does nothing for this long."""
        self._torch.cuda._sleep(int(seconds * self._cycles_a_second))

    def flush(self) -> None:
        """Write and then read twice the size of the second-level cache.

        After the read, no line has to be written back while the next call runs.
        """
        self._flushed.fill_(1.0)
        self._flushed.sum()

    def wait(self) -> None:
        """Wait until everything submitted is done."""
        self._torch.cuda.synchronize()

    def peaks(self, threads: int) -> GpuPeaks:
        """Measure the peak rates of the device, which takes less than a second."""
        peaks = self._measured_peaks()
        self.release()
        return peaks

    def _measured_peaks(self) -> GpuPeaks:
        torch, cupy = self._torch, self._cupy
        module = cupy.RawModule(code=KERNELS.read_text(encoding="utf-8"), options=("--std=c++17",))
        blocks = _BLOCKS_A_PROCESSOR * int(self.properties.multi_processor_count)
        n_threads = blocks * THREADS
        out = cupy.empty(n_threads, cupy.float32)

        def rate(name: str, *arguments: Any) -> float:
            kernel = module.get_function(name)
            return self._rate(
                lambda n: kernel((blocks,), (THREADS,), (out, np.int32(n), *arguments))
            )

        source = torch.ones(_COPIED_BYTES // 4, dtype=torch.float32, device=self.place)
        target = torch.empty_like(source)
        return GpuPeaks(
            copy_bandwidth=2 * _COPIED_BYTES / min(self._times(lambda: target.copy_(source))),
            multiply_adds=rate("multiply_adds", np.float32(0.999), np.float32(0.001))
            * (n_threads * MULTIPLY_ADDS),
            shared_bandwidth=rate("shared_reads") * n_threads * READ_BYTES,
            between_marks=min(self._times(lambda: None)),
        )

    def _rate(self, launch: Callable[[int], object]) -> float:
        """Return the repeats a second of a kernel, the best of samples of a few milliseconds."""
        launch(1)
        least = min(self._times(lambda: launch(_FIRST_REPEATS)))
        repeats = max(1, round(_FIRST_REPEATS * _SAMPLE_SECONDS / least))
        return repeats / min(self._times(lambda: launch(repeats)))

    def _times(self, call: Callable[[], object]) -> list[float]:
        """Return the times of a few calls, which are submitted while the device spins."""
        self.spin(_SAMPLE_SECONDS)
        marks = []
        for _ in range(_SAMPLES):
            first = self.mark()
            call()
            marks.append((first, self.mark()))
        self.wait()
        return [self.seconds(*pair) for pair in marks]

    def limit(self, threads: int) -> AbstractContextManager[None]:
        """Return a context that limits nothing."""
        return nullcontext()

    def run(
        self, calls: Sequence[Call], *, cold: bool, around: Context, other: Callable[[], Call]
    ) -> EventRun:
        """Return calls that are timed with events; cold ones follow a flush of the L2 cache."""
        return EventRun(calls, self, cold=cold, around=around)

    def time(
        self, runs: Mapping[str, EventRun], threads: int
    ) -> tuple[dict[str, Timing], dict[str, Exception]]:
        """Time contenders in turns."""
        return interleaved(runs)

    def release(self) -> None:
        """Wait for the device, and return unused memory of both libraries to it."""
        self.wait()
        self._torch.cuda.empty_cache()
        self._cupy.get_default_memory_pool().free_all_blocks()

    def facts(self) -> dict[str, Any]:
        """Return the description of the machine in the result file."""
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

    def software(self) -> dict[str, Any]:
        """Return nothing: the versions say it all."""
        return {}

    def _measured_clock(self) -> float:
        """Return the cycles in a second, after a few spins that raise the clock."""
        for _ in range(5):
            first = self.mark()
            self._torch.cuda._sleep(_SPIN_CYCLES)
            last = self.mark()
            self.wait()
        return _SPIN_CYCLES / self.seconds(first, last)


def _smi() -> dict[str, str]:
    """Return the driver's version and the clocks, where ``nvidia-smi`` reports one device."""
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
