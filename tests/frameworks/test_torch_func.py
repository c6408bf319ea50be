"""``torch.func``: derivatives and maps of condensed layers, against the masked dense layers."""

import copy

import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.func import (  # noqa: E402
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)

from srigl_core.torch import (  # noqa: E402
    CondensedLinear,
    CondensedSequential,
    condense,
    freeze,
    quantize,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

ACTIVATIONS = {None: lambda z: z, "relu": torch.relu, "silu": nn.functional.silu}
ALL = (0, 1, 2)


def layers_of(activation):
    """Return a condensed layer and the dense one, as functions of x, values and bias; and these."""
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((6, 8), fan_in=3, n_active=5, dtype=np.float64, rng=rng)
    layer = CondensedLinear.from_condensed(
        weight, rng.standard_normal(6), nnz_budget=17, activation=activation
    )
    rows, columns = torch.tensor(weight.active)[:, None], torch.tensor(weight.indices.astype(int))

    def condensed(x, values, bias):
        return functional_call(layer, {"values": values, "bias": bias}, (x,))

    def dense(x, values, bias):
        places = values[: weight.nnz].view(columns.shape)
        full = torch.zeros(6, 8, dtype=x.dtype).index_put((rows, columns), places)
        return ACTIVATIONS[activation](x @ full.T + bias)

    x = torch.from_numpy(rng.standard_normal((4, 8)))
    return condensed, dense, (x, layer.values.detach(), layer.bias.detach())


X_ALONE, VALUES_ALONE = (0, None, None), (None, 0, None)


def several(values):
    return torch.stack([values, 2 * values])


TRANSFORMS = {
    "grad": lambda f, x, v, b: grad(f, ALL)(x, v, b),
    "per sample": lambda f, x, v, b: vmap(grad(f, ALL), X_ALONE)(x, v, b),
    "gradient of a map": lambda f, x, v, b: grad(
        lambda *a: vmap(f, X_ALONE)(*a).sum(), ALL
    )(x, v, b),
    "ensemble": lambda f, x, v, b: vmap(grad(f, ALL), VALUES_ALONE)(x, several(v), b),
    "biases": lambda f, x, v, b: vmap(grad(f, ALL), (None, None, 0))(x, v, several(b)),
    "map within a map": lambda f, x, v, b: vmap(vmap(f, X_ALONE), VALUES_ALONE)(x, several(v), b),
    "last axis": lambda f, x, v, b: vmap(f, (1, None, None))(x.T.contiguous(), v, b),
    "jvp": lambda f, *at: jvp(f, at, tuple(array + 1 for array in at)),
    "jacfwd": lambda f, *at: jacfwd(f, ALL)(*at),
    "hessian": lambda f, *at: hessian(f, ALL)(*at),
    "reverse of reverse": lambda f, *at: jacrev(jacrev(f, ALL), ALL)(*at),
    "reverse of forward": lambda f, *at: jacrev(jacfwd(f, ALL), ALL)(*at),
    "Hessian per sample": lambda f, x, v, b: vmap(hessian(f, 1), X_ALONE)(x, v, b),
    "third": lambda f, *at: jacfwd(jacrev(jacrev(f, 1), 1), 1)(*at),
}  # fmt: skip


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("which", TRANSFORMS)
def test_a_transform_of_a_layer_is_that_of_the_dense_one(which, activation):
    condensed, dense, at = layers_of(activation)
    got, wanted = (
        TRANSFORMS[which](lambda *a, f=f: torch.sin(f(*a)).sum(), *at) for f in (condensed, dense)
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_jacobians_of_the_results_are_the_dense_ones_also_without_recording(activation):
    condensed, dense, at = layers_of(activation)
    transforms = (
        lambda f: jacrev(f, ALL, chunk_size=4)(*at),
        lambda f: jacfwd(f, ALL)(at[0][0], *at[1:]),
        lambda f: jvp(f, at, at),
        lambda f: vjp(f, *at)[1](torch.ones(4, 6, dtype=torch.float64)),
        lambda f: vmap(f, X_ALONE)(*at),
    )
    for transform in transforms:
        torch.testing.assert_close(transform(condensed), transform(dense))
    with torch.no_grad():
        for transform in transforms[1::2]:
            torch.testing.assert_close(transform(condensed), transform(dense))


def test_gradients_per_sample_of_a_convolutional_model_are_the_dense_ones():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    masks = {}
    for name, fan_in in (("0", 9), ("2", 2), ("4", 5)):
        weight = model.get_submodule(name).weight
        masks[name] = torch.zeros(weight.shape, dtype=torch.bool)
        masks[name].view(len(weight), -1)[:, :fan_in] = True
        weight.data *= masks[name]
    condensed = copy.deepcopy(model)
    condense(condensed, masks)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def of(model):
        biases = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if name.endswith("bias")
        }

        def loss(biases, image):
            return functional_call(model, biases, (image[None],)).square().sum()

        gradients = vmap(grad(loss), (None, 0))(biases, images)
        return *gradients.values(), *jvp(model, (images,), (images,)), jacfwd(model)(images)

    torch.testing.assert_close(of(condensed), of(model))


def test_forward_mode_within_forward_mode_is_refused():
    """PyTorch drops terms of it, without a word, for any function with a derivative of its own."""
    condensed, _, at = layers_of(None)
    for nested in (
        jacfwd(jacfwd(condensed)),
        lambda *at: jvp(lambda *a: jvp(condensed, a, at), at, at),
    ):
        with pytest.raises(SriglError, match="take one of the two in reverse mode"):
            nested(*at)
    with pytest.raises(SriglError, match="forward mode within forward mode"), torch.no_grad():
        jacfwd(jacfwd(condensed))(*at)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("kind", ["plain", "activation", "frozen", "row of layers", "quantised"])
def test_forward_mode_outside_of_transforms_is_refused(kind, mode):
    """The kernels would drop the tangent, and the directional derivative would be zero."""
    layers = [CondensedLinear(8, 8, fan_in=2, rng=i) for i in range(2)]
    layers[0].activation = "gelu" if kind == "activation" else None
    model = CondensedSequential(*(layers if kind == "row of layers" else layers[:1]))
    if kind == "quantised":
        quantize(model)
    elif kind == "frozen":
        freeze(model)
    x, forward_ad = torch.ones(2, 8), torch.autograd.forward_ad
    with torch.no_grad():
        expected = [model(x) for _ in range(3)][-1]  # the third call uses what the others keep
    with mode(), forward_ad.dual_level():
        with pytest.raises(SriglError, match=r"use torch\.func\.jvp"):
            model(forward_ad.make_dual(x, x))
        torch.testing.assert_close(model(x), expected)  # without a tangent, nothing is lost
        if kind in ("plain", "row of layers"):
            bias = forward_ad.make_dual(layers[0].bias.detach(), torch.ones(8))
            with pytest.raises(SriglError, match="has a tangent"):
                functional_call(layers[0], {"bias": bias}, (x,))
