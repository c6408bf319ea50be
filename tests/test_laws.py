"""Every law on every backend."""

import pytest
from hypothesis import settings

from srigl_core import get_backend
from srigl_core.testing.kernel_capabilities import capabilities_of
from srigl_core.testing.laws import LAWS
from srigl_core.testing.verification import try_law


def assert_holds(law, backend, max_examples):
    result = try_law(get_backend(backend, operation=law.operation), law, max_examples=max_examples)
    assert result.status == "passed", str(result)


def laws_of(operation):
    return pytest.mark.parametrize(
        "law", [law for law in LAWS if law.operation == operation], ids=lambda law: law.name
    )


@laws_of("condensed_matmul")
def test_product_law(law, matmul_backend):
    assert_holds(law, matmul_backend, settings().max_examples)


@laws_of("condensed_matmul_backward")
def test_gradient_law(law, backward_backend):
    assert_holds(law, backward_backend, settings().max_examples)


@laws_of("quantized_matmul")
def test_quantized_law(law, quantized_backend):
    if missing := law.not_offered(capabilities_of(get_backend(quantized_backend))):
        pytest.skip(missing)
    assert_holds(law, quantized_backend, settings().max_examples)


@laws_of("chain")
def test_chain_law(law, chain_backend):
    assert_holds(law, chain_backend, settings().max_examples)


@laws_of("update_mask")
def test_update_law(law, update_backend):
    assert_holds(law, update_backend, settings().max_examples)


@laws_of("update_condensed")
def test_condensed_update_law(law, condensed_update_backend):
    assert_holds(law, condensed_update_backend, settings().max_examples)
