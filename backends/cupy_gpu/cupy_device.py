"""The current CUDA device, through CuPy.

Kernels are compiled by CuPy's NVRTC, but not by ``RawModule``, which makes them flush subnormal
numbers to zero (SPEC 2 forbids it) and whose disk cache does not know the headers. What is
compiled is kept in CuPy's folder, under a name that holds all that it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import DTypeLike, NDArray

from srigl_core.backends.cupy_gpu.device import DeviceProperties
from srigl_core.backends.cupy_gpu.variants import Variant
from srigl_core.errors import BackendUnavailableError

try:
    import cupy
except ModuleNotFoundError as error:
    raise BackendUnavailableError(
        f"backend 'cupy' needs the package {error.name!r}, which is not installed: "
        f"pip install 'srigl-core[cupy]' for CUDA 13, 'srigl-core[cupy12]' for CUDA 12"
    ) from error

__all__ = ["CupyDevice", "check_device", "cupy", "runtime_info"]

FOLDER = Path(__file__).parent
OPTIONS = ("--std=c++17",)

_MOST_STATIC_SHARED_BYTES = 48 << 10


def check_device() -> None:
    """Raise BackendUnavailableError where no CUDA device can be used."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailableError(
            f"backend 'cupy' finds no CUDA device ({error}); it needs an NVIDIA GPU and its driver"
        ) from error
    if not count:
        raise BackendUnavailableError("backend 'cupy' finds no CUDA device; is one visible?")


class CupyDevice:
    """The device and the stream that are current in CuPy when a method is called."""

    @property
    def properties(self) -> DeviceProperties:
        """Return the current device's properties."""
        return _properties(cupy.cuda.runtime.getDevice())

    def number(self) -> int:
        """Return which of the devices is current."""
        number: int = cupy.cuda.runtime.getDevice()
        return number

    def launch(
        self,
        variant: Variant,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel on the current stream; it is compiled when first needed."""
        kernel = _kernel(cupy.cuda.runtime.getDevice(), variant)
        if shared_bytes > _MOST_STATIC_SHARED_BYTES:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        kernel(grid, block, arguments, shared_mem=shared_bytes)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an uninitialised array, of CuPy's pool."""
        return cupy.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an array of zeros."""
        return cupy.zeros(shape, dtype)

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy of a host array on the device."""
        return cupy.asarray(array)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy of a device array on the host; waits for the current stream."""
        copied: NDArray[Any] = cupy.asnumpy(array)
        return copied

    def contiguous(self, array: Any) -> Any:
        """Return the array in C order, itself if it is."""
        return cupy.ascontiguousarray(array)


def runtime_info() -> dict[str, object]:
    """Return CuPy's version, the current device, and the versions of its driver and runtime."""
    runtime = cupy.cuda.runtime
    return {
        "cupy": cupy.__version__,
        "device": _properties(runtime.getDevice()).name,
        "driver": runtime.driverGetVersion(),
        "CUDA runtime": runtime.runtimeGetVersion(),
    }


@functools.cache
def _properties(device: int) -> DeviceProperties:
    found = cupy.cuda.runtime.getDeviceProperties(device)
    return DeviceProperties(
        name=found["name"].decode(),
        processors=found["multiProcessorCount"],
        block_shared_bytes=found["sharedMemPerBlockOptin"],
        processor_shared_bytes=found["sharedMemPerMultiprocessor"],
    )


@functools.cache
def _kernel(device: int, variant: Variant) -> Any:
    """Return a kernel for a device, which is the current one."""
    major, minor = cupy.cuda.nvrtc.getVersion()
    architecture = cupy.cuda.Device(device).compute_capability
    made_of = (_sources(), OPTIONS, major, minor, architecture, variant.file, variant.name)
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    folder = _cache_folder()
    compiled, symbol = folder / f"{name}.cubin", folder / f"{name}.json"
    if not (compiled.exists() and symbol.exists()):
        binary, symbols = cupy.cuda.compiler.compile_using_nvrtc(
            (FOLDER / variant.file).read_text(),
            (*OPTIONS, f"-I{FOLDER}", *_cuda_headers()),
            architecture,
            variant.file,
            name_expressions=(variant.name,),
        )
        _write(compiled, binary)
        _write(symbol, json.dumps(symbols[variant.name]).encode())
    return cupy.RawModule(path=str(compiled)).get_function(json.loads(symbol.read_text()))


@functools.cache
def _sources() -> str:
    """Return a hash of all kernels and headers: which one includes which is not asked."""
    digest = hashlib.sha256()
    for file in sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _cuda_headers() -> tuple[str, ...]:
    """Return the options that make cuda_fp16.h be found."""
    path = cupy.cuda.get_cuda_path()
    return () if path is None else (f"-I{os.path.join(path, 'include')}",)


@functools.cache
def _cache_folder() -> Path:
    """Return CuPy's folder for what is compiled, or one for this process alone."""
    asked = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    folder = Path(asked, "srigl_core")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="srigl_core"))


def _write(file: Path, data: bytes) -> None:
    """Write a file whole: another process may be reading it."""
    unfinished = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    unfinished.write_bytes(data)
    unfinished.replace(file)
