"""What the kit says about kernels, names and files that it cannot use."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from srigl_core import SriglError
from srigl_core.cli.app import app
from srigl_core.errors import FileFormatError
from srigl_core.reference.backend import ReferenceBackend
from srigl_core.testing import (
    LAWS,
    FunctionBackend,
    KernelCapabilities,
    UpdateTrace,
    check_kernel,
    check_law,
    check_trace,
    declare,
    verify,
)
from srigl_core.testing.targets import as_backend

WIDE_TYPES = KernelCapabilities(value_dtypes={"float32", "float64"})
PRODUCT_LAW = LAWS[0]
KERNELS = """
import os
import numpy as np
from srigl_core.testing import KernelCapabilities, declare


@declare(capabilities=KernelCapabilities(value_dtypes={"float32", "float64"}))
def product(x, values, indices):
    return np.stack([x[:, i] @ v for v, i in zip(values, indices)], axis=1)


def crashes(x):
    os._exit(3)


class NeedsMore:
    def __init__(self, device):
        pass
"""


def product(x, values, indices):
    return np.stack([x[:, i] @ v for v, i in zip(values, indices, strict=True)], axis=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "kernels_of_mine.py").write_text(KERNELS)
    (tmp_path / "quits.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


class Panic(BaseException):
    """What an extension written in Rust raises."""


@pytest.mark.parametrize("error", [SystemExit(0), Panic("index out of range")])
def test_a_kernel_that_ends_python_fails(error):
    def kernel(x, values, indices):
        raise error

    (result,) = verify(kernel, laws=[PRODUCT_LAW], shrink=False).results
    assert result.status == "failed"
    assert f"would have ended Python: {error!r}" in result.failure.message


def test_an_interrupt_is_no_failure():
    def kernel(x, values, indices):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(kernel, laws=[PRODUCT_LAW])


class Sized(ReferenceBackend):
    def __init__(self, size, depth=1):
        self.size = size


def test_what_makes_a_backend_may_be_a_partial_or_have_defaults():
    assert as_backend(functools.partial(Sized, size=3)).size == 3
    assert as_backend(lambda depth=2: Sized(7, depth)).size == 7
    with pytest.raises(SriglError, match=r"cannot be made .* such as functools\.partial\("):
        as_backend(Sized)


def test_a_class_is_not_declared():
    with pytest.raises(SriglError, match="Sized is a class; give it the attributes"):
        declare(xfails={PRODUCT_LAW.name: "a guess"})(Sized)


def test_what_a_partial_calls_keeps_its_declaration():
    @declare(capabilities=WIDE_TYPES)
    def kernel(x, values, indices, depth):
        return product(x, values, indices)

    backend = FunctionBackend(functools.partial(kernel, depth=2))
    assert backend.capabilities.value_dtypes == {"float32", "float64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1 .* at least 0"),
        ({"max_examples": 0}, "max_examples=0 .* at least 1"),
        ({"xfails": [PRODUCT_LAW.name]}, "must map names of laws to reasons"),
        ({"op": "update_mask"}, "is a function for condensed_matmul, not for update_mask"),
    ],
)
def test_arguments_that_are_not_valid_are_refused(options, message):
    with pytest.raises(SriglError, match=message):
        verify(FunctionBackend(product), **options)


@pytest.mark.parametrize("dtype", ["int33", "float32"])
def test_indices_are_integers(dtype):
    with pytest.raises(SriglError, match=f"index_dtype='{dtype}' is no"):
        FunctionBackend(product, index_dtype=dtype)


def test_reports_are_written_before_the_next_kernel(folder):
    targets = ["kernels_of_mine:product", "kernels_of_mine:crashes"]
    command = [sys.executable, "-m", "srigl_core.cli", "verify", *targets]
    options = ["--max-examples=2", "--report=report.json"]
    assert subprocess.run([*command, *options], timeout=250, check=False).returncode == 3
    (report,) = json.loads((folder / "report.json").read_text())
    assert (report["kernel"], report["ok"]) == ("product", True)
    assert "bfloat16" in report["left_out"]


def refused(*arguments):
    result = CliRunner().invoke(app, ["verify", *arguments])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("quits:product", "SystemExit: 0"),
        ("breaks:product", "ZeroDivisionError"),
        (":product", "names no module"),
        (".kernels_of_mine:product", "names no module"),
        ("no_such:product", "cannot be imported"),
        ("kernels_of_mine:no_such", "no attribute 'no_such'"),
        ("kernels_of_mine:NeedsMore", "cannot be made"),
    ],
)
def test_a_target_that_cannot_be_used_is_an_error_in_a_line(folder, target, message):
    output = refused(target)
    assert message in output
    assert repr(target) in output


def test_options_that_are_not_valid_are_refused_before_anything_is_tried(folder):
    assert "condensed_matmul_backward" in refused("reference", "--op", "nonsense")
    with pytest.raises(SriglError, match="op='nonsense' is unknown; use one of condensed_matmul,"):
        as_backend("reference", "nonsense")
    for report in ("no_such/report.json", "."):
        assert "must name a file in a folder that is there" in refused("--report", report)
    (folder / "xfails.txt").write_bytes(b"\xff\xfe")
    assert "no text in UTF-8" in refused("reference", "--xfails", "xfails.txt")


def test_what_is_edited_goes_before_what_is_installed(folder, monkeypatch):
    installed = folder / "installed"
    installed.mkdir()
    (installed / "shadowed_kernel.py").write_text("product = None\n")
    (folder / "shadowed_kernel.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(str(installed))
    assert as_backend("shadowed_kernel:product").name == "product"


def test_out_is_for_functions_of_numpy_arrays():
    def writes(x, values, indices, out):
        out[...] = product(x, values, indices)

    assert check_kernel(writes, capabilities=WIDE_TYPES, max_examples=10).ok
    with pytest.raises(SriglError, match="cannot write to out"):
        FunctionBackend(writes, asarray=np.asarray)


def test_a_function_may_return_a_product_in_spite_of_out():
    def returns(x, values, indices, out=None):
        return product(x, values, indices)

    capabilities = KernelCapabilities(value_dtypes={"float64"}, out=False)
    report = check_kernel(returns, capabilities=capabilities, max_examples=10)
    assert report.counts["failed"] == 0


def test_integers_that_end_early_are_an_error():
    with pytest.raises(SriglError, match="drawn for a kernel of other capabilities"):
        check_law("reference", PRODUCT_LAW.name, [0, 0, 0])


WEIGHT, GRAD = np.array([[0.5, 0.0]]), np.array([[0.0, 2.0]])
BEFORE, AFTER = WEIGHT != 0, np.array([[False, True]])


@pytest.fixture
def trace():
    trace = UpdateTrace()
    trace.add("fc", WEIGHT, GRAD, BEFORE, AFTER, nnz_budget=1, drop_fraction=1.0)
    return trace


@pytest.mark.parametrize("budget", [np.int64(1), np.array(1)[()], 1])
def test_a_trace_takes_numbers_of_numpy(tmp_path, trace, budget):
    zeta = np.float32(1.0)
    trace.add("fc", WEIGHT, GRAD, BEFORE, AFTER, nnz_budget=budget, drop_fraction=zeta)
    trace.save(tmp_path / "trace.npz")
    assert [bool(verdict) for verdict in check_trace(tmp_path / "trace.npz")] == [True, True]


def test_settings_of_a_trace_that_are_unknown_or_missing_are_refused(trace):
    for settings in ({"nnz_budget": 1}, {"nnz_budget": 1, "drop_fraction": 0.3, "zeta": 1}):
        with pytest.raises(SriglError, match="unknown or missing"):
            trace.add("fc", WEIGHT, GRAD, BEFORE, AFTER, **settings)


def test_a_trace_that_cannot_be_written_leaves_the_last_one(tmp_path, trace, monkeypatch):
    path = tmp_path / "trace.npz"
    trace.save(path)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        trace.save(path)
    assert check_trace(path)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]


def test_a_damaged_trace_is_refused(tmp_path, trace):
    path = tmp_path / "trace.npz"
    trace.save(path)
    content = path.read_bytes()
    for damaged in (content[:-30], content[:100] + bytes(60) + content[160:], b"", b"PK"):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="is no trace"):
            check_trace(path)
