"""What the trainers of a network have in common: options, budgets, schedule and the step count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.checks import check_integer
from srigl_core._format.weight import flat_shape
from srigl_core._update import UpdateSettings
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.distributions import DISTRIBUTIONS, LayerBudget, erk, nnz_budget, uniform
from srigl_core.reference.schedule import UpdateSchedule

__all__ = ["METHODS", "LayerOptions", "TrainingState", "naming"]

METHODS = ("srigl", "rigl", "set", "static")

_STATE_VERSION = 1


@dataclass(frozen=True)
class LayerOptions:
    """What one layer does differently.

    Parameters
    ----------
    dense : bool
        Keep every weight; the other layers pay for it.
    ablate : bool or None
        Whether its neurons may be ablated; None is the trainer's choice: all but the last layer.
    sparsity : float or None
        A sparsity of its own.
    nnz_budget : int or None
        A number of weights of its own.

    Raises
    ------
    SriglError
        If more than one of `dense`, `sparsity` and `nnz_budget` is given.
    """

    dense: bool = False
    ablate: bool | None = None
    sparsity: float | None = None
    nnz_budget: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dense, bool) or not isinstance(self.ablate, bool | None):
            raise ValueTypeError(f"{self!r}: dense must be True or False, and ablate that or None")
        if self.dense + (self.sparsity is not None) + (self.nnz_budget is not None) > 1:
            raise SriglError(f"{self!r} says the layer's budget more than once; give one of them")


class TrainingState:
    """What trainers of every kind keep: budgets, schedule, the step, the masks in their own form.

    Parameters
    ----------
    shapes, sparsity, schedule, distribution, layers, ablate_last, seed
        As in `SparseTrainer`.
    method : str
    settings : UpdateSettings
        Of every update but for budget and drop fraction.
    grad_window : int
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        sparsity: float,
        schedule: UpdateSchedule | int,
        method: str,
        distribution: str,
        settings: UpdateSettings,
        grad_window: int,
        layers: Mapping[str, LayerOptions] | None,
        ablate_last: bool,
        seed: int,
    ) -> None:
        self.method = _one_of(method, "method", METHODS)
        self._settings = settings
        self._schedule = (
            schedule
            if isinstance(schedule, UpdateSchedule)
            else UpdateSchedule.for_training(schedule)
        )
        self._grad_window = check_integer(
            grad_window, "grad_window", least=1, most=self._schedule.delta_t
        )
        self._options = _checked_options(shapes, layers or {}, ablate_last=ablate_last)
        self.budgets = _budgets(shapes, sparsity, distribution, self._options)
        self._rng = np.random.default_rng(check_integer(seed, "seed", least=0))
        self.step_count = 0

    @property
    def needs_grad(self) -> bool:
        """Whether the coming step's gradients are needed for an update."""
        coming = self.step_count + 1
        due = self._schedule.next_due(coming)
        uses_gradients = self.method in ("srigl", "rigl")
        return uses_gradients and due is not None and due - coming < self._grad_window

    @property
    def sparse_layers(self) -> list[str]:
        """Names of the layers that updates are of: all but those kept dense."""
        return list(self._sparse(self.budgets))

    @property
    def is_due(self) -> bool:
        """Whether the coming step updates the masks."""
        return self._schedule.is_due(self.step_count + 1)

    @property
    def fan_in(self) -> dict[str, int | None]:
        """Fan-in of each layer's active neurons; None where it is not constant."""
        counts = {name: self._row_counts(name) for name in self.budgets}
        fan_ins = {name: set(count[count > 0].tolist()) for name, count in counts.items()}
        return {name: found.pop() if len(found) == 1 else None for name, found in fan_ins.items()}

    @property
    def n_active(self) -> dict[str, int]:
        """Number of active neurons of each layer."""
        return {name: int(np.count_nonzero(self._row_counts(name))) for name in self.budgets}

    @property
    def nnz(self) -> dict[str, int]:
        """Number of active weights of each layer: what is realised of its budget."""
        return {name: int(self._row_counts(name).sum()) for name in self.budgets}

    @property
    def sparsity(self) -> float:
        """Realised sparsity of the network."""
        return 1 - sum(self.nnz.values()) / sum(b.n_weights for b in self.budgets.values())

    def report(self) -> str:
        """Return a table of the layers: weights asked for and realised, fan-in, active neurons."""
        lines = [
            f"{'layer':<20}{'shape':>18}{'budget':>10}{'weights':>10}{'sparsity':>10}"
            f"{'fan-in':>8}{'active':>14}"
        ]
        nnz, fan_in, n_active = self.nnz, self.fan_in, self.n_active
        for name, budget in self.budgets.items():
            shape = "x".join(map(str, budget.shape))
            lines.append(
                f"{name:<20}{shape:>18}{budget.nnz_budget:>10}{nnz[name]:>10}"
                f"{1 - nnz[name] / budget.n_weights:>10.2%}{fan_in[name] or '-':>8}"
                f"{f'{n_active[name]}/{budget.shape[0]}':>14}"
            )
        return "\n".join(lines)

    def _row_counts(self, name: str) -> NDArray[np.int64]:
        """Return the number of active weights of each row."""
        raise NotImplementedError

    def _sparse(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        return {name: part for name, part in layers.items() if not self._options[name].dense}

    def _initial_fan_in(self, budget: LayerBudget) -> int:
        n_out, _ = flat_shape(budget.shape)
        if budget.nnz_budget < n_out:
            raise SriglError(
                f"nnz_budget={budget.nnz_budget} gives each of the {n_out} neurons less than one "
                f"weight at the start; lower the sparsity, or give the layer at least "
                f"{n_out} with LayerOptions(nnz_budget=...)"
            )
        return budget.nnz_budget // n_out

    def _update_settings(self, name: str, step: int) -> dict[str, Any]:
        """Return the settings of a layer's update, as `update_mask` takes them."""
        settings, ablate = self._settings, self._options[name].ablate
        return {
            "nnz_budget": self.budgets[name].nnz_budget,
            "drop_fraction": self._schedule.drop_fraction(step),
            "gamma_sal": settings.gamma_sal if ablate else None,
            "min_salient": settings.min_salient if ablate else None,
            "saliency_scope": settings.saliency_scope,
            "grown_init": settings.grown_init,
        }

    def _fingerprint(self) -> dict[str, Any]:
        """All settings that shape a run; the backend does not, since all give the same bits."""
        return {
            "method": self.method,
            "layers": {
                name: [list(budget.shape), budget.nnz_budget, asdict(self._options[name])]
                for name, budget in self.budgets.items()
            },
            "schedule": asdict(self._schedule),
            "update": asdict(self._settings),
            "grad_window": self._grad_window,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs: plain containers, numbers and new arrays."""
        return {
            "version": _STATE_VERSION,
            "settings": self._fingerprint(),
            "step_count": self.step_count,
            "rng": self._rng.bit_generator.state,
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


def _checked_options(
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, LayerOptions],
    *,
    ablate_last: bool,
) -> dict[str, LayerOptions]:
    """Return the options of every layer, with `ablate` decided."""
    if not isinstance(shapes, Mapping) or not isinstance(layers, Mapping):
        raise ValueTypeError("shapes and layers must be dicts, from the layers' names")
    if not shapes:
        raise SriglError("shapes is empty; name at least one layer")
    unknown = [name for name in layers if name not in shapes]
    if unknown:
        raise SriglError(f"layers names {unknown[0]!r}; there are {', '.join(shapes)}")
    last = list(shapes)[-1]
    options = {}
    for name in shapes:
        given = layers.get(name, LayerOptions())
        if not isinstance(given, LayerOptions):
            raise ValueTypeError(
                f"layers[{name!r}]={given!r} must be a LayerOptions, for example "
                f"LayerOptions(dense=True)"
            )
        ablate = (ablate_last or name != last) if given.ablate is None else given.ablate
        options[name] = LayerOptions(given.dense, ablate, given.sparsity, given.nnz_budget)
    return options


def _budgets(
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float,
    distribution: str,
    options: Mapping[str, LayerOptions],
) -> dict[str, LayerBudget]:
    _one_of(distribution, "distribution", DISTRIBUTIONS)
    dense, fixed = [], {}
    for i, (name, option) in enumerate(options.items()):
        with naming(name):
            n_out, n_in = flat_shape(shapes[name])
            if option.dense:
                dense.append(i)
            elif option.sparsity is not None:
                own = nnz_budget(n_out * n_in, option.sparsity)
                fixed[i] = check_integer(own, "nnz_budget", least=1)
            elif option.nnz_budget is not None:
                fixed[i] = check_integer(
                    option.nnz_budget, "nnz_budget", least=1, most=n_out * n_in
                )
    share = erk if distribution == "erk" else uniform
    layers = share(shapes, sparsity, dense=dense, fixed=fixed)
    return dict(zip(shapes, layers, strict=True))


def _one_of(value: str, what: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise SriglError(f"{what}={value!r} is unknown; use one of {', '.join(allowed)}")
    return value


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the layer's name before the message of an error from the algorithm."""
    try:
        yield
    except SriglError as error:
        raise type(error)(f"layer {layer!r}: {error}") from error
