"""Optimisers in sparse training: their state follows the connections, in wrappers too."""

import os
import subprocess
import sys
from collections import defaultdict, deque

import pytest
from training_options import training_options

from srigl_core import SriglError, ValueTypeError
from srigl_core.reference import UpdateSchedule

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from srigl_core.torch import OptimizerRule, SRigL, register_optimizer  # noqa: E402

SCHEDULE = UpdateSchedule(t_end=1000, delta_t=3, alpha=0.5)
OPTIONS = {"sparsity": 0.7, "schedule": SCHEDULE, "gamma_sal": 0.9, "seed": 1}
LAYERS = ("0", "2")


def perceptron(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).to(dtype)


def loss_of(model, step, n=16):
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(n, 20, generator=generator, dtype=dtype)
    return nn.functional.cross_entropy(model(x), torch.randint(0, 5, (n,), generator=generator))


@pytest.fixture(params=["masked", "condensed"])
def mode(request):
    return request.param


class Run:
    """A model in training; `make` makes the optimiser."""

    def __init__(self, mode, make, warm_up=0, dtype=torch.float64, **options):
        self.model = perceptron(dtype)
        self.optimizer = make(self.model.parameters())
        self.n_steps = self.n_updates = 0
        self.after_backward = self.after_step = lambda: None
        self.go(warm_up)
        options = training_options(**(OPTIONS | options))
        self.srigl = SRigL(self.model, self.optimizer, mode=mode, **options)
        self.after_backward, self.after_step = self.srigl.after_backward, self.srigl.step

    def go(self, steps):
        for _ in range(steps):
            self.n_steps += 1
            self.optimizer_step()
            self.n_updates += bool(self.after_step())
        return self

    def optimizer_step(self):
        def closure():
            self.optimizer.zero_grad()
            loss = loss_of(self.model, self.n_steps)
            loss.backward()
            self.after_backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(closure)
        elif isinstance(self.optimizer, SAM):
            closure()
            self.optimizer.first_step()
            closure()
            self.optimizer.second_step()
        else:
            closure()
            self.optimizer.step()

    def dense(self, name, values=None):
        """Return a layer's weight, or state of its shape, as a dense matrix."""
        layer, mask = self.model.get_submodule(name), self.srigl.mask(name)
        if values is None:
            values = parameter_of(layer)
        if values.ndim == 2:
            return values.detach()
        rows = torch.from_numpy(layer.to_condensed().active.astype("int64"))
        columns = torch.from_numpy(layer.to_condensed().indices.astype("int64"))
        matrix = torch.zeros(mask.shape, dtype=values.dtype)
        matrix[rows[:, None], columns] = values.detach()[: columns.numel()].view(columns.shape)
        return matrix

    def state(self, name, optimizer=None):
        """Return a layer's state of its weight's shape, as dense matrices, by name."""
        parameter = parameter_of(self.model.get_submodule(name))
        state = (optimizer or self.optimizer).state.get(parameter, {})
        return {
            key: self.dense(name, part)
            for key, part in state.items()
            if torch.is_tensor(part) and part.shape == parameter.shape
        }


def parameter_of(layer):
    return layer.weight if isinstance(layer, nn.Linear) else layer.values


def assert_same_training(masked, condensed, inner=lambda optimizer: optimizer):
    """Two runs have the same masks, weights and state, up to rounding."""
    assert masked.n_updates == condensed.n_updates >= 2
    for name in LAYERS:
        mask = masked.srigl.mask(name)
        assert torch.equal(mask, condensed.srigl.mask(name))
        torch.testing.assert_close(masked.dense(name), condensed.dense(name))
        states = [run.state(name, inner(run.optimizer)) for run in (masked, condensed)]
        assert states[0].keys() == states[1].keys()
        for key, part in states[0].items():
            torch.testing.assert_close(part[mask], states[1][key][mask])


def of_torch():
    """Return the classes of torch.optim, of this version of PyTorch."""
    parts = (getattr(torch.optim, name) for name in sorted(dir(torch.optim)))
    classes = [part for part in parts if isinstance(part, type)]
    return [c for c in classes if issubclass(c, torch.optim.Optimizer)]


REFUSED = ("Optimizer", "SparseAdam")
NEED_MATRICES = ("Adafactor", "Muon")
ARGUMENTS = {
    "SGD": [
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        {"momentum": 0.5, "dampening": 0.1, "foreach": True},
        {"momentum": 0.9, "fused": True},
    ],
    "Adam": [{"amsgrad": True}, {"fused": True}, {"foreach": True}],
    "Adagrad": [{"initial_accumulator_value": 0.1}],
    "RMSprop": [{"centered": True, "momentum": 0.5}],
    "ASGD": [{"lr": 0.05, "t0": 2}],
    "Adadelta": [{"lr": 1.0}],
    "LBFGS": [{"lr": 0.1, "max_iter": 3}, {"max_iter": 3, "line_search_fn": "strong_wolfe"}],
}
START = {("Rprop", "step_size"): 0.01, ("Adagrad", "sum"): 0.1}
CASES = [
    (cls, {"lr": 0.01} | arguments)
    for cls in of_torch()
    if cls.__name__ not in REFUSED
    for arguments in ARGUMENTS.get(cls.__name__, [{}])
]
ELEMENTWISE = [case for case in CASES if case[0].__name__ not in NEED_MATRICES]


@pytest.mark.parametrize("warm_up", [0, 2])
@pytest.mark.parametrize(("cls", "arguments"), ELEMENTWISE, ids=str)
def test_every_optimizer_of_torch_trains_both_modes_alike(cls, arguments, warm_up):
    make = lambda parameters: cls(parameters, **arguments)  # noqa: E731
    masked, condensed = (Run(mode, make, warm_up) for mode in ("masked", "condensed"))
    for _ in range(3):
        before = {name: masked.srigl.mask(name) for name in LAYERS}
        for run in (masked, condensed):
            run.go(3)
        for name in LAYERS:
            grown = masked.srigl.mask(name) & ~before[name]
            assert grown.any()
            for run in (masked, condensed):
                for key, part in run.state(name).items():
                    start = START.get((cls.__name__, key), 0)
                    assert (part[grown] == start).all(), key
    for run in (masked, condensed):
        run.go(2)
    assert_same_training(masked, condensed)


def matrices_only(cls, arguments):
    def make(parameters):
        return cls([p for p in parameters if p.ndim == 2], **arguments)

    return make


@pytest.mark.parametrize("warm_up", [0, 2])
@pytest.mark.parametrize(
    ("cls", "arguments"), [case for case in CASES if case not in ELEMENTWISE], ids=str
)
def test_an_optimizer_of_matrices_trains_masked_layers_only(cls, arguments, warm_up):
    make = matrices_only(cls, arguments)
    run = Run("masked", make, warm_up).go(8)
    assert run.n_updates == 2
    for name in LAYERS:
        for part in run.state(name).values():
            assert not part[~run.srigl.mask(name)].any()
    with pytest.raises(
        SriglError, match=rf"layer '0': {cls.__name__} needs matrices.*mode='masked'"
    ):
        Run("condensed", make, warm_up)


def test_an_optimizer_of_sparse_gradients_is_refused_by_name(mode):
    with pytest.raises(SriglError, match=r"layer '0': SparseAdam cannot train it: .*sparse"):
        Run(mode, lambda parameters: torch.optim.SparseAdam(list(parameters)))


class Foreign(torch.optim.Optimizer):
    """Scales each gradient by a number that its state starts with."""

    def __init__(self, parameters, lr=0.05, start=2.0):
        super().__init__(parameters, {"lr": lr})
        self.start = start

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.train(p, group, self.state[p])

    def train(self, p, group, state):
        if not state:
            state["scale"] = torch.full_like(p, self.start)
        state["scale"].mul_(1 - 0.1 * p.grad.sign())
        p.sub_(state["scale"] * p.grad, alpha=group["lr"])


class WithHistory(Foreign):
    """Keeps its last gradients, and starts when there are enough."""

    def train(self, p, group, state):
        last = state.setdefault("last", deque(maxlen=5))
        last.append(p.grad.clone())
        if len(last) == 5:
            p.sub_(last[0], alpha=group["lr"])


class WithDummy(Foreign):
    """Has an optimiser of a dummy parameter, for a schedule."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, lr)
        self.schedule = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


class InTheConstructor(Foreign):
    """Makes its state when it is made."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, lr, 2.0)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["scale"] = torch.full_like(p, 2.0)


class Nested(Foreign):
    """Keeps tensors in a dict and in a list, as AggMo does."""

    def train(self, p, group, state):
        if not state:
            state["by_beta"] = {beta: torch.zeros_like(p) for beta in (0.5, 0.9)}
            state["scales"] = [torch.full_like(p, self.start)]
        for beta, momentum in state["by_beta"].items():
            momentum.mul_(beta).add_(p.grad)
            p.sub_(state["scales"][0] * momentum, alpha=group["lr"] / 2)
        state["scales"][0].mul_(1 - 0.1 * p.grad.sign())


class Bound(Foreign):
    """Refers to its parameters, so that a copy of it would change them."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, lr)
        self.parameters = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.parameters:
            if p.grad is not None:
                self.train(p, self.param_groups[0], self.state[p])


register_optimizer(Bound, OptimizerRule(start={"scale": lambda group: 40 * group["lr"]}))


@pytest.mark.parametrize("cls", [Foreign, InTheConstructor, Nested, Bound])
def test_state_of_a_foreign_optimizer_starts_anew_at_grown_connections(cls):
    masked, condensed = runs = [Run(mode, cls) for mode in ("masked", "condensed")]
    for run in runs:
        before = {name: run.srigl.mask(name) for name in LAYERS}
        run.go(6)
        for name in LAYERS:
            grown = run.srigl.mask(name) & ~before[name]
            state = run.optimizer.state[parameter_of(run.model.get_submodule(name))]
            scale = state["scales"][0] if cls is Nested else state["scale"]
            assert (run.dense(name, scale)[grown] == 2).any()
        run.go(5)
    assert_same_training(masked, condensed)


class Shampooish(Foreign):
    """Has a preconditioner for the rows of a weight, which it seldom uses."""

    def train(self, p, group, state):
        if not state:
            state["rows"] = torch.eye(len(p), dtype=p.dtype)
        p.sub_(p.grad, alpha=group["lr"])


class OfObjects(Foreign):
    """Has its preconditioner in an object."""

    class Preconditioner:
        """Of no type that could be known."""

    def train(self, p, group, state):
        state.setdefault("preconditioner", self.Preconditioner())
        p.sub_(p.grad, alpha=group["lr"])


class InBlocks(Foreign):
    """Has a scale for each block of numbers, as optimisers of 8 bits do."""

    def train(self, p, group, state):
        if not state:
            state["scales"] = torch.ones(-(-p.numel() // 64))
        p.sub_(p.grad, alpha=group["lr"])


class Factored(Foreign):
    """Divides by the norm of each row."""

    def train(self, p, group, state):
        p.sub_(p.grad / (1e-8 + p.grad.norm(dim=-1, keepdim=True)), alpha=group["lr"])


class Registered(Foreign):
    """Says itself that it needs matrices."""


register_optimizer(Registered, OptimizerRule(elementwise=False))


@pytest.mark.parametrize("cls", [Shampooish, OfObjects, InBlocks, Factored, Registered])
def test_a_foreign_optimizer_of_matrices_is_refused_for_condensed_layers(cls):
    assert Run("masked", cls).go(6).n_updates == 2
    with pytest.raises(
        SriglError, match=rf"layer '0': {cls.__name__} needs matrices.*mode='masked'"
    ):
        Run("condensed", cls)


class Noisy(Foreign):
    """Adds noise, and counts its steps."""

    count = 0

    def train(self, p, group, state):
        super().train(p, group, state)
        p.add_(torch.randn_like(p), alpha=1e-3)
        self.count += 1


def test_trying_an_optimizer_out_leaves_no_trace(mode):
    model = perceptron()
    optimizer = Noisy(model.parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *arguments: calls.append(arguments))
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    random = torch.random.get_rng_state()
    srigl = SRigL(model, optimizer, mode=mode, **training_options(**OPTIONS))
    assert torch.equal(torch.random.get_rng_state(), random)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        srigl.after_backward()
        optimizer.step()
        random = torch.random.get_rng_state()
        updates = srigl.step()
        assert torch.equal(torch.random.get_rng_state(), random)
    assert updates
    assert (optimizer.count, len(calls)) == (12, 3)


def test_a_rule_is_for_an_optimizer():
    with pytest.raises(ValueTypeError, match=r"must be a subclass of torch.optim.Optimizer"):
        register_optimizer(nn.Linear, OptimizerRule())
    with pytest.raises(ValueTypeError, match="rule must be an OptimizerRule, got dict"):
        register_optimizer(Foreign, {})


@pytest.mark.parametrize("cls", [WithHistory, WithDummy])
def test_a_foreign_optimizer_that_starts_late_or_holds_another_trains_both_modes_alike(cls):
    masked, condensed = (Run(mode, cls).go(12) for mode in ("masked", "condensed"))
    for name in LAYERS:
        assert torch.equal(masked.srigl.mask(name), condensed.srigl.mask(name))
        torch.testing.assert_close(masked.dense(name), condensed.dense(name))


# Wrappers, as other packages write them.


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: two gradients for each step."""

    def __init__(self, parameters, rho=0.05):
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = torch.optim.Adam(self.param_groups, lr=0.01)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    def step(self, closure):
        raise NotImplementedError


class Lookahead(torch.optim.Optimizer):
    """Keeps slow weights in its own state."""

    def __init__(self, optimizer, k=2, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.n = optimizer, k, alpha, 0
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.n += 1
        for group in self.param_groups if self.n % self.k == 0 else ():
            for p in group["params"]:
                slow = self.state[p]["slow"]
                slow.lerp_(p, self.alpha)
                p.copy_(slow)


class ScheduleFree(torch.optim.Optimizer):
    """Has its state, an average of weights, in that of the optimiser inside."""

    def __init__(self, base):
        self.base = base

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)
    defaults = property(lambda self: self.base.defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "z" not in state:
                    state["z"] = p.detach().clone()
                p.copy_(state["z"])
        self.base.step()
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p]["z"].copy_(p)
                p.lerp_(z, 0.5)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)


class Accelerated(torch.optim.Optimizer):
    """Delegates all, as accelerate's wrapper does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Plain:
    """Is no torch.optim.Optimizer."""

    def __init__(self, *optimizers):
        self._optimizers = dict(enumerate(optimizers))

    def step(self):
        for optimizer in self._optimizers.values():
            optimizer.step()

    def zero_grad(self):
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()


class Several(list):
    """Several optimisers in a list."""

    step, zero_grad = Plain.step, Plain.zero_grad
    _optimizers = property(lambda self: dict(enumerate(self)))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True)


def halves(cls):
    def make(parameters):
        parameters = list(parameters)
        parts = [adam(parameters[:2]), adam(parameters[2:])]
        return cls(*parts) if cls is Plain else cls(parts)

    return make


TRANSPARENT = {
    "accelerated": lambda p: Accelerated(adam(p)),
    "accelerated twice": lambda p: Accelerated(Accelerated(adam(p))),
    "no subclass": lambda p: Plain(adam(p)),
    "no subclass, two": halves(Plain),
    "a list": halves(Several),
}


@pytest.mark.parametrize("what", TRANSPARENT)
def test_a_wrapped_optimizer_gives_the_bits_of_the_plain_one(what, mode):
    plain, wrapped = Run(mode, adam).go(8), Run(mode, TRANSPARENT[what]).go(8)
    assert wrapped.n_updates == 2
    for name in LAYERS:
        assert torch.equal(plain.srigl.mask(name), wrapped.srigl.mask(name))
        assert torch.equal(plain.dense(name), wrapped.dense(name))


WRAPPERS = {
    "SAM": (SAM, lambda optimizer: optimizer.base_optimizer),
    "lookahead": (lambda p: Lookahead(adam(p)), lambda optimizer: optimizer),
    "schedule-free": (lambda p: ScheduleFree(torch.optim.SGD(p, lr=0.1)), lambda o: o.base),
    "lookahead, accelerated": (
        lambda p: Accelerated(Lookahead(adam(p))),
        lambda o: o.optimizer.optimizer,
    ),
}


@pytest.mark.parametrize("what", WRAPPERS)
def test_a_wrapper_with_state_trains_both_modes_alike(what):
    make, inner = WRAPPERS[what]
    masked, condensed = (Run(mode, make).go(11) for mode in ("masked", "condensed"))
    assert_same_training(masked, condensed, inner)
    for run in (masked, condensed):
        for name in LAYERS:
            for key, part in run.state(name, inner(run.optimizer)).items():
                assert not part[~run.srigl.mask(name)].any(), key


class Master(torch.optim.Optimizer):
    """Updates copies of the parameters in another precision."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.own = self.param_groups[0]["params"]
        self.copies = [nn.Parameter(p.detach().float()) for p in self.own]
        self.inner = torch.optim.SGD(self.copies, lr=0.1)

    def step(self, closure=None):
        for p, q in zip(self.own, self.copies, strict=True):
            q.grad = p.grad.float()
        self.inner.step()
        for p, q in zip(self.own, self.copies, strict=True):
            p.data.copy_(q)


class OldMaster(Master):
    """As apex's FP16_Optimizer, which is no subclass and shows the copies."""

    param_groups = property(lambda self: self.inner.param_groups, lambda self, groups: None)

    def __init__(self, parameters):
        self.own = list(parameters)
        self.copies = [nn.Parameter(p.detach().float()) for p in self.own]
        self.inner = torch.optim.SGD(self.copies, lr=0.1)


class SlowList(Accelerated):
    """Keeps slow weights in lists of its own."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        groups = self.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in groups]


COPIES = {
    "master": (Master, "Master holds its weight, but the optimizer inside it, SGD, does not"),
    "old master": (OldMaster, "the optimizer does not hold its weight"),
    "lists": (lambda p: SlowList(adam(p)), r"SlowList\.slow holds a tensor of its weight's shape"),
}


@pytest.mark.parametrize("what", COPIES)
def test_an_optimizer_that_keeps_copies_of_weights_is_refused(what, mode):
    make, message = COPIES[what]
    with pytest.raises(SriglError, match=f"layer '0'.*{message}"):
        Run(mode, make)


@pytest.mark.parametrize("what", ["a number", [], [None], nn.Linear(2, 2)], ids=str)
def test_what_is_no_optimizer_is_refused(what, mode):
    with pytest.raises(ValueTypeError, match=f"got {type(what).__name__}"):
        SRigL(perceptron(), what, sparsity=0.5, schedule=1000, mode=mode)


ZERO = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from srigl_core import SriglError
from srigl_core.reference import UpdateSchedule
from srigl_core.torch import SRigL

def say(line):
    sys.stdout.write(f"{line}\\n")  # in one piece, since the ranks share their output
    sys.stdout.flush()

def plain(groups, group):
    return torch.optim.AdamW(groups, lr=0.01)

def zero(groups, group, **options):
    return ZeroRedundancyOptimizer(
        groups, torch.optim.AdamW, process_group=group, lr=0.01, **options
    )

def buckets(groups, group):
    return zero(groups, group, parameters_as_bucket_view=True)

def local_sgd(groups, group):
    averager = PeriodicModelAverager(period=1, warmup_steps=1000, process_group=group)
    return PostLocalSGDOptimizer(plain(groups, group), averager)

def train(make, rank, world, group, mode):
    torch.manual_seed(0)
    layers = [nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)]
    model = nn.Sequential(*layers).double()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = make(groups, group)
    schedule = UpdateSchedule(t_end=1000, delta_t=3, alpha=0.5)
    wrapped = DistributedDataParallel(model, process_group=group)
    for step in range(12):
        if step == 2:  # after two dense steps
            srigl = SRigL(
                model, optimizer, mode=mode, sparsity=0.7, schedule=schedule, process_group=group
            )
            wrapped = DistributedDataParallel(model, process_group=group)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 20, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (8,), generator=generator)
        optimizer.zero_grad()
        mine = slice(rank, None, world)
        nn.functional.cross_entropy(wrapped(x[mine]), y[mine]).backward()
        if step >= 2:
            srigl.after_backward()
        optimizer.step()
        if step >= 2:
            srigl.step()
            scheduler.step()
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
    by_index = optimizer.state_dict()["state"] if rank == 0 else {}
    states = [state for _, state in sorted(by_index.items())]
    moments = [part for s in states for _, part in sorted(s.items()) if torch.is_tensor(part)]
    return [p.detach().clone() for p in model.parameters()], moments

def work(rank, world, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    group = dist.new_group(list(range(world)))
    for mode in ("masked", "condensed"):
        weights, moments = train(plain, rank, world, group, mode)
        for make in (zero, buckets, local_sgd):
            others, other_moments = train(make, rank, world, group, mode)
            same = all(torch.equal(p, q) for p, q in zip(weights, others, strict=True))
            pairs = zip(moments, other_moments, strict=True)
            same = same and all(torch.equal(p, q) for p, q in pairs)
            everyones = [None] * world
            dist.all_gather_object(everyones, same, group=group)
            if rank == 0:
                line = f"ranks={world} {mode} {make.__name__}: same bits {all(everyones)}"
                say(f"{line} {len(moments)}")
    try:
        model = nn.Sequential(nn.Linear(4, 4))
        overlapping = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1
        )
        SRigL(model, overlapping, sparsity=0.5, schedule=100)
    except SriglError as error:
        say(error)
    dist.destroy_process_group()

if __name__ == "__main__":
    world = int(sys.argv[1])
    mp.spawn(work, (world, sys.argv[2]), nprocs=world)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [1, 2])
def test_optimizers_of_several_ranks_give_the_bits_of_the_plain_one(world, tmp_path):
    script = tmp_path / "zero.py"
    script.write_text(ZERO)
    done = subprocess.run(
        [sys.executable, str(script), str(world), str(tmp_path / "ranks")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    print(*lines, sep="\n")
    results = [line for line in lines if line.startswith("ranks=")]
    assert len(results) == 6
    assert all(line.endswith("same bits True 18") for line in results)
    refused = [line for line in lines if "overlap_with_ddp=True steps before" in line]
    assert len(refused) == world
