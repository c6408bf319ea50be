"""Trainings on several gloo processes, for test_torch_sharded.py.

Every rank runs the functions of `RUNS` in turn. Rank 0 prints a line of JSON for each: its name,
and the ranks' results, or the SriglErrors that they raised.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import sys
import warnings
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from srigl_core import SriglError, TrainingConfig
from srigl_core.reference import UpdateSchedule
from srigl_core.torch import CondensedLinear, SRigL, condense, freeze, save_model

MODES = ("masked", "condensed")
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, CondensedLinear)
alone = None
"""The group of this process."""


def perceptron():
    """Return a model whose layers do not divide among the ranks."""
    torch.manual_seed(0)
    layers = [nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 24), nn.ReLU(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).double()


def convolutional():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(5, 9, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(9, 7, 2)]
    layers = [nn.Unflatten(1, (5, 2, 2)), *convolutions, nn.Flatten(), nn.Linear(63, 5)]
    return nn.Sequential(*layers).double()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(20, 5)

    def forward(self, x):
        x = x.reshape(-1, 5, 4)
        return self.out(self.attention(x, x, x, need_weights=False)[0].flatten(1))


def attention():
    torch.manual_seed(2)  # with others, a gradient that is zero but for rounding decides a mask
    return Attention().double()


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Run:
    """The training of a model by all ranks together, or by this process alone."""

    def __init__(self, mode, *, make=perceptron, optimizer=torch.optim.Adam, solo=False):
        self.mode, self.solo, self.model = mode, solo, make()
        self.new_optimizer = partial(optimizer, lr=0.01)
        self.is_split = False  # whether each rank has its own part of a batch

    def attach(self, **options):
        """Make the optimiser and the SRigL."""
        self.optimizer = self.new_optimizer(self.model.parameters())
        settings = {
            "sparsity": 0.7,
            "schedule": UpdateSchedule(t_end=1000, delta_t=3, alpha=0.5),
            "config": TrainingConfig(gamma_sal=0.9, grad_window=2),
            "process_group": alone if self.solo else None,
        }
        self.srigl = SRigL(self.model, self.optimizer, mode=self.mode, **settings | options)
        return self

    def shard(self, **options):
        """Shard layers one by one, and the last together with the rest, by all ranks."""
        if self.solo:
            return self
        *layers, _ = [part for part in self.model.modules() if type(part) in LAYERS]
        for layer in layers:
            fully_shard(layer, **options)
        fully_shard(self.model, **options)
        self.is_split = True
        return self

    def loss(self, i, part=slice(None)):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(16, 20, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (16,), generator=generator)
        x, y = x[part], y[part]
        if self.is_split:
            mine = slice(dist.get_rank(), None, dist.get_world_size())
            x, y = x[mine], y[mine]
        return nn.functional.cross_entropy(self.model(x), y)

    def step(self, i):
        self.optimizer.zero_grad()
        self.loss(i).backward()
        self.finish()

    def finish(self):
        self.srigl.after_backward()
        self.optimizer.step()
        self.srigl.step()

    def go(self, start, stop):
        for i in range(start, stop):
            self.step(i)
        return self

    def masks(self):
        return [self.srigl.mask(name) for name in self.srigl.trainer.sparse_layers]

    def weights(self):
        return [whole(p) for p in self.model.parameters()]

    def compared(self, solo):
        """Return what is the same in two runs; weights may differ by rounding."""
        assert solo.srigl.trainer.n_updates >= 3
        same = all(map(torch.equal, self.masks(), solo.masks()))
        pairs = zip(self.weights(), solo.weights(), strict=True)
        close = all(torch.allclose(p, q, rtol=0, atol=1e-9) for p, q in pairs)
        return f"same masks: {same}, close weights: {close}"


def twice(train, *arguments, **options):
    """Train by all ranks and by a process alone, and compare."""
    return train(Run(*arguments, **options)).compared(train(Run(*arguments, **options, solo=True)))


# ---------------------------------------------------------------- orders, models, optimisers


def sharded_before(mode, **options):
    return twice(lambda run: run.shard().attach().go(0, 12), mode, **options)


def sharded_after(mode, **options):
    return twice(lambda run: run.attach().shard().go(0, 12), mode, **options)


def sharded_in_training(mode, **options):
    return twice(lambda run: run.attach().go(0, 4).shard().go(4, 12), mode, **options)


def condensed_before(mode):
    """A condensed model is sharded, and then goes on training."""

    def train(run):
        run.attach().srigl.detach()
        return run.shard().attach(sparsity=None).go(0, 12)

    return twice(train, mode)


def a_new_optimizer(mode):
    def train(run):
        run.attach().go(0, 4).shard()
        run.optimizer = run.new_optimizer(run.model.parameters())
        run.srigl.set_optimizer(run.optimizer)
        return run.go(4, 12)

    return twice(train, mode)


def a_forgotten_optimizer(mode):
    run = Run(mode).attach().go(0, 4).shard()
    run.optimizer = run.new_optimizer(run.model.parameters())
    run.go(4, 12)


def hybrid(mode):
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b"))
    return twice(lambda run: run.attach().shard(mesh=mesh).go(0, 12), mode)


def tensor_parallel(mode):
    """With FSDP2 over half of the ranks, if there are four."""
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("data", "tensor"))

    def train(run):
        if run.solo:
            return run.attach().go(0, 12)
        plan = {"2": ColwiseParallel(), "4": RowwiseParallel()}
        parallelize_module(run.model, mesh["tensor"], plan)
        if n > 2:
            fully_shard(run.model, mesh=mesh["data"])
        return run.attach().go(0, 12)

    return twice(train, mode)


# ---------------------------------------------------------------- the loop


def evaluated_within_steps(mode):
    """FSDP2 keeps the root's parameters gathered after a forward pass without a gradient."""

    def train(run):
        run.attach().shard()
        for i in range(12):
            run.optimizer.zero_grad()
            run.loss(i).backward()
            run.srigl.after_backward()
            run.optimizer.step()
            with torch.no_grad():
                run.loss(i)
            run.srigl.step()
        return run

    return twice(train, mode)


def accumulated(mode, policy=None):
    """Gradients are reduced in the last of three backward passes, and one is set to None first."""

    def train(run):
        run.attach().shard(**({} if policy is None else {"mp_policy": policy}))
        run.srigl.set_optimizer(run.optimizer)  # before the first zero_grad
        for i in range(12):
            run.loss(i + 100).backward()
            run.optimizer.zero_grad()
            if run.mode == "condensed":  # a penalty, whose gradient reaches no parameter
                x = torch.randn(4, 20, dtype=torch.float64, requires_grad=True)
                torch.autograd.grad(run.model(x).sum(), x)
            for k in range(2):
                if not run.solo:
                    run.model.set_requires_gradient_sync(k == 1)
                (run.loss(i, slice(8 * k, 8 * k + 8)) / 2).backward()
            run.finish()
        return run

    return twice(train, mode)


def averaged(mode):
    """Averages of sharded and of whole weights follow the masks."""

    def averages(run):
        run.attach().shard()
        named = list(run.model.state_dict().items())
        kept = [{n: p.detach().clone() for n, p in named}, {n: whole(p).clone() for n, p in named}]
        for average in kept:
            run.srigl.track(average)
        for i in range(12):
            run.step(i)
            for name, p in run.model.state_dict().items():
                for average, q in zip(kept, (p, whole(p)), strict=True):
                    if p.is_floating_point():
                        average[name].lerp_(q.to(average[name].dtype), 0.3)
        return [[whole(p) for p in average.values()] for average in kept]

    of_all, of_one = averages(Run(mode)), averages(Run(mode, solo=True))
    pairs = [(p, q) for a, b in zip(of_all, of_one, strict=True) for p, q in zip(a, b, strict=True)]
    return all(torch.allclose(p, q, rtol=0, atol=1e-9) for p, q in pairs)


def scaled(mode, infinite=False):
    """One rank has an infinite gradient in a step of the window."""
    run = Run(mode).attach().shard()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run.srigl.set_optimizer(run.optimizer)
    for i in range(12):
        run.optimizer.zero_grad()
        scaler.scale(run.loss(i)).backward()
        if infinite and i == 4 and dist.get_rank() == 1:
            next(iter(run.model.parameters())).grad.to_local().fill_(torch.inf)
        scaler.unscale_(run.optimizer)
        run.srigl.after_backward(scaler=scaler)
        scaler.step(run.optimizer)
        scaler.update()
        run.srigl.step()
    if infinite:
        return run.srigl.trainer.step_count
    return run.compared(Run(mode, solo=True).attach().go(0, 12))


def scaled_without_a_word(mode):
    run = Run(mode).attach().shard()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(run.loss(0)).backward()
    scaler.unscale_(run.optimizer)
    run.srigl.after_backward(scaler=scaler)


def resumed(mode):
    """In the middle of a window, in a new sharded model, from plain tensors."""
    run = Run(mode).attach().shard().go(0, 4)
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = copy.deepcopy(get_state_dict(run.model, run.optimizer, options=options))
    state = run.srigl.state_dict()
    run.go(4, 12)
    kinds = {type(part).__name__ for part in leaves(state)} - {"str", "int", "float", "NoneType"}
    other = Run(mode).attach(init="kaiming_uniform").shard()
    other.srigl.set_optimizer(other.optimizer)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_state_dict(
        other.model,
        other.optimizer,
        model_state_dict=model,
        optim_state_dict=optimizer,
        options=options,
    )
    other.srigl.load_state_dict(state)
    return other.go(4, 12).compared(run), sorted(kinds)


def leaves(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, list) else [tree]


def read_by_one_rank(mode):
    """What a rank logs by itself does not wait for the others."""
    run = Run(mode).attach().shard().go(0, 4)
    if dist.get_rank() == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return len(run.masks()), len(run.srigl.report()) > 0, run.srigl.total_sparsity > 0.5
    return None


# ---------------------------------------------------------------- errors on all ranks alike


def written_on_one_rank(mode):
    run = Run(mode).attach().shard().go(0, 4)
    if dist.get_rank() == 1:
        with torch.no_grad():
            run.model[0].weight.to_local().fill_(1.0)
    run.go(4, 5)


def an_infinity_on_one_rank(mode):
    """An optimiser that does not skip the step whose gradients an update needs."""
    run = Run(mode).attach().shard().go(0, 4)
    run.optimizer.zero_grad()
    run.loss(4).backward()
    if dist.get_rank() == 1:
        next(iter(run.model.parameters())).grad.to_local().fill_(torch.inf)
    run.finish()


class Idle(torch.optim.Adam):
    """Changes a weight's part on one rank only, or nothing."""

    changes_one_part = False

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self.changes_one_part and dist.get_rank() == 0:
            for parameter in parameters:
                parameter.detach().to_local().mul_(0.99)


class HalfIdle(Idle):
    changes_one_part = True


def not_moved(mode, optimizer):
    """The state of the optimisers is empty, so three steps are enough."""
    run = Run(mode, optimizer=optimizer).shard().attach(config=TrainingConfig())
    run.go(0, 2)
    return run.go(2, 6).srigl.trainer.step_count


# ---------------------------------------------------------------- wrappers


def gathered_elsewhere(mode):
    """The root of FSDP2 is a larger model, which SRigL cannot tell to let go."""
    run = Run(mode).attach()
    larger = fully_shard(nn.Sequential(run.model))
    x = torch.ones(2, 20, dtype=torch.float64)
    larger(x).sum().backward()
    run.finish()
    larger(x).sum().backward()
    run.srigl.after_backward()
    with torch.no_grad():
        larger(x)
    run.srigl.step()


def data_parallel_before(mode):
    run = Run(mode)
    run.model = DistributedDataParallel(run.model)
    run.attach()


def data_parallel_inside(mode):
    run = Run(mode)
    run.model[2] = DistributedDataParallel(run.model[2])
    run.attach()


def data_parallel_around(mode):
    """The inner model is made sparse, and the wrapper is then called."""
    run = Run(mode)
    wrapped = DistributedDataParallel(nn.Sequential(run.model))
    run.attach()

    def train(run, model):
        inner, run.model, run.is_split = run.model, model, not run.solo
        run.go(0, 12)
        run.model = inner
        return run

    solo = Run(mode, solo=True).attach()
    return train(run, wrapped).compared(train(solo, solo.model))


def fsdp1(mode, order, use_orig_params):
    run = Run(mode)
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    if order == "after":
        run.attach()
    inner, model = run.model, FullyShardedDataParallel(run.model, **options)
    if order != "after":
        run.model = model if order == "before" else inner
        run.attach()
    run.model = model
    run.go(0, 1)


def on_meta(mode):
    """As large models are made: sharded on the device meta, and then filled."""
    run = Run(mode)
    run.model.to("meta")
    if mode == "masked":
        run.shard()
    run.attach()


def filled(mode):
    def train(run):
        if not run.solo:
            whole_state = run.model.state_dict()
            run.model.to("meta")
            run.shard().model.to_empty(device="cpu")
            with torch.no_grad():
                for name, parameter in run.model.named_parameters():
                    full = whole_state[name]
                    parts = torch.chunk(full, dist.get_world_size())
                    parameter.to_local().copy_(parts[dist.get_rank()])
        return run.attach().go(0, 12)

    return twice(train, mode)


def converted(mode, convert):
    run = Run(mode).attach().shard()
    convert(run.model)


RUNS = {}
for mode in MODES:
    RUNS |= {
        f"{run.__name__} {mode}": partial(run, mode)
        for run in (
            sharded_before,
            sharded_after,
            sharded_in_training,
            a_new_optimizer,
            a_forgotten_optimizer,
            hybrid,
            tensor_parallel,
            evaluated_within_steps,
            accumulated,
            averaged,
            scaled,
            scaled_without_a_word,
            resumed,
            read_by_one_rank,
            gathered_elsewhere,
            data_parallel_before,
            data_parallel_inside,
            data_parallel_around,
            on_meta,
        )
    }
    for order in ("before", "inside", "after"):
        for original in (False, True):
            name = f"fsdp1 {order} {'original' if original else 'flat'} {mode}"
            RUNS[name] = partial(fsdp1, mode, order, original)
    RUNS[f"infinite {mode}"] = partial(scaled, mode, infinite=True)
    policy = MixedPrecisionPolicy(torch.float64, torch.float32)
    RUNS[f"accumulated apart {mode}"] = partial(accumulated, mode, policy)
    momentum = partial(torch.optim.SGD, momentum=0.9)
    RUNS[f"momentum {mode}"] = partial(sharded_in_training, mode, optimizer=momentum)
    # Adam would scale up the rounding errors of gradients that are zero.
    RUNS[f"attention {mode}"] = partial(sharded_after, mode, make=attention, optimizer=momentum)
    RUNS[f"convolutions {mode}"] = partial(sharded_after, mode, make=convolutional)
    RUNS[f"freeze {mode}"] = partial(converted, mode, freeze)
RUNS |= {
    "condensed_before": partial(condensed_before, "condensed"),
    "written_on_one_rank": partial(written_on_one_rank, "masked"),
    "an_infinity_on_one_rank": partial(an_infinity_on_one_rank, "masked"),
    "idle": partial(not_moved, "masked", Idle),
    "half idle": partial(not_moved, "masked", HalfIdle),
    "filled": partial(filled, "masked"),
    "save_model": partial(converted, "condensed", partial(save_model, path="never")),
    "condense": partial(converted, "masked", partial(condense, masks="nonzero")),
}


def work(rank, world, file, names):
    global alone
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    alone = [dist.new_group([other]) for other in range(world)][rank]
    for name in names:
        try:
            result = RUNS[name]()
        except SriglError as error:
            result = f"{type(error).__name__}: {error}"
        results = [None] * world
        dist.all_gather_object(results, result)
        if rank == 0:
            print(json.dumps([name, results]), flush=True)
    gc.collect()  # sharded models, before their groups
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        world = int(sys.argv[1])
        mp.spawn(work, (world, sys.argv[2], sys.argv[3:]), nprocs=world)
