"""Every law on every backend, on problems that Hypothesis draws and shrinks."""

import contextlib
import importlib
from unittest import mock

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from srigl_core import get_backend
from srigl_core.testing.kernel_capabilities import capabilities_of
from srigl_core.testing.law import NotApplicable, check
from srigl_core.testing.laws import LAWS
from srigl_core.testing.strategies import problems


@contextlib.contextmanager
def pool_for_all_work():
    """Make the Numba backend use its threads for the smallest work."""
    threads = importlib.import_module("srigl_core.backends.numba_cpu.threads")
    with mock.patch.object(threads, "SMALLEST_PARALLEL_WORK", 0):
        yield


def assert_holds(law, backend, mode, data):
    chosen = get_backend(backend, operation=law.operation)
    problem = data.draw(problems(law.build, capabilities_of(chosen)))
    applicable = True
    with mode():
        try:
            check(chosen, law, problem)
        except NotApplicable:
            applicable = False
    assume(applicable)


def laws_of(operation):
    return pytest.mark.parametrize(
        "law", [law for law in LAWS if law.operation == operation], ids=lambda law: law.name
    )


often_idle = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@laws_of("condensed_matmul")
@often_idle
@given(data=st.data())
def test_product_law(law, matmul_backend, data):
    assert_holds(law, matmul_backend, contextlib.nullcontext, data)


@laws_of("condensed_matmul_backward")
@often_idle
@given(data=st.data())
def test_gradient_law(law, backward_backend, data):
    assert_holds(law, backward_backend, contextlib.nullcontext, data)


@laws_of("update_mask")
@often_idle
@given(data=st.data())
def test_update_law(law, update_backend, data):
    assert_holds(law, update_backend, contextlib.nullcontext, data)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@settings(often_idle, max_examples=max(10, settings.default.max_examples // 4))
@given(data=st.data())
def test_law_holds_when_the_pool_does_all_work(law, backend_names, data):
    if "numba" not in backend_names("update_mask"):
        pytest.skip("the numba backend is not under test")
    assert_holds(law, "numba", pool_for_all_work, data)
