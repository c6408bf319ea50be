"""What SRigL keeps beside a model is checked against it: masks, states, and the calls of a loop."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest

from srigl_core import LayerOptions, SriglError, TrainingConfig, ValueTypeError
from srigl_core.reference import UpdateSchedule

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

from srigl_core.torch import SRigL, condense, load_model, save_model  # noqa: E402

MODES = ("masked", "condensed")
SCHEDULE = UpdateSchedule(t_end=200, delta_t=4)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).double()


def make(mode, *, weights=0, **options):
    model = network(weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"sparsity": 0.6, "schedule": SCHEDULE, "mode": mode} | options
    return model, optimizer, SRigL(model, optimizer, **options)


def step(model, optimizer, srigl, i, *, finish=True):
    optimizer.zero_grad()
    x = torch.from_numpy(np.random.default_rng(i).standard_normal((9, 16)))
    (model(x) - 1).square().mean().backward()
    srigl.after_backward()
    if finish:
        optimizer.step()
        return srigl.step()


def train(run, steps):
    for i in steps:
        step(*run, i)
    return run


def dense(model, srigl, name="0"):
    layer = model.get_submodule(name)
    return (layer.to_linear() if srigl.mode == "condensed" else layer).weight.detach().clone()


# ---------------------------------------------------------------- states


def write_dense(model, _):
    with torch.no_grad():
        model[2].weight.normal_()


def write_through_data(model, _):
    model[2].weight.data[:, 3] = 1.0


def load_another(model, other):
    model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("write", [write_dense, write_through_data, load_another])
def test_masked_weights_that_were_written_outside_their_masks_are_reported_and_kept(write):
    run = train(make("masked"), range(10))
    other = train(make("masked", weights=3, seed=5), range(30))
    write(run[0], other[0])
    before = [p.detach().clone() for p in run[0].parameters()]
    with pytest.raises(SriglError, match=r"layer '[02]' has \d+ weights .* outside its mask.*load"):
        step(*run, 10)
    for parameter, kept in zip(run[0].parameters(), before, strict=True):
        assert torch.equal(parameter, kept)


@pytest.mark.parametrize("mode", MODES)
def test_a_resume_without_the_state_of_srigl_is_an_error_and_can_be_made_good(mode):
    first = train(make(mode), range(30))
    states = [copy.deepcopy(part.state_dict()) for part in first]
    train(first, range(30, 40))
    run = make(mode, weights=2)
    run[0].load_state_dict(states[0])
    run[1].load_state_dict(states[1])
    with pytest.raises(SriglError, match=r"layer '0' has .*srigl.load_state_dict"):
        step(*run, 30)
    run[2].load_state_dict(states[2])
    train(run, range(30, 40))
    assert torch.equal(dense(run[0], run[2]), dense(first[0], first[2]))


def test_states_may_be_loaded_in_any_order_in_masked_training():
    first = train(make("masked"), range(30))
    run = make("masked", weights=2)
    for part in (2, 1, 0):
        run[part].load_state_dict(copy.deepcopy(first[part].state_dict()))
    for each in (first, run):
        train(each, range(30, 40))
    assert torch.equal(run[0][0].weight, first[0][0].weight)


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_state_is_not_loaded_into_a_condensed_layer(strict):
    model, _, _ = make("condensed")
    before = model[0].values.detach().clone()
    with pytest.raises(SriglError, match=r"0\.weight .* dense weight, but the layer is condensed"):
        model.load_state_dict(network(1).state_dict(), strict=strict)
    assert torch.equal(model[0].values, before)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_an_optimizer_and_srigl_are_pickled_together(mode):
    run = make(mode, grad_window=2)
    train(run, range(7))  # in the middle of a window
    buffer = io.BytesIO()
    torch.save(run, buffer)
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(run)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(run),
    ]
    for each in (run, *copies):
        train(each, range(8, 20))
    for model, optimizer, srigl in copies:
        assert torch.equal(dense(model, srigl), dense(run[0], run[2]))
        assert torch.equal(srigl.mask("0"), run[2].mask("0"))
        if mode == "masked":
            with pytest.raises(SriglError, match="has an SRigL already"):
                SRigL(model, optimizer, sparsity=0.6, schedule=SCHEDULE, masks="nonzero")
        srigl.detach()


# ---------------------------------------------------------------- masks that are given


@pytest.mark.parametrize("mode", MODES)
def test_a_sparse_model_gets_no_second_mask(mode):
    model, optimizer, srigl = train(make("masked"), range(6))
    weights = [p.detach().clone() for p in model.parameters()]
    srigl.detach()
    options = {"schedule": SCHEDULE, "mode": mode}
    with pytest.raises(SriglError, match=r"layer '0' is sparse already: \d+ of its 512"):
        SRigL(model, optimizer, sparsity=0.6, **options)
    for parameter, kept in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, kept)
    SRigL(model, optimizer, sparsity=0.6, **options, init="kaiming_normal")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparsity", [None, 0.6])
def test_training_goes_on_with_given_masks(mode, sparsity):
    model, _, srigl = train(make("masked"), range(6))
    masks = {name: srigl.mask(name) for name in ("0", "2")}
    for given in (masks, {f"{n}.weight": m.numpy() for n, m in masks.items()}, "nonzero"):
        other = copy.deepcopy(model)
        if given == "nonzero":
            with torch.no_grad():
                for name, mask in masks.items():
                    other.get_submodule(name).weight[mask] += 1e-3
        weights = {name: other.get_submodule(name).weight.detach().clone() for name in masks}
        optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
        options = {"sparsity": sparsity, "schedule": SCHEDULE, "mode": mode, "masks": given}
        again = SRigL(other, optimizer, **options)
        for name, mask in masks.items():
            assert torch.equal(again.mask(name), mask)
            assert torch.equal(dense(other, again, name), weights[name])
        if sparsity is None:
            assert again.trainer.nnz == {n: int(m.sum()) for n, m in masks.items()}
        train((other, optimizer, again), range(6))
        assert again.trainer.n_updates == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_with_a_full_mask_stays_dense_and_others_are_drawn(mode):
    model = network()
    before = model[2].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks = {"2": torch.ones(8, 32, dtype=torch.bool)}
    srigl = SRigL(model, optimizer, sparsity=0.5, schedule=SCHEDULE, mode=mode, masks=masks)
    assert srigl.trainer.sparse_layers == ["0"]
    assert torch.equal(model[2].weight, before)
    srigl.detach()
    model = network()
    before = model[2].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = TrainingConfig(layers={"2": LayerOptions(ablate=False)})
    options = {"sparsity": 0.5, "schedule": SCHEDULE, "mode": mode, "masks": masks}
    SRigL(model, optimizer, config=config, **options)
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize("mode", MODES)
def test_masks_that_do_not_fit_are_refused_and_nothing_is_changed(mode):
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask = torch.zeros(32, 16, dtype=torch.bool)
    mask[:, :6] = True
    uneven = mask.clone()
    uneven[3, 7] = True
    for masks, message in (
        ("zeros", "masks='zeros' is unknown"),
        ([mask], "masks must be a mapping"),
        ({"1": mask}, "masks names '1'"),
        ({"0": mask.T}, "mask of layer '0' has shape"),
        ({"0": mask.int()}, "mask of layer '0' must be a tensor or array of bool"),
        ({"0": uneven}, "layer '0': .*constant fan-in"),
        ({"0": mask & False}, "layer '0'"),
    ):
        with pytest.raises((SriglError, ValueTypeError), match=message):
            SRigL(model, optimizer, sparsity=0.5, schedule=SCHEDULE, mode=mode, masks=masks)
    with pytest.raises(SriglError, match="layer '2': sparsity is missing"):
        SRigL(model, optimizer, schedule=SCHEDULE, mode=mode, masks={"0": mask})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def continued(model, mode="condensed", **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"schedule": SCHEDULE, "mode": mode} | options
    return model, optimizer, SRigL(model, optimizer, **options)


@pytest.mark.parametrize("sparsity", [None, 0.6])
@pytest.mark.parametrize("how", ["condensed", "loaded", "attached before"])
def test_condensed_layers_go_on_training(how, sparsity, tmp_path):
    masked, _, srigl = train(make("masked", gamma_sal=0.9), range(6))
    masks = {name: srigl.mask(name) for name in ("0", "2")}
    oracle = continued(copy.deepcopy(masked), "masked", masks=masks, sparsity=sparsity)
    model = condense(copy.deepcopy(masked), srigl)
    if how == "loaded":
        save_model(model, tmp_path / "m.safetensors")
        model = load_model(tmp_path / "m.safetensors", network(5))
    run = continued(model, sparsity=sparsity)
    if how == "attached before":
        run[2].detach()
        run = continued(model, sparsity=sparsity)
    for name, mask in masks.items():
        assert torch.equal(run[2].mask(name), mask)
    with pytest.raises(SriglError, match="layer '0' has an SRigL already"):
        continued(model)
    for i in range(20):
        for each in (run, oracle):
            step(*each, i)
        assert torch.equal(run[2].mask("0"), oracle[2].mask("0"))
    torch.testing.assert_close(dense(run[0], run[2]), dense(oracle[0], oracle[2]))
    assert run[2].trainer.n_updates == 5


def test_convolutions_and_attention_keep_their_names_when_they_go_on():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Conv1d(8, 16, 1), nn.Flatten(1), nn.Unflatten(1, (-1, 16)), layer)
    options = {"sparsity": 0.5, "seed": 3}
    first = continued(model, **options)[2]
    names, state = list(first.trainer.budgets), first.state_dict()
    assert {"0", "3.self_attn.in_proj_weight", "3.self_attn.out_proj"} <= set(names)
    first.detach()
    again = continued(model, **options)[2]
    assert list(again.trainer.budgets) == names
    assert {n: b.shape for n, b in again.trainer.budgets.items()} == {
        n: b.shape for n, b in first.trainer.budgets.items()
    }
    for name in names:
        assert torch.equal(again.mask(name), first.mask(name))
    assert state["connections"].keys() == again.state_dict()["connections"].keys()


def test_condensed_layers_beside_dense_ones():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"sparsity": 0.5, "schedule": SCHEDULE, "mode": "condensed"}
    SRigL(model, optimizer, include=["0"], **options).detach()
    before = model[0].to_condensed().connections
    srigl = SRigL(model, optimizer, **options)
    assert srigl.trainer.connections["0"] == before
    assert srigl.trainer.sparse_layers == ["0", "2"]
    srigl.detach()
    with torch.no_grad():  # "nonzero" is for the dense layers among them
        model[0].values[:3] = 0
    srigl = SRigL(model, optimizer, **options | {"sparsity": None}, masks="nonzero")
    assert srigl.trainer.connections["0"] == before
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    SRigL(model, optimizer, include=["0"], **options).detach()
    masked = SRigL(model, optimizer, sparsity=0.5, schedule=SCHEDULE)
    assert masked.trainer.sparse_layers == ["2"]
    assert masked.left_dense["0"].startswith("is condensed; train it with mode='condensed'")
    masked.detach()
    with pytest.raises(SriglError, match="layer '0' is condensed, and keeps its connections"):
        SRigL(model, optimizer, **options, masks={"0": torch.ones(32, 16, dtype=torch.bool)})
    with pytest.raises(SriglError, match=r"layer '0' is condensed; train it with mode='condensed'"):
        SRigL(model, optimizer, sparsity=0.5, schedule=SCHEDULE, include=["0"])


def test_zeros_that_are_no_mask_are_no_obstacle():
    model = network()
    nn.init.zeros_(model[2].weight)  # as some output layers start
    SRigL(model, torch.optim.SGD(model.parameters(), 0.1), sparsity=0.5, schedule=SCHEDULE)
    model = network()
    with torch.no_grad():
        model[0].weight[:, :4] = 0
    SRigL(model, torch.optim.SGD(model.parameters(), 0.1), sparsity=0.5, schedule=SCHEDULE)


# ---------------------------------------------------------------- the calls of a loop


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_without_step_is_reported_at_the_second_missed_call(mode):
    _, optimizer, srigl = run = make(mode)
    for i in range(2):
        step(*run, i, finish=False)
        optimizer.step()
    for i in (2, 3):  # a caller that goes on is told again
        with pytest.raises(SriglError, match=r"step\(\) was not called after the last 2 steps"):
            step(*run, i, finish=False)
    srigl.step()
    for i in range(3, 9):  # every other call is missed
        step(*run, i, finish=False)
        optimizer.step()
        if i % 2:
            srigl.step()
    assert srigl.trainer.step_count == 4


def test_a_closure_may_call_after_backward_many_times():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=6)
    srigl = SRigL(model, optimizer, sparsity=0.6, schedule=SCHEDULE)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(3, 16).double()) - 1).square().mean()
        loss.backward()
        srigl.after_backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        srigl.step()
    assert srigl.trainer.step_count == 3


def test_a_masked_loop_without_after_backward_is_reported_at_the_second_missed_call():
    model, optimizer, srigl = run = make("masked")
    model(torch.ones(2, 16).double()).sum().backward()
    optimizer.step()
    srigl.step()
    optimizer.step()
    with pytest.raises(SriglError, match=r"after_backward\(\) was not called before the last 2"):
        srigl.step()
    assert not model[0].weight[~srigl.mask("0")].any()
    assert srigl.trainer.step_count == 1
    train(run, range(2))
    assert srigl.trainer.step_count == 3


# ---------------------------------------------------------------- layers that take no part


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = (nn.Linear(16, 16).double() for _ in range(3))

    def forward(self, x, skip):
        h = self.a(x)
        return self.c(h if skip else h + self.b(h))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("window", [1, 3])
def test_a_layer_that_takes_no_part_in_a_step_does_not_end_training(window, set_to_none):
    runs = {}
    for mode in MODES:
        model = Branches()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = UpdateSchedule(100, delta_t=5)
        srigl = SRigL(
            model, optimizer, sparsity=0.5, schedule=schedule, mode=mode, grad_window=window
        )
        masks = []
        for i in range(1, 16):
            optimizer.zero_grad(set_to_none=set_to_none)
            x = torch.from_numpy(np.random.default_rng(i).standard_normal((4, 16)))
            model(x, skip=i in (5, 13, 14, 15)).square().mean().backward()
            srigl.after_backward()
            optimizer.step()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                updates = srigl.step()
            skipped = i == 15 or (i == 5 and window == 1)
            assert (updates.keys() == {"a", "b", "c"} - ({"b"} if skipped else set())) == (
                i % 5 == 0
            )
            assert [str(w.message)[:35] for w in caught] == [
                "no gradient reached layer 'b' since"
            ] * skipped
            masks.append(srigl.mask("b"))
        assert torch.equal(masks[14], masks[10])
        assert torch.equal(masks[4], masks[3]) == (window == 1)
        runs[mode] = masks
    for one, two in zip(*runs.values(), strict=True):
        assert torch.equal(one, two)


# ---------------------------------------------------------------- averages


def averaged(kind, model):
    if kind == "AveragedModel":
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    if kind == "a copy":
        return copy.deepcopy(model)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def update_average(average, model):
    if isinstance(average, AveragedModel):
        average.update_parameters(model)
        return
    own = dict(average.named_parameters()) if isinstance(average, nn.Module) else average
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own[name].lerp_(parameter, 0.1)


def average_of(average, model, srigl):
    """Return the average as a model of dense layers."""
    if isinstance(average, dict):
        result = copy.deepcopy(model)
        result.load_state_dict(average)
    else:
        result = copy.deepcopy(getattr(average, "module", average))
    return dense(result, srigl)


@pytest.mark.parametrize("kind", ["AveragedModel", "a copy", "tensors by name"])
def test_tracked_averages_are_the_same_in_both_modes(kind):
    averages = []
    for mode in MODES:
        model, _, srigl = run = make(mode, gamma_sal=0.9)
        average = averaged(kind, model)
        srigl.track(average)
        for i in range(30):
            step(*run, i)
            update_average(average, model)
        averages.append(average_of(average, model, srigl))
        assert not averages[-1][~srigl.mask("0")].any()
    torch.testing.assert_close(*averages)


def test_a_grown_weight_starts_a_new_average():
    model, _, srigl = run = make("masked")
    average = copy.deepcopy(model)
    srigl.track(average)
    nn.init.ones_(average[0].weight)
    before = srigl.mask("0")
    train(run, range(4))
    after = srigl.mask("0")
    assert torch.equal(average[0].weight != 0, before & after)
    srigl.detach()
    assert (before & ~after).any()


@pytest.mark.parametrize("mode", MODES)
def test_an_average_that_does_not_fit_is_refused(mode):
    model, _, srigl = run = make(mode)
    early = copy.deepcopy(model)
    for average, message in (
        (nn.Sequential(nn.Linear(16, 32)), "the average has no '"),
        (network() if mode == "condensed" else nn.Sequential(*[nn.Linear(4, 4)] * 3), "has no '0"),
        ({}, "the average has no '0"),
        ([1], "average must be a torch.nn.Module, or a mapping"),
    ):
        with pytest.raises((SriglError, ValueTypeError), match=message):
            srigl.track(average)
    train(run, range(4))
    if mode == "condensed":
        with pytest.raises(SriglError, match="was made before the last mask update"):
            srigl.track(early)


# ---------------------------------------------------------------- what can be read


@pytest.mark.parametrize("mode", MODES)
def test_numbers_to_log(mode):
    run = make(mode, gamma_sal=0.9)
    _, _, srigl = train(run, range(9))
    numbers = srigl.log_dict()
    nnz = sum(int(srigl.mask(name).sum()) for name in ("0", "2"))
    rows = sum(int(srigl.mask(name).any(1).sum()) for name in ("0", "2"))
    names = {"sparsity", "total_sparsity", "active_neurons", "updates", "planned_updates"}
    assert numbers.keys() == {f"srigl/{name}" for name in names | {"itop_rate"}}
    assert numbers["srigl/sparsity"] == pytest.approx(1 - nnz / 768)
    assert numbers["srigl/total_sparsity"] == numbers["srigl/sparsity"]
    assert numbers["srigl/active_neurons"] == rows / 40
    assert 0 < numbers["srigl/itop_rate"] < 1
    assert (numbers["srigl/updates"], numbers["srigl/planned_updates"]) == (2, 49)
    assert all(type(number) is float for number in numbers.values())
    assert srigl.log_dict(prefix="")["updates"] == 2
    assert repr(srigl).startswith(
        f"SRigL(mode='{mode}', method='srigl', 2 sparse layers, sparsity="
    )
    assert repr(srigl).endswith("step 9, 2 of 49 updates)")
    assert "mask updates: 2 of 49 planned" in srigl.report()


# ---------------------------------------------------------------- settings


def test_settings_may_be_keywords_or_a_config():
    for keywords, config in (
        ({"gamma_sal": None, "seed": 4}, {"gamma_sal": None, "seed": 4}),
        ({"gamma_sal": 0.5, "grad_window": 3}, {"gamma_sal": 0.5, "grad_window": 3}),
        ({}, {}),
    ):
        *_, one = make("masked", **keywords)
        *_, two = make("masked", config=TrainingConfig(**config))
        assert one.trainer.config == two.trainer.config
        *_, three = make(
            "masked", **keywords, config=TrainingConfig(method="srigl", ablate_last=True)
        )
        assert three.trainer.config == TrainingConfig(ablate_last=True, **config)
    with pytest.raises(ValueTypeError, match="config must be a TrainingConfig, got dict"):
        make("masked", config={"seed": 1})
