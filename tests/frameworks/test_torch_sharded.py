"""Training of models that are spread over processes, and wrappers that cannot be used.

The trainings are in sharded_runs.py. They compare masks and weights with those of one process.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch trains in one process only", allow_module_level=True)

from torch import nn  # noqa: E402

from srigl_core import SriglError  # noqa: E402
from srigl_core.reference import UpdateSchedule  # noqa: E402
from srigl_core.torch import SRigL  # noqa: E402

MODES = ("masked", "condensed")
SCRIPT = Path(__file__).with_name("sharded_runs.py")
SAME = "same masks: True, close weights: True"
NO_DDP = "is wrapped in DistributedDataParallel; attach SRigL to the model itself first"
NO_FSDP1 = "is wrapped in FullyShardedDataParallel"
ATTACH_FIRST = "attach SRigL first, then call fully_shard, or use mode='masked'"
WHOLE_STATE = "is sharded over processes (fully_shard); load the whole state"

TRAINED = [
    *(f"{order} {mode}" for order in ("sharded_after", "sharded_in_training") for mode in MODES),
    "sharded_before masked",
    "condensed_before",
    "filled",
    "tensor_parallel masked",
    "data_parallel_around masked",
    *(
        f"{run} {mode}"
        for run in (
            "a_new_optimizer",
            "momentum",
            "convolutions",
            "attention",
            "evaluated_within_steps",
            "accumulated",
            "scaled",
        )
        for mode in MODES
    ),
]

REFUSED = {
    "sharded_before condensed": ATTACH_FIRST,
    "tensor_parallel condensed": ATTACH_FIRST,
    "data_parallel_around condensed": "made before SRigL replaced layers by condensed ones",
    "written_on_one_rank": "layer '0' has 232 weights that are not zero outside its mask",
    "an_infinity_on_one_rank": "layer '0': weight is not finite after a step",
    "idle": "the optimizer has not changed its weight in 3 steps",
    "save_model": WHOLE_STATE,
    "condense": WHOLE_STATE,
}
for mode in MODES:
    REFUSED |= {
        f"a_forgotten_optimizer {mode}": "pass the new one to srigl.set_optimizer(...)",
        f"scaled_without_a_word {mode}": "call srigl.set_optimizer(optimizer) right after",
        f"gathered_elsewhere {mode}": "fully_shard has gathered its weight for a forward pass",
        f"data_parallel_before {mode}": f"model {NO_DDP}",
        f"data_parallel_inside {mode}": f"submodule '2' {NO_DDP}",
        f"on_meta {mode}": "layer '0' has a weight on the device meta",
        f"freeze {mode}": WHOLE_STATE,
    }
    for kind in ("flat", "original"):
        # Whether it is found before SRigL is attached does not depend on the mode.
        for order in ("before", "inside", "after") if mode == "masked" else ("after",):
            REFUSED[f"fsdp1 {order} {kind} {mode}"] = NO_FSDP1

OTHERS = {"half idle": 6}
for mode in MODES:
    OTHERS |= {
        f"averaged {mode}": True,
        f"infinite {mode}": 11,
        f"resumed {mode}": [SAME, ["Tensor", "bool"]],
    }

OF_FOUR = [
    "sharded_before masked",
    "sharded_in_training masked",
    "sharded_in_training condensed",
    "hybrid masked",
    "hybrid condensed",
    "tensor_parallel masked",
]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """Return a function of a number of processes and of runs: the results by run and rank."""

    @functools.cache
    def run(world, names):
        ranks = tmp_path_factory.mktemp("ranks") / "file"
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(world), str(ranks), *names],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(map(json.loads, done.stdout.splitlines()))

    return run


@pytest.fixture(scope="module")
def results(results_of):
    by_mode = [
        f"{run} {mode}" for run in ("read_by_one_rank", "accumulated apart") for mode in MODES
    ]
    found = results_of(2, (*TRAINED, *REFUSED, *OTHERS, *by_mode))
    print(*(f"2 ranks, {name}: {ranks[0]}" for name, ranks in found.items()), sep="\n")
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_have_the_masks_of_one(name, results):
    assert results[name] == [SAME, SAME]


@pytest.mark.timeout(300)
def test_four_processes_have_the_masks_of_one(results_of):
    """Where a layer of five neurons has no part on one of the ranks."""
    found = results_of(4, tuple(OF_FOUR))
    print(*(f"4 ranks, {name}: {ranks[0]}" for name, ranks in found.items()), sep="\n")
    assert found == {name: [SAME] * 4 for name in OF_FOUR}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_the_same_error_on_all_ranks(name, results):
    first, second = results[name]
    assert first.startswith("SriglError: ")
    assert REFUSED[name] in first
    assert first == second


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", OTHERS)
def test_averages_resumption_and_skipped_steps_do_not_depend_on_the_rank(name, results):
    assert results[name] == [OTHERS[name]] * 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_fully_shard_accumulates_apart_reach_the_update(mode, results):
    """They are reduced in another dtype, so weights differ by more than rounding in float64."""
    assert all(line.startswith("same masks: True") for line in results[f"accumulated apart {mode}"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_one_rank_alone_reads_masks_and_reports(mode, results):
    assert results[f"read_by_one_rank {mode}"] == [[3, True, True], None]


# ---------------------------------------------------------------- in one process


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).double()


def trained(model, mode):
    """Train a model, which may be wrapped, and return its masks."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = UpdateSchedule(t_end=1000, delta_t=3)
    srigl = SRigL(model, optimizer, sparsity=0.7, schedule=schedule, mode=mode)
    for step in range(9):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    return [srigl.mask(name) for name in srigl.trainer.sparse_layers]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", ["compile", "compile in place", "DataParallel"])
def test_wrappers_that_keep_the_parameters_change_no_mask(wrap, mode):
    model = perceptron()
    if wrap == "compile":
        model = torch.compile(model, backend="eager")
    elif wrap == "compile in place":
        model[0].compile(backend="eager")
    else:
        model = nn.DataParallel(model)
    assert all(map(torch.equal, trained(model, mode), trained(perceptron(), mode)))


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_without_numbers_is_refused(mode):
    with pytest.raises(SriglError, match=r"layer '0' has a weight on the device meta.*to_empty"):
        trained(perceptron().to("meta"), mode)


def of_subclass(weight):
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(weight, weight.clone())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("make", "reason"),
    [(of_subclass, "is a TwoTensor, which hides"), (torch.Tensor.to_sparse, "sparse_coo")],
    ids=["subclass", "sparse"],
)
def test_a_weight_that_is_no_plain_tensor_is_left_dense(make, reason, mode):
    model = perceptron()
    model[0].weight = nn.Parameter(make(model[0].weight.detach()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    srigl = SRigL(model, optimizer, sparsity=0.7, schedule=1000, mode=mode)
    assert reason in srigl.left_dense["0"]
    with pytest.raises(SriglError, match=reason):
        SRigL(model, optimizer, sparsity=0.7, schedule=1000, mode=mode, include="0")


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_may_be_replaced(mode):
    """State at new connections starts anew in the optimiser that is in use."""

    def masks(replaces):
        model = perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = UpdateSchedule(t_end=1000, delta_t=3)
        srigl = SRigL(model, optimizer, sparsity=0.7, schedule=schedule, mode=mode)
        for step in range(15):
            if step == 4 and replaces:
                state = optimizer.state_dict()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                optimizer.load_state_dict(state)
                srigl.set_optimizer(optimizer)
            optimizer.zero_grad()
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).double()
            model(x).square().mean().backward()
            srigl.after_backward()
            optimizer.step()
            srigl.step()
        return [*(srigl.mask(name) for name in srigl.trainer.sparse_layers), *model.parameters()]

    assert all(map(torch.equal, masks(replaces=True), masks(replaces=False)))
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    srigl = SRigL(model, optimizer, sparsity=0.7, schedule=1000, mode=mode)
    with pytest.raises(SriglError, match="layer '0': the optimizer does not hold its weight"):
        srigl.set_optimizer(torch.optim.SGD(perceptron().parameters(), lr=0.1))
