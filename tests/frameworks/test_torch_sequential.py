"""Stacks of condensed layers: the chain of inference, and all that keeps it from being used."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy
import pytest
import torch
from torch import nn

from srigl_core import SriglError, chain
from srigl_core.torch import (
    CondensedLinear,
    CondensedSequential,
    condense,
    freeze,
    to_masked_dense,
    unfreeze,
)

ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Identity()]


def stack(activation=None, dtype=torch.float32, bias=True):
    options = {"dtype": dtype, "bias": bias}
    layers = [
        CondensedLinear(12, 40, fan_in=3, rng=0, **options),
        CondensedLinear(40, 70, fan_in=9, rng=1, **options),
        CondensedLinear(70, 5, fan_in=20, rng=2, **options),
    ]
    first, second = (activation or nn.ReLU(), copy.deepcopy(activation or nn.ReLU()))
    return CondensedSequential(layers[0], first, nn.Dropout(0.5), layers[1], second, layers[2])


def by_modules(model, x):
    for module in model:
        x = module(x)
    return x


def inputs(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_modules(model, x):
    """Three calls: the chain is made at the second."""
    with torch.no_grad():
        expected = by_modules(model, x)
        results = [model(x) for _ in range(3)]
    half = x.dtype in (torch.float16, torch.bfloat16)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {}
    for result in results:
        assert torch.equal(result, results[0])
        torch.testing.assert_close(result, expected, **tolerance)


def refuse(*arguments):
    raise AssertionError("a layer was called by itself")


no_calls_of_layers = mock.patch.object(CondensedLinear, "product", side_effect=refuse)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 12), (33, 12), (2, 3, 12), (0, 12)], ids=str)
def test_a_stack_gives_what_its_modules_give(activation, shape):
    assert_as_modules(stack(activation).eval(), inputs(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_stack_of_any_type_gives_what_its_modules_give(dtype):
    assert_as_modules(stack(dtype=dtype).eval(), inputs(3, 12, dtype=dtype))
    assert_as_modules(stack(dtype=dtype, bias=False).eval(), inputs(3, 12))


def test_inputs_of_any_strides_are_taken():
    for x in (inputs(12, 3).t(), inputs(3, 24)[:, ::2], inputs(2, 12, 3).transpose(1, 2)):
        assert_as_modules(stack().eval(), x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_in_inference_the_layers_are_one_call(context):
    model, x = stack().eval(), inputs(2, 12)
    with context():
        first = model(x)
        model(x)
        with no_calls_of_layers:
            assert torch.equal(model(x), first)
            assert torch.equal(model(-x), model(-x))


def test_with_gradients_the_modules_are_called():
    model, x = stack().eval(), inputs(2, 12).requires_grad_()
    with torch.no_grad():
        [model(x) for _ in range(3)]
    y = model(x)
    y.sum().backward()
    assert x.grad is not None
    assert model[0].values.grad is not None
    torch.testing.assert_close(y, by_modules(model, x))


def change_values(model):
    with torch.no_grad():
        model[3].values.mul_(2)


def change_values_unseen(model):
    model[3].values.data.numpy()[:] *= 2  # PyTorch does not count this


def change_bias(model):
    model[0].bias.data.numpy()[:] += 1


def change_connections(model):
    model[3].load_condensed_(CondensedLinear(40, 70, fan_in=9, rng=7).to_condensed())


def load_a_state(model):
    model.load_state_dict(copy.deepcopy(stack()).double().float().state_dict())


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(inputs(8, 12)).square().sum().backward()
    optimizer.step()
    model.eval()


def replace_a_layer(model):
    model[5] = CondensedLinear(70, 5, fan_in=2, rng=9)


def replace_an_activation(model):
    model[1] = nn.GELU()


def append_a_module(model):
    model.append(nn.Softmax(-1))


def no_bias(model):
    model[0].bias = None


def give_a_layer_an_activation(model):
    model[5].activation = "silu"


CHANGES = [change_values, change_values_unseen, change_bias, change_connections, load_a_state]
CHANGES += [step, replace_a_layer, replace_an_activation, append_a_module, no_bias]
CHANGES += [give_a_layer_an_activation]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(change):
    model, x = stack().eval(), inputs(2, 12)
    with torch.no_grad():
        before = [model(x) for _ in range(3)][-1]
    change(model)
    assert_as_modules(model, x)
    with torch.no_grad():
        assert change is load_a_state or not torch.equal(model(x), before)


def test_dropout_is_idle_in_evaluation_only():
    model, x = stack().eval(), inputs(64, 12)
    with torch.no_grad():
        [model(x) for _ in range(2)]
        model.train()
        torch.manual_seed(0)
        dropped = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(dropped, by_modules(model, x))
        assert not torch.equal(dropped, model.eval()(x))


@pytest.mark.parametrize("place", [0, 1, 2, 4, 5])
def test_hooks_of_modules_are_called(place):
    model, x, seen = stack().eval(), inputs(2, 12), []
    with torch.no_grad():
        plain = [model(x) for _ in range(3)][-1]
        with model[place].register_forward_hook(lambda *call: seen.append(call[2])):
            [model(x) for _ in range(3)]
        with model[place].register_forward_pre_hook(lambda module, arguments: seen.append(1)):
            model(x)
        assert len(seen) == 4
        with model[place].register_forward_hook(lambda module, arguments, y: y + 1):
            assert not torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)


def test_global_hooks_and_replaced_forwards_are_called():
    model, x, seen = stack().eval(), inputs(2, 12), []
    with torch.no_grad():
        [model(x) for _ in range(3)]
        hook = nn.modules.module.register_module_forward_hook(lambda m, *rest: seen.append(m))
        with hook:
            model(x)
        assert seen == [*model, model]
        model[1].forward = lambda x: x * 0
        torch.testing.assert_close(model(x), by_modules(model, x))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_autocast_tracing_and_compilers_get_the_modules():
    model, x = stack().eval(), inputs(2, 12)
    with torch.no_grad():
        expected = [model(x) for _ in range(3)][-1]
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
        for made in (
            torch.compile(model, backend="eager", fullgraph=True),
            torch.export.export(model, (x,)).module(),
            torch.jit.trace(model, (x,)),
            torch.func.vmap(model),
        ):
            torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_chain_of_the_library_takes_tensors(dtype):
    model = stack(dtype=dtype).eval()
    layers = [(each.to_condensed(), each.bias, "relu") for each in (model[0], model[3])]
    whole = chain([*layers, (model[5].to_condensed(), model[5].bias, None)])
    for x in (inputs(12, dtype=dtype), inputs(3, 12, dtype=dtype), inputs(2, 3, 12, dtype=dtype)):
        y, out = whole(x), torch.empty(*x.shape[:-1], 5, dtype=dtype)
        assert y.dtype is dtype
        with torch.no_grad():
            torch.testing.assert_close(y, model(x))
        before = out._version
        assert whole(x, out=out) is out
        assert torch.equal(out, y)
        assert out._version > before
    with pytest.raises(SriglError, match="pass arrays of one library"):
        whole(inputs(3, 12, dtype=dtype), out=numpy.empty((3, 5)))


def test_frozen_layers_stay_so():
    model, x = freeze(stack().eval()), inputs(2, 12)
    assert_as_modules(model, x)
    with torch.no_grad():
        model[3].values.mul_(2)
        with pytest.raises(SriglError, match="a frozen layer was written"):
            model(x)
    assert_as_modules(unfreeze(model), x)


def test_copies_and_files_of_a_model_are_models_of_their_own():
    model, x = stack().eval(), inputs(2, 12)
    with torch.no_grad():
        before = [model(x) for _ in range(3)][-1]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            assert all(torch.equal(other(x), before) for _ in range(3))
            other[0].bias.add_(1)
        assert_as_modules(other, x)
        with torch.no_grad():
            assert torch.equal(model(x), before)


def test_layers_that_do_not_fit_give_the_error_of_the_layer():
    model = CondensedSequential(
        CondensedLinear(12, 40, fan_in=3, rng=0), CondensedLinear(41, 5, fan_in=3, rng=0)
    )
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(SriglError, match="n_in=41"):
                model(inputs(2, 12))
            with pytest.raises(SriglError, match="n_in=12"):
                stack()(inputs(2, 13))


def test_threads_may_share_a_model():
    model = stack().eval()
    batches = [inputs(n, 12, seed=n) for n in (1, 2, 3, 9) for _ in range(5)]

    def run(x):
        with torch.inference_mode():
            return model(x)

    expected = [run(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, batches), expected))


def test_condense_makes_stacks_and_to_masked_dense_takes_them_back():
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Sequential(nn.Linear(12, 20), nn.ReLU()), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 3)
    )
    for layer in (dense[0][0], dense[1]):
        layer.weight.data[:, 4:] = 0
    keys, x = list(dense.state_dict()), inputs(3, 12)
    with torch.no_grad():
        expected = dense(x)
    model = condense(dense, "nonzero", exclude="3")
    assert model is dense
    assert [type(model), type(model[0])] == [CondensedSequential, CondensedSequential]
    assert repr(model).startswith("CondensedSequential(\n")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    to_masked_dense(model)
    assert [type(model), type(model[0])] == [nn.Sequential, nn.Sequential]
    assert list(model.state_dict()) == keys
