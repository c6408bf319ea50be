"""The kit in processes of its own, as its users run it; strategies, which are searched for long."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import find

from srigl_core.testing import strategies

MODULE = """
import os
import numpy as np
from srigl_core.testing import BackendConformance, KernelCapabilities, declare

@declare(capabilities=KernelCapabilities(value_dtypes={"float64"}))
def kernel(x, values, indices):
    return np.stack([x[:, i] @ v for v, i in zip(values, indices)], axis=1)

def broken(x, values, indices):
    return kernel(x, values, indices) * 2

def crashes(x):
    os._exit(3)

class TestKernel(BackendConformance):
    backend = staticmethod(kernel)
    max_examples = 3

class TestBroken(BackendConformance):
    backend = broken
    max_examples = 3
    xfails = {"product_agrees_with_other_oracles": "not yet"}
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "test_mine.py").write_text(MODULE)
    return tmp_path


def python(folder, *arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=250, check=False
    )


def test_a_backend_inherits_its_tests(project):
    options = ("-q", "-rfEx", "-p", "no:cacheprovider", "--import-mode=prepend")
    out = python(project, "-m", "pytest", *options, ".").stdout
    assert "FAILED test_mine.py::TestBroken::test_law[product_is_within_the_error_bound]" in out
    assert "XFAIL test_mine.py::TestBroken::test_law[product_agrees_with_other_oracles]" in out
    assert "TestKernel" not in out.partition("short test summary")[2]
    assert "Traceback" not in out


def test_reports_are_written_before_the_next_kernel(project):
    command = ("-m", "srigl_core.cli", "verify", "test_mine:kernel", "test_mine:crashes")
    done = python(project, *command, "--max-examples=2", "--report=report.json")
    assert done.returncode == 3
    (report,) = json.loads((project / "report.json").read_text())
    assert (report["kernel"], report["ok"]) == ("kernel", True)
    assert "bfloat16" in report["left_out"]


def test_pytest_elsewhere_does_not_import_the_package(tmp_path):
    (tmp_path / "test_modules.py").write_text(
        "import sys\n\ndef test_modules():\n    assert 'srigl_core' not in sys.modules\n"
    )
    done = python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert "1 passed" in done.stdout, done.stdout


def test_strategies_reach_what_tells_kernels_apart():
    weights = strategies.condensed_weights()
    for is_found in (
        lambda w: w.n_active < w.shape[0],
        lambda w: w.fan_in == 1 < w.shape[1],
        lambda w: w.fan_in == w.shape[1] > 1,
        lambda w: w.shape[0] == 1 < w.shape[1],
        lambda w: w.shape[0] > 100,
        lambda w: w.indices.dtype == np.uint32,
        lambda w: w.dtype.name == "bfloat16",
    ):
        find(weights, is_found)
    inputs = strategies.inputs(find(weights, lambda w: min(w.shape) > 1 and max(w.shape) < 9))
    for is_found in (
        lambda x: x.size == 0,
        lambda x: x.ndim == 3,
        lambda x: x.size and np.isnan(x).any(),
        lambda x: x.size and (np.signbit(x) & (x == 0)).any(),
        lambda x: x.size and not x.flags.c_contiguous,
        lambda x: x.size and ((x != 0) & (np.abs(x.astype(float)) < 1e-40)).any(),
    ):
        find(inputs, is_found)
    masks = strategies.masks((4, 6))
    assert find(masks, lambda m: len(set(m.sum(axis=1))) == 1 and m.any()).shape == (4, 6)
    find(masks, lambda m: len(set(m.sum(axis=1))) > 1)
    find(strategies.gradients((4, 6)), lambda g: len(np.unique(np.abs(g))) < 4)
