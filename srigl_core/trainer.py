"""The training driver: masks, budgets, schedule and gradient windows of a whole network.

Free of frameworks and of layer types: layers are names with shapes, weights and gradients arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core.array_checks import as_float_array, as_mask, check_integer
from srigl_core.condensed_weight import flat_shape
from srigl_core.contract import Backend
from srigl_core.dispatch import update_mask
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.float_mode import honour_subnormals
from srigl_core.mask_update import MaskUpdate, UpdateSettings
from srigl_core.reference.baselines import update_rigl, update_set, update_static
from srigl_core.reference.distributions import DISTRIBUTIONS, LayerBudget, erk, nnz_budget, uniform
from srigl_core.reference.init import random_mask, random_unstructured_mask
from srigl_core.reference.schedule import UpdateSchedule
from srigl_core.registry import get_backend
from srigl_core.value_types import accumulator_dtype

__all__ = ["METHODS", "LayerOptions", "SparseTrainer"]

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


class SparseTrainer:
    """Drive dynamic sparse training of a network, step by step.

    In every training step, after the backward pass: hand the dense gradients to `accumulate` if
    `needs_grad` says so, let the optimiser step, then call `step` and take over what it returns.
    Between updates multiply gradients (or weights) by `masks`.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        The layers' weights, original shapes, in network order.
    sparsity : float
        Of the whole network, in [0, 1).
    schedule : UpdateSchedule or int
        When to update; an int is the number of training steps, of which the first 75% update
        every 100 steps.
    method : {"srigl", "rigl", "set", "static"}
        "srigl" is constant fan-in; the others are unstructured.
    distribution : {"erk", "uniform"}
        How the weights are shared among the layers.
    gamma_sal, min_salient, saliency_scope, grown_init
        As in `UpdateSettings`.
    grad_window : int
        Steps, ending with the update's, whose gradients are averaged.
    layers : mapping of str to LayerOptions, or None
        Layers that differ.
    ablate_last : bool
        Whether neurons of the last layer, the network's outputs, may be ablated.
    seed : int
        Of the initial masks and of SET's growth.
    backend : str, Backend or None
        For SRigL's updates, as in `get_backend`.

    Attributes
    ----------
    step_count : int
        Training steps so far.
    budgets : dict of str to LayerBudget
    masks : dict of str to ndarray of bool
        Read-only arrays in the layers' shapes, replaced at updates; a dense layer's is all True.

    Raises
    ------
    SriglError
        If a setting is out of range, a name is unknown, or a layer's budget is too small.

    Notes
    -----
    SPEC 4 and 5; the paper, sec. 3. A window longer than one step has to keep its gradients: the
    trainer holds their sum, one dense array a layer, from the window's first step to the update.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> trainer = SparseTrainer(
    ...     {"hidden": (32, 16), "output": (4, 32)}, sparsity=0.75,
    ...     schedule=UpdateSchedule(t_end=100, delta_t=10),
    ... )
    >>> weights = {
    ...     name: np.where(mask, rng.standard_normal(mask.shape), 0)
    ...     for name, mask in trainer.masks.items()
    ... }
    >>> for _ in range(10):
    ...     if trainer.needs_grad:
    ...         for name, weight in weights.items():
    ...             trainer.accumulate(name, rng.standard_normal(weight.shape))
    ...     updates = trainer.step(weights)
    >>> weights.update({name: update.weight for name, update in updates.items()})
    >>> updates["hidden"].fan_in, updates["hidden"].n_pruned
    (2, 15)
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        sparsity: float,
        schedule: UpdateSchedule | int,
        method: str = "srigl",
        distribution: str = "erk",
        gamma_sal: float | None = 0.3,
        min_salient: int | None = None,
        saliency_scope: str = "inactive",
        grown_init: float = 0.0,
        grad_window: int = 1,
        layers: Mapping[str, LayerOptions] | None = None,
        ablate_last: bool = False,
        seed: int = 0,
        backend: str | Backend | None = None,
    ) -> None:
        self.method = _one_of(method, "method", METHODS)
        self._settings = UpdateSettings(1, 0.0, gamma_sal, min_salient, saliency_scope, grown_init)
        self._schedule = (
            schedule
            if isinstance(schedule, UpdateSchedule)
            else UpdateSchedule.for_training(schedule)
        )
        self._grad_window = check_integer(
            grad_window, "grad_window", least=1, most=self._schedule.delta_t
        )
        self._backend = backend
        if method == "srigl" and backend is not None:
            get_backend(backend, operation="update_mask")
        self._options = _checked_options(shapes, layers or {}, ablate_last=ablate_last)
        self.budgets = _budgets(shapes, sparsity, distribution, self._options)
        self._rng = np.random.default_rng(check_integer(seed, "seed", least=0))
        self.step_count = 0
        self.masks: dict[str, NDArray[np.bool_]] = {}
        for name, budget in self.budgets.items():
            with _naming(name):
                self.masks[name] = _frozen(self._initial_mask(budget, self._options[name]))
        self._ever_active = {name: mask.copy() for name, mask in self._sparse(self.masks).items()}
        self._window: dict[str, tuple[NDArray[Any], int]] = {}

    @property
    def needs_grad(self) -> bool:
        """Whether the coming step's dense gradients are to be accumulated."""
        coming = self.step_count + 1
        due = self._schedule.next_due(coming)
        uses_gradients = self.method in ("srigl", "rigl")
        return uses_gradients and due is not None and due - coming < self._grad_window

    @property
    def fan_in(self) -> dict[str, int | None]:
        """Fan-in of each layer's active neurons; None where it is not constant."""
        counts = {name: _row_counts(mask) for name, mask in self.masks.items()}
        fan_ins = {name: set(count[count > 0].tolist()) for name, count in counts.items()}
        return {name: found.pop() if len(found) == 1 else None for name, found in fan_ins.items()}

    @property
    def n_active(self) -> dict[str, int]:
        """Number of active neurons of each layer."""
        return {name: int(np.count_nonzero(_row_counts(mask))) for name, mask in self.masks.items()}

    @property
    def nnz(self) -> dict[str, int]:
        """Number of active weights of each layer: what is realised of its budget."""
        return {name: int(np.count_nonzero(mask)) for name, mask in self.masks.items()}

    @property
    def sparsity(self) -> float:
        """Realised sparsity of the network."""
        return 1 - sum(self.nnz.values()) / sum(mask.size for mask in self.masks.values())

    def itop_rates(self) -> dict[str, float]:
        """Return, for each sparse layer, the share of its positions that was ever active.

        Notes
        -----
        Liu et al. 2021, "Do we actually need dense over-parameterization?".
        """
        return {name: float(seen.mean()) for name, seen in self._ever_active.items()}

    def accumulate(self, name: str, grad: ArrayLike) -> None:
        """Add a dense gradient of layer `name` to the window.

        Outside the window (`needs_grad` is False), and for a dense layer, it is not used.

        Parameters
        ----------
        name : str
        grad : array, the layer's shape
            Of the mean loss, as the optimiser sees it: AMP-scaled gradients are to be unscaled
            first. Copied.

        Raises
        ------
        SriglError
            If the name is unknown or the shape differs.
        ValueTypeError
            If it is no array of a value type.
        """
        if name not in self.masks:
            raise SriglError(f"no layer is called {name!r}; there are {', '.join(self.masks)}")
        with _naming(name):
            grad = as_float_array(grad, "grad")
            if grad.shape != self.masks[name].shape:
                raise SriglError(
                    f"grad has shape {grad.shape}, but its weight has {self.masks[name].shape}"
                )
        if not self.needs_grad or self._options[name].dense:
            return
        kind = accumulator_dtype(grad.dtype)
        with honour_subnormals(), np.errstate(over="ignore", invalid="ignore"):
            if name in self._window:
                total, calls = self._window[name]
                self._window[name] = (total + grad.astype(kind), calls + 1)
            else:
                self._window[name] = (grad.astype(kind), 1)

    def discard_gradients(self) -> None:
        """Empty the window, for instance after a step whose gradients overflowed."""
        self._window.clear()

    def step(self, weights: Mapping[str, ArrayLike]) -> dict[str, MaskUpdate]:
        """Count one training step, and update the masks if it is due.

        Parameters
        ----------
        weights : mapping of str to array
            The layers' dense weights after the optimiser's step. Not written.

        Returns
        -------
        dict of str to MaskUpdate
            Empty where no update is due; else one for each sparse layer, whose ``weight`` is to
            replace the layer's, and with whose masks optimiser state is to be remapped
            (`srigl_core.reference.remap_state`).

        Raises
        ------
        SriglError
            If a weight or a gradient is missing or not finite, or an update is not possible; the
            layer is named, and nothing is changed, the step not counted.
        """
        coming = self.step_count + 1
        updates: dict[str, MaskUpdate] = {}
        rng_state = self._rng.bit_generator.state
        if self._schedule.is_due(coming):
            if not isinstance(weights, Mapping):
                raise ValueTypeError(f"weights must be a dict, got {type(weights).__name__}")
            try:
                for name in self._sparse(self.masks):
                    if name not in weights:
                        raise SriglError(f"weights lacks layer {name!r}; an update needs them all")
                    with _naming(name):
                        updates[name] = self._update(name, weights[name], coming)
            except BaseException:
                self._rng.bit_generator.state = rng_state
                raise
            self._window.clear()
        for name, update in updates.items():
            self.masks[name] = _frozen(update.mask)
            self._ever_active[name] |= update.mask
        self.step_count = coming
        return updates

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs: plain containers, numbers and new arrays."""
        return {
            "version": _STATE_VERSION,
            "settings": self._fingerprint(),
            "step_count": self.step_count,
            "masks": {name: mask.copy() for name, mask in self.masks.items()},
            "ever_active": {name: seen.copy() for name, seen in self._ever_active.items()},
            "window": {name: (total.copy(), n) for name, (total, n) in self._window.items()},
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, by a trainer made with the same arguments.

        Raises
        ------
        SriglError
            If `state` is not a trainer's, or was taken with other settings; nothing is changed.
        """
        try:
            self._check_settings_of(state)
            step_count = check_integer(state["step_count"], "step_count of state", least=0)
            masks = self._masks_of(state["masks"], self.masks)
            for name, mask in self._sparse(masks).items():
                if self.method == "srigl" and len(set(_row_counts(mask).tolist()) - {0}) != 1:
                    raise SriglError(f"mask of layer {name!r} in state is not constant fan-in")
            ever_active = self._masks_of(state["ever_active"], self._sparse(self.masks))
            window = self._window_of(state["window"])
            rng = np.random.default_rng()
            rng.bit_generator.state = state["rng"]
        except SriglError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SriglError(f"state is not a whole state_dict(): {error!r}") from error
        self.step_count, self._rng, self._window = step_count, rng, window
        self.masks = {name: _frozen(mask) for name, mask in masks.items()}
        self._ever_active = ever_active

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

    def _masks_of(
        self, masks: Mapping[str, Any], like: Mapping[str, NDArray[np.bool_]]
    ) -> dict[str, NDArray[np.bool_]]:
        """Return copies of a state's masks, one for each layer of `like` and no other."""
        if masks.keys() != like.keys():
            raise SriglError(f"state has masks of {list(masks)}, but the layers are {list(like)}")
        copies = {}
        for name, mask in like.items():
            with _naming(name):
                copies[name] = as_mask(masks[name], mask.shape, "mask in state").copy()
                if self._options[name].dense and not copies[name].all():
                    raise SriglError("mask in state has inactive weights, but the layer is dense")
        return copies

    def _window_of(self, window: Mapping[str, Any]) -> dict[str, tuple[NDArray[Any], int]]:
        """Return copies of a state's sums of gradients and numbers of calls."""
        copies = {}
        for name, (total, calls) in window.items():
            with _naming(name):
                total = as_float_array(total, "gradient in state").copy()
                if total.shape != self.masks[name].shape:
                    raise SriglError(f"gradient in state has shape {total.shape}")
                copies[name] = (total, check_integer(calls, "calls in state", least=1))
        return copies

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

    def _sparse(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        return {name: part for name, part in layers.items() if not self._options[name].dense}

    def _initial_mask(self, budget: LayerBudget, options: LayerOptions) -> NDArray[np.bool_]:
        if options.dense:
            return np.ones(budget.shape, np.bool_)
        if self.method != "srigl":
            return random_unstructured_mask(budget.shape, nnz=budget.nnz_budget, rng=self._rng)
        n_out, _ = flat_shape(budget.shape)
        if budget.nnz_budget < n_out:
            raise SriglError(
                f"nnz_budget={budget.nnz_budget} gives each of the {n_out} neurons less than one "
                f"weight at the start; lower the sparsity, or give the layer at least "
                f"{n_out} with LayerOptions(nnz_budget=...)"
            )
        return random_mask(budget.shape, fan_in=budget.nnz_budget // n_out, rng=self._rng)

    def _update(self, name: str, weight: ArrayLike, step: int) -> MaskUpdate:
        mask, settings = self.masks[name], self._settings
        if self.method == "static":
            return update_static(weight, mask)
        drop_fraction = self._schedule.drop_fraction(step)
        if self.method == "set":
            return update_set(
                weight,
                mask,
                drop_fraction=drop_fraction,
                rng=self._rng,
                grown_init=settings.grown_init,
            )
        if name not in self._window:
            raise SriglError(
                f"no gradient was accumulated for the update at step {step}; call accumulate "
                f"before step whenever needs_grad is True"
            )
        total, calls = self._window[name]
        with honour_subnormals():
            grad = total / calls
        if self.method == "rigl":
            return update_rigl(
                weight, grad, mask, drop_fraction=drop_fraction, grown_init=settings.grown_init
            )
        ablate = self._options[name].ablate
        return update_mask(
            weight,
            grad,
            mask,
            nnz_budget=self.budgets[name].nnz_budget,
            drop_fraction=drop_fraction,
            gamma_sal=settings.gamma_sal if ablate else None,
            min_salient=settings.min_salient if ablate else None,
            saliency_scope=settings.saliency_scope,
            grown_init=settings.grown_init,
            backend=self._backend,
        )

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
        with _naming(name):
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


def _row_counts(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.count_nonzero(mask.reshape(mask.shape[0], -1), axis=1)
    return counts


def _frozen(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    mask.setflags(write=False)
    return mask


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Put the layer's name before the message of an error from the algorithm."""
    try:
        yield
    except SriglError as error:
        raise type(error)(f"layer {layer!r}: {error}") from error
