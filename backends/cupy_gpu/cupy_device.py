"""The current CUDA device, through CuPy.

CuPy's NVRTC compiles the kernels. ``RawModule`` does not: it would make them flush subnormal
numbers to zero, which SPEC 2 forbids, and its disk cache ignores the headers.

Not all versions of CuPy have bfloat16, so that its arrays are made and copied as bits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from srigl_core._cache_folder import cache_version, find_cache, keep_kernel, kept_kernel
from srigl_core._files import write_whole
from srigl_core._install import install_command
from srigl_core.backends.cupy_gpu.device import DeviceProperties, check_not_capturing
from srigl_core.backends.cupy_gpu.variants import COMPILER_OPTIONS, Variant
from srigl_core.errors import BackendUnavailableError

try:
    import cupy
except ModuleNotFoundError as error:
    raise BackendUnavailableError(
        f"backend 'cupy' needs the package {error.name!r}, which is not installed: "
        f"{install_command('cupy')} for CUDA 13, {install_command('cupy12')} for CUDA 12"
    ) from error

__all__ = ["CupyDevice", "check_device", "compiled", "cupy", "runtime_info"]

FOLDER = Path(__file__).parent

_kernels: dict[tuple[int, Variant], Any] = {}
"""The kernels loaded so far, by the device's number."""


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
        """Return the number of the current device."""
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
        """Run a kernel on the current stream; it is compiled at first use."""
        self._kernel(variant)(grid, block, arguments, shared_mem=shared_bytes)

    def load(self, variant: Variant) -> None:
        """Compile a kernel, or read the compiled one, for the current device."""
        self._kernel(variant)

    def fitting_blocks(self, variant: Variant, threads: int, shared_bytes: int) -> int:
        """Return how many blocks of a kernel run on the device at once, as the driver says."""
        return _fitting_blocks(cupy.cuda.runtime.getDevice(), variant, threads, shared_bytes)

    def is_capturing(self) -> bool:
        """Return whether the current stream captures its work in a graph."""
        return bool(cupy.cuda.get_current_stream().is_capturing())

    def _kernel(self, variant: Variant) -> Any:
        device = cupy.cuda.runtime.getDevice()
        kernel = _kernels.get((device, variant))
        if kernel is None:
            check_not_capturing(self, f"kernel {variant.name}")
            kernel = _kernels.setdefault((device, variant), _loaded_kernel(device, variant))
        return kernel

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an uninitialised array from CuPy's pool."""
        dtype = np.dtype(dtype)
        return cupy.empty(shape, _bits(dtype)).view(dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return an array of zeros."""
        dtype = np.dtype(dtype)
        return cupy.zeros(shape, _bits(dtype)).view(dtype)

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy of a host array on the device."""
        return cupy.asarray(array.view(_bits(array.dtype))).view(array.dtype)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy of a device array on the host; this waits for the current stream."""
        copied: NDArray[Any] = cupy.asnumpy(array.view(_bits(array.dtype)))
        return copied.view(array.dtype)

    def contiguous(self, array: Any) -> Any:
        """Return the array in C order, itself if it is."""
        return cupy.ascontiguousarray(array.view(_bits(array.dtype))).view(array.dtype)

    def finish(self) -> None:
        """Wait for the current stream, so that other streams can read its results."""
        cupy.cuda.get_current_stream().synchronize()


def compiled(variant: Variant, architecture: str) -> tuple[bytes, str]:
    """Return a kernel's code and its symbol. This needs no device.

    Parameters
    ----------
    variant : Variant
    architecture : str
        Such as "90". If the compiler does not know it, the driver compiles the returned PTX.

    Raises
    ------
    BackendUnavailableError
        If the compiler is too new for the device, or NVRTC cannot compile the kernel, for example
        without headers. The message quotes NVRTC.
    """
    nvrtc = cupy.cuda.nvrtc
    supported = nvrtc.getSupportedArchs()
    if int(architecture) < min(supported):
        raise BackendUnavailableError(
            f"CUDA {'.'.join(map(str, nvrtc.getVersion()))} no longer compiles for this device, of "
            f"architecture {architecture}: the oldest is {min(supported)}; replace cupy-cuda13x by "
            f"CuPy for CUDA 12: {install_command('cupy12')}"
        )
    known = max(each for each in supported if each <= int(architecture))
    program = nvrtc.createProgram((FOLDER / variant.file).read_text(), variant.file, (), ())
    is_known = known == int(architecture)
    target = f"-arch={'sm' if is_known else 'compute'}_{known}"
    try:
        nvrtc.addNameExpression(program, variant.name)
        options = (*COMPILER_OPTIONS, target, f"-I{FOLDER}", *_cuda_headers())
        nvrtc.compileProgram(program, options)
        code: bytes = nvrtc.getCUBIN(program) if is_known else nvrtc.getPTX(program)
        return code, nvrtc.getLoweredName(program, variant.name)
    except nvrtc.NVRTCError as error:
        raise BackendUnavailableError(
            f"NVRTC could not compile {variant.name} of {variant.file} ({error}); CUDA's headers "
            f"come with: pip install 'cupy-cuda13x[ctk]', or cupy-cuda12x[ctk] for CUDA 12. It "
            f"said:\n{nvrtc.getProgramLog(program)}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def runtime_info() -> dict[str, object]:
    """Return CuPy's version, the current device, and the versions of its driver and runtime."""
    runtime = cupy.cuda.runtime
    return {
        "cupy": cupy.__version__,
        "device": _properties(runtime.getDevice()).name,
        "driver": runtime.driverGetVersion(),
        "CUDA runtime": runtime.runtimeGetVersion(),
        "cache directory": _cache()[1],
    }


@functools.cache
def _properties(device: int) -> DeviceProperties:
    properties = cupy.cuda.runtime.getDeviceProperties(device)
    return DeviceProperties(
        name=properties["name"].decode(),
        processors=properties["multiProcessorCount"],
        block_shared_bytes=properties["sharedMemPerBlockOptin"],
        processor_shared_bytes=properties["sharedMemPerMultiprocessor"],
        processor_threads=properties["maxThreadsPerMultiProcessor"],
        architecture=10 * properties["major"] + properties["minor"],
    )


def _loaded_kernel(device: int, variant: Variant) -> Any:
    """Return a kernel for a device, which must be the current one.

    It may use all of a block's shared memory. That is set once: if each launch set what it needs,
    another thread could launch the kernel in between.
    """
    architecture = cupy.cuda.Device(device).compute_capability
    key = repr((variant.file, variant.name, architecture))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder, _ = _cache()
    symbol = None if folder is None else _kept_symbol(folder, name)
    if folder is None or symbol is None:
        code, symbol = compiled(variant, architecture)
        if folder is None or not _keep(folder, name, code, symbol):
            folder = Path(_own_folder().name)
            _code_file(folder, name).write_bytes(code)
    kernel = cupy.RawModule(path=str(_code_file(folder, name))).get_function(symbol)
    most = _properties(device).block_shared_bytes - kernel.shared_size_bytes
    kernel.max_dynamic_shared_size_bytes = most
    return kernel


@functools.cache
def _fitting_blocks(device: int, variant: Variant, threads: int, shared_bytes: int) -> int:
    """Return how many blocks run on a device, which must be the current one, at once."""
    function = CupyDevice()._kernel(variant).kernel.ptr
    ask = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
    return _properties(device).processors * max(1, int(ask(function, threads, shared_bytes)))


@functools.cache
def _cache() -> tuple[Path | None, str]:
    sources = (file for file in FOLDER.iterdir() if file.suffix in (".cu", ".cuh"))
    version = cache_version(sources, (COMPILER_OPTIONS, cupy.cuda.nvrtc.getVersion()))
    variable = "CUPY_CACHE_DIR"
    return find_cache(version, variable=variable, named=os.environ.get(variable, ""))


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder, for kernels that cannot be cached: CuPy loads them from files."""
    return tempfile.TemporaryDirectory(prefix="srigl-core-")


def _code_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.cubin"


def _keep(folder: Path, name: str, code: bytes, symbol: str) -> bool:
    """Write a compiled kernel, and return whether that worked.

    The symbol and the code's hash are written last, since another process may be reading.
    """
    try:
        write_whole(_code_file(folder, name), code, mode=0o644)
    except OSError:
        return False
    described = json.dumps([symbol, hashlib.sha256(code).hexdigest()])
    return keep_kernel(folder / f"{name}.kernel", described.encode())


def _kept_symbol(folder: Path, name: str) -> str | None:
    """Return the symbol of a kernel that `_keep` wrote, or None if a file is missing or damaged."""
    described = kept_kernel(folder / f"{name}.kernel")
    if described is None:
        return None
    symbol, digest = json.loads(described)
    try:
        code = _code_file(folder, name).read_bytes()
    except OSError:
        return None
    return str(symbol) if hashlib.sha256(code).hexdigest() == digest else None


def _cuda_headers() -> tuple[str, ...]:
    """Return the compiler options for the folder of cuda_fp16.h."""
    path = cupy.cuda.get_cuda_path()
    return () if path is None else (f"-I{os.path.join(path, 'include')}",)


def _bits(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype of the same size that CuPy has: `dtype` itself if it is one of NumPy's."""
    return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
