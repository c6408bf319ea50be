"""The training driver for dense weights and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.checks import as_float_array, as_mask, check_integer
from srigl_core._arrays.immutable import immutable
from srigl_core._arrays.operations import HOST_ARRAYS, ArrayOps
from srigl_core._registry import get_backend
from srigl_core._training.config import TrainingConfig
from srigl_core._training.methods import LayerState
from srigl_core._training.skeleton import (
    TrainerSkeleton,
    check_names,
    entry_of,
    error_context,
)
from srigl_core._update import MaskUpdate
from srigl_core.contract import Backend
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.schedule import UpdateSchedule

__all__ = ["SparseTrainer"]


class SparseTrainer(TrainerSkeleton):
    """Drive dynamic sparse training of a network, step by step.

    In every training step, after the backward pass, pass the dense gradients to `accumulate` if
    `needs_grad` is True. After the optimiser's step call `step`, and replace the weights by those
    that it returns. Between updates multiply gradients by the backward masks (or weights by
    `masks`). The trainer knows neither frameworks nor layer types: a layer is a name with a shape.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Shape of each layer's weight, in network order.
    sparsity : float or None
        Of the whole network, in [0, 1). None, if every layer has a given mask or a budget of its
        own: the given masks keep their sizes.
    schedule : UpdateSchedule or int
        When to update. An int is the number of training steps; `UpdateSchedule.for_training` makes
        a schedule of it.
    config : TrainingConfig or None
        Method, distribution, update settings, options of single layers, seed.
    backend : str, Backend or None
        Computes the updates; see `get_backend`. With a GPU backend weights, gradients and masks
        stay on the device, and only counts and single numbers are copied to the host. Methods
        without kernels, such as "rigl", "set" and "static", update NumPy arrays only.
    masks : mapping of str to ndarray of bool
        First masks of layers, in their shapes. The masks of other layers are drawn.

    Attributes
    ----------
    step_count : int
        Training steps so far.
    budgets : dict of str to LayerBudget
    config : TrainingConfig
    device : str
        Where weights, gradients and masks are: "cpu" or "cuda".
    masks : dict of str to array of bool
        Masks of the forward pass, in the layers' shapes. Updates replace them. The mask of a dense
        layer is all True. Masks are read-only NumPy arrays, or arrays of a GPU backend.

    Raises
    ------
    SriglError
        If a setting is out of range, a name is unknown, a layer's budget is too small, or a given
        mask does not suit the method.

    Warns
    -----
    UserWarning
        If the schedule has fewer than 10 updates and follows from an int, or has none.

    Notes
    -----
    SPEC 4 and 5; the paper, sec. 3. From the window's first step to the update the trainer holds
    the sum of the gradients, one dense array for each layer.

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
        sparsity: float | None = None,
        schedule: UpdateSchedule | int,
        config: TrainingConfig | None = None,
        backend: str | Backend | None = None,
        masks: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        check_names("masks", masks, shapes)
        given = {}
        for name, mask in masks.items():
            with error_context(name):
                given[name] = as_mask(mask, tuple(shapes[name]))
        counts = {name: int(np.count_nonzero(mask)) for name, mask in given.items()}
        super().__init__(shapes, sparsity=sparsity, schedule=schedule, config=config, counts=counts)
        self._backend: Backend | None = None
        self._arrays: ArrayOps = HOST_ARRAYS
        self.device = "cpu"
        if backend is not None:
            chosen = get_backend(backend, operation="update_mask")
            self.device = chosen.capabilities.device
            if self._method.on_device:
                self._backend = chosen
                self._arrays = getattr(chosen, "arrays", HOST_ARRAYS)
            elif self.device != "cpu":
                raise SriglError(
                    f"backend={chosen.name!r} cannot compute the updates of method="
                    f"{self.config.method!r}, which take NumPy arrays; leave out backend"
                )
        self.masks: dict[str, Any] = {}
        for name, budget in self.budgets.items():
            with error_context(name):
                if self._options[name].dense:
                    mask = np.ones(budget.shape, np.bool_)
                elif name in given:
                    mask = given[name]
                    self._check_fan_in(mask, "the given mask")
                else:
                    mask = self._method.initial_mask(budget.shape, budget.nnz_budget, self._rng)
            self.masks[name] = _frozen(self._arrays.from_host(mask))
        self._backward_masks: dict[str, Any] = {}
        self._ever_active = {name: self.masks[name] for name in self.sparse_layers}
        self._window: dict[str, tuple[Any | None, int]] = {}

    def backward_mask(self, name: str) -> Any:
        """Return the mask of a layer's gradient: the mask itself, unless the method has two."""
        self._check_name(name)
        return self._backward_masks.get(name, self.masks[name])

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or name not in self.masks:
            raise SriglError(f"no layer is called {name!r}; there are {', '.join(self.masks)}")

    def itop_rates(self) -> dict[str, float]:
        """Return, for each sparse layer, the share of its positions that was ever active.

        Notes
        -----
        Liu et al. 2021, "Do we actually need dense over-parameterization?".
        """
        counts = {n: self._arrays.row_counts(seen).sum() for n, seen in self._ever_active.items()}
        return {name: float(n / self.budgets[name].n_weights) for name, n in counts.items()}

    def accumulate(self, name: str, grad: Any) -> None:
        """Add a dense gradient of layer `name` to the window.

        Outside the window (`needs_grad` is False), and for a dense layer, it is not used.

        Parameters
        ----------
        name : str
        grad : array, the layer's shape, or None
            Of the mean loss, as the optimiser sees it: unscale AMP-scaled gradients first. Copied.
            None says that the layer took no part in this step.

        Raises
        ------
        SriglError
            If the name is unknown or the shape differs.
        ValueTypeError
            If it is not an array of a value type on the trainer's device.
        """
        self._check_name(name)
        arrays, shape = self._arrays, self.budgets[name].shape
        if grad is None:
            if self.needs_grad and not self._options[name].dense:
                self._window.setdefault(name, (None, 0))
            return
        with error_context(name), arrays.execution_context(grad):
            grad = arrays.as_float_array(grad, "grad")
            if tuple(grad.shape) != shape:
                raise SriglError(f"grad has shape {tuple(grad.shape)}, but its weight has {shape}")
            if self.needs_grad and not self._options[name].dense:
                total, calls = self._window.get(name, (None, 0))
                self._window[name] = (arrays.accumulate(total, grad), calls + 1)

    def discard_gradients(self) -> None:
        """Empty the window, for instance after a step whose gradients overflowed."""
        self._window.clear()

    def step(self, weights: Mapping[str, Any]) -> dict[str, MaskUpdate]:
        """Count one training step, and update the masks if it is due.

        Parameters
        ----------
        weights : mapping of str to array
            The layers' dense weights after the optimiser's step. Not written.

        Returns
        -------
        dict of str to MaskUpdate
            Empty if no update is due. Otherwise one for each sparse layer that had a gradient, with
            arrays of the weight's library. `weight` replaces the layer's, and optimiser state must
            be remapped by the old and the new mask (`srigl_core.reference.remap_state`).

        Raises
        ------
        SriglError
            If a weight or a gradient is missing or not finite, or an update is not possible. The
            message names the layer. Nothing is changed, and the step is not counted.

        Warns
        -----
        UserWarning
            If layers took no part in the window. They keep their masks.
        """
        if self.is_due and not isinstance(weights, Mapping):
            raise ValueTypeError(f"weights must be a dict, got {type(weights).__name__}")
        layers = self.sparse_layers
        if self.is_due and self._method.uses_gradients:
            if not self._window and layers:
                raise SriglError(
                    f"no gradient was accumulated for the update at step {self.step_count + 1}; "
                    f"call accumulate before step whenever needs_grad is True"
                )
            layers = self._with_gradients(
                [name for name in layers if self._window.get(name, (None, 0))[0] is not None]
            )
        was_due = self.is_due
        updates: dict[str, MaskUpdate] = self._advance(
            layers, lambda name: self._update(name, weights), self._take
        )
        if was_due:
            self._window.clear()
        return {
            name: replace(
                update,
                mask=self._arrays.to_caller(update.mask, weights[name]),
                weight=self._arrays.to_caller(update.weight, weights[name]),
            )
            for name, update in updates.items()
        }

    def _update(self, name: str, weights: Mapping[str, Any]) -> MaskUpdate:
        weight, grad, arrays = entry_of("weights", weights, name), None, self._arrays
        with arrays.execution_context(weight):
            if self._method.uses_gradients:
                grad = arrays.divide(*self._window[name])
            weight = arrays.as_float_array(weight, "weight")
            settings = self._update_settings(name)
            return self._method.update(
                LayerState(weight, grad, self.masks[name], settings, self._rng, self._backend)
            )

    def _take(self, name: str, update: MaskUpdate) -> None:
        self.masks[name] = _frozen(update.mask)
        self._ever_active[name] = self._arrays.union(self._ever_active[name], update.mask)
        if update.backward_mask is not None:
            self._backward_masks[name] = _frozen(update.backward_mask)

    def _row_counts(self, name: str) -> NDArray[np.int64]:
        return self._arrays.row_counts(self.masks[name])

    def _masks_state(self) -> dict[str, Any]:
        to_host = self._arrays.to_host
        state = {
            "masks": {name: to_host(mask) for name, mask in self.masks.items()},
            "ever_active": {name: to_host(seen) for name, seen in self._ever_active.items()},
            "window": {
                name: (None if total is None else to_host(total), n)
                for name, (total, n) in self._window.items()
            },
        }
        if self._backward_masks:
            state["backward_masks"] = {n: to_host(m) for n, m in self._backward_masks.items()}
        return state

    def _masks_from(self, state: Mapping[str, Any]) -> Callable[[], None]:
        masks = self._checked_masks(state["masks"], list(self.masks))
        for name in self.sparse_layers:
            self._check_fan_in(masks[name], f"mask of layer {name!r} in state")
        ever_active = self._checked_masks(state["ever_active"], self.sparse_layers)
        backward = state.get("backward_masks", {})
        backward = self._checked_masks(backward, list(backward))
        window = self._checked_window(state["window"])
        on_device = self._arrays.from_host

        def set_masks() -> None:
            self.masks = {name: _frozen(on_device(mask)) for name, mask in masks.items()}
            self._ever_active = {name: on_device(seen) for name, seen in ever_active.items()}
            self._backward_masks = {n: _frozen(on_device(m)) for n, m in backward.items()}
            self._window = {
                name: (None if total is None else on_device(total), n)
                for name, (total, n) in window.items()
            }

        return set_masks

    def _check_fan_in(self, mask: NDArray[np.bool_], what: str) -> None:
        """Check that a mask has the same number of weights in each active row, if it must."""
        counts = set(HOST_ARRAYS.row_counts(mask).tolist()) - {0}
        if not counts:
            raise SriglError(f"{what} has no active weight")
        if self._method.constant_fan_in and len(counts) > 1:
            raise SriglError(
                f"{what} is not constant fan-in: active rows have {min(counts)} to {max(counts)} "
                f"weights, but must all have the same number"
            )

    def _checked_masks(
        self, masks: Mapping[str, Any], names: list[str]
    ) -> dict[str, NDArray[np.bool_]]:
        """Check that a state has masks of these layers, and return them."""
        if not isinstance(masks, Mapping):
            raise ValueTypeError(f"masks in state must be a dict, got {type(masks).__name__}")
        if list(masks) != names and masks.keys() != set(names):
            raise SriglError(f"state has masks of {list(masks)}, but the layers are {names}")
        checked = {}
        for name in names:
            with error_context(name):
                checked[name] = as_mask(masks[name], self.budgets[name].shape, "mask in state")
                if self._options[name].dense and not checked[name].all():
                    raise SriglError("mask in state has inactive weights, but the layer is dense")
        return checked

    def _checked_window(
        self, window: Mapping[str, Any]
    ) -> dict[str, tuple[NDArray[Any] | None, int]]:
        """Check and return a state's sums of gradients, each with its number of calls."""
        checked: dict[str, tuple[NDArray[Any] | None, int]] = {}
        for name, (total, calls) in window.items():
            with error_context(name):
                if total is None:
                    checked[name] = None, 0
                    continue
                total = as_float_array(total, "gradient in state")
                if total.shape != self.budgets[name].shape:
                    raise SriglError(
                        f"gradient in state has shape {total.shape}, but the layer has "
                        f"{self.budgets[name].shape}; make the trainer with the same arguments"
                    )
                checked[name] = (total, check_integer(calls, "calls in state", least=1))
        return checked


def _frozen(mask: Any) -> Any:
    return immutable(mask) if isinstance(mask, np.ndarray) else mask
