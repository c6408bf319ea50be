"""CUDA kernels on the CPU: build a ``.cu`` file with g++ and run its kernels on NumPy arrays.

``HostModule(...).kernel(name)`` is called as a ``cupy.RawKernel`` is. `cuda_cpu.hpp` says how a
kernel runs. With ``sanitize=True`` AddressSanitizer and UndefinedBehaviorSanitizer watch it, for
which Python must have been started by `run_sanitized`.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import math
import operator
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = [
    "ORDERS",
    "BuildError",
    "Counts",
    "HarnessUnavailableError",
    "HostKernel",
    "HostModule",
    "KernelError",
    "LaunchError",
    "Order",
    "is_sanitized",
    "run_in_order",
    "run_sanitized",
    "tight",
    "tight_empty",
    "unavailable",
]

HEADER = Path(__file__).with_name("cuda_cpu.hpp")
CUDA_HEADERS = ("cuda_fp16.h", "crt/host_defines.h", "nv/target")

# As NVRTC: C++17, pointers may be cast. Not as NVRTC: no product is fused with a sum unless the
# kernel says fmaf. Hidden, so that a build shares nothing with another one of the same kernels.
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden"),
)
PLAIN_FLAGS = ("-fwrapv",)
SANITIZER_FLAGS = (
    *("-fsanitize=address,undefined", "-fsanitize=bounds-strict", "-fno-sanitize-recover=all"),
    "-fno-omit-frame-pointer",
)

ASAN_OPTIONS = (
    "halt_on_error=1",
    "abort_on_error=1",  # so that faulthandler says which test ran
    "detect_leaks=0",  # Python keeps much until its end
    "detect_stack_use_after_return=0",  # needs memory for each frame of each fiber
    "allocator_may_return_null=1",  # MemoryError is Python's to raise
    "redzone=256",
)
UBSAN_OPTIONS = ("halt_on_error=1", "abort_on_error=1", "print_stacktrace=1")

MAX_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)
SHARED_BYTES = 49152
SHARED_BYTES_OPT_IN = 232448
POISON = 0xFF
"""The byte that memory holds before it is written: NaN in every float type, -1 in integers."""

ORDER_VARIABLE = "SRIGL_CUDA_CPU_ORDER"
DAYS_KEPT = 7


class HarnessUnavailableError(RuntimeError):
    """Something that building kernels needs is missing."""


class BuildError(RuntimeError):
    """The kernels do not compile."""


class LaunchError(ValueError):
    """A launch that a driver would refuse, or whose arguments do not fit the kernel."""


class KernelError(RuntimeError):
    """A barrier, a shuffle or a vote that not all its threads reach."""


@dataclass(frozen=True)
class Order:
    """The order in which threads and blocks run.

    Parameters
    ----------
    threads : {"forward", "reverse"} or int
        Of the threads of a block, between two barriers. An integer is a seed: the warps, and where
        the lanes of a warp begin, are shuffled anew at each barrier.
    blocks : {"forward", "reverse"}
    """

    threads: str | int = "forward"
    blocks: str = "forward"

    def __post_init__(self) -> None:
        if not isinstance(self.threads, int) and self.threads not in ("forward", "reverse"):
            raise ValueError(f"threads={self.threads!r}: name 'forward', 'reverse' or a seed")
        if self.blocks not in ("forward", "reverse"):
            raise ValueError(f"blocks={self.blocks!r}: name 'forward' or 'reverse'")


ORDERS = (Order(), Order("reverse", "reverse"), Order(1), Order(2, "reverse"))
"""Orders to run a test in: a race that one hides another shows."""

_order: contextvars.ContextVar[Order | None] = contextvars.ContextVar("order", default=None)


@contextlib.contextmanager
def run_in_order(order: Order) -> Iterator[None]:
    """Run all kernels launched within in this order.

    Elsewhere it is that of ``SRIGL_CUDA_CPU_ORDER``: "reverse", "7" or "7,reverse", the threads'
    order and the blocks'.
    """
    token = _order.set(order)
    try:
        yield
    finally:
        _order.reset(token)


def _order_now() -> Order:
    order = _order.get()
    if order is not None:
        return order
    threads, _, blocks = os.environ.get(ORDER_VARIABLE, "").partition(",")
    return Order(int(threads) if threads.isdecimal() else threads or "forward", blocks or "forward")


# What passes between Python and cuda_cpu.hpp, with the names that the structures have there.


class _Parameter(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint32), ("kind", ctypes.c_char))


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("run", ctypes.c_void_p),
        ("address", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("count", ctypes.c_uint64),
    )


class _Region(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("thread_order", ctypes.c_uint32),
        ("block_order", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("shared_bytes", ctypes.c_uint64),
        ("stacks", ctypes.c_void_p),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_uint64),
    )


class _Counts(ctypes.Structure):
    _fields_ = (
        ("barriers", ctypes.c_uint64),
        ("loads", ctypes.c_uint64),
        ("multiply_adds", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Counts:
    """What a launch did.

    Parameters
    ----------
    barriers : int
        That a block passed, at most.
    loads : int
        Of a thread by ``__ldg``, at most.
    multiply_adds : int
        Of a thread by ``fmaf`` and ``fma``, at most.
    """

    barriers: int
    loads: int
    multiply_adds: int


_PARAMETER_KINDS = {"p": "a pointer", "i": "an integer", "f": "a float", "s": "a structure"}
_SCALAR_KINDS = {"i": "i", "u": "i", "b": "i", "f": "f"}
"""Which kind of parameter takes a NumPy scalar, by the kind of its dtype."""


class HostKernel:
    """A kernel that runs on the CPU, called as a ``cupy.RawKernel`` is.

    Attributes
    ----------
    name : str
    shared_size_bytes : int
        Of the kernel's own static shared arrays; those of functions that it calls are not known.
    counts : Counts
        Of the last launch.
    """

    counts = Counts(0, 0, 0)

    def __init__(
        self,
        module: HostModule,
        name: str,
        record: _Kernel,
        static_arrays: Sequence[_Region],
        shared_size_bytes: int,
    ) -> None:
        self.name = name
        self.shared_size_bytes = shared_size_bytes
        self._module = module
        self._record = record
        self._parameters = [record.parameters[i] for i in range(record.count)]
        self._regions = (_Region * len(static_arrays))(*static_arrays)
        self._max_dynamic = SHARED_BYTES - shared_size_bytes

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Dynamic shared memory that a launch may ask for; assigning opts in to more."""
        return self._max_dynamic

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        limit = self._module.shared_bytes_opt_in - self.shared_size_bytes
        if not 0 <= size <= limit:
            raise LaunchError(
                f"max_dynamic_shared_size_bytes={size!r}: {self.name} can opt in to {limit} bytes"
            )
        self._max_dynamic = size

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[object],
        *,
        shared_mem: int = 0,
    ) -> None:
        """Run the grid; return when all of it has run.

        Parameters
        ----------
        grid, block : tuple of 1 to 3 int
        args : sequence
            An array is passed as a pointer to its memory, a NumPy scalar by value; ``np.intp(0)``
            is also the null pointer.
        shared_mem : int
            Bytes of dynamic shared memory.

        Raises
        ------
        LaunchError
            If a driver would refuse this, or the arguments do not fit.
        KernelError
            If not all threads reach a barrier, a shuffle or a vote.
        """
        launch = _Launch()
        launch.grid = self._extent("grid", grid, MAX_GRID)
        launch.block = self._extent("block", block, MAX_BLOCK)
        threads = math.prod(launch.block)
        if threads > MAX_THREADS:
            raise LaunchError(
                f"{block=} has {threads} threads, more than {MAX_THREADS} ({self.name})"
            )
        if not 0 <= shared_mem <= self._max_dynamic:
            raise LaunchError(
                f"{shared_mem=} exceeds {self._max_dynamic} bytes ({self.name}, with "
                f"{self.shared_size_bytes} bytes of static arrays); for more, assign "
                "max_dynamic_shared_size_bytes"
            )
        order = _order_now()
        is_seed = isinstance(order.threads, int)
        launch.thread_order = 2 if is_seed else int(order.threads == "reverse")
        launch.block_order = int(order.blocks == "reverse")
        launch.seed = int(order.threads) % 2**64 if is_seed else 0
        launch.shared_bytes = operator.index(shared_mem)
        launch.regions = self._regions
        launch.region_count = len(self._regions)
        values = self._values(args)
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.addressof(values) + 8 * i for i in range(len(values)))
        )
        failure, self.counts = self._module._launch(self._record, launch, pointers)
        if failure is not None:
            raise KernelError(f"{self.name}, {failure}")

    def _extent(self, what: str, given: tuple[int, ...], limits: tuple[int, ...]) -> Any:
        if not isinstance(given, tuple) or not 1 <= len(given) <= 3:
            raise LaunchError(f"{what}={given!r} is not a tuple of 1 to 3 integers ({self.name})")
        sizes = [operator.index(size) for size in given]
        for axis, size, limit in zip("xyz", sizes, limits, strict=False):
            if not 1 <= size <= limit:
                raise LaunchError(
                    f"{what}={given!r}: {axis} must lie between 1 and {limit} ({self.name})"
                )
        return (ctypes.c_uint32 * 3)(*sizes, *(1,) * (3 - len(sizes)))

    def _values(self, args: Sequence[object]) -> Any:
        """Return the bytes of the arguments, eight for each."""
        if len(args) != len(self._parameters):
            raise LaunchError(
                f"{self.name} takes {len(self._parameters)} arguments, {len(args)} were given"
            )
        values = (ctypes.c_uint64 * len(args))()
        for i, (value, parameter) in enumerate(zip(args, self._parameters, strict=True)):
            kind, size = parameter.kind.decode(), parameter.bytes
            if isinstance(value, np.ndarray):
                fits, given = kind == "p", f"an array of {value.dtype}"
                values[i] = value.ctypes.data
            elif isinstance(value, np.generic):
                given = f"the {value.dtype} {value}"
                fits = size == value.itemsize and (
                    kind == _SCALAR_KINDS.get(value.dtype.kind)
                    or (kind == "p" and value.dtype.kind in "iu" and int(value) == 0)
                )
                if fits:
                    ctypes.memmove(ctypes.addressof(values) + 8 * i, value.tobytes(), size)
            else:
                raise LaunchError(
                    f"argument {i} of {self.name} is {value!r}, of type {type(value).__name__}; "
                    "pass an array or a NumPy scalar, whose size is explicit: np.int32(...)"
                )
            if not fits:
                raise LaunchError(
                    f"argument {i} of {self.name} is {given}; the kernel takes "
                    f"{_PARAMETER_KINDS[kind]} of {size} bytes"
                )
        return values


class HostModule:
    """Kernels of one ``.cu`` file, built once and kept for the processes that come after.

    Parameters
    ----------
    folder : Path
        Where the file is, and all that it includes with quotes.
    file : str
    names : sequence of str
        The kernels, as C++ expressions: ``"tile_product<float, float, 4>"``.
    sanitize : bool
        Whether AddressSanitizer and UndefinedBehaviorSanitizer watch; see `is_sanitized`.
    defines : mapping from str to str or int
        Macros.

    Attributes
    ----------
    names : tuple of str
    compiler_output : str
        Warnings of the build.
    shared_bytes_opt_in : int
        Shared memory that a kernel of the module can opt in to; assign that of another device.

    Raises
    ------
    HarnessUnavailableError
        If the compiler or NVIDIA's headers are missing, or the sanitizers are not loaded.
    BuildError
        If the file does not compile.
    """

    def __init__(
        self,
        folder: Path,
        file: str,
        names: Sequence[str],
        *,
        sanitize: bool,
        defines: Mapping[str, str | int] | None = None,
    ) -> None:
        reason = unavailable()
        if reason is None and sanitize and not is_sanitized():
            reason = (
                "sanitize=True needs AddressSanitizer in the process from its start: start Python "
                "by run_sanitized, or pass sanitize=is_sanitized()"
            )
        if reason is not None:
            raise HarnessUnavailableError(reason)
        self.names = tuple(names)
        self.shared_bytes_opt_in = SHARED_BYTES_OPT_IN
        flags = [*FLAGS, *(SANITIZER_FLAGS if sanitize else PLAIN_FLAGS)]
        flags += [f"-D{macro}={value}" for macro, value in (defines or {}).items()]
        library = _build(Path(folder).resolve(), file, _unit(file, self.names), flags)
        self.compiler_output = library.with_suffix(".log").read_text()
        self._library = ctypes.CDLL(str(library))
        self._run = self._library.cuda_cpu_launch
        self._run.argtypes = (ctypes.POINTER(_Kernel), ctypes.POINTER(_Launch), ctypes.c_void_p)
        self._run.restype = ctypes.c_char_p
        self._library.cuda_cpu_counts.restype = ctypes.POINTER(_Counts)
        self._kernels = self._found_kernels(library)

    def kernel(self, name: str) -> HostKernel:
        """Return the kernel of that name, one of `names`."""
        if name not in self._kernels:
            raise KeyError(f"{name!r} is none of the kernels built: {', '.join(self.names)}")
        return self._kernels[name]

    def _found_kernels(self, library: Path) -> dict[str, HostKernel]:
        """Return the kernels, each with the static arrays to be filled with poison before a block.

        The symbol table has these as variables that are local to a function. If that is a kernel
        the array is its own, otherwise any kernel's.
        """
        records = (_Kernel * len(self.names)).in_dll(self._library, "cuda_cpu_kernels")
        listing = _output(["nm", "-S", str(library)])
        symbols = re.findall(r"^(\w+) (\w+) (\w) (\S+)$", listing, re.MULTILINE)
        offsets = {name: int(at, 16) for at, _, _, name in symbols}
        base = ctypes.addressof(records) - offsets["cuda_cpu_kernels"]
        functions = {base + int(at, 16): name for at, _, kind, name in symbols if kind in "tT"}
        owners = [_prefix_of_locals(functions[record.address]) for record in records]
        prefixes = ("_ZZN12_GLOBAL__N_1", *owners)
        arrays = [
            (name, _Region(base + int(at, 16), int(size, 16)))
            for at, size, kind, name in symbols
            if kind in "bBdD" and name.startswith(prefixes)
        ]
        shared = [region for name, region in arrays if not name.startswith(tuple(owners))]
        kernels = {}
        for name, record, owner in zip(self.names, records, owners, strict=True):
            own = [region for symbol, region in arrays if symbol.startswith(owner)]
            static_bytes = sum(region.bytes for region in own)
            kernels[name] = HostKernel(self, name, record, own + shared, static_bytes)
        return kernels

    def _launch(self, record: _Kernel, launch: _Launch, pointers: Any) -> tuple[str | None, Counts]:
        # The state of a launch is its module's, and the stacks are all modules': one at a time.
        with _launching:
            launch.stacks = _stacks(self._library.cuda_cpu_stacks)
            failure: bytes | None = self._run(record, launch, pointers)
            counted = self._library.cuda_cpu_counts().contents
            counts = Counts(counted.barriers, counted.loads, counted.multiply_adds)
        return None if failure is None else failure.decode(), counts


_launching = threading.Lock()
_stack_memory: list[int] = []


def _stacks(allocate: Any) -> int:
    """Return the memory for the stacks of a block, which all modules use."""
    if not _stack_memory:
        allocate.restype = ctypes.c_void_p
        memory = allocate()
        if memory is None:
            raise MemoryError("there is none for the stacks of a block's threads")
        _stack_memory.append(memory)
    return _stack_memory[0]


def _unit(file: str, names: Sequence[str]) -> str:
    """Return what is compiled: the harness, the file, and the kernels asked for."""
    # In an unnamed namespace the static arrays of a template are this object's alone, which lets
    # AddressSanitizer put red zones around them.
    entries = "".join(f"  cuda_cpu::Entry<(&{name})>::get(),\n" for name in names)
    return (
        f'#include "{HEADER.name}"\nnamespace {{\n#include "{file}"\n}}\n'
        'extern "C" __attribute__((visibility("default")))\n'
        f"const cuda_cpu::Kernel cuda_cpu_kernels[] = {{\n{entries}}};\n"
    )


def _prefix_of_locals(function: str) -> str:
    """Return what the symbols of a function's local variables begin with."""
    is_mangled = function.startswith("_Z")
    return f"_Z{function[1:]}E" if is_mangled else f"_ZZ{len(function)}{function}E"


def _build(folder: Path, file: str, source: str, flags: Sequence[str]) -> Path:
    """Return the shared object of `source`, which includes `file`, built if it is not there yet."""
    headers = _cuda_headers()
    assert headers is not None
    digest = hashlib.sha256(repr((source, flags, _compiler_version())).encode())
    sources = sorted(p for p in folder.iterdir() if p.suffix in {".cu", ".cuh", ".h", ".hpp"})
    for path in (HEADER, headers[0] / CUDA_HEADERS[0], *sources):
        digest.update(repr((path.name, path.read_bytes())).encode())
    library = _cache() / f"{Path(file).stem}-{digest.hexdigest()[:24]}.so"
    command = ["g++", *flags, "-iquote", str(folder), "-iquote", str(HEADER.parent)]
    command += [option for path in headers for option in ("-isystem", str(path))]
    command.append(f"-fmacro-prefix-map={folder}/=")  # a place is told by the file's name
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and finds it built
        if library.exists():
            os.utime(library)
            return library
        _prune(library.parent)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            unit, built = Path(scratch, "unit.cpp"), Path(scratch, "unit.so")
            unit.write_text(source)
            done = subprocess.run(
                [*command, str(unit), "-o", str(built)],
                capture_output=True,
                text=True,
                env=_unsanitized(),
                check=False,
            )
            if done.returncode != 0:
                raise BuildError(f"{folder / file} does not compile:\n{done.stderr}")
            library.with_suffix(".log").write_text(done.stderr)
            built.replace(library)
    return library


def _cache() -> Path:
    """Return the folder of what was built. What lies there is run, so it must be this user's."""
    folder = Path(tempfile.gettempdir()) / f"srigl-cuda-on-cpu-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} is not a folder that only this user can write to")
    return folder


def _prune(folder: Path) -> None:
    """Delete what has not been used for days."""
    oldest = time.time() - DAYS_KEPT * 86400
    with contextlib.suppress(OSError):  # another process may prune too
        for library in folder.glob("*.so"):
            if library.stat().st_mtime < oldest:
                for suffix in (".so", ".log", ".lock"):
                    library.with_suffix(suffix).unlink(missing_ok=True)


def _unsanitized() -> dict[str, str]:
    """Return the environment for programs that no sanitizer should watch."""
    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"LC_ALL": "C"}


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, env=_unsanitized(), check=True
    ).stdout


@functools.cache
def _compiler_version() -> str:
    return _output(["g++", "--version"])


@functools.cache
def _cuda_headers() -> tuple[Path, ...] | None:
    """Return the folders of NVIDIA's headers, of a CUDA toolkit or from Python's packages."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    packages = importlib.util.find_spec("nvidia")
    for location in (packages.submodule_search_locations or ()) if packages is not None else ():
        roots.extend(sorted(Path(location).iterdir(), reverse=True))
    roots.append(Path("/usr/local/cuda"))
    folders = [folder for root in roots for folder in (root / "include", root / "include/cccl")]
    found = []
    for header in CUDA_HEADERS:
        holders = [folder for folder in folders if (folder / header).is_file()]
        if not holders:
            return None
        found.append(holders[0])
    return tuple(dict.fromkeys(found))


def unavailable() -> str | None:
    """Return why kernels cannot be built here and what to install; None if they can."""
    if not sys.platform.startswith("linux"):
        return f"kernels are run on the CPU under Linux only, not on {sys.platform}"
    if shutil.which("g++") is None:
        return "running kernels on the CPU needs g++: install it (Debian, Ubuntu: apt install g++)"
    if _cuda_headers() is None:
        return (
            f"running kernels on the CPU needs NVIDIA's headers {', '.join(CUDA_HEADERS)}: "
            "pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl, or set "
            "CUDA_HOME to a CUDA toolkit"
        )
    return None


def tight(values: ArrayLike) -> NDArray[Any]:
    """Return a copy in a block of memory of exactly its size, to whose ends red zones reach."""
    values = np.asarray(values)
    copy = tight_empty(values.shape, values.dtype)
    copy[...] = values
    return copy


def tight_empty(shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an array as `tight` does that holds poison: NaN, or -1 in integers."""
    shape, dtype = (shape,) if isinstance(shape, int) else shape, np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    libc = _libc()
    address = libc.malloc(size)
    if not address:
        raise MemoryError(f"{size} bytes")
    ctypes.memset(address, POISON, size)
    block = (ctypes.c_char * size).from_address(address)
    weakref.finalize(block, libc.free, address).atexit = False
    return np.ndarray(shape, dtype, buffer=memoryview(block))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
    return libc


def is_sanitized() -> bool:
    """Return whether AddressSanitizer watches this process, as it does below `run_sanitized`."""
    return hasattr(_libc(), "__asan_init")


def run_sanitized(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` in a process that AddressSanitizer watches from its start.

    Parameters
    ----------
    arguments : sequence of str
        For example ``["-m", "pytest", "tests"]``.
    env : mapping from str to str, optional
        Variables that differ from this process's.
    timeout : float, optional
        In seconds.

    Returns
    -------
    subprocess.CompletedProcess
        With the text of both outputs. A sanitizer's report is in `stderr`; the process that it
        ends has the return code of SIGABRT.

    Raises
    ------
    HarnessUnavailableError
        If the compiler has no sanitizers.
    """
    reason = unavailable()
    if reason is not None:
        raise HarnessUnavailableError(reason)
    # libstdc++ as well: where AddressSanitizer starts without it, a C++ exception ends the process.
    libraries = [_compiler_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    preloaded = filter(None, [*libraries, os.environ.get("LD_PRELOAD")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(preloaded),
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": ":".join(ASAN_OPTIONS),
            "UBSAN_OPTIONS": ":".join(UBSAN_OPTIONS),
            **(env or {}),
        },
    )


def _compiler_library(name: str) -> str:
    found = Path(_output(["g++", f"-print-file-name={name}"]).strip())
    if not found.is_absolute():
        raise HarnessUnavailableError(
            f"g++ comes without {name}: install it (Fedora: dnf install libasan libubsan)"
        )
    return str(found.resolve())
