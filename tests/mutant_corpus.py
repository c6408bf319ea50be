"""Wrong kernels: each is a kernel of this project with one plausible bug, a diff of a few lines.

A file ``mutants/KERNEL/NAME.diff`` states the bug in one sentence, and names a law that rejects it.
Where few problems show the bug, it names their class. The diff is applied to the installed file.
The changed module, and the kernels' modules that import it, are loaded under other names beside the
right ones; they share all other modules.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import functools
import hashlib
import importlib.util
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from srigl_core.contract import Capabilities
from srigl_core.testing import LAWS, FunctionBackend, NotApplicable, verify
from srigl_core.testing.kernel_capabilities import capabilities_of
from srigl_core.testing.law import check
from srigl_core.testing.verification import source_of

__all__ = ["COMPILED", "MUTANTS", "Mutant", "MutantError", "apply_diff", "load_backend"]

FOLDER = Path(__file__).with_name("mutants")

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "mutants.json"
"""Written by `mutants/table.py`."""

BACKENDS = {
    "reference": ("srigl_core.reference.backend", "ReferenceBackend"),
    "scipy_csr": ("srigl_core.backends.scipy_csr", "ScipyBackend"),
    "numba_cpu": ("srigl_core.backends.numba_cpu.backend", "NumbaBackend"),
}
"""Module and class of the backends in Python; "cupy_gpu" is CUDA."""

FUNCTIONS: dict[str, tuple[str, Callable[[Any], Callable[..., Any]]]] = {
    "remap_state": ("srigl_core.reference.mask_update", lambda module: module.remap_state),
    "remap_condensed": (
        "srigl_core._update",
        lambda module: lambda state, update: module.CondensedUpdate.remap(update, state),
    ),
}
"""Operations that only functions have: the module, and its function."""

COMPILED = ("numba_cpu", "cupy_gpu")
"""Kernels that are compiled, so that a mutant takes seconds."""

WITHOUT_KERNELS = ("backends/numba_cpu/condensed_matmul.py",)
"""Files of numba_cpu without kernels. For other files only one type of values is tried, since each
compiles their kernels anew: bfloat16 where the bug is one of bfloat16, else that of `TYPES`, or
float32."""

TYPES = {"backends/numba_cpu/neuron_lanes.py": "float64"}
"""Types of values that a kernel computes on any processor."""

BESIDE_KERNELS = ("srigl_core._activations", "srigl_core._update")
"""Modules that may be changed although they belong to no kernel."""

LAUNCHES = "srigl_core.backends.numba_cpu.calling"
"""A module that is loaded anew for each mutant, since what the installed one compiles is cached on
disk: the wrong kernel would stay there."""

SHARED_BYTES = (512, 40 << 10)
"""Shared memory of the simulated CUDA device, for weights of an even and an odd number of values:
so small that small inputs are cut into segments, and so large that they are staged in many trips.
"""

Change = Callable[[str], str]


class MutantError(Exception):
    """A diff that is malformed, or no longer applies."""


@dataclass(frozen=True)
class Mutant:
    """A wrong backend."""

    kernel: str  # the folder of the diff: a key of `BACKENDS` or `FUNCTIONS`, or "cupy_gpu"
    name: str
    bug: str  # one sentence
    problems: str  # the class of problems that show the bug; empty where any may
    law: str  # the name of a law that rejects it
    file: str  # the changed file of this repository
    diff: str

    @classmethod
    def read(cls, path: Path) -> Mutant:
        """Read a diff; raises `MutantError` if it does not begin as a diff of the corpus does."""
        text = path.read_text()
        head = re.match(
            r"# (.+\.)\n(?:# Shown by: (.+)\.\n)?# Rejected by: (\w+)\n"
            r"--- a/(\S+)\n\+\+\+ b/\4\n@@ ",
            text,
        )
        if head is None:
            raise MutantError(
                f"{path} must begin with '# A sentence.', '# Rejected by: law', "
                f"'--- a/file' and '+++ b/file'; '# Shown by: a class of problems.' may come second"
            )
        return cls(path.parent.name, path.stem, *head.groups(default=""), text)

    def rejected(self) -> bool:
        """Whether its law rejects it: first tried on the problem that the table has."""
        backend = self.load()
        (law,) = (law for law in LAWS if law.name == self.law)
        number = _numbers_in_table().get(str(self))
        if number is not None:
            problem = law.build(source_of(law, 0, number), capabilities_of(backend))
            try:
                with np.errstate(all="ignore"):
                    check(backend, law, problem)
            except NotApplicable:
                pass
            except Exception:
                return True
        return not verify(backend, laws=[law], shrink=False).ok

    @property
    def changed_lines(self) -> int:
        """The number of lines removed or added, whichever is larger."""
        signs = [line[:1] for hunk in _hunks(self.diff) for line in hunk]
        return max(signs.count("-"), signs.count("+"))

    def load(self) -> Any:
        """Return the wrong backend."""
        change = functools.partial(apply_diff, self.diff, file=self.file)
        dtype = "bfloat16" if "bfloat16" in self.bug else TYPES.get(self.file, "float32")
        backend = load_backend(self.kernel, self.file, change, (dtype,))
        backend.name = f"mutant {self}"
        return backend

    def __str__(self) -> str:
        return f"{self.kernel}/{self.name}"


def apply_diff(diff: str, text: str, file: str) -> str:
    """Return the text of `file` with the hunks of a diff applied.

    Line numbers are ignored. Raises `MutantError` unless the old lines of each hunk are in the text
    exactly once.
    """
    lines = text.splitlines()
    for hunk in _hunks(diff):
        old, new = ([line[1:] for line in hunk if line[:1] != sign] for sign in "+-")
        starts = [at for at in range(len(lines)) if lines[at : at + len(old)] == old]
        if len(starts) != 1:
            old_lines = "\n".join(old)
            raise MutantError(
                f"the diff does not apply to {file}, which has these lines {len(starts)} times; "
                f"bring the diff up to date:\n{old_lines}"
            )
        lines[starts[0] : starts[0] + len(old)] = new
    return "\n".join(lines) + "\n"


def _hunks(diff: str) -> list[list[str]]:
    return [hunk.splitlines() for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]]


def load_backend(
    kernel: str, file: str, change: Change, dtypes: Iterable[str] = ("float32",)
) -> Any:
    """Return a new backend for which `change` was applied to the text of one file.

    `dtypes` are the types of values to try of a file of numba_cpu with kernels.
    Raises `MutantError` if the backend does not use that file.
    """
    if kernel == "cupy_gpu":
        return _simulated_backend(file, change)
    module, find = FUNCTIONS.get(kernel) or BACKENDS[kernel]
    parts = Path(file).with_suffix("").parts
    changed = ".".join(parts if parts[0] == "srigl_core" else ("srigl_core", *parts))
    if not _uses(module, changed):
        raise MutantError(f"the backend of {kernel} does not use {file}")
    loaded = _Modules(changed, change)(module)
    if callable(find):
        return FunctionBackend(find(loaded), kernel)
    backend = getattr(loaded, find)()
    if kernel == "numba_cpu" and file not in WITHOUT_KERNELS:
        its = capabilities_of(backend)
        backend.capabilities = replace(its, value_dtypes=frozenset(dtypes))
    # The reference limits its problems to save time; a bug that large ones show must be seen too.
    most = max(Capabilities.largest_problem, backend.capabilities.largest_problem)
    backend.capabilities = replace(backend.capabilities, largest_problem=most)
    return backend


# Python kernels

_numbers = itertools.count()


class _Modules:
    """Load a changed module, and the kernels' modules that import it, under other names."""

    def __init__(self, changed: str, change: Change) -> None:
        self._changed, self._change = changed, change
        # Kernels of unchanged modules into which changed ones are compiled are cached on disk: by
        # the names of these modules, which tell one change from another.
        text = hashlib.sha256(change(_path(changed).read_text()).encode()).hexdigest()[:16]
        self._prefix = f"changed_{next(_numbers)}_{text}"
        self._loaded: dict[str, ModuleType] = {}

    def __call__(self, name: str) -> ModuleType:
        if name not in self._loaded:
            path = _path(name)
            source = path.read_text()
            module = ModuleType(f"{self._prefix}.{name}")
            module.__file__ = str(path)
            module.__dict__["__builtins__"] = vars(builtins) | {"__import__": self._import}
            # Dataclasses look up their module.
            self._loaded[name] = sys.modules[module.__name__] = module
            source = self._change(source) if name == self._changed else source
            exec(compile(source, module.__name__, "exec"), module.__dict__)
        return self._loaded[name]

    def _import(
        self, name: str, scope: Any = None, local: Any = None, parts: Any = (), level: int = 0
    ) -> Any:
        if _uses(name, self._changed) or name == LAUNCHES:
            return self(name)
        module = builtins.__import__(name, scope, local, parts, level)
        own = [part for part in parts or () if _uses(f"{name}.{part}", self._changed)]
        if not own:
            return module
        others = {part: getattr(module, part) for part in parts if part not in own}
        return SimpleNamespace(**others, **{part: self(f"{name}.{part}") for part in own})


@functools.cache
def _uses(name: str, changed: str) -> bool:
    """Whether a module is the changed one, or one of the kernels' that imports it."""
    return name == changed or any(_uses(used, changed) for used in _imported(name))


@functools.cache
def _imported(name: str) -> frozenset[str]:
    """Return the kernels' modules that one of them imports."""
    path = _path(name)
    if path is None:
        return frozenset()
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(used for used in names if _path(used) is not None)


@functools.cache
def _path(name: str) -> Path | None:
    """Return the installed file of one of the kernels' modules, None for other modules."""
    package, _, last = name.rpartition(".")
    kernels = ("srigl_core.reference", "srigl_core.backends")
    if not package.startswith(kernels) and name not in BESIDE_KERNELS:
        return None
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    paths = (Path(folder, f"{last}.py") for folder in folders)
    return next((path for path in paths if path.exists()), None)


# CUDA kernels


def _simulated_backend(file: str, change: Change) -> Any:
    """Return the GPU backend on a simulated device, with one file of it changed."""
    from host_device import ORDERS, run_in_order
    from simulated import KERNELS, SimulatedDevice, TightArrays

    from srigl_core.backends.cupy_gpu.device import DeviceProperties
    from srigl_core.backends.cupy_gpu.gpu_backend import CAPABILITIES

    module, folder = "srigl_core.backends.cupy_gpu.gpu_backend", KERNELS
    if file.endswith(".py"):
        changed = ".".join(("srigl_core", *Path(file).with_suffix("").parts))
        gpu_backend = _Modules(changed, change)(module)
    else:
        gpu_backend = importlib.import_module(module)
        folder = Path(tempfile.mkdtemp(prefix="srigl-mutant-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for path in KERNELS.glob("*.cu*"):
            text = path.read_text()
            (folder / path.name).write_text(change(text) if path.name == Path(file).name else text)

    devices = [
        DeviceProperties("simulated", 3, nbytes, 4 * nbytes, 2048) for nbytes in SHARED_BYTES
    ]

    class Device(SimulatedDevice):
        """A device that runs threads and blocks in another order at each launch."""

        def __init__(self) -> None:
            super().__init__(devices[0], folder, one_by_one=True)
            self._orders = itertools.cycle(ORDERS)

        def launch(self, *arguments: Any) -> None:
            with run_in_order(next(self._orders)):
                super().launch(*arguments)

    class Backend(gpu_backend.GpuBackend):  # type: ignore[misc, name-defined]
        """A backend whose device has as much memory as the weight says."""

        def prepare(self, weight: Any) -> Any:
            self.device.properties = devices[weight.nnz % 2]
            return super().prepare(weight)

        def prepare_quantized(self, weight: Any, inputs: str) -> Any:
            self.device.properties = devices[weight.nnz % 2]
            return super().prepare_quantized(weight, inputs)

    most = 400_000 if "update" in file else 900_000  # an update of many rows takes seconds
    backend = Backend(Device(), "simulated", replace(CAPABILITIES, largest_problem=most))
    backend.arrays = TightArrays()
    return backend


@functools.cache
def _numbers_in_table() -> dict[str, int]:
    """Return which problem of the run of seed 0 is the first that shows each bug."""
    rows = json.loads(TABLE.read_text())["mutants"]
    return {row["mutant"]: row["number"] for row in rows if "number" in row}


MUTANTS = [Mutant.read(path) for path in sorted(FOLDER.glob("*/*.diff"))]
