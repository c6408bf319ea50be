"""Steps that a gradient scaler skips, and optimisers that do not change a weight."""

import pytest
from training_options import training_options

from srigl_core import SriglError
from srigl_core.reference import UpdateSchedule

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from srigl_core.torch import SRigL  # noqa: E402

SCHEDULE = UpdateSchedule(t_end=1000, delta_t=3, alpha=0.5)
OPTIONS = {"sparsity": 0.7, "schedule": SCHEDULE, "gamma_sal": 0.9, "seed": 1}


@pytest.fixture(params=["masked", "condensed"])
def mode(request):
    return request.param


class Checkpointed(nn.Sequential):
    """Recomputes its activations in the backward pass, in two segments."""

    reentrant: bool | None = None

    def forward(self, x):
        if self.reentrant is None:
            return super().forward(x)
        for part in (self[:2], self[2:]):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


def perceptron(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 5)]
    return Checkpointed(*layers).to(dtype)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 20, generator=generator, dtype=dtype)
    return x, torch.randint(0, 5, (16,), generator=generator)


class Run:
    """A model in training with a gradient scaler; `overflows` are the attempts that overflow."""

    def __init__(
        self, mode, *, overflows=(), amp=True, passes=True, unscales=True, parts=1, clip=None,
        reentrant=None, autocast=None, make=None, poison="2", **options,
    ):  # fmt: skip
        self.model = perceptron(torch.float32 if autocast else torch.float64)
        self.model.reentrant = reentrant
        make = make or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        self.optimizer = make(self.model.parameters())
        options = training_options(**(OPTIONS | options))
        self.srigl = SRigL(self.model, self.optimizer, mode=mode, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=amp, growth_interval=4)
        self.overflows, self.passes, self.unscales, self.parts = overflows, passes, unscales, parts
        self.clip, self.autocast, self.poison = clip, autocast, poison
        self.attempts = self.batches = self.n_updates = 0
        self.factor = 1.0

    def go(self, steps):
        """Make steps that are not skipped."""
        goal = self.batches + steps
        while self.batches < goal:
            overflows = self.attempts in self.overflows
            self.attempts += 1
            self.attempt(overflows)
            self.batches += not overflows
        return self

    def attempt(self, overflows):
        self.optimizer.zero_grad()
        x, y = batch(self.batches, next(self.model.parameters()).dtype)
        dtype = self.autocast or torch.bfloat16
        for part in range(self.parts):
            some = slice(part, None, self.parts)
            with torch.autocast("cpu", dtype=dtype, enabled=self.autocast is not None):
                out = self.model(x[some].requires_grad_(self.model.reentrant is not None))
                loss = nn.functional.cross_entropy(out.to(x.dtype), y[some]) / self.parts
            self.scaler.scale(loss * self.factor).backward()
        if overflows:
            parameters = list(self.model.get_submodule(self.poison).parameters())
            parameters[0].grad.view(-1)[0] = float("inf")
        if self.unscales:
            self.scaler.unscale_(self.optimizer)
        self.srigl.after_backward(scaler=self.scaler if self.passes else None)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.n_updates += bool(self.srigl.step())

    def masks(self):
        return {name: self.srigl.mask(name) for name in self.srigl.trainer.budgets}


def assert_same_masks(one, other):
    assert one.n_updates == other.n_updates >= 2
    for name, mask in one.masks().items():
        assert torch.equal(mask, other.masks()[name])


USES = {
    "as documented": {},
    "without unscale_": {"unscales": False},
    "clipped": {"clip": 0.1},
    "accumulated": {"parts": 4},
    "in a layer that stays dense": {"exclude": ["2"]},
    "fused": {"make": lambda p: torch.optim.Adam(p, lr=0.01, fused=True)},
    "fused without unscale_": {
        "make": lambda p: torch.optim.Adam(p, lr=0.01, fused=True), "unscales": False,
    },
    "checkpointed": {"reentrant": False, "parts": 2},
    "checkpointed, reentrant": {"reentrant": True, "parts": 2},
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_skipped_steps_change_nothing_in_a_run(use, mode):
    """With a window of three steps, whose scale changes, masks are those without a scaler."""
    options = {"grad_window": 3} | USES[use]
    plain = Run(mode, **(options | {"amp": False, "unscales": True})).go(9)
    scaled = Run(mode, overflows=(0, 2, 6, 7), **options).go(9)
    assert scaled.attempts == 13
    assert scaled.srigl.trainer.step_count == 9
    assert_same_masks(plain, scaled)


@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("overflows", [(2, 3, 4), (5, 9)], ids=str)
def test_a_skipped_step_of_an_update_waits_without_the_scaler_too(overflows, unscales, mode):
    plain = Run(mode).go(9)
    scaled = Run(mode, passes=False, overflows=overflows, unscales=unscales).go(9)
    assert scaled.srigl.trainer.step_count == 9
    assert_same_masks(plain, scaled)


@pytest.mark.parametrize("reentrant", [False, True])
def test_overflows_of_float16_do_not_end_a_run(reentrant, mode):
    """The scale starts too large, and grows until it is too large again."""
    run = Run(mode, autocast=torch.float16, reentrant=reentrant, clip=1.0)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    train(run, 30)
    assert 15 <= run.srigl.trainer.step_count < 27
    assert run.n_updates == run.srigl.trainer.step_count // 3


def test_gradients_of_ablated_neurons_that_overflow_do_not_end_a_run():
    """No parameter sees them, but the dense gradient of an update would."""
    run = Run("condensed").go(2)
    layer = run.model[0]
    for _ in range(2):
        x, y = batch(2)
        run.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run.model(x), y)
        run.scaler.scale(loss).backward()
        captured = run.srigl._layers._capturing["0"]
        captured[-1][1][0, 0] = float("inf")
        run.scaler.unscale_(run.optimizer)
        run.srigl.after_backward(scaler=run.scaler)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        assert not run.srigl.step()
    assert layer.values.isfinite().all()
    assert run.srigl.trainer.step_count == 2
    run.go(1)
    assert run.n_updates == 1


def test_a_run_without_any_finite_gradient_ends_at_last(mode):
    run = Run(mode, passes=False).go(2)
    for _ in range(200):
        run.attempt(True)
    with pytest.raises(SriglError, match="gradients of 201 steps in a row were not finite"):
        run.attempt(True)


class Frozen(torch.optim.SGD):
    """Never changes a parameter."""

    def step(self, closure=None):
        pass


def train(run, steps):
    for _ in range(steps):
        run.attempt(False)
        run.batches += 1


def test_a_weight_that_never_changes_is_reported(mode):
    run = Run(mode, amp=False, make=lambda p: Frozen(p, lr=0.1))
    train(run, 2)
    with pytest.raises(SriglError, match=r"layer '0' has gradients, but the optimizer has not"):
        train(run, 1)
    assert run.srigl.trainer.step_count == 2


STILL = {
    "a warm-up that starts at zero": {"lr": 0.0},
    "a warm-up whose steps are rounded away": {"lr": 1e-25},
    "gradients of zero": {"lr": 0.1},
}


@pytest.mark.filterwarnings("ignore:no gradient reached layer")
@pytest.mark.parametrize("what", STILL)
def test_a_weight_that_need_not_change_is_not_reported(what, mode):
    run = Run(mode, amp=False, make=lambda p: torch.optim.SGD(p, **STILL[what]))
    run.factor = 0.0 if what == "gradients of zero" else 1.0
    train(run, 8)
    assert run.n_updates == (0 if what == "gradients of zero" else 2)
