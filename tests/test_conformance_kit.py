"""The kit for kernel authors: how it calls a function, what it reports, how it is run."""

import itertools
import json
import math
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from ml_dtypes import bfloat16
from typer.testing import CliRunner

from srigl_core import CondensedWeight, SriglError, get_backend
from srigl_core.cli.app import app
from srigl_core.contract import Capabilities, MatmulGradients
from srigl_core.errors import ValueTypeError
from srigl_core.reference import activate
from srigl_core.reference.backend import ReferenceBackend
from srigl_core.reference.condensed_update import srigl_condensed_update
from srigl_core.reference.mask_update import UpdateSettings, srigl_update
from srigl_core.testing import (
    LAWS,
    BackendConformance,
    ConformanceError,
    FunctionBackend,
    KernelCapabilities,
    LawViolation,
    MatmulProblem,
    check_kernel,
    check_law,
    declare,
    laws,
    shrinking,
    strategies,
    verify,
)
from srigl_core.testing.kernel_capabilities import EVERYTHING, left_out
from srigl_core.testing.problem_sources import SeededSource
from srigl_core.testing.targets import as_backend

SMALL_PROBLEMS = KernelCapabilities(largest_problem=20_000)
WIDE_TYPES = KernelCapabilities(value_dtypes={"float32", "float64"}, largest_problem=200_000)
FLOAT64 = KernelCapabilities(value_dtypes={"float64"}, largest_problem=20_000)
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


def returns_its_weight(weight, gradient_rows, settings):
    return weight


# ---------------------------------------------------------------- functions


def test_a_right_product_passes_every_law_of_what_it_takes():
    report = check_kernel(product, capabilities=WIDE_TYPES, max_examples=10)
    assert report.n_run == len(report.results) - 1  # it takes no out
    assert all(r.law.operation == "condensed_matmul" for r in report.results)
    assert "not declared, so not tried: float16, bfloat16, out=, bias, activation r" in str(report)
    assert report.as_json()["left_out"] == report.left_out


def test_a_function_is_called_with_what_its_parameters_name():
    seen = []

    def kernel(x, weight, *, n_in, bias, activation="none", compact=False, out=None, depth=3):
        seen.append((n_in == weight.shape[1], bias is None, compact, activation, depth))
        z = product(x, weight.values, weight.indices, weight.active, weight.shape[0])
        z = activate((z if bias is None else z + bias).astype(np.float64), activation)
        return (z[:, weight.active] if compact else z).astype(np.result_type(x, weight.values))

    backend = FunctionBackend(kernel, capabilities=replace(FLOAT64, out=False))
    assert verify(backend, laws=LAWS[:3], max_examples=30).ok
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

    laws = [PRODUCT_LAW, LAW["out_is_filled_whatever_it_held"]]
    assert verify(FunctionBackend(kernel), laws=laws, max_examples=30).ok


def test_a_function_may_write_to_out():
    backend = get_backend("reference")

    def kernel(x, weight, bias, activation, compact, out, threads):
        backend.prepare(weight).matmul(
            x, bias, activation=activation, compact=compact, out=out, threads=threads
        )

    law = LAW["out_is_filled_whatever_it_held"]
    assert verify(FunctionBackend(kernel), laws=[law], max_examples=20).ok

    def leaves_some(x, weight, out):
        kernel(x, weight, None, "none", False, out, None)
        out[-1, -1] = np.nan

    assert failure_of(FunctionBackend(leaves_some), law)


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

    options = {"asarray": asarray, "index_dtype": "int32", "max_examples": 5}
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

    assert check_kernel(
        kernel, "condensed_matmul_backward", capabilities=SMALL_PROBLEMS, max_examples=3
    ).ok

    def swapped(grad, x, weight):
        dx, dvalues, dbias = kernel(grad, x, weight)
        return dx, dvalues, dbias[::-1]

    law = LAW["gradients_are_within_the_error_bound"]
    backend = FunctionBackend(swapped, "condensed_matmul_backward")
    assert "the gradient of bias" in failure_of(backend, law).message


@pytest.mark.parametrize("returns", ["mask", "mask and weight", "update"])
def test_an_update_may_return_what_it_has(returns):
    def kernel(weight, grad, mask, settings):
        update = srigl_update(weight, grad, mask, settings)
        if returns == "update":
            return update
        return update.mask if returns == "mask" else (update.mask, update.weight)

    report = check_kernel(kernel, "update_mask", capabilities=SMALL_PROBLEMS, max_examples=3)
    assert report.n_run == len(report.results)


def test_a_function_may_update_a_condensed_layer():
    def kernel(weight, gradient_rows, block_rows, nnz_budget, drop_fraction):
        settings = UpdateSettings(nnz_budget, drop_fraction, gamma_sal=None)
        return srigl_condensed_update(weight, gradient_rows, settings, block_rows=block_rows)

    report = check_kernel(kernel, "update_condensed", capabilities=SMALL_PROBLEMS, max_examples=2)
    assert report.counts["passed"] == len(report.results)
    failure = failure_of(
        FunctionBackend(returns_its_weight, "update_condensed"),
        LAW["a_condensed_fan_in_of_zero_is_an_error"],
    )
    with pytest.raises(LawViolation, match="expected a CondensedUpdate, got CondensedWeight"):
        exec(failure.code, {})


def test_an_update_of_few_settings_gets_no_others():
    def kernel(weight, grad, mask, nnz_budget, drop_fraction):
        return srigl_update(
            weight, grad, mask, UpdateSettings(nnz_budget, drop_fraction, gamma_sal=None)
        ).mask

    recorded = check_kernel(
        kernel, "update_mask", capabilities=SMALL_PROBLEMS, max_examples=5
    ).results[-1]
    assert recorded.law.name == "released_updates_are_reproduced"
    assert recorded.status == "not applicable"


def test_a_budget_that_is_too_small_is_an_error_of_the_function():
    def refuses(weight, grad, mask, settings):
        raise ValueError("the budget is too small")

    law = LAW["a_fan_in_of_zero_is_an_error"]
    assert verify(FunctionBackend(refuses, "update_mask"), laws=[law]).ok
    failure = failure_of(FunctionBackend(never_grows, "update_mask"), law)
    assert "a mask was returned, expected ValueError" in failure.message


def test_inactive_weights_are_zeros_of_any_sign():
    small = partial(FunctionBackend, op="update_mask", capabilities=SMALL_PROBLEMS)

    def multiplies(weight, grad, mask, settings):
        update = srigl_update(weight, grad, mask, settings)
        signed_zeros = np.copysign(0, weight).astype(weight.dtype)
        return update.mask, np.where(update.mask, update.weight, signed_zeros)

    law = LAW["update_is_that_of_the_reference"]
    assert verify(small(multiplies), laws=[law], max_examples=30).ok

    def loses_signs(weight, grad, mask, settings):
        update = srigl_update(weight, grad, mask, settings)
        return update.mask, update.weight + weight.dtype.type(0)  # -0.0 becomes 0.0

    assert failure_of(small(loses_signs), law)


def test_a_kernel_may_ablate_no_neuron_and_always_apply_an_activation():
    def kernel(x, values, indices, activation):
        assert activation == "relu"
        return np.maximum(product(x, values, indices, range(len(values)), len(values)), 0)

    capabilities = KernelCapabilities(
        value_dtypes={"float32", "float64"}, activations={"relu"}, largest_problem=20_000
    )
    report = check_kernel(kernel, capabilities=capabilities, max_examples=5)
    (linear,) = (r for r in report.results if r.law.name == "product_is_linear_in_the_input")
    assert (linear.status, linear.detail) == ("not applicable", "it always applies an activation")


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda x, weights: x, {}, "parameter 'weights' cannot be passed for condensed_matmul"),
        (lambda x, /: x, {}, "parameter 'x'"),
        (lambda *arrays: arrays, {}, "parameter 'arrays'"),
        (product, {"op": "matmul"}, "op='matmul' is unknown; use one of condensed_matmul,"),
        (product, {"op": "chain"}, "op='chain' is for backends, not for functions; use one of"),
        (product, {"index_dtype": "int33"}, "index_dtype='int33' is no"),
        (product, {"index_dtype": "float32"}, "index_dtype='float32' is no integer"),
        (lambda x, out: out, {"asarray": np.asarray}, "cannot write to out"),
        (ReferenceBackend, {}, r"must be a function, .*srigl_core\.testing\.verify"),
        (ReferenceBackend(), {}, "must be a function, got <"),
        (math.hypot, {}, "wrap it in a function of Python"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(function, options, message):
    with pytest.raises(SriglError, match=message):
        FunctionBackend(function, **options)


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


def test_a_function_of_a_script_is_imported_by_the_name_of_its_file(monkeypatch):
    def wrong(x, values, indices):
        return x

    wrong.__module__, wrong.__qualname__ = "__main__", "wrong"
    script = SimpleNamespace(__name__="__main__", __file__="/folder/my_script.py", wrong=wrong)
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert "from my_script import wrong" in failure_of(FunctionBackend(wrong)).code


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
    few = KernelCapabilities(value_dtypes={"float64"}, bias=False, settings=frozenset())
    settings = ["gamma_sal", "grown_init", "min_salient", "saliency_scope"]
    types = ["float16", "bfloat16", "float32"]
    for operation, missing in (
        ("condensed_matmul", [*types, "bias"]),
        ("condensed_matmul_backward", types),
        ("update_mask", [*types, *settings]),
        ("update_condensed", [*types, *settings]),
    ):
        assert left_out(replace(few, operations={operation})) == missing
    assert left_out(EVERYTHING) == []


def test_a_failure_of_a_large_layer_is_shown_by_the_integers_drawn():
    code = failure_of(FunctionBackend(index_of_sixteen_bits, capabilities=WIDE_TYPES)).code
    assert "problem = [" in code
    assert re.search(r"# Built from these integers: weight \(\d+, \d{5,}\) float\d+, x \(", code)
    assert len(code) < 700
    with pytest.raises(LawViolation):
        exec(code, {})


@pytest.mark.parametrize("law", ["update_is_that_of_the_reference", "ties_go_to_the_lowest_index"])
def test_a_failing_update_is_shown_on_a_small_problem_as_python(law):
    failure = failure_of(FunctionBackend(never_grows, "update_mask"), LAW[law])
    assert max(failure.shape) <= 3
    with pytest.raises(LawViolation):
        exec(failure.code, {})


def test_the_same_seed_gives_the_same_report():
    kernel = FunctionBackend(without_last_connection)
    first, second = (verify(kernel, laws=LAWS[:3], seed=3).as_json() for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert first["counts"]["failed"] == 3


class Panic(BaseException):
    """What an extension written in Rust raises."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ZeroDivisionError("no such kernel"), "ZeroDivisionError: no such kernel"),
        (SystemExit(0), "would have ended Python: SystemExit(0)"),
        (Panic("index"), "would have ended Python: Panic('index')"),
    ],
)
def test_a_kernel_that_raises_fails(error, message):
    def raises(x, values, indices):
        raise error

    failure = failure_of(FunctionBackend(raises))
    assert message in failure.message
    assert "Traceback" in failure.message
    assert "in raises\n    raise error" in failure.message  # the kernel's own line


def test_an_interrupt_is_no_failure():
    def kernel(x, values, indices):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(kernel, laws=[PRODUCT_LAW])


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
    for op in ("update_mask", "update_condensed"):
        report = verify("scipy", op=op)
        last = report.results[-1]
        assert (last.status, last.detail) == ("not applicable", f"it does not offer {op}")
        assert not report.ok


@pytest.mark.parametrize("what", ["operations", "value_dtypes", "index_dtypes", "activations"])
def test_an_unknown_capability_is_refused(what):
    with pytest.raises(SriglError, match=f"{what} has 'int31'; use some of"):
        KernelCapabilities(**{what: frozenset({"int31"})})


def test_expected_failures_are_the_authors_to_declare():
    def kernel(x, values, indices, active, n_out):
        return without_last_connection(x, values, indices, active, n_out)

    reason, few = "the last connection is for later", {"max_examples": 2, "shrink": False}
    broken = [result.law.name for result in verify(kernel, **few).failures]
    xfails = {**dict.fromkeys(broken, reason), "inputs_are_not_written": "a guess"}
    with pytest.raises(SriglError, match="'inputs_are_nt_written'; there are inputs_are_not_writ"):
        verify(kernel, xfails={"inputs_are_nt_written": "a slip"})
    report = verify(kernel, xfails=xfails, **few)
    assert report.ok
    assert report.counts["expected failure"] == len(broken)
    assert report.counts["unexpected pass"] == 1
    assert f"expected failure: {reason}" in str(report)
    assert verify(declare(xfails=xfails)(kernel), **few).counts == report.counts


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
    with pytest.raises(SriglError, match="drawn for a kernel of other capabilities"):
        check_law("reference", PRODUCT_LAW.name, [0, 0, 0])
    check_law("reference", PRODUCT_LAW.name, [0] * 30)


def test_every_law_is_listed_with_what_it_compares_with():
    listed = srigl("verify", "--list").output.splitlines()
    for law in LAWS:
        line = f"- `{law.name}`: {law.statement} Compared with {law.against}, {law.tolerance}."
        assert listed.count(line) == 1
        assert all([law.statement.endswith("."), law.against, law.tolerance])
        assert pickle.loads(pickle.dumps(law)).name == law.name  # for processes that fuzz


# ---------------------------------------------------------------- strategies


NARROW = KernelCapabilities(
    value_dtypes={"float64"},
    activations={"relu"},
    bias=False,
    ablation=False,
    layouts={"C"},
    out=False,
    settings=frozenset(),
    largest_problem=20_000,
)


@settings(max_examples=50, database=None)
@given(
    strategies.matmul_problems(NARROW),
    strategies.update_problems(NARROW),
    strategies.condensed_weights(NARROW).flatmap(lambda w: strategies.inputs(w, NARROW)),
    *(strategies.masks((4, 6)), strategies.gradients((4, 6))),
)
def test_strategies_stay_within_capabilities(product, update, inputs, mask, grad):
    weight = product.weight
    assert weight.dtype == product.x.dtype == product.out_dtype == update.weight.dtype == float
    assert product.activation == "relu"
    assert product.bias is None
    assert weight.n_active == weight.shape[0]
    assert product.x.flags.c_contiguous
    assert inputs.flags.c_contiguous
    assert (inputs.dtype, mask.dtype, mask.shape, grad.shape) == (float, bool, (4, 6), (4, 6))
    assert update.settings.gamma_sal is update.settings.min_salient is None
    assert update.settings.saliency_scope == "inactive"
    assert update.settings.grown_init == 0


# ---------------------------------------------------------------- pytest and the shell


def srigl(*arguments):
    return CliRunner().invoke(app, [str(part) for part in arguments])


class Mine(ReferenceBackend):
    name = "mine"
    capabilities = Capabilities(operations=frozenset({"update_mask"}))


class ConformanceOfMine(BackendConformance):
    backend = Mine
    max_examples = 1


class ConformanceOfAFunction(BackendConformance):
    backend = without_last_connection
    max_examples = 5
    xfails = MappingProxyType({LAWS[0].name: "not yet", "inputs_are_not_written": "no idea"})


def test_a_law_is_a_test_of_a_backend(monkeypatch):
    backend, function = ConformanceOfMine(), ConformanceOfAFunction()
    backend.test_law(LAW["update_does_not_write_its_inputs"])
    with pytest.raises(pytest.skip.Exception, match="it does not offer condensed_matmul"):
        backend.test_law(PRODUCT_LAW)
    with pytest.raises(pytest.xfail.Exception, match="not yet"):
        function.test_law(PRODUCT_LAW)
    with pytest.raises(pytest.fail.Exception, match=r"the product, compared .* expected"):
        function.test_law(LAW["product_agrees_with_other_oracles"])
    with pytest.warns(UserWarning, match=r"not_written passes, .* expected to fail \(no idea\)"):
        function.test_law(LAW["inputs_are_not_written"])
    backend.test_some_law_can_be_checked()
    monkeypatch.setattr(Mine, "capabilities", Capabilities(operations=frozenset()))
    with pytest.raises(AssertionError, match="nothing was checked"):
        backend.test_some_law_can_be_checked()


def test_verify_takes_kernels_that_are_not_registered(tmp_path, monkeypatch):
    law = LAW["update_is_that_of_the_reference"]
    monkeypatch.setattr(laws, "LAWS", [PRODUCT_LAW, LAW["inputs_are_not_written"], law])
    report, xfails, few = tmp_path / "report.json", tmp_path / "xfails.txt", ("--max-examples", 3)
    mine = "test_conformance_kit:Mine"
    result = srigl("verify", mine, "--op", "update_mask", *few, "--report", report)
    assert result.exit_code == 0, result.output
    (content,) = json.loads(report.read_text())
    assert content["kernel"] == "mine"
    assert [each["law"] for each in content["laws"]] == [law.name]
    result = srigl("verify", "test_conformance_kit.Mine", *few)
    assert "write a kernel of your own as module:attribute" in result.output
    broken = ("verify", "test_conformance_kit:without_last_connection", *few)
    result = srigl(*broken)
    assert result.exit_code == 1
    assert f'check_law({broken[1]!r}, "{PRODUCT_LAW.name}"' in result.output
    xfails.write_text(f"# all of it\n{PRODUCT_LAW.name}: it loses one, #12 # sic\n")
    result = srigl(*broken, "--xfails", xfails)
    assert result.exit_code == 0, result.output
    assert "expected failure: it loses one, #12" in result.output


def test_the_kit_is_imported_without_pytest_and_hypothesis():
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert "pip install hypothesis" in done.stdout


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


def product_of(x, values, indices):
    return np.einsum("bnk,nk->bn", x[:, indices], values, dtype=np.float64).astype(x.dtype)


def writes_its_input(x, values, indices):
    product = product_of(x, values, indices)
    x[...] = 0
    return product


def returns_the_same_array(x, values, indices, kept={}):  # noqa: B006 # it is what is wrong
    product = product_of(x, values, indices)
    buffer = kept.setdefault((product.shape, product.dtype), product)
    buffer[...] = product
    return buffer


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (writes_its_input, "the function wrote to its argument x"),
        (returns_the_same_array, "a later call changed an earlier product"),
    ],
)
def test_a_function_that_writes_or_keeps_what_it_returns_is_found(function, message):
    """Copies are made for it and of what it returns, which would hide both."""
    same = KernelCapabilities(value_dtypes=frozenset({"float32"}))
    check_kernel(product_of, capabilities=same, asarray=np.array, max_examples=3)
    with pytest.raises(ConformanceError, match=message):
        check_kernel(function, capabilities=same, asarray=np.array, max_examples=3)
