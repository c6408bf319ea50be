"""The activations inside the Numba kernels, within their share of the error bound (SPEC 2)."""

from decimal import Decimal, localcontext
from itertools import product

import numpy as np
import pytest

from srigl_core.contract import ACTIVATIONS
from srigl_core.reference.activations import activate

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
SPECIALS = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]


@pytest.fixture(scope="module")
def activate_row(backend_names):
    """Return a function that activates an array, one-dimensional, in place."""
    if "numba" not in backend_names("condensed_matmul"):
        pytest.skip("the numba backend is not under test")
    from srigl_core.backends.numba_cpu import epilogue

    return lambda row, name: epilogue.activate_row(row, ACTIVATIONS[name].code)


def assert_within_budget(found, z, activation):
    """Compare what a float32 kernel made of `z` with the reference, which computes in float64."""
    assert found.dtype == z.dtype == np.float32
    z = z.astype(np.float64)
    with np.errstate(all="ignore"):
        y = activate(z, activation)
        budget = 8 * 2.0**-24 * (np.abs(z) + np.abs(y)) + 2.0**-149
        exact = activation in ("none", "relu")
        within = (found == y) if exact else np.abs(found - y) <= budget
    same_class = (found == y) | (np.isnan(found) & np.isnan(y))
    same_sign = (z != 0) | (np.signbit(found) == np.signbit(y))
    allowed = np.where(np.isfinite(z), within, same_class) & same_sign
    assert allowed.all(), [(z[i], y[i], found[i]) for i in np.flatnonzero(~allowed)[:5]]


def all_magnitudes():
    """Return finite float32 of each exponent and sign, subnormals included."""
    rng = np.random.default_rng(0)
    mantissas = np.concatenate([[0, 1, 2**23 - 1], rng.integers(2**23, size=253)])
    bits = np.arange(512)[:, None] << 23 | mantissas
    numbers = bits.astype(np.uint32).view(np.float32)
    return numbers[np.isfinite(numbers)]


def test_float32_activations_keep_to_their_budget_at_all_magnitudes(activate_row):
    moderate = np.linspace(-24, 24, 200_001, dtype=np.float32)
    z = np.concatenate([all_magnitudes(), moderate, np.float32(SPECIALS)])
    for activation in ACTIVATIONS:
        row = z.copy()
        activate_row(row, activation)
        assert_within_budget(row, z, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_row_of_any_length_is_activated_and_nothing_beside_it(activate_row, kind, activation):
    numbers = np.random.default_rng(1).normal(scale=3, size=72).astype(np.float32)
    for n in range(71):
        memory = numbers.astype(kind)
        activate_row(memory[1 : n + 1], activation)
        assert_within_budget(memory[1 : n + 1].astype(np.float32), numbers[1 : n + 1], activation)
        memory[1 : n + 1] = numbers[1 : n + 1]
        np.testing.assert_array_equal(memory, numbers)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_special_number_has_its_own_result_and_leaves_its_neighbours(
    activate_row, kind, activation
):
    for special, place in product(SPECIALS, range(16)):
        z = np.linspace(-4, 4, 70, dtype=np.float32)
        z[place::16] = special
        row = z.astype(kind)
        activate_row(row, activation)
        assert_within_budget(row.astype(np.float32), z, activation)


def test_rows_with_gaps_are_activated(activate_row):
    z = np.random.default_rng(2).normal(scale=3, size=(70, 3)).astype(np.float32)
    for activation in ACTIVATIONS:
        rows = z.copy()
        activate_row(rows[:, 1], activation)
        assert_within_budget(rows[:, 1], z[:, 1], activation)
        np.testing.assert_array_equal(rows[:, ::2], z[:, ::2])


def test_float64_activations_keep_to_their_budget_at_all_magnitudes(activate_row):
    rng = np.random.default_rng(3)
    magnitudes = np.ldexp(rng.uniform(1, 2, size=300), rng.integers(-1074, 5, size=300))
    z = np.concatenate(
        [
            np.linspace(-12, 12, 401),
            magnitudes * rng.choice([-1, 1], size=300),
            [s * 2.0**e for e in (-1074, -1073, -1022, -537, 10, 340, 512, 1023) for s in (1, -1)],
            [np.finfo(np.float64).max, -np.finfo(np.float64).max, 0.0, -0.0],
        ]
    )
    for activation in ACTIVATIONS:
        row = z.copy()
        activate_row(row, activation)
        with localcontext(prec=60):
            for number, found in zip(z, row, strict=True):
                exact = EXACT[activation](Decimal(float(number)))
                budget = 8 * Decimal(2) ** -53 * (abs(Decimal(float(number))) + abs(exact))
                error = abs(Decimal(float(found)) - exact)
                assert error <= budget + Decimal(2) ** -1074, (activation, number, found, exact)


def exact_gelu(z):
    x = min(max(z, Decimal(-12)), Decimal(12)) / Decimal(2).sqrt()
    term, total, n = x, Decimal(0), 0
    while abs(term) > Decimal("1e-60"):
        total += term
        n += 1
        term *= 2 * x * x / (2 * n + 1)
    erf = 2 / PI.sqrt() * (-x * x).exp() * total
    return z / 2 * (1 + erf)


def exact_gelu_tanh(z):
    return exact_silu(z, 2 * (2 / PI).sqrt() * (z + Decimal("0.044715") * z**3))


def exact_silu(z, exponent=None):
    exponent = z if exponent is None else exponent
    return z / (1 + (-min(max(exponent, Decimal(-2000)), Decimal(2000))).exp())


EXACT = {
    "none": lambda z: z,
    "relu": lambda z: max(z, Decimal(0)),
    "gelu": exact_gelu,
    "gelu_tanh": exact_gelu_tanh,
    "silu": exact_silu,
}
