"""Compile every GPU kernel variant, on a machine without a GPU, and read what it needs.

NVRTC, which CuPy calls on the user's machine, needs no driver. Each `.cu` file is compiled for each
architecture with all its variants in one program. The gate fails where

- a file does not compile, or holds a kernel that no variant names, or a variant comes out as none;
- registers are spilled to memory;
- subnormal float32 numbers are flushed to zero, which the semantics forbid;
- a tile is staged by more instructions, or with fewer loads in flight, than the launch model
  assumes. That is read from the machine code, for which the command needs NVIDIA's disassembler.

    python tests/gpu/compile_gate.py --arch 75 80 90 100 120 --json kernels.json

`make gpu-compile` writes benchmarks/results/gpu_kernels.json, of which a page of the site is made.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from machine_code import Staging, disassembled, disassembler, staging_of

from srigl_core.backends.cupy_gpu.variants import COMPILER_OPTIONS

__all__ = [
    "GateError",
    "KernelReport",
    "MissingCompilerError",
    "Variant",
    "as_markdown",
    "as_rows",
    "compile_gate",
    "compiler_version",
    "flushes",
    "missing_compiler",
    "missing_disassembler",
    "page",
    "slow_staging",
    "spills",
    "staging_limits",
]

# The module with `variants()`; the .cu files lie beside it. It must import without CuPy or a GPU.
BACKEND = "srigl_core.backends.cupy_gpu.variants"

INSTALL = (
    "pip install cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl "
    "nvidia-cuda-crt"
)
INSTALL_DISASSEMBLER = "pip install nvidia-cuda-nvdisasm"

STAGING_LIMITS = {
    "float": Staging(34, 16),
    "__half": Staging(75, 16),
    "__nv_bfloat16": Staging(75, 16),
}
"""By the type of x: most instructions for a quad, and fewest loads in flight, of the kernels that
stage tiles. Tiles of double have fewer registers for loads, and no limits."""

TILE_KERNELS = ("tile_product", "sum_products")
STAGING_KERNELS = (*TILE_KERNELS, "stream_product")

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for 'sm_\w+'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
# Approximations such as ex2.approx.ftz stand in the library's exact functions, whatever the mode.
_FLUSHING = re.compile(r"^\s*\{?\s*(?:@!?%\w+\s+)?(?!\S*\.approx)[\w.]+\.ftz\b", re.MULTILINE)
_BLOCK = re.compile(r"\.(entry|func)\b")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ATTRIBUTE = re.compile(r"__\w+__\s*\((?:[^()]|\([^()]*\))*\)")
_KERNEL = re.compile(r"__global__\s[\w\s:]*?(\w+)\s*\(")


class Variant(Protocol):
    """One kernel: a `.cu` file's name, and a C++ name expression such as "product<float, 4>"."""

    @property
    def file(self) -> str: ...

    @property
    def name(self) -> str: ...


class GateError(RuntimeError):
    """A kernel does not compile, or other kernels were compiled than the variants name."""


class MissingCompilerError(ImportError):
    """NVRTC, its headers or the disassembler are not installed."""


class KernelReport(NamedTuple):
    """What one variant needs on one architecture.

    Attributes
    ----------
    variant : Variant
    architecture : int
        90 for sm_90.
    registers : int
        For each thread.
    shared_bytes : int
        Static shared memory; what is asked for at launch is not in it.
    stack_bytes, spill_stores, spill_loads : int
        Bytes for each thread, of the kernel and of the functions that it calls.
    binary_bytes : int
        Size of the machine code.
    flushing : int
        Number of PTX instructions that flush subnormal float32 numbers to zero.
    staging : Staging or None
        None if nothing is staged, or the code was not disassembled.
    """

    variant: Variant
    architecture: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    binary_bytes: int
    flushing: int
    staging: Staging | None = None


class _Program(NamedTuple):
    """One call of the compiler: the variants of one file, for one architecture."""

    path: Path
    variants: tuple[Variant, ...]
    architecture: int
    options: tuple[str, ...]
    disassembler: Path | None

    def __str__(self) -> str:
        return f"{self.path.name} for sm_{self.architecture}"


def compile_gate(
    folder: Path,
    variants: Iterable[Variant],
    architectures: Sequence[int],
    *,
    options: Sequence[str] = COMPILER_OPTIONS,
    jobs: int = 1,
    disassemble: bool = False,
) -> list[KernelReport]:
    """Compile the variants, and nothing else, for every architecture.

    Parameters
    ----------
    folder : Path
        Holds the `.cu` files and the headers that they include.
    variants : iterable of Variant
        Every kernel in the folder, once each.
    architectures : sequence of int
        Such as 75 and 90.
    options : sequence of str
        Options for NVRTC besides the architecture and the folders of headers.
    jobs : int
        Number of programs compiled at a time; NVRTC is as quick in threads as in processes.
    disassemble : bool
        Whether to read from the machine code how inputs are staged.

    Returns
    -------
    list of KernelReport
        One for each variant and architecture, also of kernels that spill.

    Raises
    ------
    MissingCompilerError
        If NVRTC, its headers or the disassembler are not installed; says how to install them.
    GateError
        If the kernels compiled are not exactly the variants, or one does not compile; holds the
        compiler's log, for all programs that failed.
    """
    variants = list(variants)
    if not variants or not architectures:
        raise GateError(f"nothing to compile: {len(variants)} variants, for {architectures}")
    _check_architectures(architectures)
    options = [*options, *(f"-I{include}" for include in (folder, *_header_folders()))]
    _check_sources(folder, variants)
    if disassemble and (reason := missing_disassembler()):
        raise MissingCompilerError(reason)
    program = disassembler() if disassemble else None
    programs = _programs(folder, variants, architectures, options, program)
    with ThreadPoolExecutor(jobs) as executor:
        results = list(executor.map(_attempt, programs))
    if failures := [result for result in results if isinstance(result, GateError)]:
        raise GateError("\n\n".join(str(failure) for failure in failures))
    return [report for result in results if isinstance(result, list) for report in result]


def spills(reports: Iterable[KernelReport]) -> list[KernelReport]:
    """Return the kernels that keep registers in memory."""
    return [report for report in reports if report.spill_stores or report.spill_loads]


def flushes(reports: Iterable[KernelReport]) -> list[KernelReport]:
    """Return the kernels that flush subnormal numbers to zero."""
    return [report for report in reports if report.flushing]


def slow_staging(reports: Iterable[KernelReport]) -> list[KernelReport]:
    """Return the kernels that stage tiles by more instructions or fewer loads than the limits."""
    return [report for report in reports if _stages_slowly(report)]


def staging_limits(name: str) -> Staging | None:
    """Return the limits of a kernel, by its name expression; None if it has none."""
    if _function(name) not in TILE_KERNELS:
        return None
    return STAGING_LIMITS.get(_types(name)[0])


def _stages_slowly(report: KernelReport) -> bool:
    found, limits = report.staging, staging_limits(report.variant.name)
    if limits is None:
        return False
    return found is None or found.instructions > limits.instructions or found.loads < limits.loads


def as_rows(reports: Iterable[KernelReport]) -> list[dict[str, Any]]:
    """Return a row for each variant: its file, its name, and its needs on each architecture.

    The needs are registers, bytes of static shared memory, of stack, and spilled. A kernel that
    stages has the instructions and loads of that, too.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        variant, architecture = report.variant, str(report.architecture)
        new = {"file": variant.file, "kernel": variant.name, "needs": {}}
        row = rows.setdefault((variant.file, variant.name), new)
        spilled = report.spill_stores + report.spill_loads
        numbers = [report.registers, report.shared_bytes, report.stack_bytes, spilled]
        row["needs"][architecture] = numbers
        if report.staging is not None:
            row.setdefault("staging", {})[architecture] = list(report.staging)
    return list(rows.values())


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the rows: for each architecture registers / shared bytes.

    Stack and spilled bytes follow, where there are any.
    """
    return _table(rows, "needs", _cell)


def _table(rows: Sequence[dict[str, Any]], what: str, cell: Callable[..., str]) -> str:
    """Return a table of the rows that have `what`, a mapping from architectures to numbers."""
    rows = [row for row in rows if what in row]
    architectures = sorted({name for row in rows for name in row[what]}, key=int)
    lines = [
        ["file", "kernel", *(f"sm_{architecture}" for architecture in architectures)],
        ["---", "---", *("--:" for _ in architectures)],
    ]
    for row in sorted(rows, key=lambda row: (row["file"], row["kernel"])):
        cells = (cell(*row[what][a]) if a in row[what] else "" for a in architectures)
        lines.append([f"`{row['file']}`", f"`{row['kernel']}`", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(content: dict[str, Any]) -> str:
    """Return the page of what `--json` wrote."""
    return (
        "# What the GPU kernels need\n\n"
        "Registers for each thread / bytes of static shared memory, and the stack where there is "
        f"one; compiled by NVRTC {content['nvrtc']}. `make gpu-compile` measures it.\n\n"
        f"{as_markdown(content['kernels'])}\n"
        "## Staging\n\n"
        "Instructions for each 16 bytes of x that a thread brings to shared memory / its loads in "
        "flight, as the machine code has them.\n\n"
        f"{_table(content['kernels'], 'staging', _staging_cell)}"
    )


def compiler_version() -> str:
    """Return NVRTC's version, such as "13.0"."""
    return ".".join(str(number) for number in _call(_nvrtc().nvrtcVersion()))


def missing_compiler() -> str | None:
    """Return why nothing can be compiled here and what to install, or None."""
    try:
        compiler_version()
        _header_folders()
    except MissingCompilerError as error:
        return str(error)
    return None


def missing_disassembler() -> str | None:
    """Return what to install to read machine code, or None."""
    if disassembler() is not None:
        return None
    return f"NVIDIA's disassembler is missing; {INSTALL_DISASSEMBLER}"


def _staging_cell(instructions: float, loads: int) -> str:
    return f"{instructions:g} / {loads}"


def _cell(registers: int, shared: int, stack: int, spilled: int) -> str:
    cell = f"{registers} / {shared}"
    if stack:
        cell += f", stack {stack}"
    if spilled:
        cell += f", spilled {spilled}"
    return cell


# --- which kernels ---------------------------------------------------------------------------


def _check_sources(folder: Path, variants: Sequence[Variant]) -> None:
    """Refuse kernels that the compiler would pass over in silence: templates nobody instantiates.

    A kernel that a macro writes is not seen here.
    """
    kernels = [(variant.file, variant.name) for variant in variants]
    if twice := [kernel for kernel, count in Counter(kernels).items() if count > 1]:
        raise GateError(f"variants given twice: {twice}")
    files = {file for file, _ in kernels}
    present = {path.name for path in folder.glob("*.cu")}
    if files != present:
        raise GateError(
            f"the variants are in files {sorted(files)}, but {folder} holds {sorted(present)}; "
            "each .cu file needs a variant, and each variant a file"
        )
    for file in sorted(files):
        named = {_function(name) for where, name in kernels if where == file}
        if unnamed := _kernels_in((folder / file).read_text()) - named:
            raise GateError(f"{file}: no variant names the kernels {sorted(unnamed)}")


def _function(name: str) -> str:
    """Return the function of a name expression: "f" of "deep::f<float>"."""
    return name.partition("<")[0].rpartition("::")[2].strip()


def _types(name: str) -> list[str]:
    """Return the arguments of a name expression: ["float", "4"] of "deep::f<float, 4>"."""
    return name.partition("<")[2].rstrip(">").split(", ")


def _kernels_in(source: str) -> set[str]:
    return set(_KERNEL.findall(_ATTRIBUTE.sub(" ", _COMMENT.sub(" ", source))))


def _check_architectures(architectures: Sequence[int]) -> None:
    supported = _call(_nvrtc().nvrtcGetSupportedArchs())
    if unknown := sorted(set(architectures) - set(supported)):
        raise GateError(
            f"NVRTC {compiler_version()} does not compile for {unknown}, but for {supported}"
        )


def _check_kernels(program: _Program, symbols: Sequence[str], compiled: set[str]) -> None:
    """Refuse other kernels than the variants' own; `symbols` are their lowered names."""
    counts = Counter(symbols)
    named = [
        (variant.name, symbol) for variant, symbol in zip(program.variants, symbols, strict=True)
    ]
    if same := [name for name, symbol in named if counts[symbol] > 1]:
        raise GateError(f"{program}: the variants {same} are one kernel")
    if missing := [name for name, symbol in named if symbol not in compiled]:
        raise GateError(f"{program}: the variants {missing} were not compiled as kernels")
    if extra := compiled - counts.keys():
        raise GateError(f"{program}: no variant names the kernels {sorted(extra)}")


# --- compiling -------------------------------------------------------------------------------


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library, a package of its own
    except (ImportError, RuntimeError) as error:
        raise MissingCompilerError(f"NVRTC cannot be loaded: {error}; {INSTALL}") from error
    return nvrtc


def _header_folders() -> list[str]:
    """Return the folders of cuda_fp16.h and of the C++ headers, found the way CuPy does."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as error:
        raise MissingCompilerError(f"no CUDA headers: {error}; {INSTALL}") from error
    folders = {name: find_nvidia_header_directory(name) for name in ("cudart", "cccl")}
    if missing := [name for name, folder in folders.items() if folder is None]:
        raise MissingCompilerError(f"no CUDA headers of {missing}; {INSTALL}")
    return [str(folder) for folder in folders.values()]


def _programs(
    folder: Path,
    variants: Sequence[Variant],
    architectures: Sequence[int],
    options: Sequence[str],
    disassembler: Path | None,
) -> list[_Program]:
    by_file: dict[str, list[Variant]] = {}
    for variant in variants:
        by_file.setdefault(variant.file, []).append(variant)
    return [
        _Program(folder / file, tuple(by_file[file]), architecture, tuple(options), disassembler)
        for file in by_file
        for architecture in architectures
    ]


def _attempt(program: _Program) -> list[KernelReport] | GateError:
    """Return the error, so that one run shows those of all programs."""
    try:
        return _compile(program)
    except GateError as error:
        return error


def _compile(program: _Program) -> list[KernelReport]:
    nvrtc = _nvrtc()
    source, names = program.path.read_bytes(), [v.name.encode() for v in program.variants]
    handle = _call(nvrtc.nvrtcCreateProgram(source, program.path.name.encode(), 0, [], []))
    try:
        for name in names:
            _call(nvrtc.nvrtcAddNameExpression(handle, name))
        log = _run_compiler(handle, program)
        symbols = [_call(nvrtc.nvrtcGetLoweredName(handle, name)).decode() for name in names]
        cubin = _output(handle, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        ptx = _output(handle, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        _call(nvrtc.nvrtcDestroyProgram(handle))
    return _reports(program, symbols, log, cubin, ptx.decode())


def _run_compiler(handle: Any, program: _Program) -> str:
    """Compile and return the log, which says what each kernel needs."""
    nvrtc = _nvrtc()
    architecture = f"--gpu-architecture=sm_{program.architecture}"
    options = [o.encode() for o in (*program.options, architecture, "--ptxas-options=-v")]
    (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
    log = _output(handle, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    text = log.decode(errors="replace").strip("\0 \n")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise GateError(f"{program} does not compile: {status.name}\n{text}")
    return text


def _call(result: tuple[Any, ...]) -> Any:
    """Return what a function of NVRTC returned, without its status."""
    status, *values = result
    if status != _nvrtc().nvrtcResult.NVRTC_SUCCESS:
        raise GateError(status.name)
    return values[0] if len(values) == 1 else values


def _output(handle: Any, size: Callable[..., Any], fill: Callable[..., Any]) -> bytes:
    content = bytearray(_call(size(handle)))
    _call(fill(handle, content))
    return bytes(content)


# --- reading what came out -------------------------------------------------------------------


def _reports(
    program: _Program, symbols: Sequence[str], log: str, cubin: bytes, ptx: str
) -> list[KernelReport]:
    _, *entries = _ENTRY.split(log)
    needs = dict(zip(entries[::2], entries[1::2], strict=True))
    _check_kernels(program, symbols, set(needs))
    code, flushing = _code_bytes(cubin), _flushing(ptx)
    listings = disassembled(cubin, program.disassembler) if program.disassembler else {}
    return [
        KernelReport(
            variant,
            program.architecture,
            *_resources(needs[symbol]),
            code[symbol],
            flushing[symbol],
            _staging(variant, listings.get(symbol, "")),
        )
        for variant, symbol in zip(program.variants, symbols, strict=True)
    ]


def _staging(variant: Variant, listing: str) -> Staging | None:
    return staging_of(listing) if _function(variant.name) in STAGING_KERNELS else None


def _resources(log: str) -> tuple[int, int, int, int, int]:
    """Return registers, shared memory, stack, spill stores and loads, from one kernel's log.

    Functions that it calls follow it there, with frames of their own.
    """
    registers, shared, frames = _REGISTERS.search(log), _SHARED.search(log), _FRAME.findall(log)
    if registers is None or not frames:
        raise GateError(f"cannot read the compiler's log:\n{log}")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    return int(registers[1]), int(shared[1]) if shared else 0, stack, stores, loads


def _code_bytes(cubin: bytes) -> dict[str, int]:
    """Return the size of each kernel's code, which is a section `.text.NAME` of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    sections = [
        struct.unpack_from("<IIQQQQ", cubin, table + number * entry_size) for number in range(count)
    ]
    names_at = sections[names_index][4]
    sizes = {}
    for name_at, *_, size in sections:
        start = names_at + name_at
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            sizes[name.removeprefix(".text.")] = size
    return sizes


def _flushing(ptx: str) -> dict[str, int]:
    """Count the flushing instructions of each kernel; those of a function count for every one."""
    _, *blocks = _BLOCK.split(ptx)
    kernels: dict[str, int] = {}
    in_functions = 0
    for block, body in zip(blocks[::2], blocks[1::2], strict=True):
        found = len(_FLUSHING.findall(body))
        if block == "entry":
            kernels[body.split("(", 1)[0].strip()] = found
        else:
            in_functions += found
    return {name: found + in_functions for name, found in kernels.items()}


# --- command line ----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate on the backend's kernels; return 0 if they pass."""
    options = _parser().parse_args(arguments)
    backend = importlib.import_module(BACKEND)
    folder = Path(str(backend.__file__)).parent
    start = time.perf_counter()
    try:
        reports = compile_gate(
            folder, backend.variants(), options.arch, jobs=options.jobs, disassemble=True
        )
    except (GateError, MissingCompilerError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        rows = ",\n".join(json.dumps(row) for row in as_rows(reports))
        head = f'{{"nvrtc": "{compiler_version()}", "kernels": [\n'
        options.json.write_text(f"{head}{rows}\n]}}\n")
    print(
        f"NVRTC {compiler_version()}: {len(reports)} kernels, "
        f"{len(reports) // len(options.arch)} variants for {len(options.arch)} architectures, "
        f"at most {max(report.registers for report in reports)} registers, "
        f"in {time.perf_counter() - start:.0f} s"
    )
    return (
        _complain("spill registers", spills(reports))
        | _complain("flush subnormal numbers to zero", flushes(reports))
        | _complain("stage too slowly", slow_staging(reports))
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", required=True, help="such as: 75 90")
    parser.add_argument("--json", type=Path, help="file to write the kernels' needs to")
    parser.add_argument("--jobs", type=int, default=2, help="programs compiled at a time")
    return parser


def _complain(what: str, reports: Sequence[KernelReport]) -> int:
    if reports:
        print(f"{len(reports)} kernels {what}:\n{as_markdown(as_rows(reports))}", file=sys.stderr)
    return int(bool(reports))


if __name__ == "__main__":
    sys.exit(main())
