"""The skeleton of the training drivers: budgets, schedule, step count, state and resume."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.checks import check_integer
from srigl_core._format.connections import flat_shape
from srigl_core._training.config import LayerOptions, TrainingConfig
from srigl_core._training.methods import Method, get_method
from srigl_core._update import UpdateOptions, UpdateSettings
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.distributions import LayerBudget, erk, nnz_budget, uniform
from srigl_core.reference.schedule import UpdateSchedule

__all__ = ["TrainerSkeleton", "check_names", "entry_of", "error_context"]

_STATE_VERSION = 1
_UPDATE_FIELDS = fields(UpdateOptions)
_FEW_UPDATES = 10
"""Fewer updates than these are reported if the schedule follows from a number of steps."""

Update = TypeVar("Update")


class TrainerSkeleton(ABC):
    """The part that all training drivers share; subclasses store the masks.

    Parameters
    ----------
    shapes, sparsity, schedule, config
        As in `SparseTrainer`.
    counts : mapping of str to int
        Number of active weights of each layer whose first mask is given.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        sparsity: float | None,
        schedule: UpdateSchedule | int,
        config: TrainingConfig | None,
        counts: Mapping[str, int],
    ) -> None:
        config = TrainingConfig() if config is None else config
        if not isinstance(config, TrainingConfig):
            raise ValueTypeError(f"config must be a TrainingConfig, got {type(config).__name__}")
        self.config = config
        least = 1 if isinstance(schedule, UpdateSchedule) else _FEW_UPDATES
        if not isinstance(schedule, UpdateSchedule):
            if isinstance(schedule, bool) or not isinstance(schedule, int | np.integer):
                raise ValueTypeError(
                    f"schedule must be an UpdateSchedule or the number of training steps, got "
                    f"{type(schedule).__name__}"
                )
            schedule = UpdateSchedule.for_training(schedule)
        self.schedule = schedule
        if check_integer(config.grad_window, "grad_window", least=1) > schedule.delta_t:
            raise SriglError(
                f"grad_window={config.grad_window!r} exceeds delta_t={schedule.delta_t}, the steps "
                f"between updates; make the window shorter"
            )
        options = _layer_options(shapes, config)
        self.budgets = _budgets(shapes, sparsity, config.distribution, options, counts)
        self._options = {
            name: _dense(option) if self.budgets[name].is_dense else option
            for name, option in options.items()
        }
        for name, count in counts.items():
            if self._options[name].dense and count < self.budgets[name].n_weights:
                raise SriglError(
                    f"layer {name!r}: the given mask has {count} weights, but the layer is dense "
                    f"(by its options, or by the sparsity and the distribution); leave out its "
                    f"mask, or leave out sparsity to keep the masks' sizes"
                )
        if self.schedule.n_updates < least and self.config.method != "static":
            warnings.warn(
                f"{self.schedule} has {self.schedule.n_updates} mask updates; train for more "
                f"steps, or pass an UpdateSchedule with a smaller delta_t",
                stacklevel=3,
            )
        if self.config.method == "srigl":
            self._warn_of_low_thresholds()
        self._rng = np.random.default_rng(config.seed)
        self.step_count = 0

    @property
    def _method(self) -> Method:
        return get_method(self.config.method)  # not kept, so that trainers can be pickled

    @property
    def needs_grad(self) -> bool:
        """Whether the next update needs the gradients of the coming step."""
        coming = self.step_count + 1
        due = self.schedule.next_due(coming)
        in_window = due is not None and due - coming < self.config.grad_window
        return self._method.uses_gradients and in_window

    @property
    def sparse_layers(self) -> list[str]:
        """Names of the layers that are updated: all except those that have all their weights."""
        return [name for name, options in self._options.items() if not options.dense]

    @property
    def is_due(self) -> bool:
        """Whether the coming step updates the masks."""
        return self.schedule.is_due(self.step_count + 1)

    @property
    def fan_in(self) -> dict[str, int | None]:
        """Fan-in of each layer's active neurons; None where it is not constant."""
        counts = {name: self._row_counts(name) for name in self.budgets}
        fan_ins = {name: set(count[count > 0].tolist()) for name, count in counts.items()}
        return {name: some.pop() if len(some) == 1 else None for name, some in fan_ins.items()}

    @property
    def n_active(self) -> dict[str, int]:
        """Number of active neurons of each layer."""
        return {name: int(np.count_nonzero(self._row_counts(name))) for name in self.budgets}

    @property
    def nnz(self) -> dict[str, int]:
        """Number of active weights of each layer; at most its budget."""
        return {name: int(self._row_counts(name).sum()) for name in self.budgets}

    @property
    def n_updates(self) -> int:
        """Number of mask updates so far."""
        return self.schedule.n_updates_until(self.step_count)

    @property
    def sparsity(self) -> float:
        """Realised sparsity of the network."""
        return 1 - sum(self.nnz.values()) / sum(b.n_weights for b in self.budgets.values())

    def report(self) -> str:
        """Return a table of the layers: budgets, active weights, fan-in and active neurons."""
        width = max([19, *map(len, self.budgets)]) + 1
        lines = [
            f"{'layer':<{width}}{'shape':>18}{'budget':>10}{'weights':>10}{'sparsity':>10}"
            f"{'fan-in':>8}{'active':>14}"
        ]
        nnz, fan_in, n_active = self.nnz, self.fan_in, self.n_active
        for name, budget in self.budgets.items():
            shape = "x".join(map(str, budget.shape))
            lines.append(
                f"{name:<{width}}{shape:>18}{budget.nnz_budget:>10}{nnz[name]:>10}"
                f"{1 - nnz[name] / budget.n_weights:>10.2%}{fan_in[name] or '-':>8}"
                f"{f'{n_active[name]}/{budget.shape[0]}':>14}"
            )
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs: plain containers, numbers and new NumPy arrays."""
        return {
            "version": _STATE_VERSION,
            "settings": self._fingerprint(),
            "step_count": self.step_count,
            "rng": self._rng.bit_generator.state,
            **self._masks_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the `state_dict` of a trainer made with the same arguments.

        Raises
        ------
        SriglError
            If `state` is not a trainer's, or was taken with other settings; nothing is changed.
        """
        try:
            self._check_settings_of(state)
            step_count = check_integer(state["step_count"], "step_count of state", least=0)
            set_masks = self._masks_from(state)
            rng = np.random.default_rng()
            rng.bit_generator.state = state["rng"]
        except SriglError:
            raise
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise SriglError(f"state is not a whole state_dict(): {error!r}") from error
        self.step_count, self._rng = step_count, rng
        set_masks()

    def _with_gradients(self, layers: list[str]) -> list[str]:
        """Return the layers that had gradients, and warn of the others, which keep their masks."""
        absent = [name for name in self.sparse_layers if name not in layers]
        if absent:
            warnings.warn(
                f"no gradient reached layer {', '.join(map(repr, absent))} since the last update, "
                f"so this update leaves its mask as it is",
                stacklevel=3,
            )
        return layers

    def _advance(
        self,
        layers: list[str],
        update: Callable[[str], Update],
        take: Callable[[str, Update], None],
    ) -> Any:
        """Count a step, and update the layers if an update is due.

        `update` computes a layer's update, `take` stores it. An error in one layer changes nothing.
        """
        updates: dict[str, Update] = {}
        rng_state = self._rng.bit_generator.state
        try:
            for name in layers if self.is_due else ():
                with error_context(name):
                    updates[name] = update(name)
        except BaseException:
            self._rng.bit_generator.state = rng_state
            raise
        for name, result in updates.items():
            take(name, result)
        self.step_count += 1
        return updates

    def _update_settings(self, name: str) -> UpdateSettings:
        """Return the settings of a layer's update at the coming step."""
        budget = self.budgets[name]
        options = asdict(self.config.update_options(self._options[name], budget.shape))
        drop_fraction = self.schedule.drop_fraction(self.step_count + 1)
        return UpdateSettings(budget.nnz_budget, drop_fraction, **options)

    def _warn_of_low_thresholds(self) -> None:
        """Name the layers where ablation removes no more than rows without a salient weight."""
        low = []
        for name in self.sparse_layers:
            budget = self.budgets[name]
            options = self.config.update_options(self._options[name], budget.shape)
            fan_in = budget.nnz_budget // budget.shape[0]
            if options.gamma_sal is not None and math.floor(options.gamma_sal * fan_in) < 2:
                low.append(f"{name!r} (gamma_sal={options.gamma_sal}, fan-in {fan_in})")
        if low:
            warnings.warn(
                f"layer {', '.join(low)}: ablation only removes neurons without any salient "
                f"weight, since gamma_sal times the fan-in is below 2; raise gamma_sal or lower "
                f"the sparsity, or set ablate=False in LayerOptions",
                stacklevel=4,
            )

    @abstractmethod
    def _row_counts(self, name: str) -> NDArray[np.int64]:
        """Return the number of active weights of each row."""

    @abstractmethod
    def _masks_state(self) -> dict[str, Any]:
        """Return the masks' part of `state_dict`."""

    @abstractmethod
    def _masks_from(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check the masks of a state, and return a function that stores them."""

    def _fingerprint(self) -> dict[str, Any]:
        """Return the settings that decide a run's masks; all backends give the same bits."""
        return {
            "method": self.config.method,
            "layers": {
                name: [list(budget.shape), budget.nnz_budget, asdict(self._options[name])]
                for name, budget in self.budgets.items()
            },
            "schedule": asdict(self.schedule),
            "update": {field.name: getattr(self.config, field.name) for field in _UPDATE_FIELDS},
            "grad_window": self.config.grad_window,
        }

    def _check_settings_of(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or not isinstance(state.get("version"), int):
            raise SriglError(f"state is not a state_dict(); got {type(state).__name__}")
        if state["version"] != _STATE_VERSION:
            raise SriglError(
                f"state is not a state_dict() of version {_STATE_VERSION}, but of "
                f"{state['version']!r}; use the srigl-core that wrote it"
            )
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise SriglError(f"state is not a whole state_dict(): it lacks {missing[0]}")
        mine, theirs = self._fingerprint(), state["settings"]
        differ = [key for key in mine if mine[key] != theirs.get(key)]
        if differ:
            raise SriglError(
                f"state was taken with other settings: {differ[0]} was {theirs.get(differ[0])!r} "
                f"and is {mine[differ[0]]!r}; make the trainer with the same arguments"
            )


def _layer_options(
    shapes: Mapping[str, tuple[int, ...]], config: TrainingConfig
) -> dict[str, LayerOptions]:
    """Return the options of every layer; `ablate` is True or False."""
    if not isinstance(shapes, Mapping):
        raise ValueTypeError(
            f"shapes must be a dict from the layers' names to shapes, got {type(shapes).__name__}"
        )
    if not shapes:
        raise SriglError("shapes is empty; name at least one layer")
    check_names("layers", config.layers, shapes)
    last = list(shapes)[-1]
    options = {}
    for name in shapes:
        layer = config.layers.get(name, LayerOptions())
        ablate = (config.ablate_last or name != last) if layer.ablate is None else layer.ablate
        options[name] = replace(layer, ablate=ablate)
    return options


def _dense(options: LayerOptions) -> LayerOptions:
    """Return the options of a layer that has all its weights: there is nothing to update."""
    return replace(options, dense=True, sparsity=None, nnz_budget=None)


def _budgets(
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float | None,
    distribution: str,
    options: Mapping[str, LayerOptions],
    counts: Mapping[str, int],
) -> dict[str, LayerBudget]:
    dense, fixed = [], {}
    for i, (name, option) in enumerate(options.items()):
        with error_context(name):
            n_out, n_in = flat_shape(shapes[name])
            budget = option.nnz_budget
            if option.sparsity is not None:
                budget = nnz_budget(n_out * n_in, option.sparsity)
            if budget is None and sparsity is None:
                budget = counts.get(name)
            if option.dense:
                dense.append(i)
            elif budget is not None:
                fixed[i] = check_integer(budget, "nnz_budget", least=1, most=n_out * n_in)
            elif sparsity is None:
                raise SriglError("sparsity is missing; only layers with a given mask need none")
    share = erk if distribution == "erk" else uniform
    layers = share(shapes, 0.0 if sparsity is None else sparsity, dense=dense, fixed=fixed)
    for layer, name in zip(layers, shapes, strict=True):
        if counts.get(name, 0) > layer.nnz_budget:
            raise SriglError(
                f"layer {name!r}: the given mask has {counts[name]} weights, but the budget is "
                f"{layer.nnz_budget}; lower the sparsity, or leave it out to keep the masks' sizes"
            )
    return dict(zip(shapes, layers, strict=True))


def check_names(what: str, names: Iterable[str], layers: Iterable[str]) -> None:
    """Check that an argument names only layers."""
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise SriglError(
            f"{what} has an entry {unknown[0]!r}, but the layers are: {', '.join(layers)}"
        )


def entry_of(what: str, arguments: Mapping[str, Any], layer: str) -> Any:
    """Return a layer's entry of an argument of `step`."""
    if layer not in arguments:
        raise SriglError(f"{what} has no entry for it; pass those of all sparse layers")
    return arguments[layer]


@contextmanager
def error_context(layer: str) -> Iterator[None]:
    """Prefix the message of a SriglError with the layer's name."""
    try:
        yield
    except SriglError as error:
        raise type(error)(f"layer {layer!r}: {error}") from error
