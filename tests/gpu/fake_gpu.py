"""A GPU without hardware: a queue with a clock of its own, and tensors in the host's memory."""

from contextlib import nullcontext

import pytest

from srigl_core.benchmarks.arrays import TorchArrays
from srigl_core.benchmarks.event_timing import EventRun
from srigl_core.benchmarks.roofline import GpuPeaks
from srigl_core.benchmarks.timing import interleaved

PEAKS = GpuPeaks(
    copy_bandwidth=1000.0, multiply_adds=100.0, shared_bandwidth=500.0, between_marks=0.0
)


class HostTensors(TorchArrays):
    """Tensors in the host's memory; the backend takes NumPy arrays of the same memory."""

    def __init__(self):
        super().__init__("cpu")

    def for_backend(self, array):
        if "bfloat16" in str(array.dtype):
            import ml_dtypes
            import torch

            return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()


def gpu_contenders():
    """The contenders of a GPU, ours with the reference; 2:4 needs a GPU."""
    pytest.importorskip("torch", reason="the GPU benchmark needs PyTorch")
    from srigl_core.benchmarks.contenders import ours, pytorch

    return [*ours.gpu_contenders("reference"), *pytorch.contenders("gpu")]


class FakeGpu:
    """A device that works through its queue while the host goes on, and the clocks of both.

    Where `alive` is set to False, it takes no more work.
    """

    MARK_SECONDS, FLUSH_SECONDS = 1e-6, 5e-6
    name, copies, packages = "gpu", 4, ("numpy",)

    def __init__(self):
        self.host, self.free, self.record = 0.0, 0.0, []
        self.spins, self.released, self.alive = [], 0, True
        self.arrays = HostTensors()

    def clock(self):
        return self.host

    def submit(self, host, device):
        self.host += host
        self.free = max(self.free, self.host) + device

    def mark(self):
        self.submit(self.MARK_SECONDS, 0.0)
        return self.free

    def has_passed(self, mark):
        return self.host >= mark

    def seconds(self, first, last):
        return last - first

    def spin(self, seconds):
        self.record.append("spin")
        self.spins.append(seconds)
        self.submit(self.MARK_SECONDS, seconds)

    def flush(self):
        self.record.append("flush")
        self.submit(self.FLUSH_SECONDS, 4e-5)

    def wait(self):
        if not self.alive:
            raise RuntimeError("CUDA error: an illegal memory access\nat /some/folder/file.cpp:1")
        self.host = max(self.host, self.free)

    def release(self):
        self.wait()
        self.released += 1

    def limit(self, threads):
        return nullcontext()

    def run(self, calls, *, cold, around, other):
        return EventRun(calls, self, cold=cold, around=around, clock=self.clock)

    def time(self, runs, threads):
        return interleaved(runs)

    def facts(self):
        return {"gpu": "Some GPU", "memory": 139 << 30, "L2": 60 << 20, "driver_version": "1.2"}

    def software(self):
        return {}

    def call(self, name, device=1e-5, host=2e-5, *, waits=False, result=None):
        """Return a call that takes these seconds and is recorded by name."""

        def run():
            self.record.append(name)
            self.submit(host, device)
            if waits:
                self.wait()
            return name if result is None else result()

        return run

    def timed(self, name, *, cold=False, **costs):
        """Return the calls of a contender as they are timed."""
        calls = [self.call(f"{name}{copy}", **costs) for copy in range(self.copies)]
        return EventRun(calls, self, cold=cold, clock=self.clock)
