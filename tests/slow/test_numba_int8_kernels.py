"""The CPU kernels of quantised weights one by one: every family, and each of its tails."""

import numpy as np
import pytest

pytest.importorskip("numba")

from numba import njit

from srigl_core import CondensedWeight, chain
from srigl_core.backends.numba_cpu import (
    plane_lookup,
    plane_schedule,
    quantized_matmul,
    simd,
    threads,
)
from srigl_core.backends.numba_cpu.processor import has_byte_products
from srigl_core.testing.bounds import first_violation
from srigl_core.testing.int8_oracle import exact_int8_product
from srigl_core.testing.oracles import expected_product

needs_byte_products = pytest.mark.skipif(
    not has_byte_products(), reason="this processor, or NUMBA_CPU_NAME, lacks AVX-512 VBMI or VNNI"
)
F32 = np.dtype(np.float32)
CANARY = 77
MARGIN = 16
SHAPES = [
    (n_in, n_active, fan_in or n_in)
    for n_in in (1, 63, 64, 65, 129)
    for n_active in (1, 15, 16, 17, 33)
    for fan_in in (1, 4, 5, None)
    if (fan_in or n_in) <= n_in
] + [(300, 40, 60), (4097, 20, 1100), (65_536, 17, 40), (70_000, 33, 90)]
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17)


@pytest.fixture(autouse=True)
def _numba_is_under_test(backend_names):
    if "numba" not in backend_names("quantized_matmul"):
        pytest.skip("the numba backend is not under test")


def surrounded(array, by):
    """Return a copy of `array` in memory that holds `by` before and behind it."""
    memory = np.full(array.size + 2 * MARGIN, by, array.dtype)
    inner = memory[MARGIN:-MARGIN].reshape(array.shape)
    inner[...] = array
    return inner


def product_of(prepared, x, bias, *, n_columns, compact=False, n_threads=1):
    """Return the product, all arrays surrounded."""
    out = surrounded(np.full((len(x), n_columns), np.nan, F32), CANARY)
    prepared.matmul(
        surrounded(x, np.nan),
        surrounded(bias, np.nan),
        activation="none",
        compact=compact,
        out=out,
        threads=n_threads,
    )
    assert (out.base[:MARGIN] == CANARY).all()
    assert (out.base[-MARGIN:] == CANARY).all()
    return out


def drawn(number):
    """Return a quantised weight of one of the shapes, inputs and a bias."""
    rng = np.random.default_rng(number)
    n_in, n_active, fan_in = SHAPES[number]
    n_out = n_active + int(rng.choice([0, 5]))
    weight = CondensedWeight.random((n_out, n_in), fan_in=fan_in, n_active=n_active, rng=rng)
    x = rng.standard_normal((BATCHES[number % len(BATCHES)], n_in)).astype(F32)
    return weight.quantize(), x, rng.standard_normal(n_out).astype(F32)


@pytest.mark.parametrize(
    "kernel", ["Int8Product", pytest.param("Int8Lookup", marks=needs_byte_products)]
)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_int8_products_have_the_defined_bits_whatever_the_shape(kernel, n_threads, monkeypatch):
    monkeypatch.setattr(threads, "SMALLEST_PARALLEL_WORK", 0)
    for number in range(len(SHAPES)):
        weight, x, bias = drawn(number)
        x[number % len(x), -1] = (np.nan, np.inf, 3, 0)[number % 4]
        expected = exact_int8_product(weight, x, bias)
        prepared = getattr(quantized_matmul, kernel)(weight)
        for compact, columns in ((False, slice(None)), (True, weight.active)):
            wanted = expected[:, columns]
            got = product_of(
                prepared,
                x,
                bias,
                n_columns=wanted.shape[1],
                compact=compact,
                n_threads=n_threads,
            )
            np.testing.assert_array_equal(got, wanted)
            is_number = ~np.isnan(wanted)
            np.testing.assert_array_equal(np.signbit(got[is_number]), np.signbit(wanted[is_number]))


def test_weight_only_products_are_within_the_bound_whatever_the_shape():
    for number in range(len(SHAPES)):
        weight, x, bias = drawn(number)
        prepared = quantized_matmul.WeightOnlyProduct(weight)
        got = product_of(prepared, x, bias, n_columns=bias.size)
        assert first_violation(got, expected_product(weight, x, bias, "none")) is None


@needs_byte_products
@pytest.mark.parametrize("fresh", [1, 2])
def test_a_group_that_finds_no_memory_left_writes_to_none(fresh, monkeypatch):
    """The first group has 80 blocks. With two in a step it takes the 40 steps that there are."""
    kept = []

    def guarded(*sizes):
        arrays = allocate(*sizes)
        walls = [np.full(array.size + MARGIN, CANARY, array.dtype) for array in arrays]
        kept.extend((wall, array.size) for wall, array in zip(walls, arrays, strict=True))
        return tuple(wall[:-MARGIN] for wall in walls)

    allocate = plane_schedule._arrays
    monkeypatch.setattr(plane_schedule, "_arrays", guarded)
    columns = np.arange(80).reshape(16, 5) * 64
    indices = np.concatenate([columns, columns])
    positions, _, blocks, ends = plane_schedule.scheduled(indices, 5120, np.arange(64), 4, fresh)
    assert len(kept) > 6  # more memory was needed than the first and the last time
    assert all((wall[size:] == CANARY).all() for wall, size in kept)
    assert np.sort(positions[positions >= 0]).tolist() == list(range(indices.size))
    assert blocks.size == fresh * ends[-1] + 2 * (2 - fresh)


@needs_byte_products
def test_byte_products_look_up_in_both_blocks_and_wrap_around():
    @njit
    def step(totals, low, indices, high, weights):
        U = np.uint64
        rows = simd.load(low, U(0), 32), simd.load(high, U(0), 32)
        chosen, factors = simd.load(indices, U(0), 16), simd.load(weights, U(0), 16)
        sums = simd.load(totals, U(0), 32)
        sums = plane_lookup.add_products(sums, rows[0], chosen, rows[1], factors)
        simd.store(totals, U(0), sums)

    rng = np.random.default_rng(0)
    octets = rng.integers(0, 256, (2, 2, 64), np.uint8)  # block, batch row
    octets[0, 0, :4] = 255
    weights = rng.integers(-127, 128, 64).astype(np.int8)
    weights[:4] = 127
    chosen = rng.permutation(128)[:64].astype(np.uint8)
    chosen[:4] = range(4)
    before = rng.integers(-(2**31), 2**31, (2, 16))
    before[0, 0] = 2**31 - 1
    expected = before.copy()
    for row in range(2):
        found = np.concatenate([octets[0, row], octets[1, row]]).astype(np.int64)[chosen]
        expected[row] += (found * weights).reshape(16, 4).sum(axis=1)
    totals = before.astype(np.int32).ravel()
    step(totals, *(part.view(np.int32).ravel() for part in (octets[0], chosen, octets[1], weights)))
    np.testing.assert_array_equal(totals.reshape(2, 16), expected.astype(np.int32))


@pytest.mark.parametrize("inputs", ["float", pytest.param("int8", marks=needs_byte_products)])
def test_quantised_layers_are_in_the_native_call_of_a_chain(inputs):
    weights = [CondensedWeight.random((20, 20), fan_in=5, rng=n).quantize() for n in range(3)]
    whole = chain([(weight, None, "relu", inputs) for weight in weights], backend="numba")
    assert whole.describe()["calls"] == "one for all layers"
