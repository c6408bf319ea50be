"""Hypothesis profiles, the backends under test, and the golden data."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# Three, so that the pool's ranges are uneven, also on two cores; read when numba is imported.
os.environ.setdefault("NUMBA_NUM_THREADS", "3")

import pytest
from hypothesis import settings

from srigl_core import list_backends
from srigl_core.testing import released_updates as released

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=800, deadline=None, derandomize=True)

pytest.register_assert_rewrite("array_library_tests")

DATA = Path(__file__).parent / "data"

# A test that takes one of these arguments runs once for each backend that offers the operations.
BACKEND_ARGUMENTS = {
    "matmul_backend": ("condensed_matmul",),
    "backward_backend": ("condensed_matmul_backward",),
    "product_backend": ("condensed_matmul", "condensed_matmul_backward"),
    "update_backend": ("update_mask",),
    "condensed_update_backend": ("update_condensed",),
    "quantized_backend": ("quantized_matmul",),
    "chain_backend": ("chain",),
}


@pytest.fixture(autouse=True)
def gradients_as_usual():
    """A benchmark switches PyTorch's gradients off, for its process: the next test wants them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)


def pytest_configure(config):
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("dev")
    available = {status.name: status.reason for status in list_backends() if status.available}
    reasons = {status.name: status.reason for status in list_backends()}
    for name in _requested_backends():
        if name not in available:
            raise pytest.UsageError(
                f"SRIGL_TEST_BACKENDS asks for backend {name!r}, which cannot run here: "
                f"{reasons.get(name, 'nothing of that name is registered')}"
            )


def pytest_generate_tests(metafunc):
    for argument, operations in BACKEND_ARGUMENTS.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, _backends_offering(*operations))


def _requested_backends():
    """Names in SRIGL_TEST_BACKENDS, a comma-separated list; none means all that can run."""
    return [name.strip() for name in os.environ.get("SRIGL_TEST_BACKENDS", "").split(",") if name]


def _backends_offering(*operations):
    requested = _requested_backends()
    return [
        status.name
        for status in list_backends()
        if status.available
        and status.capabilities.operations.issuperset(operations)
        and (not requested or status.name in requested)
    ]


@pytest.fixture(scope="session")
def backend_names():
    """Return a function: names of the backends under test that offer the operations."""
    return _backends_offering


@pytest.fixture(scope="session")
def released_updates():
    """The 80 updates of the released code."""
    return [
        SimpleNamespace(
            **update.recorded,
            weight=update.weight,
            grad=update.grad,
            mask=update.mask,
            new_mask=update.new_mask,
            new_weight=update.new_weight,
            settings={
                "nnz_budget": update.settings.nnz_budget,
                "drop_fraction": update.settings.drop_fraction,
                "gamma_sal": update.settings.gamma_sal,
                "saliency_scope": "all",
            },
        )
        for update in released.released_updates()
    ]


@pytest.fixture(scope="session")
def released_distributions():
    """The 64 sparsity distributions of the released code."""
    return json.loads((DATA / "srigl_released_distributions.json").read_text())
