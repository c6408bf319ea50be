"""Pruning in one shot to a constant fan-in, and models that other tools have pruned."""

import copy
import re

import numpy as np
import pytest

from srigl_core import SriglError, ValueTypeError
from srigl_core.reference import nnz_budget

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from srigl_core.torch import (  # noqa: E402
    CondensedLinear,
    SRigL,
    condense,
    prune_to_constant_fan_in,
    report,
)


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)
    )


class Branched(nn.Module):
    """Convolutions of several kinds, and attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
        self.second = nn.Conv2d(8, 8, (1, 2), stride=2, dilation=(1, 2), padding=(0, 1), bias=False)
        self.signal = nn.Conv1d(8, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x, scale=1.0):
        x = self.signal(self.second(self.first(x)).flatten(2)).transpose(1, 2)
        x = self.dropout(self.attention(query=x, key=x, value=x, need_weights=False)[0])
        return scale * self.head(x.mean(1))


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(scores, mask):
    """Whether no score that is left out in a row exceeds one that is kept."""
    kept = torch.where(mask, scores, np.inf).flatten(1).amin(1)
    return (torch.where(mask, -np.inf, scores).flatten(1).amax(1) <= kept).all()


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("make", [perceptron, Branched])
def test_each_neuron_keeps_its_largest_weights_and_the_layer_its_budget(make, distribution):
    model, sparsity = make(), 0.6
    before = copy.deepcopy(model.state_dict())
    masks = prune_to_constant_fan_in(model, sparsity, distribution=distribution)
    parameters = dict(model.named_parameters())
    weights = {n: n if n in parameters else f"{n}.weight" for n in masks}
    for name, mask in masks.items():
        weight = before[weights[name]]
        counts = mask.flatten(1).sum(1)
        assert (counts == counts[0]).all()
        assert largest(weight.abs(), mask)
        assert torch.equal(parameters[weights[name]], weight * mask)
        if distribution == "uniform":
            assert counts[0] == nnz_budget(weight.numel(), sparsity) // len(weight)
    others = before.keys() - set(weights.values())
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in others)
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    n_neurons = sum(len(mask) for mask in masks.values())
    assert 0 <= total * (1 - sparsity) - kept <= n_neurons + len(masks)
    condensed = condense(copy.deepcopy(model), masks).eval()
    x = inputs(2, 24) if make is perceptron else inputs(2, 3, 6, 6)
    torch.testing.assert_close(condensed(x), model.eval()(x))


def test_ties_go_to_the_lower_column_and_zeros_may_be_kept():
    model = nn.Sequential(nn.Linear(5, 2))
    model[0].weight.data = torch.tensor([[1.0, -1.0, 1.0, 1.0, 2.0], [0.0, 0.0, -0.0, 0.0, 0.0]])
    mask = prune_to_constant_fan_in(model, 0.4)["0"].int().tolist()
    assert mask == [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]]


def test_wanda_scores_weights_by_the_norms_of_their_inputs():
    model, x = perceptron(), inputs(50, 24) * torch.linspace(0.1, 3, 24)
    weight = model[0].weight.detach().clone()
    hidden = model[1](model[0](x)).detach()
    later = model[2].weight.detach().clone()
    model.forward = lambda x: model[4](model[3](model[2](input=model[1](model[0](x)))))
    masks = prune_to_constant_fan_in(
        model, 0.5, method="wanda", calibration=[x[:20], (x[20:],)], exclude="4"
    )
    assert largest(weight.abs() * x.norm(dim=0), masks["0"])
    # The inputs are those of the dense model, although the layer before is pruned.
    assert largest(later.abs() * hidden.norm(dim=0), masks["2"])
    assert not largest(weight.abs(), masks["0"])


def captured(model, layer, x):
    """Return what a layer that is a module gets, as its rows."""
    found = []
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(x)
    handle.remove()
    return found[0]


def test_wanda_knows_the_inputs_of_convolutions_and_attention():
    """Condensed layers get windows and projections as rows, which are what wanda looks at."""
    model, x = Branched().eval(), inputs(5, 3, 6, 6)
    x[:, 0] *= 20
    weights = {
        "first": model.first.weight,
        "second": model.second.weight,
        "signal": model.signal.weight,
        "attention.in_proj_weight": model.attention.in_proj_weight,
        "attention.out_proj": model.attention.out_proj.weight,
        "head": model.head.weight,
    }
    weights = {name: weight.detach().clone() for name, weight in weights.items()}
    whole = copy.deepcopy(model)
    # Nearly full masks change nothing, since the weights that they leave out are zero.
    full = {}
    for name, weight in weights.items():
        mask = torch.ones_like(weight, dtype=torch.bool)
        mask.flatten(1)[:, 0] = False
        full[name] = mask
    for name, parameter in whole.named_parameters():
        key = name.removesuffix(".weight")
        if key in full:
            parameter.data *= full[key]
            weights[key] *= full[key]
    model.load_state_dict(whole.state_dict())
    condensed = condense(whole, full)
    masks = prune_to_constant_fan_in(model, 0.6, method="wanda", calibration={"x": x, "scale": 2.0})
    assert masks.keys() == weights.keys()
    places = {
        "attention.in_proj_weight": condensed.attention.in_proj,
        "attention.out_proj": condensed.attention.out_proj,
        **{name: getattr(condensed, name).linear for name in ("first", "second", "signal")},
        "head": None,
    }
    for name, layer in places.items():
        if layer is not None:
            rows = captured(condensed, layer, x)
            norms = rows.reshape(-1, rows.shape[-1]).norm(dim=0)
            scores = weights[name].flatten(1).abs() * norms
            # Rounding differs, so nearly equal scores may change places.
            mask = masks[name].flatten(1)
            assert largest(scores + mask * 1e-5 * scores.amax(), mask), name


def test_calibration_leaves_modes_statistics_and_hooks_as_they_were():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4))
    model[2].eval()
    before = copy.deepcopy(model[1].state_dict())
    once = prune_to_constant_fan_in(
        copy.deepcopy(model), 0.5, method="wanda", calibration=inputs(9, 8)
    )
    again = prune_to_constant_fan_in(model, 0.5, method="wanda", calibration=inputs(9, 8))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(model[1].state_dict()[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def unused():
    model = perceptron()
    model.add_module("other", nn.Linear(8, 8))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    return model


def infinite():
    model = perceptron()
    model[2].weight.data[0, 0] = float("inf")
    return model


REFUSED = {
    "method": (perceptron, {"method": "random"}, "method='random' is unknown; use one of magni"),
    "distribution": (perceptron, {"distribution": "flat"}, "distribution='flat' is unknown"),
    "sparsity": (perceptron, {"sparsity": 1.0}, r"sparsity=1.0 must be in \[0, 1\)"),
    "no inputs": (perceptron, {"method": "wanda"}, "pass batches of them as calibration"),
    "inputs": (
        perceptron,
        {"calibration": inputs(2, 24)},
        "but method='magnitude' does not use it",
    ),
    "no rows": (
        perceptron,
        {"method": "wanda", "calibration": inputs(0, 24)},
        "layer '0': no calibration input reached it",
    ),
    "arrays": (
        perceptron,
        {"method": "wanda", "calibration": np.ones((2, 24))},
        "a batch of calibration must be a tensor, a tuple of arguments or a mapping, got ndarray",
    ),
    "number": (
        perceptron,
        {"method": "wanda", "calibration": 3},
        "calibration must be a tensor, a tuple of arguments, .*, got int",
    ),
    "less than one": (
        perceptron,
        {"sparsity": 0.97, "distribution": "uniform"},
        "layer '0'.*'uniform' leaves 23 weights to 32 neurons, less than one",
    ),
    "not reached": (
        unused,
        {"method": "wanda", "calibration": inputs(2, 24)},
        "layer '4': no calibration input reached it",
    ),
    "infinite": (infinite, {}, "layer '2': a weight or an input is not finite"),
    "infinite input": (
        perceptron,
        {"method": "wanda", "calibration": inputs(2, 24) / 0},
        "layer '0': a weight or an input is not finite",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_pruned_is_said_and_the_model_is_left_as_it_was(what):
    make, options, message = REFUSED[what]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SriglError, match=message):
        prune_to_constant_fan_in(model, **{"sparsity": 0.5} | options)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueTypeError, match=r"must be a torch\.nn\.Module"):
        prune_to_constant_fan_in([], 0.5)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)

    def forward(self, x, gate):
        return self.fc(x * gate)


@pytest.mark.parametrize("kind", ["batch", "batches", "loader"])
def test_a_batch_of_several_arguments_is_one_call(kind):
    """A tuple alone is a batch, not several."""
    x, gate = inputs(6, 8), torch.tensor([1.0] * 4 + [0.0] * 4)
    data = torch.utils.data.TensorDataset(x, gate.expand(6, 8))
    calibration = {
        "batch": (x, gate),
        "batches": [(x[:4], gate), [x[4:], gate]],
        "loader": torch.utils.data.DataLoader(data, batch_size=3),
    }[kind]
    masks = prune_to_constant_fan_in(Gated(), 0.5, method="wanda", calibration=calibration)
    assert masks["fc"][:, :4].all()
    assert not masks["fc"][:, 4:].any()


def test_srigl_goes_on_from_a_pruned_model():
    model = perceptron()
    masks = prune_to_constant_fan_in(model, 0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    srigl = SRigL(model, optimizer, masks=masks, schedule=200, mode="condensed")
    sparse = {name: mask for name, mask in masks.items() if not mask.all()}
    assert sparse
    assert all(torch.equal(srigl.mask(name), mask) for name, mask in sparse.items())


# ---------------------------------------------------------------- padding


def unstructured(model, sparsity=0.8):
    """Prune a model over whole layers, so that rows differ in length."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            prune.l1_unstructured(module, "weight", sparsity)
            prune.remove(module, "weight")
    return model


def test_rows_are_padded_with_zeros_and_the_warning_says_what_it_costs():
    model = unstructured(perceptron())
    model[0].weight.data[5] = 0  # stays ablated
    dense = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="rows were padded with zeros") as warned:
        condense(model, "nonzero", pad=True, exclude="4")
    message = str(warned[0].message)
    for place in ("0", "2"):
        weight, layer = dense[int(place)].weight.detach(), model[int(place)]
        counts = weight.count_nonzero(dim=1)
        assert torch.equal(layer.weight, weight)
        assert layer.fan_in == counts.max()
        assert layer.n_active == counts.count_nonzero()
        before, after = int(counts.sum()), layer.fan_in * layer.n_active
        cost = f"'{place}' has {after:,} weights in place of {before:,} ({after / before - 1:+.0%})"
        mean = f"{layer.fan_in} a row, where the mean was {before / layer.n_active:.1f}"
        assert f"{cost}, {mean}" in message
        used = layer.mask.reshape(weight.shape)
        first_unused = (weight == 0).int().cumsum(1)
        added = used & (weight == 0)
        missing = counts.max() - counts
        assert torch.equal(
            added, (weight == 0) & (first_unused <= missing[:, None]) & (counts > 0)[:, None]
        )
    x = inputs(3, 24)
    torch.testing.assert_close(model(x), dense(x))
    assert report(model).layers[0].fan_in == model[0].fan_in


def test_masks_are_padded_with_zeros_whatever_the_weight_has_there():
    model = perceptron()
    masks = {"0": torch.rand(32, 24, generator=torch.Generator().manual_seed(0)) < 0.3}
    expected = model[0].weight.detach() * masks["0"]
    with pytest.warns(UserWarning, match="layer '0' has"):
        condense(model, masks, pad=True)
    assert torch.equal(model[0].weight, expected)


def test_nothing_is_said_of_padding_where_rows_are_of_one_length(recwarn):
    model = perceptron()
    masks = prune_to_constant_fan_in(model, 0.7)
    condense(model, masks, pad=True)
    assert not recwarn


def test_without_pad_the_error_names_it():
    with pytest.raises(SriglError, match=r"not constant fan-in.*condense\(\.\.\., pad=True\)"):
        condense(unstructured(perceptron()), "nonzero")
    with pytest.raises(SriglError, match="no active weight") as raised:
        condense(perceptron(), {"0": torch.zeros(32, 24, dtype=torch.bool)})
    assert "pad=True" not in str(raised.value)


# ---------------------------------------------------------------- models of other tools


def n_of_m(weight, n, m):
    groups = weight.abs().reshape(len(weight), -1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(2, groups.topk(n, dim=2).indices, True).reshape(weight.shape)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_a_model_with_n_of_m_weights_is_condensed_as_it_is(n, m):
    model = perceptron()
    for layer in model[::2]:
        layer.weight.data *= n_of_m(layer.weight, n, m)
    dense = copy.deepcopy(model)
    condense(model, "nonzero")
    assert [layer.fan_in for layer in model[::2]] == [24 * n // m, 32 * n // m, 16 * n // m]
    torch.testing.assert_close(model(inputs(3, 24)), dense(inputs(3, 24)))


def test_a_model_whose_neurons_are_removed_is_condensed_as_it_is():
    model = perceptron()
    for layer in model[:3:2]:
        prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
        prune.remove(layer, "weight")
    dense = copy.deepcopy(model)
    condense(model, "nonzero")
    assert [(layer.n_active, layer.fan_in) for layer in model[:3:2]] == [(16, 24), (8, 32)]
    torch.testing.assert_close(model(inputs(3, 24)), dense(inputs(3, 24)))


def pruned_by_torch():
    model = perceptron()
    prune.custom_from_mask(model[2], "weight", n_of_m(model[2].weight, 1, 4))
    return model, lambda: prune.remove(model[2], "weight")


def pruned_by_a_sparsifier():
    ao = pytest.importorskip("torch.ao.pruning")
    model = perceptron()
    options = {"sparsity_level": 1.0, "sparse_block_shape": (1, 4), "zeros_per_block": 2}
    sparsifier = ao.WeightNormSparsifier(**options)
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])
    sparsifier.step()
    return model, sparsifier.squash_mask


CALLS = {
    pruned_by_torch: "torch.nn.utils.prune.remove(layer, 'weight')",
    pruned_by_a_sparsifier: "sparsifier.squash_mask()",
}


@pytest.mark.filterwarnings("ignore")  # what torch.ao says of itself
@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_pruning_that_is_not_permanent_is_an_error_that_names_the_call(make):
    model, make_permanent = make()
    expected = model(inputs(3, 24))
    message = rf"layer '2' computes its weight.*permanent with {re.escape(CALLS[make])}"
    full = torch.ones(16, 32, dtype=torch.bool)
    for masks in ("nonzero", {"2": full}):
        with pytest.raises(SriglError, match=message):
            condense(model, masks)
    assert type(model[0]) is nn.Linear
    with pytest.raises(SriglError, match=message):
        prune_to_constant_fan_in(model, 0.5, include="2")
    make_permanent()
    condense(model, "nonzero")
    assert isinstance(model[2], CondensedLinear)
    torch.testing.assert_close(model(inputs(3, 24)), expected)
