"""What importing loads, and the errors."""

import ast
import graphlib
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import srigl_core
from srigl_core import (
    BackendUnavailableError,
    FileFormatError,
    SriglError,
    ValueTypeError,
    errors,
)

HEAVY = (
    "numba",
    "llvmlite",
    "cupy",
    "torch",
    "jax",
    "hypothesis",
    "pytest",
    "typer",
    "rich",
    "sklearn",
    "matplotlib",
)
INSTALLED_IN = str(Path(srigl_core.__file__).parent.parent)


def run(program):
    """Run a Python program that prints JSON, in a fresh interpreter that finds the same package."""
    paths = [INSTALLED_IN, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LOADED = f"import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"


@pytest.mark.parametrize(
    "statement",
    [
        "import srigl_core",
        "import srigl_core.reference",
        "from srigl_core import *",
        "from srigl_core.reference import *",
        "import srigl_core._format.file, srigl_core._training.sparse_trainer, srigl_core.testing",
        "import srigl_core._arrays.libraries",
    ],
)
def test_importing_loads_no_backend_and_no_framework(statement):
    assert run(f"{statement}; {LOADED}") == []


def test_importing_loads_numpy_and_no_other_package():
    program = """
import importlib.metadata, json, sys
before = set(sys.modules)
import srigl_core
packages = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(packages & importlib.metadata.packages_distributions().keys())))
"""
    assert run(program) == ["numpy", "srigl_core"]


def test_using_the_reference_loads_no_backend_and_no_framework():
    program = (
        "import numpy as np, srigl_core as s; "
        "w = s.CondensedWeight.random((4, 6), fan_in=2, rng=0); "
        "s.condensed_matmul(np.ones((1, 6)), w, activation='gelu', backend='reference'); "
        "s.update_mask(np.eye(4), np.eye(4), np.eye(4) > 0, nnz_budget=4, drop_fraction=0.3, "
        "backend='reference'); "
    )
    assert run(program + LOADED) == []


def test_asking_for_a_backend_loads_that_one_alone():
    program = "import srigl_core; srigl_core.get_backend('scipy'); " + LOADED
    assert run(program) == []


def test_all_that_is_promised_is_there():
    for module in (srigl_core, srigl_core.reference, errors):
        for name in module.__all__:
            assert hasattr(module, name), name
        assert len(set(module.__all__)) == len(module.__all__)


def module_level_imports(path, modules):
    """Return those of `modules` that a file imports outside of functions."""
    names, statements = set(), list(ast.parse(path.read_text()).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in modules else node.module)
        elif not isinstance(node, ast.FunctionDef):
            statements.extend(ast.iter_child_nodes(node))
    return names & modules


def test_no_imports_form_a_circle():
    folders = {"srigl_core": Path(srigl_core.__file__).parent}
    for name in ("reference", "backends", "benchmarks"):
        package = importlib.import_module(f"srigl_core.{name}")
        folders[f"srigl_core.{name}"] = Path(package.__file__).parent
    paths = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            paths[".".join((package, *parts)).removesuffix(".__init__")] = path
    assert len(paths) > 150
    imports = {name: module_level_imports(path, paths.keys()) for name, path in paths.items()}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_every_error_is_a_srigl_error_and_also_what_python_calls_it():
    assert issubclass(SriglError, ValueError)
    assert issubclass(ValueTypeError, SriglError)
    assert issubclass(ValueTypeError, TypeError)
    assert issubclass(BackendUnavailableError, SriglError)
    assert issubclass(BackendUnavailableError, ImportError)
    assert issubclass(FileFormatError, SriglError)
    assert not issubclass(FileFormatError, TypeError | ImportError)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_can_be_sent_to_another_process(name):
    error = getattr(errors, name)("k=0 is wrong; use 1")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error) == "k=0 is wrong; use 1"
    assert again.args == error.args
