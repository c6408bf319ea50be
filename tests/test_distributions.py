"""Budgets of layers and networks (SPEC 3)."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srigl_core import SriglError, ValueTypeError
from srigl_core.reference import erk, nnz_budget, uniform

DECIMAL_DENSITIES = [
    Fraction(n, 1000) for n in (1, 5, 10, 20, 50, 100, 125, 200, 250, 300, 500, 999)
]

shapes = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 60))
    | st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3)),
    min_size=1,
    max_size=6,
)
sparsities = st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9, 0.95]) | st.floats(0, 0.98)


# ---------------------------------------------------------------- one layer


@given(
    n_out=st.integers(1, 5000),
    n_in=st.integers(1, 5000),
    density=st.sampled_from(DECIMAL_DENSITIES),
)
@example(n_out=19, n_in=45, density=Fraction(1, 5))
@example(n_out=64, n_in=640, density=Fraction(1, 10))
@example(n_out=100, n_in=10, density=Fraction(1, 10))
def test_budget_is_what_was_written_in_decimal(n_out, n_in, density):
    """Also where the sparsity was computed as 1 - density in float64."""
    exact = math.floor(n_out * n_in * density)
    assert nnz_budget(n_out * n_in, 1 - float(density)) == exact
    assert nnz_budget(n_out * n_in, float(1 - density)) == exact


@given(n_weights=st.integers(1, 10**12), sparsity=st.floats(0, 1, exclude_max=True))
def test_budget_is_the_exact_floor_of_the_formula(n_weights, sparsity):
    exact = n_weights * Fraction(1 - sparsity) + Fraction(n_weights, 2**51)
    assert nnz_budget(n_weights, sparsity) == math.floor(exact)


def test_budget_of_a_dense_layer_is_all_its_weights():
    for n_weights in (1, 7, 10**6, 2**51 - 1):
        assert nnz_budget(n_weights, 0.0) == n_weights


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        (1.0, SriglError, r"sparsity=1\.0 must be in \[0, 1\)"),
        (-0.1, SriglError, r"sparsity=-0\.1 must be in \[0, 1\)"),
        (90, SriglError, r"sparsity=90 must be in \[0, 1\): 0\.9 keeps a tenth"),
        (math.nan, SriglError, "sparsity=nan must be finite"),
        ("0.9", ValueTypeError, "sparsity='0.9' must be a number"),
        (True, ValueTypeError, "sparsity=True must be a number"),
    ],
)
def test_a_sparsity_out_of_range_is_an_error(sparsity, error, message):
    with pytest.raises(error, match=message):
        nnz_budget(100, sparsity)
    for share in (erk, uniform):
        with pytest.raises(error, match=message):
            share([(10, 10)], sparsity)


# ---------------------------------------------------------------- a network


@given(shapes=shapes, sparsity=sparsities)
@example(shapes=[(1, 1)], sparsity=0.1)
def test_erk_budgets_follow_the_formula_exactly(shapes, sparsity):
    """Solved here by trying which layers are dense, the fullest first."""
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes) * min(Fraction(1), Fraction(1 - sparsity) + Fraction(1, 2**51))
    dense = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        left = total - sum(sizes[i] for i in dense)
        if not sparse:
            break
        eps = left / sum(sum(shapes[i]) for i in sparse)
        full = {i for i in sparse if eps * sum(shapes[i]) > sizes[i]}
        if not full:
            break
        dense |= full
    expected = [
        size if i in dense else math.floor(eps * sum(shape))
        for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]
    if min(expected) < 1:
        with pytest.raises(SriglError, match="less than one"):
            erk(shapes, sparsity)
        return
    layers = erk(shapes, sparsity)
    assert [layer.nnz_budget for layer in layers] == expected
    assert [layer.shape for layer in layers] == shapes
    assert sum(expected) <= total < sum(expected) + len(shapes)


@given(shapes=shapes, sparsity=sparsities)
def test_uniform_gives_every_layer_the_sparsity(shapes, sparsity):
    expected = [nnz_budget(math.prod(shape), sparsity) for shape in shapes]
    if min(expected) < 1:
        with pytest.raises(SriglError, match="less than one"):
            uniform(shapes, sparsity)
        return
    assert [layer.nnz_budget for layer in uniform(shapes, sparsity)] == expected


@given(shapes=shapes, sparsity=sparsities, share=st.sampled_from([erk, uniform]), data=st.data())
def test_total_is_within_the_budget_whatever_is_kept_dense(shapes, sparsity, share, data):
    positions = st.sets(st.integers(0, len(shapes) - 1))
    dense = data.draw(positions)
    sizes = [math.prod(shape) for shape in shapes]
    fixed = {i: data.draw(st.integers(1, sizes[i])) for i in data.draw(positions) - dense}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layers = share(shapes, sparsity, dense=dense, fixed=fixed)
    except (SriglError, UserWarning):
        return
    assert all(1 <= b.nnz_budget <= size for b, size in zip(layers, sizes, strict=True))
    assert all(layers[i].nnz_budget == sizes[i] for i in dense)
    assert all(layers[i].nnz_budget == budget for i, budget in fixed.items())
    if len(dense | fixed.keys()) < len(shapes):
        total = sum(layer.nnz_budget for layer in layers)
        assert total <= nnz_budget(sum(sizes), sparsity)


def test_layers_kept_dense_are_paid_for_by_the_others():
    shapes = [(20, 10), (50, 20), (40, 50)]
    layers = uniform(shapes, 0.5, dense=[0])
    assert layers[0].nnz_budget == 200
    assert [layer.nnz_budget for layer in layers[1:]] == [466, 933]  # 1400 of 3000, thirds
    assert uniform(shapes, 0.5)[1].nnz_budget == 500


def test_erk_uses_kernel_dimensions():
    conv, flat = (8, 4, 3, 3), (8, 36)
    assert erk([conv, (64, 64)], 0.8)[0].nnz_budget != erk([flat, (64, 64)], 0.8)[0].nnz_budget


def test_erk_layer_that_would_exceed_one_is_dense_and_the_rest_is_solved_again():
    shapes = [(10, 3), (300, 100), (100, 300)]
    layers = erk(shapes, 0.9)
    assert layers[0].nnz_budget == 30
    eps = (Fraction(60030) * (Fraction(1 - 0.9) + Fraction(1, 2**51)) - 30) / 800
    assert [layer.nnz_budget for layer in layers[1:]] == [math.floor(eps * 400)] * 2
    assert layers[1].density == eps * 400 / 30000
    assert layers[0].sparsity == 0.0


def test_erk_power_zero_is_uniform():
    shapes = [(64, 32), (128, 64), (10, 128)]
    budgets = [layer.nnz_budget for layer in erk(shapes, 0.75, power=0)]
    assert budgets == [layer.nnz_budget for layer in uniform(shapes, 0.75)]


def test_erk_power_makes_small_layers_denser():
    shapes = [(200, 20), (200, 200)]
    densities = [float(erk(shapes, 0.8, power=power)[0].density) for power in (0.5, 1, 1.5)]
    assert densities == sorted(densities)
    assert densities[0] < densities[2]


def test_layers_with_budgets_of_their_own_keep_them():
    shapes = [(20, 10), (50, 20), (40, 50)]
    for share in (erk, uniform):
        layers = share(shapes, 0.5, fixed={1: 77})
        assert layers[1].nnz_budget == 77
        assert layers[1].density == Fraction(77, 1000)


def test_uniform_that_cannot_pay_falls_back_to_the_target_with_a_warning():
    shapes = [(100, 50), (10, 100)]
    with pytest.warns(UserWarning, match=r"5000 weights, all that sparsity=0\.9 leaves"):
        layers = uniform(shapes, 0.9, dense=[0])
    assert [layer.nnz_budget for layer in layers] == [5000, 100]


def test_erk_that_cannot_pay_is_an_error():
    with pytest.raises(SriglError, match=r"600 weights, but .* have 5000 already; lower"):
        erk([(100, 50), (10, 100)], 0.9, dense=[0])


def test_the_result_does_not_depend_on_the_integer_type_of_shapes():
    shapes = [(300, 200), (100, 300)]
    typed = [tuple(np.int16(n) for n in shape) for shape in shapes]
    for share in (erk, uniform):
        assert share(typed, 0.9) == share(shapes, 0.9)


@pytest.mark.parametrize("share", [erk, uniform])
@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        ([], {}, SriglError, "shapes is empty"),
        ([(10,)], {}, SriglError, r"shape \(10,\) has no neurons with inputs"),
        ([(10, 0)], {}, SriglError, r"shape \(10, 0\) has no neurons with inputs"),
        ([(10, -3)], {}, SriglError, "length of shape of layer .*=-3 must be at least 0"),
        ([(10, 2.5)], {}, ValueTypeError, r"length of shape of layer .*=2\.5 must be an integer"),
        ([(10, 10)], {"dense": [1]}, SriglError, "dense=1 must be between 0 and 0"),
        ([(10, 10)], {"fixed": {0: 101}}, SriglError, "101 must be between 1 and 100"),
        ([(10, 10)], {"fixed": {0: 0}}, SriglError, "0 must be between 1 and 100"),
        ([(2, 2), (90, 90)], {"fixed": {1: 8000}}, SriglError, "lower the sparsity"),
    ],
)
def test_bad_layers_are_an_error(share, shapes, options, error, message):
    if share is uniform and options == {"fixed": {1: 8000}}:
        with pytest.warns(UserWarning, match="8000"):
            share(shapes, 0.5, **options)
        return
    with pytest.raises(error, match=message):
        share(shapes, 0.5, **options)


def test_a_layer_left_with_less_than_one_weight_is_an_error():
    with pytest.raises(SriglError, match=r"layer '0' of shape \(4, 4\) gets 0\.160 weights"):
        uniform([(4, 4), (1000, 10)], 0.99)


@pytest.mark.parametrize(
    ("power", "error"),
    [(math.nan, SriglError), (math.inf, SriglError), ("1", ValueTypeError)],
)
def test_a_power_that_is_no_number_is_an_error(power, error):
    with pytest.raises(error, match="power="):
        erk([(10, 10)], 0.5, power=power)


def test_uniform_warns_where_dense_layers_take_exactly_the_budget():
    with pytest.warns(UserWarning, match="take that sparsity themselves"):
        layers = uniform([(10, 10), (10, 10)], 0.5, dense=[0])
    assert [layer.nnz_budget for layer in layers] == [100, 50]


@pytest.mark.parametrize("power", [1000, -1000])
def test_a_power_out_of_range_is_an_error(power):
    with pytest.raises(SriglError, match="power"):
        erk([(64, 64)] * 2, 0.9, power=power)


@pytest.mark.parametrize(
    "arguments",
    [{"shapes": None}, {"shapes": [5, (3, 4)]}, {"dense": 0}, {"fixed": [3]}],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_refused(arguments):
    with pytest.raises(ValueTypeError):
        erk(**({"shapes": [(3, 4)], "sparsity": 0.5} | arguments))
