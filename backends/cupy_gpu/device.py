"""The interface of a device for the host code, which can also drive a simulated device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import DTypeLike, NDArray

from srigl_core.backends.cupy_gpu.variants import Variant
from srigl_core.errors import SriglError

__all__ = ["Device", "DeviceProperties", "check_not_capturing"]


@dataclass(frozen=True)
class DeviceProperties:
    """Properties that plans depend on.

    Parameters
    ----------
    name : str
    processors : int
        Number of multiprocessors.
    block_shared_bytes : int
        Most shared memory of a block, after opting in.
    processor_shared_bytes : int
        Shared memory of a multiprocessor.
    processor_threads : int
        Most threads that a multiprocessor runs at once.
    architecture : int
        The compute capability, such as 90; 0 if it is unknown.
    """

    name: str
    processors: int
    block_shared_bytes: int
    processor_shared_bytes: int
    processor_threads: int
    architecture: int = 0


class Device(Protocol):
    """A CUDA device, or a simulated one; its arrays behave like NumPy arrays."""

    @property
    def properties(self) -> DeviceProperties:
        """Return the properties of the current device."""
        ...

    def number(self) -> int:
        """Return the number of the current device."""
        ...

    def launch(
        self,
        variant: Variant,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel on the current stream.

        Parameters
        ----------
        variant : Variant
        grid, block : tuple of int
        arguments : tuple
            Contiguous arrays, and NumPy scalars of the parameters' types.
        shared_bytes : int
            Dynamic shared memory.
        """
        ...

    def load(self, variant: Variant) -> None:
        """Compile a kernel, or read the compiled one, so that its next launch need not."""
        ...

    def fitting_blocks(self, variant: Variant, threads: int, shared_bytes: int) -> int:
        """Return how many blocks of a kernel run on the device at once."""
        ...

    def is_capturing(self) -> bool:
        """Return whether the current stream captures its work in a graph."""
        ...

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an uninitialised array."""
        ...

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an array of zeros."""
        ...

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy of a host array on the device."""
        ...

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy of a device array on the host, after it has been computed."""
        ...

    def contiguous(self, array: Any) -> Any:
        """Return the array in C order, itself if it is."""
        ...

    def finish(self) -> None:
        """Wait for the current stream, so that other streams can read its results."""
        ...


def check_not_capturing(device: Device, missing: str) -> None:
    """Raise SriglError if a graph is captured: what is missing cannot be made meanwhile."""
    if device.is_capturing():
        raise SriglError(
            f"{missing} is missing and cannot be made while a CUDA graph is captured; call "
            f"plan.warm(batches, dtypes) with the batches and dtypes of the graph before"
        )
