"""The kit for kernel authors: how it calls a function, what it reports, how it is run."""

import itertools
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import find, given, settings
from ml_dtypes import bfloat16
from typer.testing import CliRunner

from srigl_core import CondensedWeight, SriglError, get_backend
from srigl_core.cli.app import app
from srigl_core.contract import Capabilities, MatmulGradients
from srigl_core.errors import FileFormatError, ValueTypeError
from srigl_core.reference import activate
from srigl_core.reference.backend import ReferenceBackend
from srigl_core.reference.mask_update import UpdateSettings, srigl_update
from srigl_core.testing import (
    LAWS,
    ConformanceError,
    FunctionBackend,
    KernelCapabilities,
    LawViolation,
    MatmulProblem,
    UpdateTrace,
    check_kernel,
    check_law,
    check_trace,
    declare,
    shrinking,
    strategies,
    verify,
)
from srigl_core.testing.problems import EVERYTHING, SeededSource
from srigl_core.testing.targets import as_backend

WIDE_TYPES = KernelCapabilities(value_dtypes={"float32", "float64"})
FLOAT64 = KernelCapabilities(value_dtypes={"float64"})
LAW = {law.name: law for law in LAWS}
PRODUCT_LAW = LAW["product_is_within_the_error_bound"]


def product(x, values, indices, active, n_out):
    y = np.zeros((len(x), n_out), np.result_type(x, values))
    for row, value, index in zip(active, values, indices, strict=True):
        y[:, row] = x[:, index] @ value
    return y


def without_last_connection(x, values, indices, active, n_out):
    return product(x, values[:, :-1], indices[:, :-1], active, n_out)


def index_of_sixteen_bits(x, values, indices, active, n_out):
    return product(x, values, indices.astype(np.uint16), active, n_out)


def never_grows(weight, grad, mask, settings):
    return mask


def raising(x, values):
    raise ZeroDivisionError("no such kernel")


# ---------------------------------------------------------------- functions


def test_a_right_product_passes_every_law_of_what_it_takes():
    report = check_kernel(product, capabilities=WIDE_TYPES, max_examples=30)
    assert report.ok
    assert report.n_run == len(report.results) - 1  # it takes no out
    assert all(r.law.operation == "condensed_matmul" for r in report.results)


def test_a_function_is_called_with_what_its_parameters_name():
    seen = []

    def kernel(x, weight, *, n_in, bias, activation="none", compact=False, threads=None, depth=3):
        seen.append((n_in == weight.shape[1], bias is None, compact, activation, depth))
        z = product(x, weight.values, weight.indices, weight.active, weight.shape[0])
        z = activate((z if bias is None else z + bias).astype(np.float64), activation)
        return (z[:, weight.active] if compact else z).astype(np.result_type(x, weight.values))

    assert check_kernel(kernel, capabilities=FLOAT64, max_examples=30).ok
    n_in_is_right, no_bias, compact, activations, depths = map(set, zip(*seen, strict=True))
    assert n_in_is_right == {True}
    assert no_bias == compact == {True, False}
    assert activations == {"none", "relu", "gelu", "gelu_tanh", "silu"}
    assert depths == {3}


def test_a_product_that_rounds_by_way_of_float32_is_within_the_bound():
    def kernel(x, weight, out):
        wide = weight.values.astype(np.float64), x.astype(np.float64)
        y = np.zeros((len(x), weight.shape[0]))
        y[:, weight.active] = np.einsum("bnk,nk->bn", wide[1][:, weight.indices], wide[0])
        out[...] = y if out.dtype == np.float64 else y.astype(np.float32).astype(out.dtype)

    assert check_kernel(kernel, max_examples=30).ok


def test_a_function_without_row_numbers_gets_no_ablated_neurons():
    def kernel(x, values, indices):
        assert len(values) in (*range(1, 41), 130, 1_100)
        return np.stack([x[:, i] @ v for v, i in zip(values, indices, strict=True)], axis=1)

    assert check_kernel(kernel, capabilities=WIDE_TYPES, max_examples=20).ok


def test_a_function_may_write_to_out():
    backend = get_backend("reference")

    def kernel(x, weight, bias, activation, compact, out, threads):
        backend.prepare(weight).matmul(
            x, bias, activation=activation, compact=compact, out=out, threads=threads
        )

    assert check_kernel(kernel, max_examples=20).counts["not applicable"] == 0

    def leaves_some(x, weight, out):
        kernel(x, weight, None, "none", False, out, None)
        out[-1, -1] = np.nan

    with pytest.raises(ConformanceError, match="out_is_filled_whatever_it_held"):
        check_kernel(leaves_some, max_examples=20)


def test_arrays_are_converted_for_a_function():
    dtypes = set()

    def asarray(array):
        assert array.flags.c_contiguous
        assert array.flags.aligned
        dtypes.add(array.dtype.name)
        return memoryview(array)

    def kernel(x, values, indices):
        x, values, indices = map(np.asarray, (x, values, indices))
        return product(x, values, indices, range(len(values)), len(values))

    options = {"asarray": asarray, "index_dtype": "int32", "max_examples": 10}
    report = check_kernel(kernel, capabilities=FLOAT64, **options)
    assert report.ok
    assert dtypes == {"float64", "int32"}
    status = {result.law.name: result.status for result in report.results}
    assert status["memory_layout_does_not_matter"] == "not applicable"


def test_gradients_may_come_as_a_tuple():
    reference = get_backend("reference")

    def kernel(grad, x, weight):
        dx = np.empty(x.shape, np.result_type(grad, weight.values))
        out = MatmulGradients(dx, np.empty(weight.values.shape), np.empty(weight.shape[0]))
        reference.prepare(weight).backward(grad, x, out=out, threads=None)
        return out.x, out.values, out.bias

    assert check_kernel(kernel, "condensed_matmul_backward", max_examples=20).ok

    def swapped(grad, x, weight):
        dx, dvalues, dbias = kernel(grad, x, weight)
        return dx, dvalues, dbias[::-1]

    with pytest.raises(ConformanceError, match="the gradient of bias"):
        check_kernel(swapped, "condensed_matmul_backward", max_examples=20)


@pytest.mark.parametrize("returns", ["mask", "mask and weight", "update"])
def test_an_update_may_return_what_it_has(returns):
    def kernel(weight, grad, mask, settings):
        update = srigl_update(weight, grad, mask, settings)
        if returns == "update":
            return update
        return update.mask if returns == "mask" else (update.mask, update.weight)

    report = check_kernel(kernel, "update_mask", max_examples=20)
    assert report.n_run == len(report.results)


def test_an_update_of_few_settings_gets_no_others():
    def kernel(weight, grad, mask, nnz_budget, drop_fraction):
        return srigl_update(
            weight, grad, mask, UpdateSettings(nnz_budget, drop_fraction, gamma_sal=None)
        ).mask

    recorded = check_kernel(kernel, "update_mask", max_examples=20).results[-1]
    assert recorded.law.name == "released_updates_are_reproduced"
    assert recorded.status == "not applicable"


def test_a_budget_that_is_too_small_is_an_error_of_the_function():
    def refuses(weight, grad, mask, settings):
        try:
            return srigl_update(weight, grad, mask, settings).mask
        except SriglError as error:
            raise ValueError("the budget is too small") from error

    laws = [LAW["a_fan_in_of_zero_is_an_error"]]
    assert verify(FunctionBackend(refuses, "update_mask"), laws=laws).ok
    (result,) = verify(FunctionBackend(never_grows, "update_mask"), laws=laws).failures
    assert "a mask was returned, expected ValueError" in result.failure.message


def test_inactive_weights_are_zeros_of_any_sign():
    def multiplies(weight, grad, mask, settings):
        update = srigl_update(weight, grad, mask, settings)
        signed_zeros = np.copysign(0, weight).astype(weight.dtype)
        return update.mask, np.where(update.mask, update.weight, signed_zeros)

    assert check_kernel(multiplies, "update_mask", max_examples=30).ok

    def loses_signs(weight, grad, mask, settings):
        update = srigl_update(weight, grad, mask, settings)
        return update.mask, update.weight + weight.dtype.type(0)  # -0.0 becomes 0.0

    report = verify(FunctionBackend(loses_signs, "update_mask"), max_examples=30, shrink=False)
    assert "update_is_that_of_the_reference" in {result.law.name for result in report.failures}


def test_a_kernel_may_always_apply_an_activation():
    def kernel(x, values, indices, activation):
        assert activation == "relu"
        return np.maximum(product(x, values, indices, range(len(values)), len(values)), 0)

    capabilities = KernelCapabilities(value_dtypes={"float32", "float64"}, activations={"relu"})
    report = check_kernel(kernel, capabilities=capabilities, max_examples=20)
    (linear,) = (r for r in report.results if r.law.name == "product_is_linear_in_the_input")
    assert (linear.status, linear.detail) == ("not applicable", "it always applies an activation")


@pytest.mark.parametrize(
    ("function", "op", "message"),
    [
        (lambda x, weights: x, "condensed_matmul", "parameter 'weights' cannot be passed for"),
        (lambda x, /: x, "condensed_matmul", "parameter 'x'"),
        (lambda *arrays: arrays, "condensed_matmul", "parameter 'arrays'"),
        (product, "matmul", "op='matmul' is unknown; use one of condensed_matmul,"),
        (ReferenceBackend, "update_mask", r"must be a function, .*srigl_core\.testing\.verify"),
        (ReferenceBackend(), "update_mask", "must be a function, got <"),
        (math.hypot, "condensed_matmul", "wrap it in a function of Python"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(function, op, message):
    with pytest.raises(SriglError, match=message):
        FunctionBackend(function, op)


# ---------------------------------------------------------------- reports


def failure_of(kernel, law=PRODUCT_LAW):
    (result,) = verify(kernel, laws=[law]).failures
    return result.failure


def test_a_failure_is_shrunk_and_its_python_shows_it_again():
    kernel = FunctionBackend(without_last_connection, capabilities=WIDE_TYPES)
    report = verify(kernel, laws=LAWS[:3])
    assert not report.ok
    first = report.failures[0]
    assert first.law is PRODUCT_LAW
    assert first.failure.shape == (1, 1)
    assert first.failure.examples <= 10
    assert "expected 8.0, got 0.0, which differs by 8" in first.failure.message
    with pytest.raises(LawViolation, match=r"expected 8\.0, got 0\.0"):
        exec(first.failure.code, {})
    text = str(report)
    for part in (PRODUCT_LAW.statement, first.failure.message, "the error bound of SPEC 2"):
        assert part in text
    assert "The same problem breaks\n    product_agrees_with_other_oracles: the product, " in text


def test_the_python_of_a_failure_makes_the_kernel_as_it_was_made():
    capabilities = KernelCapabilities(value_dtypes={"float64", "float32"}, bias=False)
    options = {"capabilities": capabilities, "asarray": np.asarray, "index_dtype": np.int32}
    code = failure_of(FunctionBackend(without_last_connection, **options)).code
    assert "value_dtypes=['float32', 'float64'], bias=False), " in code
    assert "asarray=asarray, index_dtype='int32')" in code
    with pytest.raises(LawViolation, match="expected"):
        exec(code, {})


def test_what_has_no_name_to_import_is_left_to_be_filled_in():
    class Broken(ReferenceBackend):
        def prepare(self, weight):
            raise ZeroDivisionError

    code = failure_of(Broken).code
    assert "kernel = ...  # put your backend here" in code
    assert "check_law(kernel, " in code
    code = failure_of(FunctionBackend(without_last_connection, asarray=lambda array: array)).code
    assert "asarray = ...  # put your conversion here" in code


def test_a_script_is_imported_by_its_name(tmp_path):
    (tmp_path / "my_script.py").write_text(
        "from srigl_core.testing import verify\n"
        "def wrong(x, values, indices):\n"
        "    return x\n"
        "if __name__ == '__main__':\n"
        "    print(verify(wrong, max_examples=1).failures[0].failure.code)\n"
    )
    done = python(tmp_path, "my_script.py")
    assert "from my_script import wrong" in done.stdout
    again = python(tmp_path, "-c", f"import sys; sys.path.insert(0, '')\n{done.stdout}")
    assert "LawViolation: the product" in again.stderr


def test_a_failure_is_shrunk_for_a_limited_time(monkeypatch):
    def n_calls(seconds):
        calls = []

        def wrong(x, values, indices):
            calls.append(None)
            return np.zeros((len(x), 1), x.dtype)

        clock = itertools.count()  # a second passes from one look at it to the next
        monkeypatch.setattr(shrinking, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        monkeypatch.setattr(shrinking, "_SECONDS", seconds)
        assert not verify(FunctionBackend(wrong), laws=[PRODUCT_LAW]).ok
        return len(calls)

    searched = n_calls(0)
    assert n_calls(4) == searched + 3
    assert n_calls(10**6) > searched + 10


def test_a_report_says_what_was_left_out():
    report = check_kernel(product, capabilities=WIDE_TYPES, max_examples=2)
    missing = (
        "float16, bfloat16, out=, bias, activation relu, activation gelu, activation gelu_tanh"
    )
    assert f"not declared, so not tried: {missing}" in str(report)
    assert report.as_json()["left_out"] == report.left_out
    assert verify("reference", max_examples=1).left_out == ()
    few = KernelCapabilities(value_dtypes={"float64"}, settings=frozenset())
    of_product = verify(FunctionBackend(product, capabilities=few), max_examples=1)
    assert "gamma_sal" not in of_product.left_out
    update = FunctionBackend(never_grows, "update_mask", capabilities=few)
    of_update = verify(update, max_examples=1, shrink=False)
    assert {"gamma_sal", "float32"} <= {*of_update.left_out}
    assert "bias" not in of_update.left_out


def test_a_failure_of_a_large_layer_is_shown_by_the_integers_drawn():
    code = failure_of(FunctionBackend(index_of_sixteen_bits, capabilities=WIDE_TYPES)).code
    assert "problem = [" in code
    assert re.search(r"# Built from these integers: weight \(\d+, \d{5,}\) float\d+, x \(", code)
    assert len(code) < 700
    with pytest.raises(LawViolation):
        exec(code, {})


def test_a_failing_update_is_shown_on_a_small_problem_as_python():
    *failures, recorded = verify(FunctionBackend(never_grows, "update_mask")).failures
    assert recorded.law.name == "released_updates_are_reproduced"
    assert failures
    for result in failures:
        assert max(result.failure.shape) <= 3
        with pytest.raises(LawViolation):
            exec(result.failure.code, {})


def test_the_same_seed_gives_the_same_report():
    kernel = FunctionBackend(without_last_connection)
    first, second = (verify(kernel, laws=LAWS[:5], seed=3).as_json() for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert first["counts"]["failed"] == 4


def test_a_kernel_that_raises_fails_with_its_traceback():
    with pytest.raises(ConformanceError, match="ZeroDivisionError: no such kernel") as raised:
        check_kernel(raising, max_examples=5)
    assert raised.value.report.counts["passed"] == 0


def test_a_kernel_that_fails_now_and_then_fails():
    calls = []

    def flaky(x, values, indices, active, n_out):
        calls.append(None)
        return product(x, values, indices, active, n_out) + (len(calls) % 7 == 0)

    assert failure_of(FunctionBackend(flaky, capabilities=WIDE_TYPES))


def test_nothing_checked_is_no_success():
    nothing = KernelCapabilities(value_dtypes=frozenset())
    with pytest.raises(ConformanceError, match="nothing was checked"):
        check_kernel(product, capabilities=nothing)
    assert not verify("scipy", op="update_mask").ok


@pytest.mark.parametrize("what", ["operations", "value_dtypes", "index_dtypes", "activations"])
def test_an_unknown_capability_is_refused(what):
    with pytest.raises(SriglError, match=f"{what} has 'int31'; use some of"):
        KernelCapabilities(**{what: frozenset({"int31"})})


def test_plain_capabilities_are_accepted():
    plain = Capabilities(value_dtypes=frozenset({"float64"}), index_dtypes=frozenset({"uint32"}))
    assert check_kernel(product, capabilities=plain, max_examples=10).n_run > 10


@pytest.mark.parametrize("declared", ["argument", "decorator"])
def test_expected_failures_are_the_authors_to_declare(declared):
    reason = "the last connection is for later"
    kernel, few = FunctionBackend(without_last_connection), {"max_examples": 10, "shrink": False}
    broken = [result.law.name for result in verify(kernel, **few).failures]
    xfails = {**dict.fromkeys(broken, reason), "inputs_are_not_written": "a guess"}
    if declared == "decorator":
        report = verify(declare(xfails=xfails)(without_last_connection), **few)
        del without_last_connection.declared
    else:
        report = verify(kernel, xfails=xfails, **few)
    assert report.ok
    assert report.counts["expected failure"] == len(broken)
    assert report.counts["unexpected pass"] == 1
    assert f"expected failure: {reason}" in str(report)
    with pytest.raises(SriglError, match="'inputs_are_nt_written'; there are inputs_are_not_writ"):
        verify(kernel, xfails={"inputs_are_nt_written": "a slip"})


def test_a_kernel_is_named_as_a_backend_a_class_or_a_function():
    assert as_backend("reference") is get_backend("reference")
    assert as_backend("srigl_core.reference.backend:ReferenceBackend").name == "reference"
    assert as_backend("test_conformance_kit:product").name == "product"
    with pytest.raises(SriglError, match="no backend is called"):
        as_backend("nonesuch")
    with pytest.raises(ValueTypeError, match="'math:pi' is a float"):
        as_backend("math:pi")


def test_a_law_can_be_checked_on_a_problem_of_ones_own():
    with pytest.raises(SriglError, match="no law is called 'tidiness'"):
        check_law("reference", "tidiness", [0])
    check_law("reference", PRODUCT_LAW.name, [0] * 30)


def test_every_law_is_listed_with_what_it_compares_with():
    listed = srigl("verify", "--list").output.splitlines()
    for law in LAWS:
        assert law.statement.endswith(".")
        assert law.against
        assert law.tolerance
        line = f"- `{law.name}`: {law.statement} Compared with {law.against}, {law.tolerance}."
        assert listed.count(line) == 1


# ---------------------------------------------------------------- strategies


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
    inputs = strategies.inputs(find(weights, lambda w: w.shape == (3, 5)))
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


NARROW = KernelCapabilities(
    value_dtypes={"float64"},
    activations={"relu"},
    bias=False,
    ablation=False,
    strides=False,
    out=False,
    settings=frozenset(),
)


@settings(max_examples=50, database=None)
@given(strategies.matmul_problems(NARROW), strategies.update_problems(NARROW))
def test_strategies_stay_within_capabilities(product, update):
    weight = product.weight
    assert weight.dtype == product.x.dtype == product.out_dtype == update.weight.dtype == float
    assert product.activation == "relu"
    assert product.bias is None
    assert weight.n_active == weight.shape[0]
    assert product.x.flags.c_contiguous
    assert update.settings.gamma_sal is update.settings.min_salient is None
    assert update.settings.saliency_scope == "inactive"
    assert update.settings.grown_init == 0


# ---------------------------------------------------------------- pytest and the shell

MODULE = """
import numpy as np
from srigl_core.contract import Capabilities
from srigl_core.reference.backend import ReferenceBackend

class Mine(ReferenceBackend):
    name = "mine"

class NoOperations(ReferenceBackend):
    capabilities = Capabilities(operations=frozenset())

def kernel(x, values, indices, active, n_out):
    y = np.zeros((len(x), n_out), np.result_type(x, values))
    for row, value, index in zip(active, values, indices):
        y[:, row] = x[:, index] @ value
    return y

def broken(x, values, indices, active, n_out):
    return kernel(x, values, indices, active, n_out) * 2
"""
TESTS = """
from srigl_core.testing import BackendConformance
import my_kernels

class TestMine(BackendConformance):
    backend = my_kernels.Mine
    max_examples = 3

class TestNothing(BackendConformance):
    backend = my_kernels.NoOperations

class TestFunction(BackendConformance):
    backend = staticmethod(my_kernels.kernel)
    op = "condensed_matmul"
    max_examples = 1

class TestBroken(BackendConformance):
    backend = my_kernels.broken
    max_examples = 10
    xfails = {"product_agrees_with_other_oracles": "not yet", "inputs_are_not_written": "no idea"}
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "my_kernels.py").write_text(MODULE)
    (tmp_path / "test_mine.py").write_text(TESTS)
    return tmp_path


def python(folder, *arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=250, check=False
    )


def srigl(*arguments):
    return CliRunner().invoke(app, [str(part) for part in arguments])


def test_a_backend_inherits_its_tests(project):
    options = ("-q", "-rfEx", "-p", "no:cacheprovider", "--import-mode=prepend")
    out = python(project, "-m", "pytest", *options, ".").stdout
    assert "FAILED test_mine.py::TestBroken::test_law[product_is_within_the_error_bound]" in out
    assert "XFAIL test_mine.py::TestBroken::test_law[product_agrees_with_other_oracles]" in out
    assert "inputs_are_not_written passes, and was expected to fail (no idea)" in out
    assert "FAILED test_mine.py::TestBroken::test_law[inputs_are_not_written]" not in out
    assert "FAILED test_mine.py::TestNothing::test_some_law_can_be_checked" in out
    assert "nothing was checked" in out
    assert not re.search("TestMine|TestFunction", out.partition("short test summary")[2])
    assert "Traceback" not in out


def test_pytest_elsewhere_does_not_import_the_package(tmp_path):
    (tmp_path / "test_modules.py").write_text(
        "import sys\n\ndef test_modules():\n    assert 'srigl_core' not in sys.modules\n"
    )
    done = python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert "1 passed" in done.stdout, done.stdout


def test_verify_takes_kernels_that_are_not_registered(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    report, xfails = project / "report.json", project / "xfails.txt"
    few = ("--max-examples", 3)
    result = srigl("verify", "my_kernels:Mine", "--op", "update_mask", *few, "--report", report)
    assert result.exit_code == 0, result.output
    (content,) = json.loads(report.read_text())
    assert content["kernel"] == "mine"
    assert content["counts"]["passed"] == len(content["laws"]) == 11
    broken = ("verify", "my_kernels:broken", "--op", "condensed_matmul", *few)
    result = srigl(*broken)
    assert result.exit_code == 1
    assert "check_law('my_kernels:broken', \"product_is_within_the_error_bound\"" in result.output
    names = re.findall(r"^(\w+) +\d+  failed", result.output, re.MULTILINE)
    xfails.write_text("# all of it\n" + "".join(f"{name}: it doubles  # sic\n" for name in names))
    result = srigl(*broken, "--xfails", xfails)
    assert result.exit_code == 0, result.output
    assert "expected failure: it doubles" in result.output
    xfails.write_text("no reason\n")
    result = srigl("verify", "reference", "--xfails", xfails)
    assert result.exit_code == 1
    assert "line 1: 'no reason' is not 'law: reason'" in result.output


def test_the_kit_is_imported_without_pytest_and_hypothesis(tmp_path):
    code = """
import sys
from srigl_core.testing import FunctionBackend, check_law, verify
assert not {"pytest", "hypothesis"} & set(sys.modules)
sys.modules["hypothesis"] = None
try:
    verify("reference", max_examples=1)
except ImportError as error:
    print(error)
"""
    assert "pip install hypothesis" in python(tmp_path, "-c", code).stdout


# ---------------------------------------------------------------- recorded updates


def recorded(tmp_path, spoil=lambda mask: mask, dtype=np.float32):
    rng = np.random.default_rng(0)
    trace, options = UpdateTrace(), {"nnz_budget": 12, "drop_fraction": 0.3}
    for layer in ("fc1", "fc2"):
        weight, grad = rng.standard_normal((2, 4, 6)).astype(dtype)
        mask = np.tile(np.arange(6) < 3, (4, 1))
        weight *= mask
        after = srigl_update(weight, grad, mask, UpdateSettings(**options)).mask
        trace.add(layer, weight, grad, mask, spoil(after) if layer == "fc2" else after, **options)
    path = tmp_path / "trace.npz"
    trace.save(path)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "bfloat16", "float16"])
def test_a_right_trace_passes(tmp_path, dtype):
    path = recorded(tmp_path, dtype=dtype)
    assert [bool(verdict) for verdict in check_trace(path)] == [True, True]
    result = srigl("check-trace", path)
    assert result.exit_code == 0
    assert "2 updates, 0 of them not the definition's" in result.output


def test_a_wrong_trace_is_explained(tmp_path):
    path = recorded(tmp_path, spoil=lambda mask: mask[::-1])
    assert [bool(verdict) for verdict in check_trace(path)] == [True, False]
    result = srigl("check-trace", path)
    assert result.exit_code == 1
    assert "update 1, layer 'fc2': first difference at stage" in result.output
    assert "2 updates, 1 of them not" in result.output


def test_a_convolution_can_be_traced(tmp_path):
    trace, mask = UpdateTrace(), np.ones((2, 3, 1, 1), bool)
    numbers = np.ones(mask.shape)
    trace.add("conv", numbers, numbers, mask, mask, nnz_budget=6, drop_fraction=0.0)
    trace.save(tmp_path / "trace.npz")
    assert all(check_trace(tmp_path / "trace.npz"))


def test_what_is_no_trace_is_refused(tmp_path):
    ones, mask = np.ones((2, 2)), np.ones((2, 2), bool)
    trace = UpdateTrace()
    for arrays, drop_fraction, message in (
        ((ones, ones[:1], mask, mask), 0.1, "grad has shape"),
        ((ones, ones, mask, mask[:1]), 0.1, "shape"),
        ((ones, "none", mask, mask), 0.1, "grad"),
        ((ones, ones, mask, mask), 2, "drop_fraction=2"),
    ):
        with pytest.raises(SriglError, match=message):
            trace.add("fc", *arrays, nnz_budget=2, drop_fraction=drop_fraction)
    path = tmp_path / "empty.npz"
    trace.save(path)
    with pytest.raises(FileFormatError, match="holds no update"):
        check_trace(path)
    np.savez(path, **{"0.weight": ones})
    with pytest.raises(FileFormatError, match="update 0 lacks grad, mask_before"):
        check_trace(path)
    with pytest.raises(FileNotFoundError):
        check_trace(tmp_path / "none.npz")
    path.write_bytes(b"text")
    result = srigl("check-trace", path)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert "is no trace" in result.output


def test_an_update_that_cannot_be_is_a_verdict(tmp_path):
    path = recorded(tmp_path)
    arrays = dict(np.load(path))
    arrays["1.settings"] = json.dumps({"layer": "fc2", "nnz_budget": 500, "drop_fraction": 0.3})
    np.savez(path, **arrays)
    right, wrong = check_trace(path)
    assert right
    assert "nnz_budget=500 exceeds" in str(wrong)


# ---------------------------------------------------------------- false alarms that fuzzing found


@pytest.mark.parametrize("law", [PRODUCT_LAW.name, "out_is_filled_whatever_it_held"])
def test_a_bias_of_float64_is_rounded_once(law, matmul_backend):
    problem = MatmulProblem(
        CondensedWeight(np.ones((1, 1), bfloat16), [[0]], [0], (1, 1)),
        x=np.zeros((1, 1), bfloat16),
        grad=np.zeros((1, 1), bfloat16),
        bias=np.array([-0.04235839697066424]),  # ml_dtypes rounds it to float32 on the way
        activation="none",
        out_dtype=np.dtype(np.float32),
    )
    check_law(matmul_backend, law, problem)


@pytest.mark.parametrize("seed", [2533, 2561, 2725])
def test_more_ties_may_survive_than_the_budget_was_chosen_for(seed, update_backend):
    law = LAW["ties_go_to_the_lowest_index"]
    check_law(update_backend, law, law.build(SeededSource(seed), EVERYTHING))
