"""The devices that are measured: a CPU with its threads, and a CUDA GPU."""

from srigl_core.benchmarks.devices.cpu import CpuDevice
from srigl_core.benchmarks.devices.gpu import GpuDevice

__all__ = ["CpuDevice", "Device", "GpuDevice"]

Device = CpuDevice | GpuDevice
"""What `srigl_core.benchmarks.measure` uses of the two is the same."""
