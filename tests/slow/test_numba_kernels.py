"""The CPU kernels of products and gradients one by one: every family, and each of its tails.

The laws reach them through the public door, and which one a problem meets is left to chance there.
"""

import os
import platform
import subprocess
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

import srigl_core
from srigl_core import CondensedWeight
from srigl_core._arrays.dtypes import value_dtype
from srigl_core.backends.numba_cpu import condensed_matmul, lockstep, processor, threads
from srigl_core.backends.numba_cpu.batch_tiles import tile_parts, widest_lanes
from srigl_core.backends.numba_cpu.byte_planes import BytePlanes
from srigl_core.backends.numba_cpu.compressed_rows import CompressedRows
from srigl_core.backends.numba_cpu.lockstep import Lockstep
from srigl_core.backends.numba_cpu.neuron_lanes import NeuronLanes
from srigl_core.backends.numba_cpu.processor import has_avx512, has_byte_lookup, vector_bytes
from srigl_core.backends.numba_cpu.value_gradient import (
    MOST_TILES,
    gathered_gradient,
    value_gradient,
)
from srigl_core.backends.numba_cpu.value_types import as_bits
from srigl_core.contract import ACTIVATIONS
from srigl_core.testing.bounds import first_violation
from srigl_core.testing.oracles import expected_gradients, expected_product

needs_byte_lookup = pytest.mark.skipif(
    not has_byte_lookup(), reason="this processor, or NUMBA_CPU_NAME, lacks AVX-512 VBMI"
)
ROW_LAYOUTS = {
    "neuron lanes": lambda indices, n_in: NeuronLanes(indices, most_rows=4),
    "byte planes": BytePlanes,
}
ROW_KERNELS = ["neuron lanes", pytest.param("byte planes", marks=needs_byte_lookup)]
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
CANARY = 77
MARGIN = 16


@pytest.fixture(autouse=True)
def _numba_is_under_test(backend_names):
    if "numba" not in backend_names("condensed_matmul", "condensed_matmul_backward"):
        pytest.skip("the numba backend is not under test")


def surrounded(array, by):
    """Return a copy of `array` in memory that holds `by` before and behind it."""
    memory = np.full(array.size + 2 * MARGIN, by, array.dtype)
    inner = memory[MARGIN:-MARGIN].reshape(array.shape)
    inner[...] = array
    return inner


def assert_surroundings_are_left(inner):
    outside = np.concatenate([inner.base[:MARGIN], inner.base[-MARGIN:]])
    assert (outside == CANARY).all()


def assert_within(got, outcome, columns=None):
    if columns is not None:
        outcome = replace(
            outcome,
            z=outcome.z[..., columns],
            scale=outcome.scale[..., columns],
            terms=outcome.terms[columns],
        )
    assert got.shape == outcome.z.shape
    violation = first_violation(got, outcome)
    assert violation is None, violation[1]


def with_integers(weight, rng):
    """Return the weight with small integers for values, of which some are 0."""
    values = rng.integers(-8, 9, weight.values.shape)
    return weight.with_values(values.astype(weight.dtype))


def exact_product(weight, x):
    """Return the product of small integers, in which nothing is rounded."""
    return x.astype(np.float64) @ weight.to_dense().astype(np.float64).T


# Layouts that take the rows of a batch one by one


def row_product(layout, weight, x, bias, *, compact=False, activation="none", n_threads=1):
    """Return the product by a layout's kernel, all arrays surrounded."""
    n_columns = weight.n_active if compact else weight.shape[0]
    columns = np.arange(weight.n_active) if compact else weight.active
    out = surrounded(np.full((*x.shape[:-1], n_columns), np.nan, x.dtype), CANARY)
    with threads.pool(n_threads, np.inf) as n:
        layout.multiply(
            layout.arrange(as_bits(weight.values), x.dtype),
            surrounded(x, np.nan),
            surrounded(bias[weight.active] if compact else bias, np.nan),
            columns,
            out,
            ACTIVATIONS[activation].code,
            n,
        )
    assert_surroundings_are_left(out)
    return out


ROW_TYPES = [  # of the values, the sums and the indices; more threads cost a compilation
    ("float32", F32, np.uint16, (1, 3)),
    ("float16", F32, np.uint32, (1,)),
    ("bfloat16", F32, np.uint16, (1,)),
    ("float64", F64, np.uint32, (1,)),
    ("bfloat16", F64, np.uint16, (1,)),
]
ROW_CASES = [
    pytest.param(name, *types, marks=needs_byte_lookup if name == "byte planes" else ())
    for name, types in product(ROW_LAYOUTS, ROW_TYPES)
    if name != "byte planes" or types[1] == F32
]
ROW_SHAPES = [
    (n_in, n_active, fan_in or n_in)
    for n_in in (1, 16, 63, 64, 65, 128, 129, 257)
    for n_active in (1, 4, 5, 8, 9, 16, 17, 63, 64, 65, 129)
    for fan_in in (1, 2, 5, None)
    if (fan_in or n_in) <= n_in
] + [(33, 100, 3), (48, 150, 7), (16_385, 70, 90), (65_535, 17, 40), (65_536, 33, 60)]
ROW_SHAPES += [(65_536, 1, 3000), (70_000, 65, 200)]


@pytest.mark.parametrize(("name", "values_type", "kind", "index_type", "thread_counts"), ROW_CASES)
def test_a_row_layout_sums_each_connection_once_whatever_the_shape(
    name, values_type, kind, index_type, thread_counts
):
    for number, (n_in, n_active, fan_in) in enumerate(ROW_SHAPES):
        rng = np.random.default_rng(number)
        n_ablated, compact = ((0, False), (5, False), (5, True))[rng.integers(3)]
        n_out, batch = n_active + n_ablated, int(rng.choice([1, 2, 3, 4, 5, 7]))
        weight = CondensedWeight.random(
            (n_out, n_in), fan_in=fan_in, n_active=n_active, dtype=value_dtype(values_type), rng=rng
        )
        index_type = np.uint32 if n_in > 65_536 else index_type
        layout = ROW_LAYOUTS[name](weight.indices.astype(index_type), n_in)
        columns = weight.active if compact else np.arange(n_out)

        x, bias = (rng.standard_normal(size).astype(kind) for size in ((batch, n_in), n_out))
        activation = str(rng.choice(list(ACTIVATIONS)))
        expected = expected_product(weight, x, bias, activation)
        for n_threads in thread_counts:
            got = row_product(
                layout, weight, x, bias, compact=compact, activation=activation, n_threads=n_threads
            )
            assert_within(got, expected, columns)

        weight = with_integers(weight, rng)
        x, bias = (rng.integers(-8, 9, size).astype(kind) for size in ((batch, n_in), n_out))
        expected = (exact_product(weight, x) + bias)[:, columns]
        for n_threads in thread_counts:
            got = row_product(layout, weight, x, bias, compact=compact, n_threads=n_threads)
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_a_row_layout_takes_one_vector_as_a_batch_of_one(name):
    rng = np.random.default_rng(0)
    weight = with_integers(CondensedWeight.random((37, 41), fan_in=9, n_active=33, rng=rng), rng)
    layout = ROW_LAYOUTS[name](weight.indices, 41)
    x, bias = rng.integers(-8, 9, 41).astype(F32), rng.integers(-8, 9, 37).astype(F32)
    got = row_product(layout, weight, x, bias)
    np.testing.assert_array_equal(got, exact_product(weight, x) + bias)


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_batch_rows_beyond_the_first_item_are_summed_too_whatever_the_threads(name):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((150, 130), fan_in=9, n_active=140, rng=rng)
    weight = with_integers(weight, rng)
    layout = ROW_LAYOUTS[name](weight.indices, 130)
    for batch, n_threads in product((63, 64, 65, 131), (1, 3)):
        x, bias = rng.integers(-8, 9, (batch, 130)).astype(F32), rng.integers(-8, 9, 150)
        got = row_product(layout, weight, x, bias.astype(F32), n_threads=n_threads)
        np.testing.assert_array_equal(got, exact_product(weight, x) + bias)


@needs_byte_lookup
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_padding_is_exact_whatever_the_input_and_wherever_it_is_not_finite(special):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((70, 141), fan_in=3, rng=rng)
    layout = BytePlanes(weight.indices, 141)
    assert layout.padding > 2
    for column in range(141):
        x = rng.standard_normal((2, 141)).astype(F32)
        x[column % 2, column] = special
        expected = expected_product(weight, x, np.zeros(70, F32), "none")
        assert_within(row_product(layout, weight, x, np.zeros(70, F32)), expected)


@needs_byte_lookup
def test_a_schedule_that_outgrows_its_memory_goes_on_in_more():
    """Each neuron of a group has its inputs in blocks of its own, so that a step serves one."""
    indices = np.arange(130)[:, None] % 64 * 192 + np.array([[0, 64, 130]])
    rng = np.random.default_rng(0)
    weight = CondensedWeight(
        rng.integers(1, 9, indices.shape).astype(F32), indices, np.arange(130), (130, 64 * 192)
    )
    layout = BytePlanes(weight.indices, weight.shape[1])
    assert layout.padding > 20
    x = rng.integers(-8, 9, (3, weight.shape[1])).astype(F32)
    got = row_product(layout, weight, x, np.zeros(130, F32))
    np.testing.assert_array_equal(got, exact_product(weight, x))


# Tiles


@pytest.fixture
def layout_of(monkeypatch):
    """Return a function that makes a layout with blocks of `block` columns, or a few more."""

    def make(connections, lanes, kind, block):
        size = lanes * kind.itemsize * (block + 1)
        monkeypatch.setattr(lockstep, "cache_bytes", lambda: (2 * size, 2 * size))
        layout = Lockstep(connections, lanes, kind)
        assert layout.block <= max(8, block)
        return layout

    return make


def tile_product(layout, values, x, bias, columns, **options):
    """Return the product by tiles, all arrays surrounded, the sums cut into `runs` parts."""
    first, runs = options.get("first", 0), options.get("runs", 1)
    out = surrounded(np.full((x.shape[0], bias.size), CANARY, x.dtype), CANARY)
    tiles = -(-(x.shape[0] - first) // layout.lanes)
    runs = min(runs, layout.visits.shape[1] - 1)
    arguments = (
        runs,
        first,
        *layout.arrays,
        layout.arrange(as_bits(values), x.dtype),
        surrounded(x, np.nan),
        surrounded(bias, np.nan),
        columns,
        out,
        ACTIVATIONS[options.get("activation", "none")].code,
    )
    with threads.pool(options.get("n_threads", 1), np.inf) as n:
        layout.launch(tiles * runs, n, arguments)
    assert_surroundings_are_left(out)
    assert (out[:first] == CANARY).all()
    return out[first:]


TILES = [  # lanes, type of the sums, columns of a block, of all
    (8, F32, 16, (3, 16, 41)),
    (8, F32, 304, (600, 607)),
    (16, F32, 16, (3, 16, 41)),
    (32, F32, 304, (600, 607)),
    (32, F32, 32, (5, 32, 100)),
    (8, F64, 16, (3, 16, 41)),
    (16, F64, 48, (5, 48, 100)),
    (16, F64, 304, (600, 607)),
]
GROUP_ROWS = lockstep.GROUP_ROWS[0]
TILE_ROWS = (1, 2, 7, 8, 9, GROUP_ROWS - 1, GROUP_ROWS, GROUP_ROWS + 1, 2 * GROUP_ROWS + 16)
each_tile = pytest.mark.parametrize(("lanes", "kind", "block", "widths"), TILES)


@each_tile
def test_tiles_sum_each_connection_once_whatever_the_shape(layout_of, lanes, kind, block, widths):
    rng = np.random.default_rng(lanes)
    batches = [1, lanes - 1, lanes, lanes + 1, 2 * lanes + 5]
    for number, (n_in, n_active) in enumerate(product(widths, TILE_ROWS)):
        n_out, fan_in = n_active + 5 * (number % 2), int(rng.integers(1, min(n_in, 40) + 1))
        first, runs, batch = number % 3 * 7, 1 + number % 4, batches[number % 5]
        size = first + batch
        weight = CondensedWeight.random((n_out, n_in), fan_in=fan_in, n_active=n_active, rng=rng)
        connections = CompressedRows.of_neurons(weight.indices, weight.shape[1])
        layout = layout_of(connections, lanes, kind, block)
        options = {"first": first, "runs": runs}

        activation = list(ACTIVATIONS)[number % 5]
        x, bias = (rng.standard_normal(shape).astype(kind) for shape in ((size, n_in), n_out))
        got = tile_product(
            layout, weight.values, x, bias, weight.active, activation=activation, **options
        )
        assert_within(got, expected_product(weight, x[first:], bias, activation))

        weight = with_integers(weight, rng)
        x, bias = (rng.integers(-8, 9, shape).astype(kind) for shape in ((size, n_in), n_out))
        got = tile_product(layout, weight.values, x, bias, weight.active, **options)
        np.testing.assert_array_equal(got, (exact_product(weight, x) + bias)[first:])


def unevenly_used(n_out, n_in, fan_in, rng):
    """Return a weight: column 0 is everybody's, the last ones nobody's, most of the rest few's."""
    shares = 1 / np.arange(1, n_in + 1.0) ** 2
    shares[n_in - n_in // 4 :] = 0
    shares[0] = 1e9
    shares /= shares.sum()
    indices = [
        np.sort(rng.choice(n_in, fan_in, replace=False, p=shares, shuffle=False))
        for _ in range(n_out)
    ]
    return CondensedWeight(
        rng.standard_normal((n_out, fan_in)), indices, np.arange(n_out), (n_out, n_in)
    )


@each_tile
def test_tiles_along_the_columns_sum_each_connection_once_however_uneven(
    layout_of, lanes, kind, block, widths
):
    rng = np.random.default_rng(lanes)
    for number, (n_out, n_in) in enumerate(product(widths, TILE_ROWS)):
        weight = unevenly_used(n_out, n_in, min(n_in - n_in // 4, 6), rng)
        batch = int(rng.integers(1, 2 * lanes + 6))
        connections = CompressedRows.of_columns(weight.indices, weight.shape[1])
        layout = layout_of(connections, lanes, kind, block)
        options = {"runs": 1 + number % 4}
        nought, columns = np.zeros(n_in, kind), np.arange(n_in)

        grad = rng.standard_normal((batch, n_out)).astype(kind)
        got = tile_product(layout, weight.values, grad, nought, columns, **options)
        expected = expected_gradients(weight, grad, np.zeros((batch, n_in), kind))["x"]
        assert_within(got, replace(expected, accumulator=kind))

        weight = with_integers(weight, rng)
        grad = rng.integers(-8, 9, (batch, n_out)).astype(kind)
        got = tile_product(layout, weight.values, grad, nought, columns, **options)
        np.testing.assert_array_equal(got, grad.astype(np.float64) @ weight.to_dense())


@pytest.mark.parametrize(("lanes", "kind"), [(8, F32), (16, F32), (32, F32), (8, F64), (16, F64)])
def test_tiles_take_blocks_of_as_many_columns_as_their_offsets_can_number(monkeypatch, lanes, kind):
    rng = np.random.default_rng(0)
    units = lanes * kind.itemsize // 8
    n_in = (65_535 // units - 1) // 8 * 8 * 3
    weight = with_integers(CondensedWeight.random((3, n_in), fan_in=500, rng=rng), rng)
    monkeypatch.setattr(lockstep, "cache_bytes", lambda: (1 << 30, 1 << 30))
    layout = Lockstep(CompressedRows.of_neurons(weight.indices, n_in), lanes, kind)
    assert 65_000 < layout.offsets.max() == layout.block * units <= 65_535
    x = rng.integers(-8, 9, (9, n_in)).astype(kind)
    got = tile_product(layout, weight.values, x, np.zeros(3, kind), weight.active)
    np.testing.assert_array_equal(got, exact_product(weight, x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_tiles_widen_values_of_16_bits_exactly(layout_of, lanes, dtype):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random(
        (41, 100), fan_in=13, n_active=37, dtype=value_dtype(dtype), rng=rng
    )
    connections = CompressedRows.of_neurons(weight.indices, 100)
    layout = layout_of(connections, lanes, F32, 32)
    assert layout.arrange(as_bits(weight.values), F32).itemsize == 2
    wide = layout.arrange(as_bits(weight.values), F64)
    used = layout.positions >= 0
    np.testing.assert_array_equal(
        wide[used], weight.values.ravel()[layout.positions[used]].astype(F64)
    )
    assert (wide[~used] == 0).all()
    x, bias = (rng.standard_normal(size).astype(F32) for size in ((9, 100), 41))
    got = tile_product(layout, weight.values, x, bias, weight.active)
    assert_within(got, expected_product(weight, x, bias, "none"))


def gradient_of_values(layout, weight, grad, x, n_threads=1):
    out = surrounded(np.full(weight.values.shape, np.nan, x.dtype), CANARY)
    active = np.ascontiguousarray(grad[:, weight.active])
    arrays = surrounded(active, np.nan), surrounded(x, np.nan), out
    with threads.pool(n_threads, np.inf) as n:
        value_gradient(layout, *arrays, n_threads=n)
    assert_surroundings_are_left(out)
    return out


@each_tile
def test_the_gradient_of_values_sums_each_batch_row_once_whatever_the_shape(
    layout_of, lanes, kind, block, widths
):
    rng = np.random.default_rng(lanes)
    batches = [1, lanes - 1, lanes, lanes + 1, 2 * lanes + 5, MOST_TILES * lanes + 3]
    for number, (n_in, n_active) in enumerate(product(widths, TILE_ROWS)):
        n_out, fan_in = n_active + 5 * (number % 2), min(n_in, 1 + number % 7)
        batch = batches[number % 6]
        weight = CondensedWeight.random((n_out, n_in), fan_in=fan_in, n_active=n_active, rng=rng)
        connections = CompressedRows.of_neurons(weight.indices, weight.shape[1])
        layout = layout_of(connections, lanes, kind, block)

        x, grad = (rng.standard_normal((batch, n)).astype(kind) for n in (n_in, n_out))
        got = gradient_of_values(layout, weight, grad, x)
        assert_within(got, expected_gradients(weight, grad, x)["values"])

        x, grad = (rng.integers(-8, 9, (batch, n)).astype(kind) for n in (n_in, n_out))
        got = gradient_of_values(layout, weight, grad, x)
        dense = grad.astype(np.float64).T @ x
        np.testing.assert_array_equal(got, dense[weight.active[:, None], weight.indices])


@pytest.mark.parametrize("kind", [F32, F64])
@pytest.mark.parametrize("index_type", [np.uint16, np.uint32])
def test_the_gradient_from_gathered_inputs_is_right_whatever_the_shape(kind, index_type):
    rng = np.random.default_rng(0)
    for batch, n_active, fan_in in product((1, 2, 3), (1, 5), (1, 15, 16, 17, 32, 40)):
        weight = CondensedWeight.random((n_active, 50), fan_in=fan_in, rng=rng)
        x, grad = (rng.integers(-8, 9, (batch, n)).astype(kind) for n in (50, n_active))
        out = surrounded(np.full(weight.values.shape, np.nan, kind), CANARY)
        indices = weight.indices.astype(index_type)
        gathered_gradient(
            indices, surrounded(grad, np.nan), surrounded(x, np.nan), out, n_threads=1
        )
        assert_surroundings_are_left(out)
        dense = grad.astype(np.float64).T @ x
        np.testing.assert_array_equal(out, dense[np.arange(n_active)[:, None], weight.indices])


@pytest.mark.parametrize("block", [240, 256, 272])
def test_tiles_take_a_row_that_is_connected_to_every_column_of_a_block(layout_of, block):
    rng = np.random.default_rng(0)
    n_in = 2 * block - 3
    weight = with_integers(CondensedWeight.random((5, n_in), fan_in=n_in, rng=rng), rng)
    layout = layout_of(CompressedRows.of_neurons(weight.indices, n_in), 8, F32, block)
    assert layout.block == block
    x, grad = (rng.integers(-8, 9, (9, n)).astype(F32) for n in (n_in, 5))
    got = tile_product(layout, weight.values, x, np.zeros(5, F32), weight.active)
    np.testing.assert_array_equal(got, exact_product(weight, x))
    got = gradient_of_values(layout, weight, grad, x)
    np.testing.assert_array_equal(got, grad.astype(np.float64).T @ x)


@each_tile
def test_numbers_that_are_not_finite_in_the_last_batch_row_reach_their_gradients_as_they_are(
    layout_of, lanes, kind, block, widths
):
    rng = np.random.default_rng(lanes)
    for batch, fan_in, special in product(
        (1, lanes - 1, lanes, lanes + 1), (1, 2, 3, 5, 7), (np.inf, -np.inf, np.nan)
    ):
        weight = CondensedWeight.random((20, widths[-1]), fan_in=fan_in, rng=rng)
        connections = CompressedRows.of_neurons(weight.indices, weight.shape[1])
        layout = layout_of(connections, lanes, kind, block)
        x, grad = (rng.standard_normal((batch, n)).astype(kind) for n in (widths[-1], 20))
        x[-1, weight.indices[:5].ravel()] = special
        grad[-1, [7, 11]] = special
        got = gradient_of_values(layout, weight, grad, x)
        assert np.count_nonzero(~np.isfinite(got)) < got.size
        assert_within(got, expected_gradients(weight, grad, x)["values"])


@each_tile
def test_padding_is_exact_whatever_the_tile_holds(layout_of, lanes, kind, block, widths):
    """A column that one neuron has and its neighbours in lockstep have not is not finite."""
    rng = np.random.default_rng(lanes)
    n_in = widths[-1]
    weight = CondensedWeight.random((40, n_in), fan_in=3, rng=rng)
    layout = layout_of(CompressedRows.of_neurons(weight.indices, n_in), lanes, kind, block)
    assert layout.positions.size > weight.nnz
    for special in (np.nan, np.inf, -np.inf):
        x = np.full((lanes, n_in), special, kind)
        x[:, weight.indices[:39].ravel()] = rng.standard_normal((lanes, 1))
        got = tile_product(layout, weight.values, x, np.zeros(40, kind), weight.active)
        assert_within(got, expected_product(weight, x, np.zeros(40, kind), "none"))


@pytest.mark.parametrize("itemsize", [4, 8])
def test_the_tiles_of_a_batch_hold_each_row_once(itemsize):
    for batch in range(1, 300):
        rows = 0
        for first, tiles, lanes in tile_parts(batch, itemsize):
            assert first == rows
            assert tiles > 0
            assert 8 <= lanes <= widest_lanes(itemsize)
            rows += tiles * lanes
        assert batch <= rows < batch + lanes


# Plans: which kernel, and what holds for all of them

BATCHES = (1, 2, 4, 8, 16, 32, 64, 65)


@pytest.fixture
def plan_on(monkeypatch):
    """Return a function: a plan whose smallest batches use the kernel of a given name."""

    def make(kernel, weight):
        monkeypatch.setattr(NeuronLanes, "estimate", lambda *shape: np.inf)
        monkeypatch.setattr(condensed_matmul, "has_byte_lookup", lambda: kernel == "byte planes")
        plan = srigl_core.prepare(weight, backend="numba", threads=1)
        assert plan.describe()["kernel"].startswith(f"{kernel} up to")
        return plan

    return make


def each_call(plan, x, bias=None):
    """Return the product as a call without `out` gives it, and as one with `out` does."""
    out = np.empty((*x.shape[:-1], plan.weight.shape[0]), F32)
    return plan(x, bias), plan(x, bias, out=out)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_plan_sums_each_row_of_a_batch_once_whatever_its_size(dtype):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((29, 23), fan_in=5, n_active=27, dtype=dtype, rng=rng)
    weight = with_integers(weight, rng)
    plan = srigl_core.prepare(weight, backend="numba", threads=1)
    dense = weight.to_dense().astype(np.float64)
    for batch in (*range(1, 42), *range(63, 200, 8), 64, 96, 128, 192):
        x, grad = (rng.integers(-8, 9, (batch, n)).astype(dtype) for n in (23, 29))
        out = np.full((batch, 29), np.nan, dtype)
        plan(x, out=out)
        gradients = srigl_core.MatmulGradients(np.full_like(x, np.nan), None, None)
        plan.backward(grad, x, out=gradients)
        np.testing.assert_array_equal(out, x @ dense.T)
        np.testing.assert_array_equal(gradients.x, grad @ dense)


def test_a_used_plan_gives_the_bits_of_a_fresh_one(monkeypatch):
    monkeypatch.setattr(threads, "SMALLEST_PARALLEL_WORK", 0)
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((301, 450), fan_in=29, n_active=290, rng=rng)
    used = srigl_core.prepare(weight, backend="numba")
    before = threads.numba.get_num_threads()
    for number, (batch, kind) in enumerate(
        (b, k) for b in (64, 5, 33, 1, 24, 100, 8) for k in (F32, F64)
    ):
        x, grad = (rng.standard_normal((batch, n)).astype(kind) for n in (450, 301))
        n_threads = 1 + number % threads.numba.config.NUMBA_NUM_THREADS
        x[0, 7] = (np.nan, np.inf, 1)[number % 3]
        results = []
        for plan in (used, srigl_core.prepare(weight, backend="numba")):
            gradients = plan.backward(grad, x, threads=n_threads)
            results.append((plan(x, threads=n_threads), gradients.x, gradients.values))
        for got, fresh in zip(*results, strict=True):
            assert got.tobytes() == fresh.tobytes()
        assert threads.numba.get_num_threads() == before


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_bias_and_activation_are_the_same_whether_inputs_are_finite_or_not(plan_on, kernel):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((43, 48), fan_in=11, n_active=37, rng=rng)
    plan = plan_on(kernel, weight)
    given = rng.standard_normal(43).astype(F32)
    for batch, special, activation in product((1, 2, 4, 8), (0, np.inf, np.nan), ACTIVATIONS):
        x = rng.standard_normal((batch, 48)).astype(F32)
        x[-1, 17] = special
        for inputs, bias in product((x, x[-1]), (None, given)):
            expected = expected_product(weight, inputs, bias, activation)
            for compact in (False, True):
                columns = weight.active if compact else np.arange(43)
                out = np.full((*inputs.shape[:-1], columns.size), np.nan, F32)
                options = {"activation": activation, "compact": compact}
                assert_within(plan(inputs, bias, **options), expected, columns)
                assert_within(plan(inputs, bias, out=out, **options), expected, columns)


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_a_plan_takes_inputs_of_every_type_in_any_order(plan_on, kernel):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random(
        (43, 48), fan_in=11, n_active=37, dtype=value_dtype("bfloat16"), rng=rng
    )
    for kinds in product((F32, F64), repeat=3):
        plan = plan_on(kernel, weight)
        for batch, kind in product((1, 2, 8), kinds):
            x, grad = (rng.standard_normal((batch, n)).astype(kind) for n in (48, 43))
            assert_within(plan(x), expected_product(weight, x, None, "none"))
            gradients = plan.backward(grad, x)
            for name, expected in expected_gradients(weight, grad, x).items():
                assert_within(getattr(gradients, name), expected)


@pytest.mark.parametrize("kernel", ROW_KERNELS)
@pytest.mark.parametrize("n_in", [1, 15, 16, 64, 65, 16_385, 65_536, 65_537, 65_600, 4_194_304])
def test_the_first_and_the_last_column_count_whatever_the_width_of_the_input(plan_on, kernel, n_in):
    rng = np.random.default_rng(0)
    indices = [np.unique([0, n_in // 2, n_in - 1])] * 9
    values = rng.integers(1, 9, np.shape(indices)).astype(F32)
    weight = CondensedWeight(values, indices, np.arange(9), (9, n_in))
    plan = plan_on(kernel, weight)
    for batch in (1, 2, 9):
        x = np.zeros((batch, n_in), F32)
        x[:, indices[0]] = rng.integers(1, 9, (batch, values.shape[1]))
        for got in each_call(plan, x):
            np.testing.assert_array_equal(got, x[:, indices[0]] @ values.T)


@pytest.mark.parametrize("n_in", [48, 41])
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_an_input_that_is_not_finite_reaches_exactly_its_neurons_from_every_column(
    plan_on, kernel, n_in
):
    rng = np.random.default_rng(n_in)
    weight = CondensedWeight.random((43, n_in), fan_in=11, n_active=37, rng=rng)
    plan = plan_on(kernel, weight)
    specials = np.array([np.nan, np.inf, -np.inf], F32)
    for batch in BATCHES:
        x = np.tile(rng.standard_normal((batch, n_in)).astype(F32), (3, n_in, 1, 1))
        column = np.arange(n_in)
        x[:, column, column % batch, column] = specials[:, None]
        expected = expected_product(weight, x, None, "none")
        for special in range(3):
            due = replace(expected, z=expected.z[special], scale=expected.scale[special])
            calls = [each_call(plan, each) for each in x[special]]
            for got in zip(*calls, strict=True):
                assert_within(np.stack(got), due)


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_a_sum_too_large_is_infinite_and_its_neighbours_are_not(plan_on, kernel):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((43, 48), fan_in=24, n_active=37, rng=rng)
    weight = weight.with_values(np.ones(weight.values.shape, F32))
    plan = plan_on(kernel, weight)
    for batch in BATCHES:
        x = rng.standard_normal((batch, 48)).astype(F32)
        x[-1, [3, 20, 47]] = 1.2e38  # twice as much is finite, three times is not
        expected = expected_product(weight, x, None, "none")
        too_large = expected.z > np.finfo(F32).max
        assert 0 < np.count_nonzero(too_large) < 37
        for got in each_call(plan, x):
            assert_within(got, expected)
            assert (got[too_large] == np.inf).all()
            assert np.isfinite(got[~too_large]).all()


THREADED_BATCHES = (1, 2, 8, 16, 40, 64, 150)


@pytest.mark.skipif(
    threads.numba.config.NUMBA_NUM_THREADS < 2, reason="NUMBA_NUM_THREADS allows one thread"
)
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_each_kernel_gives_the_same_bits_on_any_number_of_threads(plan_on, monkeypatch, kernel):
    monkeypatch.setattr(threads, "SMALLEST_PARALLEL_WORK", 0)
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((650, 500), fan_in=29, n_active=601, rng=rng)
    plan = plan_on(kernel, weight)
    bias = rng.standard_normal(650).astype(F32)
    batches = THREADED_BATCHES if kernel == "neuron lanes" else (1, 2)
    for batch in batches:
        x, grad = (rng.standard_normal((batch, n)).astype(F32) for n in (500, 650))
        results = []
        for n_threads in (1, 2, 3):
            gradients = plan.backward(grad, x, threads=n_threads)
            y = plan(x, bias, activation="gelu", threads=n_threads)
            results.append((y, *(getattr(gradients, part.name) for part in fields(gradients))))
        for result in results[1:]:
            for got, expected in zip(result, results[0], strict=True):
                np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    ("sparsity", "dtype", "kernel"),
    [
        pytest.param(0.9, "float32", "byte planes", marks=needs_byte_lookup),
        pytest.param(0.9, "bfloat16", "byte planes", marks=needs_byte_lookup),
        pytest.param(0.99, "float32", "byte planes", marks=needs_byte_lookup),
        (0.9, "float64", "neuron lanes"),
        (0.998, "float32", "neuron lanes"),
    ],
)
def test_a_layer_of_usual_size_uses_the_quickest_kernel_for_its_sparsity(sparsity, dtype, kernel):
    fan_in = round(3072 * (1 - sparsity))
    weight = CondensedWeight.random((768, 3072), fan_in=fan_in, dtype=value_dtype(dtype), rng=0)
    described = srigl_core.prepare(weight, backend="numba").describe()
    rows = 4 if kernel == "byte planes" else 1 if vector_bytes() >= 32 else 2
    assert described["kernel"] == f"{kernel} up to batch {rows}, lockstep beyond"


def test_a_layer_of_few_connections_is_computed_by_rows_whatever_the_batch():
    rng = np.random.default_rng(0)
    weight = with_integers(CondensedWeight.random((10, 768), fan_in=8, n_active=9, rng=rng), rng)
    plan = srigl_core.prepare(weight, backend="numba", threads=1)
    assert plan.describe()["kernel"] == "neuron lanes"
    for batch in (1, 3, 4, 63, 64, 65, 256, 300):
        x = rng.integers(-8, 9, (batch, 768)).astype(F32)
        for got in each_call(plan, x):
            np.testing.assert_array_equal(got, exact_product(weight, x))


def test_without_byte_lookup_no_kernel_that_needs_it_is_used(monkeypatch):
    monkeypatch.setattr(condensed_matmul, "has_byte_lookup", lambda: False)
    weight = CondensedWeight.random((768, 3072), fan_in=307, rng=0)
    plan = srigl_core.prepare(weight, backend="numba")
    assert plan.describe()["kernel"].startswith("neuron lanes")


@pytest.mark.parametrize(
    ("features", "has_lookup"),
    [
        ("+avx512f,+avx512bw,+avx512vbmi", True),
        ("+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd", False),
        ("+avx512f,+avx512bw,-avx512vbmi", False),
        ("+avx2,+fma", False),
        ("", False),
    ],
)
def test_the_features_of_a_processor_decide_and_not_its_name(monkeypatch, features, has_lookup):
    monkeypatch.setattr(processor.numba.config, "CPU_NAME", "znver5")
    monkeypatch.setattr(processor.numba.config, "CPU_FEATURES", features)
    processor.target_features.cache_clear()
    try:
        assert has_byte_lookup() == has_lookup
    finally:
        processor.target_features.cache_clear()


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_other_values_share_the_packing_and_have_their_own_product(plan_on, kernel):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((43, 48), fan_in=11, n_active=37, rng=rng)
    plan = plan_on(kernel, weight)

    def use(plan):
        for batch in BATCHES:
            x, grad = (rng.standard_normal((batch, n)).astype(F32) for n in (48, 43))
            assert_within(plan(x), expected_product(plan.weight, x, None, "none"))
            gradients = plan.backward(grad, x)
            for name, expected in expected_gradients(plan.weight, grad, x).items():
                assert_within(getattr(gradients, name), expected)

    use(plan)
    layouts, size = plan._prepared._layouts, plan.describe()["bytes"]
    packed = layouts.nbytes
    assert packed > 0
    other = plan.with_values(-2 * weight.values[::-1, ::-1])
    assert other._prepared._layouts is layouts
    use(other)
    use(plan)
    assert layouts.nbytes == packed
    assert other.describe()["bytes"] == plan.describe()["bytes"] == size


# Processes of their own

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib"]


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "NUMBA_NUM_THREADS": "3", **environment},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def assert_clean(process):
    assert process.returncode == 0, (process.returncode, process.stderr[-3000:])
    assert process.stdout.split()[-1:] == ["done"], process.stdout


GUARDED = """
import ctypes
import mmap
import sys

import numpy as np

import srigl_core
from srigl_core.backends.numba_cpu import condensed_matmul, threads
from srigl_core.backends.numba_cpu.neuron_lanes import MOST_ROWS, NeuronLanes
from srigl_core.backends.numba_cpu.processor import has_byte_lookup

protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
PAGE = mmap.PAGESIZE


def guarded(array, place):
    '''Return a copy of `array` beside a page that ends the process when it is touched.'''
    size = -(-array.nbytes // PAGE) * PAGE
    pages = mmap.mmap(-1, size + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for guard in (address, address + PAGE + size):
        assert protect(guard, PAGE, 0) == 0, ctypes.get_errno()
    skip = {"begin": 0, "end": size - array.nbytes}[place]
    inner = np.frombuffer(pages, array.dtype, array.size, PAGE + skip).reshape(array.shape)
    inner[...] = array
    return inner
"""

needs_guards = pytest.mark.skipif(sys.platform != "linux", reason="guard pages as Linux has them")


@needs_guards
@pytest.mark.parametrize(("place", "outside"), [("begin", -1), ("end", 10)])
def test_the_guard_ends_a_process_that_touches_it(place, outside):
    process = run(
        GUARDED
        + f"""
array = guarded(np.arange(10, dtype=np.float32), {place!r})
assert array.sum() == 45
print("inside", flush=True)
ctypes.c_float.from_address(array.ctypes.data + 4 * {outside}).value
print("outside")
"""
    )
    assert process.returncode < 0, process.stderr[-3000:]
    assert process.stdout == "inside\n"


@needs_guards
def test_no_kernel_touches_memory_outside_its_arrays():
    assert_clean(
        run(
            GUARDED
            + """
KERNELS = {"few": 0, "neuron lanes": np.inf, "byte planes": np.inf}
if not has_byte_lookup():
    del KERNELS["byte planes"]
ROWS = (None, 1, 2, 3, 4)
TILES = (5, 8, 9, 16, 19, 33, 64, 70)
threads.SMALLEST_PARALLEL_WORK = 0
rng = np.random.default_rng(0)


def numbers(*shape):
    return rng.integers(-8, 9, shape).astype(np.float32)


def check(plan, batch, place, n_threads):
    weight = plan.weight
    n_out, n_in = weight.shape
    lead = () if batch is None else (batch,)
    x, bias = guarded(numbers(*lead, n_in), place), guarded(numbers(n_out), place)
    out = guarded(np.full((*lead, n_out), np.nan, np.float32), place)
    expected = x.astype(np.float64) @ weight.to_dense().T + bias
    plan(x, bias, out=out, threads=n_threads)
    assert (out == expected).all()
    assert (plan(x, bias, threads=n_threads) == expected).all()
    few = guarded(np.full((*lead, weight.n_active), np.nan, np.float32), place)
    plan(x, bias, out=few, compact=True, threads=n_threads)
    assert (few == expected[..., weight.active]).all()

    grad = guarded(numbers(*lead, n_out), place)
    shapes = {"x": x.shape, "values": weight.values.shape, "bias": bias.shape}
    out = srigl_core.MatmulGradients(**{
        name: guarded(np.full(shape, np.nan, np.float32), place) for name, shape in shapes.items()
    })
    plan.backward(grad, x, out=out, threads=n_threads)
    assert (out.x == grad.astype(np.float64) @ weight.to_dense()).all()
    dense = grad.reshape(-1, n_out).astype(np.float64).T @ x.reshape(-1, n_in)
    assert (out.values == dense[weight.active[:, None], weight.indices]).all()
    assert (out.bias == grad.reshape(-1, n_out).sum(axis=0)).all()


# All sizes odd, but for the first: what begins or ends a page is then aligned to 4 bytes only at
# the other end.
for n_out, n_active, n_in, fan_in in (
    (64, 64, 64, 16), (43, 43, 41, 7), (45, 37, 17, 17), (211, 205, 251, 5), (9, 8, 16, 1)
):
    pattern = srigl_core.CondensedWeight.random(
        (n_out, n_in), fan_in=fan_in, n_active=n_active, rng=0
    )
    weight = pattern.with_values(numbers(n_active, fan_in))
    for kernel, estimate in KERNELS.items():
        NeuronLanes.estimate = staticmethod(lambda *shape, estimate=estimate: estimate)
        condensed_matmul.has_byte_lookup = lambda: kernel == "byte planes"
        plan = srigl_core.prepare(weight, backend="numba")
        beyond = f" up to batch {MOST_ROWS if kernel == 'neuron lanes' else 4}"
        begin = "neuron lanes" if kernel == "few" else kernel + beyond
        assert plan.describe()["kernel"].startswith(begin)
        for batch in ROWS + TILES if kernel != "byte planes" else ROWS:
            for place in ("begin", "end"):
                for n_threads in (1, 3):
                    check(plan, batch, place, n_threads)
print("done")
"""
        )
    )


AVX2 = "+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+popcnt,+sse4.2"


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="these are processors of x86-64"
)
@pytest.mark.parametrize(
    "processor",
    [
        pytest.param(
            {
                "NUMBA_CPU_NAME": "skylake-avx512",
                "NUMBA_CPU_FEATURES": f"{AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl",
            },
            marks=pytest.mark.skipif(not has_avx512(), reason="this processor lacks AVX-512"),
            id="skylake",
        ),
        pytest.param(
            {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2},
            marks=pytest.mark.skipif(
                not has_avx512(), reason="all other tests are of kernels without AVX-512"
            ),
            id="haswell",
        ),
        pytest.param({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, id="generic"),
    ],
)
def test_the_laws_hold_on_a_processor_without_byte_lookup(processor):
    assert_clean(
        run(
            """
import os
from dataclasses import replace

import srigl_core
from srigl_core.backends.numba_cpu import threads
from srigl_core.backends.numba_cpu.processor import has_byte_lookup
from srigl_core.testing import LAWS, NotApplicable, check_law
from srigl_core.testing.kernel_capabilities import capabilities_of
from srigl_core.testing.problem_sources import SeededSource

assert not has_byte_lookup()
# Quantised weights have the same kernels; their laws compile these once more, which takes minutes.
operations = ("condensed_matmul", "quantized_matmul")
if os.environ["NUMBA_CPU_NAME"] != "haswell":
    operations = operations[:1]
weight = srigl_core.CondensedWeight.random((768, 3072), fan_in=307, rng=0)
kernel = srigl_core.prepare(weight, backend="numba").describe()["kernel"]
assert kernel.startswith("neuron lanes"), kernel
able = capabilities_of(srigl_core.get_backend("numba"))


def check_laws(*value_dtypes):  # each type of value, and more so each number of threads, compiles
    narrowed = replace(able, value_dtypes=value_dtypes, largest_problem=200_000)
    checked = 0
    for law in LAWS:
        if not law.operation.startswith(operations):
            continue
        for seed in range(5):
            problem = law.build(SeededSource(seed, len(law.name)), narrowed)
            try:
                check_law("numba", law, problem)
            except NotApplicable:
                continue
            checked += 1
    return checked


# Compiling takes minutes: one processor has all types, and each a type that tells enough of it.
types = {"generic": able.value_dtypes, "haswell": ("float32", "float16"), "skylake-avx512": ()}
threads.SMALLEST_PARALLEL_WORK = 10**12  # one thread
if of_processor := types[os.environ["NUMBA_CPU_NAME"]]:
    assert check_laws(*of_processor) > 60 * (1 + len(operations))
threads.SMALLEST_PARALLEL_WORK = 0  # three
if os.environ["NUMBA_CPU_NAME"] != "haswell":
    assert check_laws("float32") > 60 * (1 + len(operations))
print("done")
""",
            **processor,
        )
    )


def test_activations_keep_to_their_budget_in_code_for_a_generic_processor(tmp_path):
    """Its vectors are shorter, and on x86 it has no fused multiplication and addition."""
    tests = Path(__file__).parents[1] / "test_numba_epilogue.py"
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    process = subprocess.run(
        [*PYTEST, str(tests)],
        env={**os.environ, **generic, "SRIGL_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
