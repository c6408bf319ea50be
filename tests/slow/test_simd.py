"""The vector operations, each by itself, at more and fewer lanes than a register has."""

import numpy as np
import pytest

pytest.importorskip("numba")

from numba import njit

from srigl_core._arrays.dtypes import value_dtype
from srigl_core.backends.numba_cpu import plane_lookup, simd
from srigl_core.backends.numba_cpu.compressed_rows import aligned_empty
from srigl_core.backends.numba_cpu.processor import has_byte_lookup
from srigl_core.backends.numba_cpu.simd import store
from srigl_core.backends.numba_cpu.value_types import as_bits
from srigl_core.backends.numba_cpu.vector_tuples import (
    UNIT,
    accumulate,
    load_each,
    multiply,
    store_each,
    zeros_each,
)


@pytest.fixture(autouse=True)
def _numba_is_under_test(backend_names):
    if "numba" not in backend_names("condensed_matmul"):
        pytest.skip("the numba backend is not under test")


def numbers(size, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).integers(-50, 50, size).astype(dtype)


U = np.uint64
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])
widths = pytest.mark.parametrize("lanes", [4, 8, 16, 64])


@both
@widths
def test_load_and_store_move_as_many_numbers_as_there_are_lanes(dtype, lanes):
    @njit
    def move(source, target):
        simd.store(target, U(2), simd.load(source, U(3), lanes))

    source, target = numbers(80, dtype), np.full(80, 7, dtype)
    move(source, target)
    np.testing.assert_array_equal(target[2 : 2 + lanes], source[3 : 3 + lanes])
    assert (target[:2] == 7).all()
    assert (target[2 + lanes :] == 7).all()


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_loads_of_16_bit_numbers_are_exact(kind):
    @njit
    def convert(source, target):
        for at in range(U(0), U(source.size), U(16)):
            simd.store(target, at, simd.load(source, at, 16))

    every = np.arange(1 << 16, dtype=np.uint16).view(value_dtype(kind))
    target = np.empty(every.size, np.float32)
    convert(as_bits(every), target)
    expected = every.astype(np.float32)
    is_number = ~np.isnan(expected)
    np.testing.assert_array_equal(
        target[is_number].view(np.uint32), expected[is_number].view(np.uint32)
    )
    assert np.isnan(target[~is_number]).all()


@both
@widths
def test_arithmetic_is_lane_by_lane(dtype, lanes):
    @njit
    def compute(a, b, out):
        x, y = simd.load(a, U(0), lanes), simd.load(b, U(0), lanes)
        simd.store(out, U(0), simd.add(simd.fma(x, y, x), simd.splat(b[1], lanes)))

    a, b, out = numbers(64, dtype), numbers(64, dtype, seed=1), np.empty(64, dtype)
    compute(a, b, out)
    np.testing.assert_array_equal(out[:lanes], (a * b + a + b[1])[:lanes])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_quad_has_the_first_number_lowest(dtype):
    @njit
    def quad(source):
        return simd.load_quad(source, U(1))

    source = np.array([9, 1, 2, 3, np.iinfo(dtype).max], dtype)
    bits = 8 * source.itemsize
    assert quad(source) == sum(int(source[1 + i]) << (bits * i) for i in range(4))


@both
@pytest.mark.parametrize("index_dtype", [np.uint16, np.uint32])
@widths
def test_gather_takes_the_indexed_numbers(dtype, index_dtype, lanes):
    @njit
    def take(source, indices, out):
        simd.store(out, U(0), simd.gather(source, indices, U(3), lanes))

    source, out = numbers(65536, dtype), np.empty(64, dtype)
    indices = np.random.default_rng(2).integers(0, 65536, 70).astype(index_dtype)
    indices[3] = 65535  # as a signed number it would be negative
    take(source, indices, out)
    np.testing.assert_array_equal(out[:lanes], source[indices[3 : 3 + lanes]])


@both
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("last", [0, 2, 15])
def test_transpose_turns_rows_into_columns_and_repeats_the_last_row(dtype, lanes, last):
    @njit
    def turn(source, target, last):
        simd.transpose(source, (U(1), U(20), U(last)), target, U(2), U(18), lanes)

    source, target = numbers(1 + 20 * 16, dtype), np.zeros(2 + 18 * 16, dtype)
    turn(source, target, last)
    rows = np.minimum(np.arange(lanes), last)
    square = source[1:].reshape(16, 20)[rows, :lanes]
    np.testing.assert_array_equal(target[2:].reshape(16, 18)[:lanes, :lanes], square.T)
    assert (target[2:].reshape(16, 18)[:lanes, lanes:] == 0).all()


neurons = pytest.mark.parametrize("count", [1, 2, 4, 8])


def step_of(dtype, lanes, count):
    """Return a tile, and the values and rows of the tile of one step."""
    rng = np.random.default_rng(lanes * count)
    n = max(4, count)
    tile = aligned_empty(20 * lanes, dtype)
    tile[:] = rng.integers(-50, 50, 20 * lanes)
    return tile, rng.integers(-50, 50, 3 + n).astype(dtype), rng.integers(0, 20, 3 + n)


@both
@neurons
@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_a_step_adds_each_connection_to_the_sum_of_its_neuron(dtype, lanes, count):
    @njit
    def step(values, offsets, tile, rows, sums):
        totals = load_each(sums, U(lanes), rows, U(1), count, lanes)
        totals = accumulate(totals, values, offsets, U(3), tile)
        store_each(sums, U(0), rows, U(1), totals)
        store_each(sums, U(0), rows, U(0), zeros_each(sums, 1, lanes))

    tile, values, chosen = step_of(dtype, lanes, count)
    offsets = (chosen * lanes * tile.itemsize // UNIT).astype(np.uint16)
    rows = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(count)])
    sums = numbers((count + 2) * lanes, dtype)
    expected = sums.reshape(-1, lanes).copy()
    expected[rows[1:]] = expected[rows[1:] + 1]
    for e in range(max(4, count)):
        row = tile.reshape(-1, lanes)[chosen[3 + e]]
        expected[rows[1 + e % count]] += values[3 + e] * row
    expected[0] = 0
    step(values, offsets, tile, rows.astype(np.uint16), sums)
    np.testing.assert_array_equal(sums.reshape(-1, lanes), expected)


@both
@neurons
@pytest.mark.parametrize(("lanes", "part"), [(8, 4), (8, 8), (16, 16), (32, 4), (32, 16)])
def test_a_step_of_the_gradient_sums_each_connection_over_the_lanes(dtype, lanes, part, count):
    @njit
    def step(factors, rows, offsets, tile, out):
        own = load_each(factors, U(0), rows, U(0), count, lanes)
        store(out, U(1), multiply(own, offsets, U(3), tile, U(lanes), part))

    tile, _, chosen = step_of(dtype, lanes, count)
    chosen = np.maximum(chosen, 1)
    offsets = ((chosen - 1) * lanes * tile.itemsize // UNIT).astype(np.uint16)
    factors = numbers(count * lanes, dtype)
    rows = np.random.default_rng(0).permutation(count)
    out = np.full(12, 7, dtype)
    step(factors, rows.astype(np.uint16), offsets, tile, out)
    n = max(4, count)
    expected = [
        factors.reshape(-1, lanes)[rows[e % count]] @ tile.reshape(-1, lanes)[chosen[3 + e]]
        for e in range(n)
    ]
    np.testing.assert_array_equal(out[1 : 1 + n], expected)
    assert (out[:1] == 7).all()
    assert (out[1 + n :] == 7).all()


def test_flat_sees_the_same_memory_whatever_the_axes():
    @njit
    def flatten(array):
        return simd.flat(array)

    array = numbers(24).reshape(4, 6)
    seen = flatten(array)
    assert np.shares_memory(seen, array)
    np.testing.assert_array_equal(seen, array.ravel())
    array.flags.writeable = False
    np.testing.assert_array_equal(flatten(array), array.ravel())


needs_byte_lookup = pytest.mark.skipif(
    not has_byte_lookup(), reason="this processor, or NUMBA_CPU_NAME, lacks AVX-512 VBMI"
)


@needs_byte_lookup
def test_a_lookup_takes_from_both_blocks_and_padding_is_zero_whatever_they_hold():
    @njit
    def look_up(x, indices, out):
        low = plane_lookup.split(simd.load(x, U(0), 64))
        high = plane_lookup.split(simd.load(x, U(64), 64))
        simd.store(out, U(0), plane_lookup.look_up(low, simd.load(indices, U(0), 16), high))

    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << 32, 128, np.uint32)  # NaN, infinity and subnormal numbers too
    bits[:4] = 0x7FC00001, 0xFF800000, 1, 0x80000000
    chosen = rng.permutation(128)[:64]
    expected = bits[chosen]
    for lanes in (range(0, 64, 3), range(0), range(64)):
        octets, out = np.empty(64, np.uint8), np.empty(64, np.float32)
        chosen[lanes], expected[lanes] = 0x80 | chosen[lanes], 0
        octets[plane_lookup.place_of_lane()] = chosen
        look_up(bits.view(np.float32), octets.view(np.int32), out)
        np.testing.assert_array_equal(out.view(np.uint32), expected)


@needs_byte_lookup
def test_planes_hold_one_byte_of_each_number():
    @njit
    def split(x, planes):
        simd.store(planes, U(0), plane_lookup.split(simd.load(x, U(0), 64)))

    octets = np.random.default_rng(0).integers(0, 256, (64, 4), np.uint8)
    planes = np.empty(64, np.int32)
    split(octets.view(np.float32).ravel(), planes)
    np.testing.assert_array_equal(planes.view(np.uint8).reshape(4, 64), octets.T)


@needs_byte_lookup
def test_pairs_of_bfloat16_become_the_low_ones_and_then_the_high_ones():
    @njit
    def widen(pairs, out):
        simd.store(out, U(0), plane_lookup.widen_pairs(simd.load(pairs, U(0), 32)))

    halves = np.random.default_rng(0).integers(0, 1 << 16, 64, np.uint16)
    out = np.empty(64, np.float32)
    widen(halves.view(np.int32), out)
    expected = halves.reshape(2, 16, 2).swapaxes(1, 2).ravel().astype(np.uint32) << 16
    np.testing.assert_array_equal(out.view(np.uint32), expected)
