"""The gradient of inactive weights in JAX, where it is asked for; connections drawn from a key."""

import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError, ValueTypeError

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from srigl_core.jax import (  # noqa: E402
    Connections,
    condensed_linear,
    from_condensed,
    with_dense_gradient,
)

N_OUT, N_IN = 6, 9


def problem(dtype=jnp.float32, batch=(5,)):
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((N_OUT, N_IN), fan_in=3, n_active=4, rng=rng)
    values, connections = from_condensed(weight)
    x, y = (jnp.asarray(rng.standard_normal((*batch, n)), dtype) for n in (N_IN, N_OUT))
    return values.astype(dtype), connections, x, y


def loss(values, zeros, connections, x, y):
    z = with_dense_gradient(condensed_linear(x, values, connections), x, zeros)
    return ((jnp.tanh(z) - y) ** 2).sum()


def dense_loss(dense, x, y):
    return ((jnp.tanh(x @ dense.T) - y) ** 2).sum()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_the_gradient_is_that_of_a_dense_layer(jit, batch):
    values, connections, x, y = problem(batch=batch)
    zeros = jnp.zeros((N_OUT, N_IN))
    gradients = jax.grad(loss, (0, 1, 3))
    of_values, dense, of_x = (jax.jit(gradients) if jit else gradients)(
        values, zeros, connections, x, y
    )
    weight = connections.scatter(values)
    expected = jax.grad(dense_loss, (0, 1))(weight, x, y)
    for found, wanted in ((dense, expected[0]), (of_x, expected[1])):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(of_values, connections.gather(dense), rtol=2e-5, atol=1e-6)
    assert jnp.count_nonzero(dense) == dense.size  # inactive weights and ablated neurons too


def test_it_is_not_computed_where_it_is_not_asked_for():
    values, connections, x, y = problem()
    zeros = jnp.zeros((N_OUT, N_IN))
    for argument, is_computed in ((0, False), (3, False), (1, True)):
        program = jax.make_jaxpr(jax.grad(loss, argument))(values, zeros, connections, x, y)
        assert (f"f32[{N_OUT},{N_IN}] = dot_general" in str(program)) == is_computed


def test_vmap_gives_a_gradient_for_each_example():
    values, connections, x, y = problem()
    zeros = jnp.zeros((N_OUT, N_IN))
    gradient = jax.vmap(jax.grad(loss, 1), (None, None, None, 0, 0))
    each = gradient(values, zeros, connections, x, y)
    assert each.shape == (len(x), N_OUT, N_IN)
    whole = jax.grad(loss, 1)(values, zeros, connections, x, y)
    np.testing.assert_allclose(each.sum(0), whole, rtol=2e-5, atol=1e-6)


def test_numbers_of_16_bits_are_summed_in_float32_and_the_gradient_has_the_type_of_zeros():
    ones = jnp.ones((2**12, 1), jnp.bfloat16)

    def total(zeros):
        return with_dense_gradient(ones, ones, zeros).astype(jnp.float32).sum()

    assert jax.grad(total)(jnp.zeros((1, 1))) == 2**12
    assert jax.grad(total)(jnp.zeros((1, 1), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("shapes", [((5, 6), (5, 9), (9, 6)), ((5, 6), (4, 9), (6, 9))])
def test_shapes_that_disagree_are_an_error(shapes):
    with pytest.raises(SriglError, match=r"y has shape \(5, 6\).*of one layer"):
        with_dense_gradient(*map(jnp.zeros, shapes))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_key_decides_the_connections(make):
    drawn = [Connections.random(make(s), (6, 9), fan_in=3, n_active=4) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert (drawn[0].n_active, drawn[0].fan_in, drawn[0].shape) == (4, 3, (6, 9))
    with pytest.raises(SriglError, match="fan_in=10"):
        Connections.random(make(0), (6, 9), fan_in=10)
    with pytest.raises(ValueTypeError, match="key"):
        jax.jit(lambda key: Connections.random(key, (6, 9), fan_in=3).indices)(make(0))
