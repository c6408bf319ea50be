"""The training driver: masks, budgets, schedule and gradient windows of a whole network.

Free of frameworks and of layer types: layers are names with shapes, weights and gradients arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._api import update_mask
from srigl_core._arrays.checks import as_float_array, as_mask, check_integer
from srigl_core._arrays.dtypes import accumulator_dtype
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._registry import get_backend
from srigl_core._training.training_state import LayerOptions, TrainingState, naming
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.contract import Backend
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.baselines import update_rigl, update_set, update_static
from srigl_core.reference.distributions import LayerBudget
from srigl_core.reference.init import random_mask, random_unstructured_mask
from srigl_core.reference.schedule import UpdateSchedule

__all__ = ["SparseTrainer"]


class SparseTrainer(TrainingState):
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
        super().__init__(
            shapes,
            sparsity=sparsity,
            schedule=schedule,
            method=method,
            distribution=distribution,
            settings=UpdateSettings(1, 0.0, gamma_sal, min_salient, saliency_scope, grown_init),
            grad_window=grad_window,
            layers=layers,
            ablate_last=ablate_last,
            seed=seed,
        )
        self._backend = backend
        if method == "srigl" and backend is not None:
            get_backend(backend, operation="update_mask")
        self.masks: dict[str, NDArray[np.bool_]] = {}
        for name, budget in self.budgets.items():
            with naming(name):
                self.masks[name] = _frozen(self._initial_mask(budget, self._options[name]))
        self._ever_active = {name: mask.copy() for name, mask in self._sparse(self.masks).items()}
        self._window: dict[str, tuple[NDArray[Any], int]] = {}

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
        with naming(name):
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
                    with naming(name):
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
            **super().state_dict(),
            "masks": {name: mask.copy() for name, mask in self.masks.items()},
            "ever_active": {name: seen.copy() for name, seen in self._ever_active.items()},
            "window": {name: (total.copy(), n) for name, (total, n) in self._window.items()},
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

    def _masks_of(
        self, masks: Mapping[str, Any], like: Mapping[str, NDArray[np.bool_]]
    ) -> dict[str, NDArray[np.bool_]]:
        """Return copies of a state's masks, one for each layer of `like` and no other."""
        if masks.keys() != like.keys():
            raise SriglError(f"state has masks of {list(masks)}, but the layers are {list(like)}")
        copies = {}
        for name, mask in like.items():
            with naming(name):
                copies[name] = as_mask(masks[name], mask.shape, "mask in state").copy()
                if self._options[name].dense and not copies[name].all():
                    raise SriglError("mask in state has inactive weights, but the layer is dense")
        return copies

    def _window_of(self, window: Mapping[str, Any]) -> dict[str, tuple[NDArray[Any], int]]:
        """Return copies of a state's sums of gradients and numbers of calls."""
        copies = {}
        for name, (total, calls) in window.items():
            with naming(name):
                total = as_float_array(total, "gradient in state").copy()
                if total.shape != self.masks[name].shape:
                    raise SriglError(f"gradient in state has shape {total.shape}")
                copies[name] = (total, check_integer(calls, "calls in state", least=1))
        return copies

    def _initial_mask(self, budget: LayerBudget, options: LayerOptions) -> NDArray[np.bool_]:
        if options.dense:
            return np.ones(budget.shape, np.bool_)
        if self.method != "srigl":
            return random_unstructured_mask(budget.shape, nnz=budget.nnz_budget, rng=self._rng)
        return random_mask(budget.shape, fan_in=self._initial_fan_in(budget), rng=self._rng)

    def _row_counts(self, name: str) -> NDArray[np.int64]:
        return _row_counts(self.masks[name])

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
        return update_mask(
            weight, grad, mask, **self._update_settings(name, step), backend=self._backend
        )


def _row_counts(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.count_nonzero(mask.reshape(mask.shape[0], -1), axis=1)
    return counts


def _frozen(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    mask.setflags(write=False)
    return mask
