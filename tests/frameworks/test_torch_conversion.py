"""Models converted: condensed, dense again, folded, saved, and loaded from released checkpoints."""

import copy
import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file
from training_options import training_options

import srigl_core
from srigl_core import CondensedWeight, FileFormatError, LayerOptions, SriglError, ValueTypeError
from srigl_core._format.file import layer_metadata, read_whole, weight_arrays

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from srigl_core.torch import (  # noqa: E402
    CondensedConv2d,
    CondensedLinear,
    CondensedSequential,
    SRigL,
    quantize,
)
from srigl_core.torch.conversion import (  # noqa: E402
    condense,
    condensed_modules,
    to_csr,
    to_masked_dense,
)
from srigl_core.torch.folding import fold_ablated  # noqa: E402
from srigl_core.torch.model_file import load_model, save_model  # noqa: E402
from srigl_core.torch.model_report import report  # noqa: E402
from srigl_core.torch.released_checkpoint import load_released_checkpoint  # noqa: E402

ACTIVATIONS = [
    nn.ReLU,
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Identity,
    nn.Dropout,
]


def perceptron(dtype=torch.float64):
    layers = [nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).to(dtype)


def convolutional(dtype=torch.float64):
    first = nn.Conv2d(3, 12, 3, padding="same", padding_mode="reflect")
    second = nn.Conv2d(12, 16, (1, 2), stride=2, dilation=(1, 2), padding=(0, 1), bias=False)
    norm = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU())
    return nn.Sequential(first, norm, second, nn.Flatten(), nn.Linear(144, 5)).to(dtype)


INPUTS = {perceptron: (20,), convolutional: (3, 6, 6)}


def batch(make, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, *INPUTS[make], generator=generator, dtype=dtype)


def trained(make, dtype=torch.float64, **options):
    """A masked model after a few updates, with ablated neurons and newly grown weights."""
    torch.manual_seed(0)
    model = make(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"sparsity": 0.7, "gamma_sal": 0.9, "schedule": 40, "seed": 1} | options
    schedule = srigl_core.reference.UpdateSchedule(t_end=1000, delta_t=2, alpha=0.5)
    srigl = SRigL(model, optimizer, **training_options(**options | {"schedule": schedule}))
    for _ in range(4):
        optimizer.zero_grad()
        model(batch(make, dtype)).square().mean().backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    return model.eval(), srigl


def masks_of(srigl):
    return {name: srigl.mask(name) for name in srigl.trainer.budgets}


class Untouched:
    """Asserts that a block does not change a model."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.modules = list(self.model.modules())
        self.parameters = list(self.model.parameters())
        self.state = copy.deepcopy(self.model.state_dict())

    def __exit__(self, *_):
        same = zip(self.model.parameters(), self.parameters, strict=True)
        assert list(self.model.modules()) == self.modules
        assert all(one is other for one, other in same)
        state = self.model.state_dict()
        assert state.keys() == self.state.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in self.state.items())


# ---------------------------------------------------------------- condense


@pytest.mark.parametrize(
    ("make", "dtype"), [(perceptron, torch.bfloat16), (convolutional, torch.float64)]
)
def test_a_condensed_model_is_the_masked_one_and_gets_back_exactly(make, dtype):
    model, srigl = trained(make, dtype)
    masks, dense = masks_of(srigl), copy.deepcopy(model)
    zeros = sum(int((model.get_submodule(n).weight[m] == 0).sum()) for n, m in masks.items())
    assert zeros, "no active weight is zero, so the test shows nothing about them"
    biases = {name: model.get_submodule(name).bias for name in masks}
    model.get_submodule("0").weight.requires_grad_(False)
    assert condense(model, srigl) is model
    assert list(condensed_modules(model)) == list(masks)
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        linear = layer.linear if isinstance(layer, CondensedConv2d) else layer
        assert torch.equal(linear.mask, mask.flatten(1))
        assert linear.bias is biases[name]
        assert linear.values.requires_grad is (name != "0")
        assert not layer.training
        assert linear.values.dtype is dtype
    torch.testing.assert_close(model(batch(make, dtype)), dense(batch(make, dtype)))
    assert to_masked_dense(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
    assert torch.equal(model(batch(make, dtype)), dense(batch(make, dtype)))


def test_masks_are_arrays_or_tensors_by_the_name_of_a_layer_or_parameter():
    model, srigl = trained(perceptron, layers={"4": LayerOptions(dense=True)}, sparsity=0.6)
    masks = masks_of(srigl)
    for by_name in (
        masks,
        {name: mask.numpy() for name, mask in masks.items()},
        {f"{name}.weight": mask for name, mask in masks.items()},
    ):
        condensed = condense(copy.deepcopy(model), by_name, exclude="2")
        assert list(condensed_modules(condensed)) == ["0"]  # the mask of "4" is all True
        assert [type(condensed[i]) for i in (2, 4)] == [nn.Linear, nn.Linear]


def test_zeros_give_the_mask_where_no_active_weight_is_zero():
    model = perceptron()
    mask = CondensedWeight.random((24, 32), fan_in=5, n_active=20, rng=0).to_mask()
    with torch.no_grad():
        model[2].weight *= torch.from_numpy(mask)
    condense(model, "nonzero")
    assert list(condensed_modules(model)) == ["2"]
    assert np.array_equal(model[2].mask.numpy(), mask)


def test_csr_is_the_masked_weight_with_active_zeros_stored():
    model, srigl = trained(convolutional)
    masks, dense = masks_of(srigl), copy.deepcopy(model)
    arrays = to_csr(condense(model, srigl))
    assert arrays.keys() == masks.keys()
    for name, csr in arrays.items():
        weight = dense.get_submodule(name).weight.detach().flatten(1).numpy()
        assert np.array_equal(csr.toarray(), weight)
        assert csr.nnz == int(masks[name].sum())


def uneven(mask):
    mask = mask.clone()
    mask[3] = False
    mask[3, :2] = True
    return mask


def grouped():
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))


def hooked():
    model = perceptron()
    model[0].register_forward_hook(lambda *_: None)
    return model


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


def condensed():
    model, srigl = trained(perceptron)
    return condense(model, srigl)


def halves(*shape):
    """A mask of every other column."""
    mask = np.zeros(shape, np.bool_)
    mask[:, ::2] = True
    return mask


FIRST = halves(32, 20)
BAD_MASKS = {
    "uneven": (
        perceptron,
        {"0": FIRST, "2": uneven(torch.from_numpy(halves(24, 32)))},
        SriglError,
        r"layer '2': mask is not constant fan-in: 1 of 24 .*\(row 3 has 2\).*or exclude the layer",
    ),
    "empty": (perceptron, {"0": ~(FIRST | True)}, SriglError, "layer '0': mask has no active"),
    "shape": (perceptron, {"0": FIRST.T}, SriglError, r"layer '0' has shape \(20, 32\)"),
    "numbers": (perceptron, {"0": FIRST * 1.0}, ValueTypeError, "layer '0' must be .*float64"),
    "list": (perceptron, {"0": [[True]]}, ValueTypeError, "got list; convert"),
    "no mapping": (perceptron, [FIRST], ValueTypeError, "masks must be a mapping.*got list"),
    "a word": (perceptron, "zeros", SriglError, "masks='zeros' is unknown"),
    "unknown": (
        perceptron,
        {"fc": FIRST},
        SriglError,
        "no layer or parameter 'fc'; its layers are 0, 2",
    ),
    "all True": (perceptron, "nonzero", SriglError, "all masks are True everywhere"),
    "groups": (grouped, {"0": halves(4, 2, 3, 3)}, SriglError, "'0' has groups=2"),
    "hooks": (hooked, {"0": FIRST}, SriglError, "layer '0' has hooks"),
    "shared": (tied, {"0": halves(8, 8)}, SriglError, "layer '0' shares its weight"),
    "twice": (condensed, {"0": FIRST}, SriglError, "layer '0' is condensed already"),
    "itself": (lambda: nn.Linear(4, 2), {"": halves(2, 4)}, SriglError, "wrap the model in"),
    "its weight": (lambda: nn.Linear(4, 2), {"weight": halves(2, 4)}, SriglError, "wrap the"),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        {"in_proj_weight": halves(12, 4)},
        SriglError,
        r"'in_proj_weight' \(MultiheadAttention, in_proj_weight\) cannot be condensed",
    ),
}


@pytest.mark.parametrize("what", BAD_MASKS)
def test_what_cannot_be_condensed_is_said_and_the_model_is_left_as_it_was(what):
    make, masks, error, message = BAD_MASKS[what]
    torch.manual_seed(0)
    model = make()
    with Untouched(model), pytest.raises(error, match=message):
        condense(model, masks)


def test_zeros_of_weights_just_grown_are_no_mask_and_the_error_says_so():
    model, _ = trained(perceptron)
    with Untouched(model), pytest.raises(SriglError, match=r"layer '\d'.*are active although"):
        condense(model, "nonzero")


def test_an_activation_of_its_own_cannot_become_dense():
    layers = [CondensedLinear(8, 4, fan_in=2, rng=0, activation=a) for a in (None, "relu")]
    model = nn.Sequential(layers[0], CondensedLinear(4, 4, fan_in=1, activation="relu"))
    with Untouched(model), pytest.raises(SriglError, match="layer '1' has activation='relu'"):
        to_masked_dense(model)
    with pytest.raises(SriglError, match="the model itself is a CondensedLinear"):
        to_masked_dense(layers[0])
    with pytest.raises(ValueTypeError, match=r"model must be a torch.nn.Module, got int"):
        to_masked_dense(3)


def test_a_layer_in_two_places_becomes_one_in_two_places():
    layer = CondensedLinear(6, 6, fan_in=2, rng=0)
    model = to_masked_dense(nn.Sequential(layer, nn.ReLU(), layer))
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]


# ---------------------------------------------------------------- report


def test_the_report_has_the_facts_of_every_layer():
    model, srigl = trained(convolutional)
    summary = report(condense(model, srigl))
    assert [layer.name for layer in summary.layers] == ["0", "2", "4"]
    for layer in summary.layers:
        mask = srigl.mask(layer.name).flatten(1)
        counts = mask.sum(1)
        assert layer.shape == tuple(mask.shape)
        assert layer.n_active == int((counts > 0).sum())
        assert layer.fan_in == int(counts.max())
        assert layer.sparsity == pytest.approx(1 - mask.double().mean().item())
        assert layer.dense_bytes == 8 * mask.numel()
        nnz = layer.n_active * layer.fan_in
        assert layer.condensed_bytes == 10 * nnz + 8 * layer.n_active
    lines = str(summary).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "2", "4", "total"]
    assert lines[-1].split()[1:] == [f"{summary.condensed_bytes:,}", f"{summary.dense_bytes:,}"]
    assert len({line.index("%") for line in lines[1:-1]}) == 1  # columns are aligned


def test_the_speed_up_is_what_recommend_says():
    model = nn.Sequential(CondensedLinear(768, 300, sparsity=0.9, rng=0))
    summary = report(model, backend="reference")
    assert summary.layers[0].speed_ups == (None, None)
    assert str(summary).splitlines()[1].split()[-2:] == ["-", "-"]
    weight = model[0].to_condensed()
    if srigl_core.get_backend().name == "numba":
        wanted = [srigl_core.recommend(weight, batch=b).speed_up for b in (1, 64)]
        assert report(model).layers[0].speed_ups == pytest.approx(wanted)


# ---------------------------------------------------------------- folding


def condensed_layer(n_in, n_out, fan_in, n_active, *, seed=0, bias=True, **options):
    rng = np.random.default_rng(seed)
    weight = CondensedWeight.random(
        (n_out, n_in), fan_in=fan_in, n_active=n_active, dtype=np.float64, rng=rng
    )
    numbers = rng.standard_normal(n_out) if bias else None
    return CondensedLinear.from_condensed(weight, numbers, **options)


def dense_layer(n_in, n_out, n_ablated=0, *, bias=True):
    layer = nn.Linear(n_in, n_out, bias=bias).double()
    with torch.no_grad():
        layer.weight[:n_ablated] = 0
    return layer


def inputs(n_in):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, n_in, generator=generator, dtype=torch.float64)


FIRSTS = {
    "condensed": lambda: condensed_layer(10, 12, 3, 8),
    "without bias": lambda: condensed_layer(10, 12, 3, 8, bias=False),
    "activated": lambda: condensed_layer(10, 12, 3, 8, activation="gelu"),
    "dense": lambda: dense_layer(10, 12, 4),
}
NEXTS = {
    "condensed": lambda: condensed_layer(12, 9, 7, 6, seed=1),
    "of few inputs": lambda: condensed_layer(12, 9, 1, 6, seed=1),
    "of all inputs": lambda: condensed_layer(12, 9, 12, 6, seed=1),
    "without bias": lambda: condensed_layer(12, 9, 7, 6, seed=1, bias=False),
    "activated": lambda: condensed_layer(12, 9, 7, 6, seed=1, activation="relu"),
    "dense": lambda: dense_layer(12, 9),
    "dense without bias": lambda: dense_layer(12, 9, bias=False),
}


# All pairs of layers, each with one of the activations.
CASES = [([*FIRSTS][i % 4], [*NEXTS][i % 7], ACTIVATIONS[i % 8]) for i in range(28)]


@pytest.mark.parametrize(("first", "following", "activation"), CASES)
def test_folding_removes_ablated_neurons_and_changes_no_result(first, following, activation):
    torch.manual_seed(0)
    model = nn.Sequential(FIRSTS[first](), activation(), NEXTS[following]()).eval()
    fan_in = getattr(model[2], "fan_in", None)
    wanted = model(inputs(10))
    assert fold_ablated(model).removed == {"0": 4}
    assert model[0].out_features == model[2].in_features == 8
    assert getattr(model[0], "n_active", 8) == 8
    assert getattr(model[2], "fan_in", None) == (None if fan_in is None else min(fan_in, 8))
    assert model[2].out_features == 9
    torch.testing.assert_close(model(inputs(10)), wanted, rtol=1e-13, atol=1e-14)
    assert not model[0].training
    assert not model[2].training
    assert not fold_ablated(model).removed


def test_a_model_is_folded_after_it_was_condensed():
    torch.manual_seed(0)
    model = nn.Sequential(dense_layer(10, 12, 4), nn.ReLU(), dense_layer(12, 9)).eval()
    masks = {name: model.get_submodule(name).weight != 0 for name in ("0", "2")}
    masks["2"][:, 5] = False
    with torch.no_grad():
        model[2].weight *= masks["2"]
    wanted = model(inputs(10))
    assert type(condense(model, masks)) is CondensedSequential
    assert fold_ablated(model, inputs(10)).removed == {"0": 4}
    torch.testing.assert_close(model(inputs(10)), wanted, rtol=1e-13, atol=1e-14)


def test_folding_goes_through_a_whole_chain_and_says_what_it_left():
    inner = nn.Sequential(nn.Tanh(), nn.Sequential(condensed_layer(12, 9, 8, 5), nn.ReLU()))
    model = nn.Sequential(condensed_layer(10, 12, 3, 7), inner, condensed_layer(9, 6, 3, 4))
    wanted = model(inputs(10))
    folding = fold_ablated(model, inputs(10))
    assert folding.removed == {"0": 5, "1.1.0": 4}
    assert str(folding).splitlines() == [
        "0: 5 ablated neurons removed",
        "1.1.0: 4 ablated neurons removed",
        "2: not changed, as no linear layer follows in its nn.Sequential",
    ]
    torch.testing.assert_close(model(inputs(10)), wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_folding_rounds_once_in_every_dtype(dtype):
    model = nn.Sequential(FIRSTS["condensed"](), nn.GELU(), NEXTS["condensed"]()).to(dtype)
    x = inputs(10).to(dtype)
    wanted = model(x)
    assert fold_ablated(model).removed == {"0": 4}
    assert model[2].bias.dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model(x), wanted, rtol=eps, atol=eps)


def test_an_activation_used_twice_counts_twice():
    act = nn.Sigmoid()
    layers = [condensed_layer(10, 12, 3, 7), act, condensed_layer(12, 9, 8, 5), act]
    model = nn.Sequential(*layers, dense_layer(9, 4))
    wanted = model(inputs(10))
    assert fold_ablated(model).removed == {"0": 5, "2": 4}
    torch.testing.assert_close(model(inputs(10)), wanted, rtol=1e-13, atol=1e-14)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(condensed_layer(10, 10, 3, 7), nn.ReLU())
        self.alone = condensed_layer(10, 10, 3, 7)

    def forward(self, x):
        return x + self.body(x) + self.alone(x)


class Chain(nn.Module):
    """A model with an nn.Sequential as `body`, which it calls by a function of `body` and x."""

    def __init__(self, call):
        super().__init__()
        self.body = nn.Sequential(condensed_layer(10, 10, 3, 7), nn.ReLU(), dense_layer(10, 10))
        self.call = call

    def forward(self, x):
        return self.call(self.body, x)


def between(*modules, first=None):
    first = condensed_layer(10, 12, 3, 8) if first is None else first
    return nn.Sequential(first, *modules, dense_layer(12, 9))


def relu_with_hook():
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return module


def used_twice():
    layer = condensed_layer(10, 10, 3, 8)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), dense_layer(10, 9))


def infinite_bias():
    layer = condensed_layer(10, 12, 3, 8)
    nn.init.constant_(layer.bias, float("inf"))
    return layer


def convolution():
    conv = CondensedConv2d(condensed_layer(8, 6, 3, 4), (2, 2))
    return nn.Sequential(conv, nn.Flatten(), dense_layer(6, 2))


def quantised(first, following):
    """Return a chain in which one layer is quantised, or both."""
    layers = condensed_layer(10, 12, 3, 8), condensed_layer(12, 9, 4, 9)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).float()
    left = [str(2 * i) for i, is_quantised in enumerate((first, following)) if not is_quantised]
    return quantize(model, exclude=left)


NO_LAYER = "as no linear layer follows in its nn.Sequential"
QUANTISED = "as it is quantised; call fold_ablated before quantize"
LEFT = {
    "norm": (lambda: between(nn.LayerNorm(12).double()), {"0": "as 1 (LayerNorm) follows it"}),
    "dropout": (lambda: between(nn.Dropout()), {"0": "as 1 (Dropout) is in training mode; call"}),
    "residual": (Residual, {"body.0": NO_LAYER, "alone": "as it is in no nn.Sequential"}),
    "hook": (lambda: between(relu_with_hook()), {"0": "as 1 has hooks"}),
    "shared": (used_twice, {"0": "as 0 is used more than once", "2": "as 2 is used"}),
    "none": (lambda: between(nn.ReLU(), first=dense_layer(10, 12)), {}),
    "all": (lambda: between(first=dense_layer(10, 12, 12)), {"0": "as none of its neurons is"}),
    "not finite": (lambda: between(first=infinite_bias()), {"0": "as the output of an ablated"}),
    "convolution": (convolution, {"0": "as it is a convolution"}),
    "quantised": (lambda: quantised(True, False), {"0": QUANTISED}),
    "quantised next": (lambda: quantised(False, True), {"0": "as 2 (QuantizedLinear) follows it"}),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_cannot_be_folded_is_named_and_left(what):
    make, reasons = LEFT[what]
    torch.manual_seed(0)
    model = make()
    with Untouched(model):
        folding = fold_ablated(model)
    assert not folding.removed
    assert folding.left.keys() == reasons.keys()
    assert all(folding.left[name].startswith(reason) for name, reason in reasons.items())


def asserting(body, x):
    hidden = body[1](body[0](x))
    assert hidden.shape[-1] == 10
    return {"result": body[2](hidden)}


OTHER_CALLS = {
    "in other ways than one after": lambda body, x: body(x) + body[0](x),
    "a result that differs by": lambda body, x: body(x).sum() + body[0](x).sum(),
    "a result of shape": lambda body, x: {"result": body(x), "hidden": body[0](x)},
    "AssertionError": asserting,
}


@pytest.mark.parametrize("message", OTHER_CALLS)
def test_a_model_that_uses_its_chain_otherwise_is_noticed_by_its_example(message):
    model = Chain(OTHER_CALLS[message])
    with Untouched(model), pytest.raises(SriglError, match=message):
        fold_ablated(model, inputs(10))


def test_a_model_may_have_infinite_results_and_write_to_its_input():
    def call(body, x):
        result = body(x.add_(1))
        result[:, 0], result[:, 1] = float("-inf"), float("nan")
        return result

    x = inputs(10)
    assert fold_ablated(Chain(call), x).removed == {"body.0": 3}
    assert torch.equal(x, inputs(10))
    with pytest.raises(ValueTypeError, match=r"model must be a torch.nn.Module"):
        fold_ablated([call])


def test_a_chain_within_a_module_of_a_chain_is_folded():
    model = nn.Sequential(Chain(lambda body, x: body(x)), nn.ReLU())
    assert fold_ablated(model, inputs(10)).removed == {"0.body.0": 3}


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("into", ["dense", "condensed"])
@pytest.mark.parametrize(
    ("make", "dtype"), [(perceptron, torch.bfloat16), (convolutional, torch.float32)]
)
def test_a_saved_model_is_loaded_into_the_architecture(make, into, dtype, tmp_path):
    model, srigl = trained(make, dtype)
    condense(model, srigl, exclude="4" if make is perceptron else ())
    linear = next(m for m in model.modules() if isinstance(m, CondensedLinear))
    linear.activation = "relu"
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    if into == "dense":
        torch.manual_seed(5)
        fresh = make(dtype).eval()
        fresh.get_submodule("0").weight.requires_grad_(False)
    else:
        fresh, other = trained(make, dtype, seed=7)
        condense(fresh, other, exclude="4" if make is perceptron else ())
    assert load_model(path, fresh) is fresh
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    state = fresh.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(fresh(batch(make, dtype)), model(batch(make, dtype)))
    loaded = next(m for m in fresh.modules() if isinstance(m, CondensedLinear))
    assert loaded.values.requires_grad is (into == "condensed")
    assert loaded.activation == "relu"
    assert not fresh[0].training
    if dtype is not torch.bfloat16:
        arrays = srigl_core.load_condensed(path)
        name = next(iter(condensed_modules(model)))
        assert arrays[name] == linear.to_condensed()


def test_a_file_keeps_room_to_spare_and_takes_the_models_dtype(tmp_path):
    layer = condensed_layer(10, 12, 3, 8, nnz_budget=40)
    save_model(nn.Sequential(layer), tmp_path / "model")
    fresh = load_model(tmp_path / "model", nn.Sequential(nn.Linear(10, 12)))
    assert fresh[0].nnz_budget == 40
    assert fresh[0].values.dtype is torch.float32
    alone = condensed_layer(10, 12, 3, 8)
    save_model(alone, tmp_path / "alone")
    with pytest.raises(SriglError, match="the model itself is a Linear"):
        load_model(tmp_path / "alone", nn.Linear(10, 12))


def test_a_file_whose_weight_is_not_what_its_module_has_is_refused(tmp_path):
    path = tmp_path / "model"
    layer = condensed_layer(10, 12, 3, 8)
    save_model(nn.Sequential(layer), path)
    _, metadata = read_whole(path, "np")
    weight = layer.to_condensed().quantize()
    metadata |= layer_metadata({"0": weight})
    save_file(weight_arrays("0", weight), path, metadata=metadata)
    with pytest.raises(FileFormatError, match="layer '0'"):
        load_model(path, nn.Sequential(nn.Linear(10, 12)))


def test_a_layer_in_two_places_is_loaded_into_one_in_two_places(tmp_path):
    def twice(layer):
        return nn.Sequential(layer, nn.ReLU(), layer)

    path, model = tmp_path / "model", twice(condensed_layer(6, 6, 2, 5))
    save_model(model, path)
    for layer in (nn.Linear(6, 6), CondensedLinear(6, 6, fan_in=3)):
        loaded = load_model(path, twice(layer.double()))
        assert loaded[0] is loaded[2]
        assert torch.equal(loaded(inputs(6)), model(inputs(6)))
    model[2] = condensed_layer(6, 6, 2, 5, seed=1)
    save_model(model, path)
    assert load_model(path, nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    fresh = twice(nn.Linear(6, 6))
    with Untouched(fresh), pytest.raises(SriglError, match="'0' and '2' are one in the model, but"):
        load_model(path, fresh)


def another(**changes):
    layers = {"0": nn.Linear(20, 32), "2": nn.Linear(32, 24), "4": nn.Linear(24, 5)}
    layers = {name: layer.double() for name, layer in layers.items()} | changes
    return nn.Sequential(*(layers.get(str(i), nn.ReLU()) for i in range(5)))


OTHER_MODELS = {
    "fewer outputs": (
        another(**{"0": nn.Linear(20, 31)}),
        r"'0' of the file is a linear of \(32, ",
    ),
    "no bias": (another(**{"2": nn.Linear(32, 24, bias=False)}), "model's is .* without a bias"),
    "another type": (another(**{"2": nn.Conv2d(3, 3, 1)}), "the model's is a convolution of"),
    "no layer": (another(**{"2": nn.Identity()}), "the model's is a Identity"),
    "missing": (nn.Sequential(nn.Linear(20, 32)), "a condensed layer '2', but the model has none"),
    "more": (nn.Sequential(*another(), nn.Linear(5, 5)), "lacks '5.bias', '5.weight'; make"),
    "a norm": (another(**{"3": nn.BatchNorm1d(24)}), "lacks '3.bias'"),
    "dense": (another(**{"4": nn.Linear(24, 6)}), r"'4.\w+' of the file has shape \(5"),
    "nothing dense": (
        another(**{"4": nn.Identity()}),
        "has 4.bias, 4.weight, which the model lacks",
    ),
}


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_a_file_of_another_model_is_refused_and_the_model_left_as_it_was(what, tmp_path):
    model, srigl = trained(perceptron)
    save_model(condense(model, srigl, exclude="4"), tmp_path / "model")
    other, message = OTHER_MODELS[what]
    with Untouched(other), pytest.raises(SriglError, match=message):
        load_model(tmp_path / "model", other)


def rewritten(path, change):
    """Write a file again with its tensors and metadata changed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    facts = {key: json.loads(text) for key, text in metadata.items()}
    facts["srigl_core.format_version"] = metadata["srigl_core.format_version"]
    change(tensors, facts)
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    save_file(tensors, path, metadata=metadata)


LAYERS, MODULES = "srigl_core.layers", "srigl_core.modules"
DAMAGES = {
    "no modules": (lambda t, f: f.pop(MODULES), "no description of modules"),
    "version": (lambda t, f: f.update({"srigl_core.format_version": "9"}), "version '9'"),
    "not JSON": (lambda t, f: f.update({MODULES: "{"}), "does not describe layers"),
    "other layers": (lambda t, f: f[MODULES].pop("0"), "does not describe layers"),
    "no values": (lambda t, f: t.pop("0.values"), "layer '0' lacks '0.values'"),
    "no shape": (lambda t, f: f[LAYERS]["0"].pop("shape"), "does not describe layers"),
    "dtype": (lambda t, f: f[LAYERS]["0"].update(dtype="float32"), "layer '0': values are"),
    "no dtype": (lambda t, f: f[LAYERS]["0"].update(dtype="int8"), "layer '0': dtype 'int8'"),
    "order": (lambda t, f: t["0.indices"].fill_(1), "layer '0': indices"),
    "budget": (lambda t, f: f[MODULES]["0"].update(nnz_budget=3), "layer '0': nnz_budget=3"),
    "activation": (lambda t, f: f[MODULES]["0"].update(activation="x"), "layer '0': activation"),
    "no mapping": (lambda t, f: f[MODULES].update({"0": 3}), "layer '0'"),
    "bias": (lambda t, f: t.update({"0.bias": torch.zeros(3)}), "layer '0': bias has shape"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_file_is_refused_and_the_model_left_as_it_was(what, tmp_path):
    change, message = DAMAGES[what]
    model, srigl = trained(perceptron)
    path = tmp_path / "model.safetensors"
    save_model(condense(model, srigl), path)
    rewritten(path, change)
    fresh = perceptron()
    with Untouched(fresh), pytest.raises(FileFormatError, match=message):
        load_model(path, fresh)


def test_what_is_no_model_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_model(tmp_path / "none", perceptron())
    (tmp_path / "half").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        load_model(tmp_path / "half", perceptron())
    srigl_core.save_condensed(tmp_path / "layer", CondensedWeight.random((4, 8), fan_in=2))
    with pytest.raises(FileFormatError, match="not written by save_model"):
        load_model(tmp_path / "layer", perceptron())

    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

    with pytest.raises(ValueTypeError, match=r"'0._extra_state' of the model's state is a dict"):
        save_model(nn.Sequential(Noted(2, 2)), tmp_path / "noted")
    assert not (tmp_path / "noted").exists()


@pytest.mark.parametrize(
    ("make", "name", "more"),
    [
        (perceptron, "0", lambda layer: layer.register_buffer("scale", torch.ones(1))),
        (perceptron, "0", lambda layer: layer.add_module("linear", nn.Linear(2, 2))),
        (perceptron, "0", lambda layer: setattr(layer, "adapter", nn.Parameter(torch.ones(1)))),
        (convolutional, "0", lambda layer: layer.register_buffer("scale", torch.ones(1))),
        (convolutional, "0", lambda layer: layer.linear.register_buffer("x", torch.ones(1))),
    ],
)
def test_a_layer_with_more_than_a_file_holds_is_neither_saved_nor_replaced(
    make, name, more, tmp_path
):
    model, srigl = trained(make)
    condense(model, srigl)
    save_model(model, tmp_path / "model")
    more(model.get_submodule(name))
    with pytest.raises(SriglError, match=rf"layer '{name}' also has '.*model\.state_dict\(\)"):
        save_model(model, tmp_path / "more")
    assert not (tmp_path / "more").exists()
    with pytest.raises(SriglError, match=rf"layer '{name}' also has"):
        load_model(tmp_path / "model", model)
    dense = make()
    dense.get_submodule(name).register_buffer("scale", torch.ones(1))
    with pytest.raises(SriglError, match=rf"layer '{name}' also has 'scale'"):
        load_model(tmp_path / "model", dense)


# ---------------------------------------------------------------- released checkpoints


def checkpoint_of(model, srigl, prefix="module."):
    """What the released training script saves, as far as it matters here."""
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    masks = [srigl.mask(name) for name in srigl.trainer.budgets]
    pruner = {"backward_masks": masks, "S": [0.7] * len(masks), "step": 4}
    return {"run_id": "abc", "model": state, "pruner": pruner, "epoch": 3}


@pytest.mark.parametrize("form", ["file", "mapping", "unwrapped", "bare", "floats"])
def test_a_released_checkpoint_gives_weights_and_masks(form, tmp_path):
    make = convolutional if form in ("file", "bare") else perceptron
    model, srigl = trained(make)
    source = checkpoint_of(model, srigl, "" if form == "unwrapped" else "module.")
    if form == "file":
        torch.save(source, tmp_path / "checkpoint.pt.tar")
        source = tmp_path / "checkpoint.pt.tar"
    elif form == "bare":
        source = {"state_dict": source["model"]} | source["pruner"]
    elif form == "floats":
        masks = source["pruner"]["backward_masks"]
        source["pruner"]["backward_masks"] = [mask.float() for mask in masks]
    torch.manual_seed(3)
    fresh = make().eval()
    masks = load_released_checkpoint(source, fresh)
    assert masks.keys() == masks_of(srigl).keys()
    assert all(torch.equal(mask, srigl.mask(name)) for name, mask in masks.items())
    assert torch.equal(fresh(batch(make)), model(batch(make)))
    condense(fresh, masks)
    torch.testing.assert_close(fresh(batch(make)), model(batch(make)))


def test_dense_layers_of_a_released_checkpoint_have_no_mask():
    model, srigl = trained(perceptron, layers={"0": LayerOptions(dense=True)}, sparsity=0.5)
    source = checkpoint_of(model, srigl)
    source["pruner"]["backward_masks"][0] = None
    assert list(load_released_checkpoint(source, perceptron())) == ["2", "4"]


FIRST_WEIGHT = "module.0.weight"


def unstructured(state, masks):
    for row in range(6):
        masks[1][row] = False
        masks[1][row, : row + 1] = True
    state["module.2.weight"] *= masks[1]


SPOILT = {
    r"'2': .* not constant fan-in.*row 0 has 1, row 1 has 2,.*, and 1 more rows": unstructured,
    "'0' has .* not zero outside its mask; .* another order": lambda s, m: s[FIRST_WEIGHT].add_(1),
    r"2 masks, but the model has 3 layers with a weight \(0, 2, 4\)": lambda s, m: m.pop(),
    r"'4' has shape \(5, 3\), but its weight has \(5, 24\)": lambda s, m: m.append(m.pop()[:, :3]),
    "'0' has other numbers than 0 and 1": lambda s, m: m.insert(0, m.pop(0) * 2.0),
    "'0' must be a tensor or None, got list": lambda s, m: m.insert(0, m.pop(0).tolist()),
    "'0' has no active weight": lambda s, m: (m[0].fill_(False), s[FIRST_WEIGHT].zero_()),
    "the checkpoint lacks 2.bias; make the": lambda s, m: s.pop("module.2.bias"),
    "the model lacks 9.bias; make the": lambda s, m: s.update({"module.9.bias": torch.zeros(2)}),
    r"'4.bias' .* has shape \(4,\), but": lambda s, m: s.update({"module.4.bias": torch.zeros(4)}),
}


@pytest.mark.parametrize("message", SPOILT)
def test_a_checkpoint_that_does_not_fit_is_refused_and_the_model_left_as_it_was(message):
    source = copy.deepcopy(checkpoint_of(*trained(perceptron)))
    SPOILT[message](source["model"], source["pruner"]["backward_masks"])
    fresh = perceptron()
    error = FileFormatError if "got list" in message else SriglError
    with Untouched(fresh), pytest.raises(error, match=message):
        load_released_checkpoint(source, fresh)


@pytest.mark.parametrize(
    ("key", "message"), [("pruner", "no list 'backward_masks'"), ("model", "no state of a model")]
)
def test_a_checkpoint_without_masks_or_weights_is_refused(key, message):
    source = checkpoint_of(*trained(perceptron))
    del source[key]
    with pytest.raises(FileFormatError, match=message):
        load_released_checkpoint(source, perceptron())


class Config:
    """An object of another package in a checkpoint, like the released code's configuration."""


def test_a_file_with_more_than_tensors_is_not_run_and_the_error_says_what_to_do(tmp_path):
    model, srigl = trained(perceptron)
    path = tmp_path / "checkpoint.pt.tar"
    torch.save(checkpoint_of(model, srigl) | {"cfg": Config()}, path)
    fresh = perceptron()
    with Untouched(fresh), pytest.raises(FileFormatError, match=re.escape("weights_only=False")):
        load_released_checkpoint(path, fresh)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        FileFormatError, match=r"not a complete PyTorch checkpoint|more than tensors"
    ):
        load_released_checkpoint(path, fresh)
    torch.save([1], path)
    with pytest.raises(FileFormatError, match="holds a list"):
        load_released_checkpoint(path, fresh)
    with pytest.raises(FileNotFoundError):
        load_released_checkpoint(tmp_path / "none", fresh)
    with pytest.raises(ValueTypeError, match=r"model must be a torch.nn.Module"):
        load_released_checkpoint(path, None)
