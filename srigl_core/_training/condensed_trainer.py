"""The training driver for condensed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._api import update_condensed
from srigl_core._arrays.checks import check_flag
from srigl_core._format.connections import Connections, flat_shape
from srigl_core._format.weight import CondensedWeight
from srigl_core._registry import get_backend
from srigl_core._training.config import TrainingConfig
from srigl_core._training.methods.srigl import SRIGL, initial_fan_in
from srigl_core._training.skeleton import TrainerSkeleton, check_names, entry_of, error_context
from srigl_core._update import CondensedUpdate, GradientRows
from srigl_core.contract import Backend
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.schedule import UpdateSchedule

__all__ = ["CondensedTrainer"]


class CondensedTrainer(TrainerSkeleton):
    """Drive SRigL training of condensed layers, step by step.

    In every training step, after the optimiser's, call `step`. If an update is due it needs the
    condensed weights and, for each layer, a function that returns rows of the dense gradient's mean
    over the window. Masks and updates are those of `SparseTrainer` with the same arguments. No
    dense array is kept.

    Parameters
    ----------
    shapes, sparsity, schedule, config
        As in `SparseTrainer`. The method must be "srigl"; dense layers are not condensed.
    backend : str, Backend or None
        Computes the updates; see `get_backend`.
    connections : mapping of str to Connections
        First connections of layers. Those of other layers are drawn.
    track_itop : bool
        Whether to keep one bit for each position of a layer. `itop_rates` needs them.

    Attributes
    ----------
    step_count : int
        Training steps so far.
    budgets : dict of str to LayerBudget
    config : TrainingConfig
    connections : dict of str to Connections
        The connections of the sparse layers; replaced at updates.

    Raises
    ------
    SriglError
        If a setting is out of range, a name is unknown, or a layer's budget is too small.

    Notes
    -----
    SPEC 2 (Backward), 4 and 5. The caller computes the rows of the gradient. For a window longer
    than one step it must keep the inputs and output gradients of all steps.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> trainer = CondensedTrainer(
    ...     {"hidden": (32, 16), "output": (4, 32)}, sparsity=0.75,
    ...     schedule=UpdateSchedule(t_end=100, delta_t=10),
    ... )
    >>> weights = {
    ...     name: CondensedWeight.from_connections(rng.standard_normal((c.n_active, c.fan_in)), c)
    ...     for name, c in trainer.connections.items()
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
        sparsity: float | None = None,
        schedule: UpdateSchedule | int,
        config: TrainingConfig | None = None,
        backend: str | Backend | None = None,
        connections: Mapping[str, Connections] = MappingProxyType({}),
        track_itop: bool = True,
    ) -> None:
        check_names("connections", connections, shapes)
        counts = {name: given.nnz for name, given in connections.items()}
        super().__init__(shapes, sparsity=sparsity, schedule=schedule, config=config, counts=counts)
        if self._method is not SRIGL:
            raise SriglError(
                f"method={self.config.method!r} cannot train condensed layers, which need "
                f"method='srigl'; use masked training"
            )
        if backend is not None:
            backend = get_backend(backend, operation="update_condensed")
        self._backend = backend
        self.connections: dict[str, Connections] = {}
        for name in self.sparse_layers:
            budget = self.budgets[name]
            with error_context(name):
                shape = flat_shape(budget.shape)
                if name in connections:
                    if connections[name].shape != shape:
                        raise SriglError(
                            f"the given connections are of shape {connections[name].shape}, but "
                            f"the layer is of {shape}"
                        )
                    self.connections[name] = connections[name]
                    continue
                fan_in = initial_fan_in(budget.shape, budget.nnz_budget)
                self.connections[name] = Connections.random(shape, fan_in=fan_in, rng=self._rng)
        self._ever_active: dict[str, NDArray[np.uint8]] = {}
        if check_flag(track_itop, "track_itop"):
            for name, part in self.connections.items():
                n_out, n_in = part.shape
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
        gradients: Mapping[str, GradientRows | None],
    ) -> dict[str, CondensedUpdate]:
        """Count one training step, and update the masks if it is due.

        Parameters
        ----------
        weights : mapping of str to CondensedWeight
            The sparse layers' weights after the optimiser's step, with the connections of
            `connections`.
        gradients : mapping of str to callable
            The `gradient_rows` of `srigl_core.update_condensed` for each layer, called if an update
            is due. They return rows of the dense gradient's mean over the window. None says that a
            layer took no part in the window.

        Returns
        -------
        dict of str to CondensedUpdate
            Empty if no update is due. Otherwise one for each sparse layer that had a gradient.

        Raises
        ------
        SriglError
            If a weight or a gradient is missing, has other connections, or is not finite, or an
            update is not possible. The message names the layer. Nothing is changed, and the step is
            not counted.

        Warns
        -----
        UserWarning
            If layers took no part in the window. They keep their masks.
        """
        layers = self.sparse_layers
        if self.is_due:
            absent = {name for name, rows in gradients.items() if rows is None}
            layers = self._with_gradients([name for name in layers if name not in absent])
        updates: dict[str, CondensedUpdate] = self._advance(
            layers,
            lambda name: self._update(name, weights, gradients),
            self._take,
        )
        return updates

    def _update(
        self,
        name: str,
        weights: Mapping[str, CondensedWeight],
        gradients: Mapping[str, GradientRows | None],
    ) -> CondensedUpdate:
        weight = entry_of("weights", weights, name)
        if not isinstance(weight, CondensedWeight):
            raise ValueTypeError(
                f"weight must be a CondensedWeight, got {type(weight).__name__}; "
                f"CondensedWeight.from_connections(values, trainer.connections[name]) makes one"
            )
        if self.connections[name] != weight.connections:
            raise SriglError(
                "weight has other connections than the trainer; use the weights that step returns, "
                "and do not change their connections"
            )
        rows = entry_of("gradients", gradients, name)
        settings = self._update_settings(name)
        return update_condensed(weight, rows, settings, backend=self._backend)

    def _take(self, name: str, update: CondensedUpdate) -> None:
        self.connections[name] = update.weight.connections
        if name in self._ever_active:
            self._mark_active(name)

    def _masks_state(self) -> dict[str, Any]:
        return {
            "connections": {
                name: {"indices": part.indices.copy(), "active": part.active.copy()}
                for name, part in self.connections.items()
            },
            "ever_active": {name: bits.copy() for name, bits in self._ever_active.items()},
        }

    def _masks_from(self, state: Mapping[str, Any]) -> Callable[[], None]:
        for what, mine in (("connections", self.connections), ("ever_active", self._ever_active)):
            if state[what].keys() != mine.keys():
                raise SriglError(
                    f"state has {what} of {list(state[what])}, but the trainer has those of "
                    f"{list(mine)}; make the trainer with the same arguments"
                )
        connections, ever_active = {}, {}
        for name, saved in state["connections"].items():
            with error_context(name):
                shape, most = self.connections[name].shape, self.budgets[name].nnz_budget
                connections[name] = Connections(saved["indices"], saved["active"], shape)
                if connections[name].nnz > most:
                    raise SriglError(
                        f"state has {connections[name].nnz} connections, but the budget is {most}"
                    )
        for name, bits in state["ever_active"].items():
            ever_active[name] = np.array(bits, np.uint8)
            if ever_active[name].shape != self._ever_active[name].shape:
                raise SriglError(
                    f"layer {name!r}: ever_active in state has shape {ever_active[name].shape}, "
                    f"but must have {self._ever_active[name].shape}; make the trainer with the "
                    f"same arguments"
                )

        def set_masks() -> None:
            self.connections, self._ever_active = connections, ever_active

        return set_masks

    def _row_counts(self, name: str) -> NDArray[np.int64]:
        n_out, n_in = flat_shape(self.budgets[name].shape)
        if name not in self.connections:
            return np.full(n_out, n_in)
        counts = np.zeros(n_out, np.int64)
        counts[self.connections[name].active] = self.connections[name].fan_in
        return counts

    def _mark_active(self, name: str) -> None:
        part, bits = self.connections[name], self._ever_active[name]
        for row, columns in zip(part.active.tolist(), part.indices, strict=True):
            positions = row * part.shape[1] + columns.astype(np.int64)
            np.bitwise_or.at(bits, positions >> 3, (128 >> (positions & 7)).astype(np.uint8))
