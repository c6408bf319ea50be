"""The activations' formulas against the scalar functions of Python's math module."""

import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest

from srigl_core import CondensedWeight, condensed_matmul
from srigl_core.contract import ACTIVATIONS
from srigl_core.reference.activations import activate

NUMBERS = [0.0, 1e-300, -1e-9, 0.1, -0.5, 1.0, -1.0, 2.5, -3.75, 6.0, -8.0, 30.0, -40.0]

FORMULAS = {
    "none": lambda z: z,
    "relu": lambda z: max(z, 0.0),
    "gelu": lambda z: z / 2 * math.erfc(-z / math.sqrt(2)),
    "gelu_tanh": lambda z: (
        z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)))
    ),
    "silu": lambda z: z / (1 + math.exp(-z)),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_activation_is_its_formula(activation):
    expected = np.array([FORMULAS[activation](z) for z in NUMBERS])
    found = activate(np.array(NUMBERS), activation)
    # Cancellation in 1 + erf(z) costs a few units of roundoff of z itself.
    assert (np.abs(found - expected) <= 8 * 2.0**-53 * (np.abs(NUMBERS) + np.abs(expected))).all()


@pytest.mark.parametrize(
    ("activation", "minus_infinity"),
    [("none", -np.inf), ("relu", 0.0), ("gelu", np.nan), ("gelu_tanh", np.nan), ("silu", np.nan)],
)
def test_activation_of_what_is_not_finite_follows_the_formula(
    matmul_backend, activation, minus_infinity
):
    weight = CondensedWeight(np.ones((1, 1)), [[0]], [0], (1, 1))
    x = np.array([[-np.inf], [np.inf], [np.nan]])
    y = condensed_matmul(x, weight, activation=activation, backend=matmul_backend)
    np.testing.assert_array_equal(y.ravel(), [minus_infinity, np.inf, np.nan])


def test_every_kernel_knows_every_activation_by_its_code():
    """Numba's and the frameworks' are compared with the formulas elsewhere, over the table."""
    codes = [activation.code for activation in ACTIVATIONS.values()]
    assert len(set(codes)) == len(codes)
    folder = importlib.util.find_spec("srigl_core.backends.cupy_gpu").submodule_search_locations[0]
    source = (Path(folder) / "numbers.cuh").read_text()
    (enum,) = re.findall(r"enum Activation \{([^}]*)\}", source)
    (switch,) = re.findall(r"switch \(activation\) \{(.*?)\n  \}", source, re.DOTALL)
    names = dict(re.findall(r"k(\w+) = (\d+)", enum))
    table = {name.title().replace("_", ""): str(row.code) for name, row in ACTIVATIONS.items()}
    assert names == table
    cases = len(re.findall(r"case k\w+:", switch)) + switch.count("default:")
    assert cases == len(table)
