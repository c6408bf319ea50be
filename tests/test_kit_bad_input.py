"""What the kit says of kernels, names and files that are not what it asked for."""

import functools
import json
import math
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
    NotApplicable,
    UpdateTrace,
    check_kernel,
    check_law,
    check_trace,
    declare,
    verify,
)
from srigl_core.testing.targets import as_backend

WIDE_TYPES = KernelCapabilities(value_dtypes=frozenset({"float32", "float64"}))
PRODUCT_LAW = LAWS[0]
KERNELS = """
import sys
import numpy as np
from srigl_core.contract import Capabilities
from srigl_core.testing import KernelCapabilities, declare


@declare(capabilities=KernelCapabilities(value_dtypes={"float32", "float64"}))
def product(x, values, indices):
    return np.stack([x[:, i] @ v for v, i in zip(values, indices)], axis=1)


class NoOperations:
    name = "none"
    capabilities = Capabilities(operations=frozenset())

    def prepare(self, weight):
        return None


class NeedsMore:
    def __init__(self, device):
        pass
"""
TESTS = """
from kernels_of_mine import product
from srigl_core.testing import BackendConformance


class TestProduct(BackendConformance):
    backend = product
    max_examples = 3
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


def pytest_in(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=250, check=False
    )


def test_a_function_is_tried_by_pytest_like_a_backend(folder):
    (folder / "test_mine.py").write_text(TESTS)
    n_others = sum(law.operation != "condensed_matmul" for law in LAWS)
    n_run = len(LAWS) - n_others - 2 + 1  # it takes no out and no ablation; one asks for any law
    inherited = pytest_in(folder, "--import-mode=prepend", "test_mine.py")
    assert f"{n_run} passed, {n_others + 2} skipped" in inherited.stdout
    empty = folder / "empty"
    empty.mkdir()
    option = ("--srigl-backend=kernels_of_mine:product", "--srigl-max-examples=3")
    added = pytest_in(folder, *option, "empty")
    assert f"{n_run} passed, {n_others + 2} skipped" in added.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--srigl-backend=no_such"], "--srigl-backend=no_such: "),
        (["--srigl-backend=reference", "--srigl-max-examples=0"], "must be at least 1"),
    ],
)
def test_pytest_refuses_what_cannot_be_tried(folder, options, message):
    done = pytest_in(folder, *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout


def test_pytest_fails_where_a_backend_has_no_law_to_obey(folder):
    done = pytest_in(folder, "--srigl-backend=kernels_of_mine:NoOperations")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "nothing was checked" in done.stdout


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


class NotToday(ReferenceBackend):
    def prepare(self, weight):
        raise NotApplicable("not today")


@pytest.mark.parametrize("kernel", [lambda x: NotToday().prepare(x), NotToday])
def test_a_kernel_cannot_excuse_itself(kernel):
    (result,) = verify(kernel, laws=[PRODUCT_LAW], shrink=False).results
    assert result.status == "failed"
    assert "the kernel raised NotApplicable: not today" in result.failure.message


class Sized(ReferenceBackend):
    def __init__(self, size, depth=1):
        self.size = size


def test_what_makes_a_backend_may_be_a_partial_or_have_defaults():
    assert as_backend(functools.partial(Sized, size=3)).size == 3
    assert as_backend(lambda depth=2: Sized(7, depth)).size == 7
    with pytest.raises(SriglError, match=r"cannot be made .* such as functools\.partial\("):
        as_backend(Sized)


@pytest.mark.parametrize("kernel", [Sized, ReferenceBackend()])
def test_a_backend_is_not_taken_for_a_function(kernel):
    with pytest.raises(SriglError, match=r"must be a function, got .*srigl_core\.testing\.verify"):
        check_kernel(kernel)


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
def test_arguments_that_cannot_be_are_refused(options, message):
    with pytest.raises(SriglError, match=message):
        verify(FunctionBackend(product), **options)


@pytest.mark.parametrize("given", ["int33", "float32"])
def test_indices_are_integers(given):
    with pytest.raises(SriglError, match=f"index_dtype='{given}' is no"):
        FunctionBackend(product, index_dtype=given)


def test_reports_are_written_before_the_next_kernel(folder):
    (folder / "crashes.py").write_text("import os\n\ndef product(x):\n    os._exit(3)\n")
    command = [sys.executable, "-m", "srigl_core.cli", "verify", "kernels_of_mine:product"]
    options = ["crashes:product", "--max-examples=2", "--report=report.json"]
    assert (
        subprocess.run([*command, *options], cwd=folder, timeout=250, check=False).returncode == 3
    )
    (report,) = json.loads((folder / "report.json").read_text())
    assert (report["kernel"], report["ok"]) == ("product", True)
    assert "bfloat16" in report["left_out"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("quits:product", "SystemExit: 0"),
        ("breaks:product", "ZeroDivisionError"),
        (":product", "names no module"),
        (".kernels_of_mine:product", "names no module"),
        ("kernels_of_mine:no_such", "no attribute 'no_such'"),
        ("kernels_of_mine:NeedsMore", "cannot be made"),
    ],
)
def test_a_target_that_cannot_be_had_is_an_error_in_a_line(folder, target, message):
    result = CliRunner().invoke(app, ["verify", target])
    assert result.exit_code == 1
    assert message in result.output
    assert repr(target) in result.output
    assert "Traceback" not in result.output


def test_an_operation_or_a_folder_that_there_is_not_is_refused_before_anything_is_tried(folder):
    result = CliRunner().invoke(app, ["verify", "reference", "--op", "nonsense"])
    assert result.exit_code != 0
    assert "condensed_matmul_backward" in result.output
    with pytest.raises(SriglError, match="op='nonsense' is unknown; use one of condensed_matmul,"):
        as_backend("reference", "nonsense")
    for report in ("no_such/report.json", "."):
        result = CliRunner().invoke(app, ["verify", "reference", "--report", report])
        assert result.exit_code == 1
        assert "it must name a file in a folder that is there" in result.output
    (folder / "xfails.txt").write_bytes(b"\xff\xfe")
    result = CliRunner().invoke(app, ["verify", "reference", "--xfails", "xfails.txt"])
    assert result.exit_code == 1
    assert "no text in UTF-8" in result.output


def test_a_function_whose_parameters_cannot_be_told_is_refused():
    with pytest.raises(SriglError, match="wrap it in a function of Python"):
        FunctionBackend(math.hypot)


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

    able = KernelCapabilities(value_dtypes=frozenset({"float64"}), out=False)
    report = check_kernel(returns, capabilities=able, max_examples=10)
    assert report.counts["failed"] == 0


def test_choices_that_end_early_are_an_error():
    with pytest.raises(SriglError, match="made for a kernel of other capabilities"):
        check_law("reference", PRODUCT_LAW.name, [0, 0, 0])


def test_a_failure_of_many_problems_is_shown_on_a_small_one():
    def grows_nothing(weight, grad, mask):
        return mask

    report = verify(FunctionBackend(grows_nothing, "update_mask"), max_examples=40)
    shapes = [result.failure.shape for result in report.failures]
    assert shapes
    assert max(max(shape) for shape in shapes) <= 3


@pytest.mark.parametrize("budget", [np.int64(1), np.array(1)[()], 1])
def test_a_trace_takes_numbers_of_numpy(tmp_path, budget):
    trace = UpdateTrace()
    weight, grad = np.array([[0.5, 0.0]]), np.array([[0.0, 2.0]])
    after = np.array([[False, True]])
    zeta = np.float32(1.0)
    trace.add("fc", weight, grad, weight != 0, after, nnz_budget=budget, drop_fraction=zeta)
    trace.save(tmp_path / "trace.npz")
    assert all(check_trace(tmp_path / "trace.npz"))


def test_settings_of_a_trace_that_are_unknown_or_missing_are_refused():
    trace, weight = UpdateTrace(), np.array([[0.5, 0.0]])
    for settings in ({"nnz_budget": 1}, {"nnz_budget": 1, "drop_fraction": 0.3, "zeta": 1}):
        with pytest.raises(SriglError, match="unknown or missing"):
            trace.add("fc", weight, weight, weight != 0, weight != 0, **settings)


def test_a_trace_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    trace, weight = UpdateTrace(), np.array([[0.5, 0.0]])
    trace.add("fc", weight, weight, weight != 0, weight != 0, nnz_budget=1, drop_fraction=0.3)
    path = tmp_path / "trace.npz"
    trace.save(path)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        trace.save(path)
    assert check_trace(path)
    assert [found.name for found in tmp_path.iterdir()] == ["trace.npz"]


def test_a_damaged_trace_is_refused(tmp_path):
    trace, weight = UpdateTrace(), np.array([[0.5, 0.0]])
    trace.add("fc", weight, weight, weight != 0, weight != 0, nnz_budget=1, drop_fraction=0.3)
    path = tmp_path / "trace.npz"
    trace.save(path)
    content = path.read_bytes()
    for damaged in (content[:-30], content[:100] + bytes(60) + content[160:], b"", b"PK"):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="is no trace"):
            check_trace(path)
