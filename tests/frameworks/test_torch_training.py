"""SRigL attached to PyTorch models: masked and condensed training are one algorithm."""

import copy
import gc
import importlib
import io
import os
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
from training_options import training_options

from srigl_core import LayerOptions, SriglError, ValueTypeError
from srigl_core.reference import UpdateSchedule

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from srigl_core.torch import CondensedConv2d, CondensedLinear, SRigL  # noqa: E402

SCHEDULE = UpdateSchedule(t_end=1000, delta_t=3, alpha=0.5)
OPTIONS = {"sparsity": 0.7, "schedule": SCHEDULE, "gamma_sal": 0.9, "seed": 1}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5),
}


def perceptron(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).to(dtype)


def convolutional(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2, padding="valid", padding_mode="zeros"),
        nn.Flatten(),
        nn.Linear(32, 5),
    ]
    return nn.Sequential(*layers).to(dtype)


INPUTS = {perceptron: (20,), convolutional: (3, 6, 6)}


def batch(shape, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, *shape, generator=generator, dtype=dtype)
    return x, torch.randint(0, 5, (16,), generator=generator)


@pytest.fixture(params=["masked", "condensed"])
def mode(request):
    return request.param


def attach(model, optimizer=None, **options):
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return SRigL(model, optimizer, **training_options(**(OPTIONS | options)))


class Run:
    """A model in training."""

    def __init__(self, mode, *, make=perceptron, optimizer="momentum", parts=1, **options):
        self.model, self.shape, self.parts = make(), INPUTS.get(make, (20,)), parts
        self.optimizer = OPTIMIZERS.get(optimizer, optimizer)(self.model.parameters())
        self.srigl = attach(self.model, self.optimizer, mode=mode, **options)
        self.n_steps = self.n_updates = 0

    def loss(self, step, dtype=torch.float64):
        x, y = batch(self.shape, step, dtype)
        return nn.functional.cross_entropy(self.model(x), y)

    def go(self, steps):
        for _ in range(steps):
            self.n_steps += 1
            self.optimizer.zero_grad()
            x, y = batch(self.shape, self.n_steps)
            for part in range(self.parts):
                some = slice(part, None, self.parts)
                loss = nn.functional.cross_entropy(self.model(x[some]), y[some])
                (loss / self.parts).backward()
            self.finish()
        return self

    def finish(self):
        """End a step after its backward passes."""
        self.srigl.after_backward()
        self.optimizer.step()
        self.n_updates += bool(self.srigl.step())

    def masks(self):
        return {name: self.srigl.mask(name) for name in self.srigl.trainer.budgets}

    def weights(self):
        """Return the dense weight of each layer, as a matrix."""
        weights = {}
        for name in self.srigl.trainer.budgets:
            layer = self.model.get_submodule(name)
            layer = layer.linear if isinstance(layer, CondensedConv2d) else layer
            dense = layer.to_linear() if isinstance(layer, CondensedLinear) else layer
            weights[name] = dense.weight.detach().flatten(1)
        return weights


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_same_training(masked, condensed, n_updates):
    """Two runs have the same masks, and the same weights up to rounding."""
    assert masked.n_updates == condensed.n_updates == n_updates
    assert same(condensed.masks(), {name: masked.srigl.mask(name) for name in condensed.masks()})
    for name, weight in masked.weights().items():
        torch.testing.assert_close(condensed.weights()[name], weight)


@pytest.mark.parametrize(
    ("make", "optimizer"), [*((perceptron, name) for name in OPTIMIZERS), (convolutional, "Adam")]
)
def test_masked_training_keeps_masks_weights_and_state_in_step(make, optimizer):
    run = Run("masked", make=make, optimizer=optimizer)
    seen = []
    for _ in range(10):
        before = run.masks()
        run.go(1)
        masks = run.masks()
        seen.append(masks)
        for name, mask in masks.items():
            layer = run.model.get_submodule(name)
            counts = mask.flatten(1).sum(1)
            assert counts[counts > 0].unique().numel() == 1
            assert not layer.weight[~mask].any()
            assert layer.weight.grad.any()
            assert not layer.weight.grad[~before[name]].any()
            for part in run.optimizer.state[layer.weight].values():
                if torch.is_tensor(part) and part.shape == mask.shape:
                    assert not part[~mask].any()
    assert run.n_updates == 3
    assert not same(seen[0], seen[-1])
    assert same(seen[0], seen[1])


@pytest.mark.parametrize(("make", "optimizer"), [(perceptron, "Adam"), (convolutional, "momentum")])
def test_condensed_and_masked_training_have_the_same_masks_for_20_updates(make, optimizer):
    masked = Run("masked", make=make, optimizer=optimizer)
    condensed = Run("condensed", make=make, optimizer=optimizer)
    start = masked.masks()
    assert same(start, condensed.masks())
    for _ in range(20):
        masked.go(3)
        condensed.go(3)
        assert same(masked.masks(), condensed.masks())
    assert_same_training(masked, condensed, 20)
    assert not same(masked.masks(), start)
    assert any(n < len(start[name]) for name, n in condensed.srigl.trainer.n_active.items())
    dense = sum(p.numel() for p in masked.model.parameters())
    assert sum(p.numel() for p in condensed.model.parameters()) < 0.45 * dense


@pytest.mark.parametrize(
    "options",
    [
        {"grad_window": 3},
        {"parts": 4},
        {"init": "kaiming_normal"},
        {"saliency_scope": "all"},
        {"gamma_sal": None, "min_salient": 2},
        {"ablate_last": True},
        {"distribution": "uniform"},
        {"exclude": ["4"]},
        {"include": ["2"], "sparsity": 0.9},
        {"layers": {"0": LayerOptions(dense=True)}, "sparsity": 0.5},
        {"grown_init": 0.01},
    ],
    ids=str,
)
def test_both_modes_agree_whatever_the_options(options):
    masked, condensed = Run("masked", **options).go(12), Run("condensed", **options).go(12)
    assert_same_training(masked, condensed, 4)


def discarded(run, x, *, set_to_none=True):
    run.model(3 * x).square().sum().backward()  # as for the loss of another network
    run.optimizer.zero_grad(set_to_none=set_to_none)


def of_the_input(run, x):
    x = x.clone().requires_grad_()
    torch.autograd.grad(run.model(3 * x).square().sum(), x)


def of_the_weights(run, x):
    torch.autograd.grad(run.model(3 * x).square().sum(), list(run.model.parameters()))


def of_the_input_in_place(run, x):
    x = x.clone().requires_grad_()
    run.model(3 * x).square().sum().backward(inputs=[x])


def penalty(run, x):
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(run.model(x).exp().sum(), x, create_graph=True)
    return dx.square().mean()


ASIDE = {
    "discarded": discarded,
    "set to zero": lambda run, x: discarded(run, x, set_to_none=False),
    "of the input": of_the_input,
    "of the weights": of_the_weights,
    "of the input in place": of_the_input_in_place,
    "penalty": penalty,
}


WITHIN = ("of the input", "of the weights", "penalty")


@pytest.mark.parametrize("what", ASIDE)
def test_gradients_that_the_optimizer_does_not_get_do_not_move_connections(what):
    masked, condensed = Run("masked", grad_window=2), Run("condensed", grad_window=2)
    for run in (masked, condensed):
        for step in range(12):
            run.optimizer.zero_grad()
            x, y = batch(run.shape, step)
            if what.startswith(("discarded", "set")):
                ASIDE[what](run, x)
            for some in (slice(0, 8), slice(8, 16)):  # an accumulation of two parts
                extra = ASIDE[what](run, x) if what in WITHIN else None
                loss = nn.functional.cross_entropy(run.model(x[some]), y[some])
                (loss if extra is None else loss + extra).backward()
                if what == "of the input in place":
                    ASIDE[what](run, x)
            run.finish()
    assert_same_training(masked, condensed, 4)


@pytest.mark.parametrize("scheduled", [False, True])
def test_groups_of_parameters_keep_their_options_in_both_modes(scheduled):
    def grouped(parameters):
        parameters = list(parameters)
        return torch.optim.AdamW(
            [
                {"params": [parameters[0], parameters[4]], "lr": 0.02, "weight_decay": 0.3},
                {"params": [parameters[2]], "lr": 0.004, "betas": (0.5, 0.9)},
                {"params": parameters[1::2], "weight_decay": 0.0, "amsgrad": True},
            ]
        )

    def weighted(run):
        return [p for group in run.optimizer.param_groups[:2] for p in group["params"]]

    masked, condensed = runs = [Run(mode, optimizer=grouped) for mode in ("masked", "condensed")]
    options = [
        [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
        for run in runs
    ]
    assert options[0] == options[1]
    layers = [condensed.model[i] for i in (0, 4, 2)]
    assert all(p is layer.values for p, layer in zip(weighted(condensed), layers, strict=True))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.8) for run in runs]
    for _ in range(18):
        for run, scheduler in zip(runs, schedulers, strict=True):
            run.go(1)
            if scheduled:
                scheduler.step()
    assert_same_training(masked, condensed, 6)


def test_a_frozen_layer_is_left_out_or_keeps_its_mask(mode):
    def frozen():
        model = perceptron()
        model[0].requires_grad_(False)
        return model

    dense = {"layers": {"0": LayerOptions(dense=True)}, "sparsity": 0.5}
    for options in ({"exclude": ["0"]}, dense):
        run = Run(mode, make=frozen, **options).go(9)
        assert run.n_updates == 3
        assert torch.equal(run.model[0].weight, frozen()[0].weight)
    run = Run(mode, make=frozen).go(9)
    assert run.srigl.left_dense["0"].startswith("is frozen")
    with pytest.raises(SriglError, match="layer '0' is frozen"):
        Run(mode, make=frozen, include=["0"])
    run = Run(mode).go(2)
    for parameter in run.model[0].parameters():
        parameter.requires_grad_(False)
    run.optimizer.zero_grad()
    mask, weight = run.masks()["0"], run.weights()["0"]
    with pytest.warns(UserWarning, match="no gradient reached layer '0'"):
        run.go(1)
    assert torch.equal(run.masks()["0"], mask)
    assert torch.equal(run.weights()["0"], weight)
    assert run.srigl.trainer.step_count == 3


def test_an_optimizer_that_has_its_parameters_twice_moves_the_condensed_ones():
    """LBFGS has its parameters in another list, too."""
    run = Run("condensed", optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2))
    before = [p.detach().clone() for p in run.model.parameters()]

    def closure():
        run.optimizer.zero_grad()
        loss = run.loss(0)
        loss.backward()
        return loss

    run.optimizer.step(closure)
    assert not any(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))


def test_a_scaler_that_is_switched_off_skips_no_step(mode):
    run, scaler = Run(mode), torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(run.loss(0) * float("inf")).backward()
    run.srigl.after_backward(scaler=scaler)
    scaler.step(run.optimizer)
    run.srigl.step()
    assert run.srigl.trainer.step_count == 1


def test_a_deep_copy_trains_the_same_and_independently(mode):
    run = Run(mode, optimizer="Adam", grad_window=3).go(4)
    twin = copy.deepcopy(run)
    assert not same(twin.go(8).masks(), run.masks())
    assert run.srigl.trainer.step_count == 4
    assert same(run.go(8).masks(), twin.masks())
    assert same(run.weights(), twin.weights())
    twin.srigl.detach()
    with pytest.raises(SriglError, match=r"has an SRigL already|no dense layer is left"):
        attach(run.model, run.optimizer)


def test_a_mask_of_no_layer_is_an_error_with_the_layers_names(mode):
    with pytest.raises(SriglError, match="no layer is called 'nope'; the layers are: 0"):
        Run(mode).srigl.mask("nope")


def test_a_model_may_be_converted_between_steps(mode):
    run = Run(mode, optimizer="SGD", grad_window=3)
    run.model.float()
    for step in range(4):
        run.optimizer.zero_grad()
        run.loss(step, torch.float32).backward()
        run.finish()
    assert run.n_updates == 1


def test_replicas_that_an_update_would_not_see_are_refused():
    run = Run("condensed").go(1)
    layer = run.model[0]
    assert not run.srigl.trainer.needs_grad
    layer._replicate_for_data_parallel()  # as DataParallel does on several devices
    run.go(1)
    with pytest.raises(SriglError, match="use DistributedDataParallel in place of DataParallel"):
        layer._replicate_for_data_parallel()
    with torch.no_grad():
        layer._replicate_for_data_parallel()


def test_a_window_is_stored_once(monkeypatch):
    """It has the layers' dtype, and an update makes no second copy."""
    module = importlib.import_module("srigl_core.torch.condensed_layers")
    others = gc.get_objects()  # other tests' tensors; held, so that no id is used twice
    of_others = set(map(id, others))
    model = convolutional(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    srigl = attach(model, optimizer, mode="condensed")

    def tensor_bytes():
        objects = [x for x in gc.get_objects() if id(x) not in of_others]
        tensors = [x for x in objects if type(x) in (torch.Tensor, nn.Parameter)]
        return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    def step(number):
        optimizer.zero_grad()
        x, y = batch((3, 6, 6), number, torch.bfloat16)
        nn.functional.cross_entropy(model(x.repeat(8, 1, 1, 1)), y.repeat(8)).backward()

    seen = []
    spy = lambda block, _: seen.append(tensor_bytes()) or block  # noqa: E731
    monkeypatch.setattr(module, "mean_of_ranks", spy)
    for number in range(3):
        step(number)
        srigl.after_backward()
        optimizer.step()
        before = tensor_bytes()
        srigl.step()
    assert seen
    assert max(seen) < before + 100_000  # a layer's block; the window itself has half a million


def test_a_scaled_loss_gives_the_same_masks_and_a_skipped_step_does_not_count(mode):
    plain, scaled = Run(mode).go(9), Run(mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped = 0
    while scaled.n_steps - skipped < 9:
        scaled.optimizer.zero_grad()
        overflows = scaled.n_steps == 5 and not skipped
        loss = scaled.loss(scaled.n_steps - skipped + 1)
        scaler.scale(loss * (float("inf") if overflows else 1)).backward()
        scaler.unscale_(scaled.optimizer)
        scaled.srigl.after_backward(scaler=scaler)
        scaler.step(scaled.optimizer)
        scaler.update()
        scaled.n_updates += bool(scaled.srigl.step())
        scaled.n_steps += 1
        skipped += overflows
    assert skipped == 1
    assert scaled.srigl.trainer.step_count == 9
    assert scaled.n_updates == plain.n_updates == 3
    assert same(plain.masks(), scaled.masks())


@pytest.mark.parametrize("cut", [4, 5, 6])
def test_resume_is_exact_also_in_the_middle_of_a_window(mode, cut):
    whole = Run(mode, optimizer="Adam", grad_window=3).go(12)
    first = Run(mode, optimizer="Adam", grad_window=3).go(cut)
    file = io.BytesIO()
    parts = {"model": first.model, "optimizer": first.optimizer, "srigl": first.srigl}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    second = Run(mode, optimizer="Adam", grad_window=3)
    for name in ("model", "optimizer", "srigl"):
        getattr(second, name).load_state_dict(states[name])
    second.n_steps = cut
    second.go(12 - cut)
    assert same(second.masks(), whole.masks())
    assert same(second.weights(), whole.weights())


def test_a_state_with_a_broken_window_is_refused_and_changes_nothing():
    taken, fresh = Run("condensed", grad_window=3).go(2), Run("condensed", grad_window=3)
    fresh.model.load_state_dict(taken.model.state_dict())
    state = taken.srigl.state_dict()
    del state["window"][1][0]["2"]
    with pytest.raises(SriglError, match=r"not a whole state_dict\(\): KeyError\('2'\)"):
        fresh.srigl.load_state_dict(state)
    assert fresh.srigl.trainer.step_count == 0
    assert not fresh.srigl.state_dict()["window"]


def test_a_state_of_another_run_is_refused():
    masked, condensed = Run("masked").go(3), Run("condensed").go(3)
    with pytest.raises(SriglError, match="not of an SRigL with mode='condensed', but of 'masked'"):
        condensed.srigl.load_state_dict(masked.srigl.state_dict())
    fresh = Run("condensed")
    before = fresh.masks()
    with pytest.raises(SriglError, match=r"layer '0' has other connections.*load the model's"):
        fresh.srigl.load_state_dict(condensed.srigl.state_dict())
    assert same(fresh.masks(), before)
    assert fresh.srigl.trainer.step_count == 0
    other = Run("condensed", sparsity=0.5)
    with pytest.raises(SriglError, match="taken with other settings"):
        other.srigl.load_state_dict(condensed.srigl.state_dict())


def test_projections_of_attention_are_masked_by_name():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = ["in_proj_weight", "out_proj"]
    srigl = attach(model, optimizer, include=names)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(step))
        model(x, x, x)[0].square().mean().backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    assert list(srigl.trainer.budgets) == names
    assert not model.in_proj_weight[~srigl.mask("in_proj_weight")].any()
    assert 0.65 < (model.in_proj_weight == 0).float().mean() < 0.9


GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    {"kernel_size": 2, "padding": "valid", "bias": False},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_condensed_convolution_is_the_masked_one(geometry):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, **geometry)).double()
    masked = copy.deepcopy(model)
    attach(masked, sparsity=0.5)
    attach(model, sparsity=0.5, mode="condensed")
    assert isinstance(model[0], CondensedConv2d)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    expected, result = masked(x), model(x)
    torch.testing.assert_close(result, expected)
    direction = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(result, x, direction)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, direction)[0])


def test_a_convolution_says_what_input_it_takes():
    linear = CondensedLinear(16, 3, fan_in=2)
    conv = CondensedConv2d(linear, (2, 2))
    with pytest.raises(SriglError, match=r"x has shape \(4, 9, 8\), but must be \(batch, 4,"):
        conv(torch.zeros(4, 9, 8))
    with pytest.raises(SriglError, match="9 places, which do not divide the layer's 16 inputs"):
        CondensedConv2d(linear, (3, 3))


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))


def hooked(register):
    model = perceptron()
    register(model[0])
    return model


CONDENSED = {"mode": "condensed", "sparsity": 0.5}
HOOKS = {
    "hooks": lambda layer: layer.register_forward_hook(print),
    "hooks of a weight": lambda layer: layer.weight.register_hook(print),
    "hooks of the backward pass": lambda layer: layer.register_full_backward_pre_hook(print),
}


BAD = {
    "unknown mode": (perceptron, {"mode": "sparse"}, "mode='sparse' is unknown"),
    "unknown init": (perceptron, {"init": "xavier"}, "init='xavier' is unknown"),
    "unknown layer": (
        perceptron,
        {"include": ["7"]},
        "no layer or parameter '7'; its layers are 0, 2, 4",
    ),
    "unknown to leave out": (perceptron, {"exclude": ["head"]}, "no layer or parameter 'head'"),
    "all left out": (perceptron, {"exclude": ["0", "2", "4"]}, "no dense layer is left"),
    "bias": (perceptron, {"include": ["0.bias"]}, r"'0.bias' has a weight of shape \(32,\)"),
    "too small": (perceptron, {"sparsity": 0.995}, r"layer '\d': nnz_budget=\d+ gives each"),
    "sparsity": (perceptron, {"sparsity": 1.5}, "sparsity=1.5"),
    "unstructured": (perceptron, CONDENSED | {"method": "rigl"}, "'rigl' cannot train condensed"),
    "shared": (tied, {}, "layer '0' shares its weight"),
    "computed": (parametrized, {}, "layer '0' computes its weight"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8)), {}, "layer '0' has no weight yet"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), CONDENSED, "has groups=2"),
    "axes": (
        lambda: nn.Sequential(nn.Conv3d(4, 4, 3)),
        CONDENSED,
        r"'0' \(Conv3d, weight\) cannot",
    ),
    "the model itself": (lambda: nn.Linear(8, 8), CONDENSED, "wrap the model in nn.Sequential"),
} | {
    what: (partial(hooked, register), CONDENSED | {"include": ["0"]}, "layer '0' has hooks")
    for what, register in HOOKS.items()
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_attached_is_said_and_the_model_is_left_as_it_was(what):
    make, options, message = BAD[what]
    model = make()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1)), *model.parameters()], lr=0.1)
    modules, before = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(SriglError, match=message):
        attach(model, optimizer, **options)
    assert list(model.modules()) == modules
    for name, tensor in model.state_dict().items():
        assert what == "lazy" or torch.equal(tensor, before[name])


def test_an_optimizer_of_other_parameters_and_a_second_attachment_are_refused():
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SriglError, match="layer '0': the optimizer does not hold its weight"):
        attach(perceptron(), optimizer)
    with pytest.raises(ValueTypeError, match=r"model must be a torch.nn.Module"):
        attach("model", optimizer)
    first = attach(model, optimizer)
    for whole in (model, nn.Sequential(nn.ReLU(), model[:3])):
        with pytest.raises(SriglError, match=r"layer '(1\.)?0' has an SRigL already"):
            attach(whole, optimizer)
    first.detach()
    with pytest.raises(SriglError, match=r"layer '0' is sparse already.*masks='nonzero'"):
        attach(model, optimizer, mode="condensed")
    attach(model, optimizer, mode="condensed", masks="nonzero").detach()
    with pytest.raises(SriglError, match="no dense layer is left"):
        attach(model, optimizer)


def test_a_model_that_changed_after_attaching_is_noticed(mode):
    run = Run(mode)
    run.model[2] = nn.Linear(32, 24).double()
    with pytest.raises(SriglError, match="layer '2'"):
        run.go(1)


def test_a_missing_call_in_a_loop_is_an_error(mode):
    run = Run(mode).go(2)
    run.optimizer.zero_grad()
    with pytest.raises(SriglError, match=r"no sparse layer has a gradient.*after loss.backward"):
        run.srigl.after_backward()
    run.loss(3).backward()
    run.optimizer.zero_grad()
    with pytest.raises(SriglError, match=r"no sparse layer has a gradient.*before zero_grad"):
        run.srigl.after_backward()
    run.loss(3).backward()
    run.optimizer.step()
    with pytest.raises(SriglError, match="gradient was"):
        run.srigl.step()
    assert run.srigl.trainer.step_count == 2


def test_between_windows_nothing_is_kept(mode):
    run = Run(mode).go(1)
    assert not run.srigl.trainer.needs_grad
    assert len(run.srigl.state_dict()["window"]) == 0
    x, y = batch(run.shape, 9)
    assert tensors_kept_of_a_step(run.model, x, y) <= 0


@pytest.mark.parametrize("end", ["detached", "let go"])
def test_after_an_srigl_nothing_is_kept(end):
    """The window would keep inputs and gradients."""
    run = Run("condensed").go(2)
    assert run.srigl.trainer.needs_grad
    model, (x, y) = run.model, batch(run.shape, 9)
    if end == "detached":
        run.srigl.detach()
    else:
        del run
    assert tensors_kept_of_a_step(model, x, y) <= 0


def tensors_kept_of_a_step(model, x, y):
    counts = []
    for _ in range(3):
        nn.functional.cross_entropy(model(x), y).backward()
        gc.collect()
        counts.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
    return counts[-1] - counts[0]


def test_condensed_training_keeps_no_dense_weight_alive():
    model = perceptron()
    weights = [weakref.ref(model[i].weight) for i in (0, 2, 4)]
    srigl = attach(model, mode="condensed")
    gc.collect()
    assert [weight() for weight in weights] == [None, None, None]
    srigl.detach()


def test_a_step_with_gradients_that_are_not_finite_is_not_counted_or_is_an_error(mode):
    run = Run(mode).go(2)
    before = run.masks()
    x, y = batch(run.shape, 3)
    for has_stepped in (False, True):
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x * float("nan")), y).backward()
        run.srigl.after_backward()
        if has_stepped:
            run.optimizer.step()
            with pytest.raises(SriglError, match="layer '0': weight is not finite after a step"):
                run.srigl.step()
        else:
            assert not run.srigl.step()
    assert run.srigl.trainer.step_count == 2
    assert same(run.masks(), before)


DISTRIBUTED = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from srigl_core import SriglError, TrainingConfig
from srigl_core.reference import UpdateSchedule
from srigl_core.torch import SRigL

def train(rank, world, group, mode, fault):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seed = 1 + (fault == "seed" and rank == world - 1)
    srigl = SRigL(
        model, optimizer, mode=mode, sparsity=0.7, process_group=group,
        config=TrainingConfig(gamma_sal=0.9, seed=seed),
        schedule=UpdateSchedule(t_end=1000, delta_t=3, alpha=0.5),
    )
    unwrapped = fault == "unwrapped"
    wrapped = model if unwrapped else DistributedDataParallel(model, process_group=group)
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 20, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (8,), generator=generator)
        optimizer.zero_grad()
        mine = slice(rank, None, world)
        nn.functional.cross_entropy(wrapped(x[mine]), y[mine]).backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    return torch.cat([srigl.mask(name).reshape(-1) for name in srigl.trainer.budgets])

def work(rank, file, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4)
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 4)}
    for case in cases:
        world, mode, fault = case.split(",")
        world = int(world)
        if rank < world:
            try:
                masks = train(rank, world, groups[world], mode, fault)
            except SriglError as error:
                line = str(error)
            else:
                everyones = [None] * world
                dist.all_gather_object(everyones, masks, group=groups[world])
                same = all(torch.equal(masks, theirs) for theirs in everyones)
                number = sum(2**i for i in masks.nonzero().flatten().tolist())
                line = f"all the same: {same}, {number}"
            if rank == 0:
                print(line, flush=True)
        dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1], sys.argv[2:]), nprocs=4)
"""


@pytest.mark.timeout(300)
def test_ranks_have_the_same_masks_and_one_that_differs_is_named(tmp_path):
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    cases = [f"{world},{mode}," for mode in ("masked", "condensed") for world in (1, 2, 4)]
    faults = ["2,masked,seed", "2,masked,unwrapped", "4,condensed,seed"]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "ranks"), *cases, *faults],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases) + len(faults)
    assert all(line.startswith("all the same: True") for line in lines[: len(cases)])
    assert len(set(lines[: len(cases)])) == 1, "the number of ranks, or the mode, changed masks"
    seed, unwrapped, of_four = lines[len(cases) :]
    assert "the masks of rank 1 differ from those of rank 0, first in layer '0'" in seed
    assert "the masks of rank 1 differ" in unwrapped
    assert "the masks of rank 3 differ" in of_four


def test_a_wrapped_model_is_refused():
    model = perceptron()
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(SriglError, match="attach SRigL to the model itself first"):
        attach(wrapped)


def test_the_report_names_every_layer():
    report = Run("condensed").srigl.report()
    assert [line.split()[0] for line in report.splitlines()[1:4]] == ["0", "2", "4"]
    assert np.isclose(Run("masked").srigl.trainer.sparsity, 0.7, atol=0.03)
