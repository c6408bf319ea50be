"""The training driver of a network whose sparse layers are condensed: nothing dense is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srigl_core._arrays.checks import check_integer
from srigl_core._format.connections import CondensedMask
from srigl_core._format.weight import CondensedWeight, flat_shape
from srigl_core._training.training_state import LayerOptions, TrainingState, naming
from srigl_core._update import CondensedUpdate, UpdateSettings
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.condensed_update import update_condensed
from srigl_core.reference.schedule import UpdateSchedule

__all__ = ["CondensedTrainer"]


class CondensedTrainer(TrainingState):
    """Drive SRigL training of condensed layers, step by step.

    In every training step, after the optimiser's: call `step`. Where an update is due it takes the
    condensed weights and, for each layer, a function that gives rows of the dense gradient's mean
    over the window. Masks and updates are those of `SparseTrainer` with the same arguments.

    Parameters
    ----------
    shapes, sparsity, schedule, distribution, gamma_sal, min_salient, saliency_scope, grown_init, \
grad_window, layers, ablate_last, seed
        As in `SparseTrainer`. A layer that `layers` keeps dense is not condensed.
    track_itop : bool
        Whether to keep, for `itop_rates`, a bit for each position.

    Attributes
    ----------
    step_count : int
        Training steps so far.
    budgets : dict of str to LayerBudget
    connections : dict of str to CondensedMask
        Of the sparse layers; replaced at updates.

    Raises
    ------
    SriglError
        If a setting is out of range, a name is unknown, or a layer's budget is too small.

    Notes
    -----
    SPEC 2 (Backward), 4 and 5. A window longer than one step has to keep its inputs and output
    gradients; that is the caller's, who gives the gradient's rows.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> trainer = CondensedTrainer(
    ...     {"hidden": (32, 16), "output": (4, 32)}, sparsity=0.75,
    ...     schedule=UpdateSchedule(t_end=100, delta_t=10),
    ... )
    >>> weights = {
    ...     name: mask.with_values(rng.standard_normal(mask.indices.shape))
    ...     for name, mask in trainer.connections.items()
    ... }
    >>> for _ in range(10):
    ...     gradients = {name: rng.standard_normal(w.shape) for name, w in weights.items()}
    ...     updates = trainer.step(
    ...         weights, {name: lambda a, b, g=g: g[a:b] for name, g in gradients.items()}
    ...     )
    >>> updates["hidden"].fan_in, updates["hidden"].weight == weights["hidden"]
    (2, False)
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        sparsity: float,
        schedule: UpdateSchedule | int,
        distribution: str = "erk",
        gamma_sal: float | None = 0.3,
        min_salient: int | None = None,
        saliency_scope: str = "inactive",
        grown_init: float = 0.0,
        grad_window: int = 1,
        layers: Mapping[str, LayerOptions] | None = None,
        ablate_last: bool = False,
        seed: int = 0,
        track_itop: bool = True,
    ) -> None:
        super().__init__(
            shapes,
            sparsity=sparsity,
            schedule=schedule,
            method="srigl",
            distribution=distribution,
            settings=UpdateSettings(1, 0.0, gamma_sal, min_salient, saliency_scope, grown_init),
            grad_window=grad_window,
            layers=layers,
            ablate_last=ablate_last,
            seed=seed,
        )
        self.connections: dict[str, CondensedMask] = {}
        for name, budget in self._sparse(self.budgets).items():
            with naming(name):
                self.connections[name] = CondensedMask.drawn(
                    flat_shape(budget.shape), fan_in=self._initial_fan_in(budget), rng=self._rng
                )
        self._ever_active = {}
        if track_itop:
            for name, mask in self.connections.items():
                n_out, n_in = mask.shape
                self._ever_active[name] = np.zeros(-(-n_out * n_in // 8), np.uint8)
                self._mark_active(name)

    def itop_rates(self) -> dict[str, float]:
        """Return, for each sparse layer, the share of its positions that was ever active.

        Raises
        ------
        SriglError
            If the trainer was made without `track_itop`.
        """
        if self.connections and not self._ever_active:
            raise SriglError("itop_rates needs a trainer made with track_itop=True")
        counts = {n: int(np.bitwise_count(bits).sum()) for n, bits in self._ever_active.items()}
        return {name: n / self.budgets[name].n_weights for name, n in counts.items()}

    def step(
        self,
        weights: Mapping[str, CondensedWeight],
        gradients: Mapping[str, Callable[[int, int], ArrayLike]],
    ) -> dict[str, CondensedUpdate]:
        """Count one training step, and update the masks if it is due.

        Parameters
        ----------
        weights : mapping of str to CondensedWeight
            The sparse layers' after the optimiser's step, with the connections of `connections`.
        gradients : mapping of str to callable
            For each layer what `srigl_core.reference.update_condensed` takes: rows ``start`` to
            ``stop`` of the dense gradient's mean over the window. Called if an update is due.

        Returns
        -------
        dict of str to CondensedUpdate
            Empty where no update is due; else one for each sparse layer.

        Raises
        ------
        SriglError
            If a weight or a gradient is missing, has other connections, or is not finite, or an
            update is not possible; the layer is named, and nothing is changed, the step not
            counted.
        """
        coming = self.step_count + 1
        updates: dict[str, CondensedUpdate] = {}
        if self._schedule.is_due(coming):
            for name in self.connections:
                with naming(name):
                    weight = self._checked_weight(name, weights)
                    if name not in gradients:
                        raise SriglError("gradients lacks it; an update needs them all")
                    settings = self._update_settings(name, coming)
                    updates[name] = update_condensed(weight, gradients[name], **settings)
        for name, update in updates.items():
            self.connections[name] = CondensedMask.of(update.weight)
            if name in self._ever_active:
                self._mark_active(name)
        self.step_count = coming
        return updates

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs: plain containers, numbers and new arrays."""
        return {
            **super().state_dict(),
            "connections": {
                name: {"indices": mask.indices.copy(), "active": mask.active.copy()}
                for name, mask in self.connections.items()
            },
            "ever_active": {name: bits.copy() for name, bits in self._ever_active.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, by a trainer made with the same arguments.

        Raises
        ------
        SriglError
            If `state` is not such a trainer's, or was taken with other settings; nothing is
            changed.
        """
        try:
            self._check_settings_of(state)
            step_count = check_integer(state["step_count"], "step_count of state", least=0)
            for what, mine in (
                ("connections", self.connections),
                ("ever_active", self._ever_active),
            ):
                if state[what].keys() != mine.keys():
                    raise SriglError(
                        f"state has {what} of {list(state[what])}, but here they are of "
                        f"{list(mine)}; make the trainer with the same arguments"
                    )
            connections = {}
            for name, saved in state["connections"].items():
                with naming(name):
                    connections[name] = self._connections_of(name, saved)
            ever_active = {}
            for name, bits in state["ever_active"].items():
                ever_active[name] = np.array(bits, np.uint8)
                if ever_active[name].shape != self._ever_active[name].shape:
                    raise SriglError(f"ever_active of layer {name!r} in state has another size")
            rng = np.random.default_rng()
            rng.bit_generator.state = state["rng"]
        except SriglError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SriglError(f"state is not a whole state_dict(): {error!r}") from error
        self.step_count, self._rng = step_count, rng
        self.connections, self._ever_active = connections, ever_active

    def _connections_of(self, name: str, saved: Mapping[str, Any]) -> CondensedMask:
        """Return the connections in a state, once they are checked."""
        shape = self.connections[name].shape
        zeros = np.zeros(np.shape(saved["indices"]), np.float16)
        weight = CondensedWeight(zeros, saved["indices"], saved["active"], shape)
        if weight.nnz > self.budgets[name].nnz_budget:
            raise SriglError(
                f"connections in state are {weight.nnz}, but the budget is "
                f"{self.budgets[name].nnz_budget}"
            )
        return CondensedMask.of(weight)

    def _checked_weight(self, name: str, weights: Mapping[str, CondensedWeight]) -> CondensedWeight:
        if name not in weights:
            raise SriglError("weights lacks it; an update needs them all")
        weight = weights[name]
        if not isinstance(weight, CondensedWeight):
            raise ValueTypeError(
                f"weight must be a CondensedWeight, got {type(weight).__name__}; "
                f"trainer.connections[name].with_values(...) makes one"
            )
        if not self.connections[name].same(weight):
            raise SriglError(
                "weight has other connections than the trainer; take over what step returns, and "
                "change connections in no other way"
            )
        return weight

    def _row_counts(self, name: str) -> NDArray[np.int64]:
        n_out, n_in = flat_shape(self.budgets[name].shape)
        if name not in self.connections:
            return np.full(n_out, n_in)
        counts = np.zeros(n_out, np.int64)
        counts[self.connections[name].active] = self.connections[name].fan_in
        return counts

    def _mark_active(self, name: str) -> None:
        mask, bits = self.connections[name], self._ever_active[name]
        for row, columns in zip(mask.active.tolist(), mask.indices, strict=True):
            positions = row * mask.shape[1] + columns.astype(np.int64)
            np.bitwise_or.at(bits, positions >> 3, (128 >> (positions & 7)).astype(np.uint8))
