"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from srigl_core._arrays.checks import check_choice, check_integer
from srigl_core._update import UpdateOptions
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.distributions import DISTRIBUTIONS

__all__ = ["AUTO", "LayerOptions", "TrainingConfig"]

AUTO = "auto"
_GAMMA_SAL_OF_MATRICES, _GAMMA_SAL_OF_KERNELS = 0.9, 0.3


@dataclass(frozen=True)
class LayerOptions:
    """Settings of one layer that differ from the others'.

    Parameters
    ----------
    dense : bool
        Keep every weight. The other layers become sparser in return.
    ablate : bool or None
        Whether neurons may be ablated. By default those of all layers except the last may.
    sparsity : float or None
        The layer's own sparsity.
    nnz_budget : int or None
        The layer's own number of weights.
    gamma_sal : float or None
        The layer's own `gamma_sal`; None means that of the `TrainingConfig`.

    Raises
    ------
    SriglError
        If more than one of `dense`, `sparsity` and `nnz_budget` is given.
    """

    dense: bool = False
    ablate: bool | None = None
    sparsity: float | None = None
    nnz_budget: int | None = None
    gamma_sal: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dense, bool) or not isinstance(self.ablate, bool | None):
            raise ValueTypeError(f"{self!r}: dense must be True or False, and ablate that or None")
        if self.dense + (self.sparsity is not None) + (self.nnz_budget is not None) > 1:
            raise SriglError(f"{self!r} sets the layer's budget more than once; give one of them")
        UpdateOptions(gamma_sal=self.gamma_sal)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(UpdateOptions):
    """The settings of a training run that are rarely changed.

    Parameters
    ----------
    method : str
        "srigl" (constant fan-in), "rigl", "set", "static", or a method that a package registers in
        the entry-point group ``srigl_core.methods``.
    distribution : {"erk", "uniform"}
        Distribution of the weights over the layers.
    gamma_sal : float, "auto" or None
        As in `UpdateOptions`. "auto" is 0.9 for matrices and 0.3 for weights with kernel
        dimensions, the paper's settings for transformers and convolutional networks (SPEC 4.4).
        With `min_salient` it means None.
    min_salient, saliency_scope, grown_init
        As in `UpdateOptions`.
    grad_window : int
        The number of steps, up to the update's own, whose gradients are averaged.
    layers : mapping of str to LayerOptions
        Options of single layers, by name.
    ablate_last : bool
        Whether neurons of the last layer, the network's outputs, may be ablated.
    seed : int
        Seed of the initial masks and of random growth.

    Raises
    ------
    SriglError
        If a setting is out of range.
    ValueTypeError
        If a setting has the wrong type.

    Examples
    --------
    >>> TrainingConfig(gamma_sal=0.9, seed=1).method
    'srigl'
    """

    gamma_sal: float | str | None = AUTO  # type: ignore[assignment] # the drivers' own value
    method: str = "srigl"
    distribution: str = "erk"
    grad_window: int = 1
    layers: Mapping[str, LayerOptions] = field(default_factory=dict)
    ablate_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gamma_sal == AUTO:
            checked = replace(self, gamma_sal=None)
            for name in ("min_salient", "saliency_scope", "grown_init"):
                object.__setattr__(self, name, getattr(checked, name))
            return
        super().__post_init__()
        check_choice(self.distribution, "distribution", DISTRIBUTIONS)
        check_integer(self.grad_window, "grad_window", least=1)
        check_integer(self.seed, "seed", least=0)
        if not isinstance(self.layers, Mapping):
            raise ValueTypeError(
                f"layers must be a dict from names to LayerOptions, got "
                f"{type(self.layers).__name__}"
            )
        for name, options in self.layers.items():
            if not isinstance(options, LayerOptions):
                raise ValueTypeError(
                    f"layers[{name!r}]={options!r} must be a LayerOptions, for example "
                    f"LayerOptions(dense=True)"
                )

    def update_options(self, layer: LayerOptions, shape: tuple[int, ...]) -> UpdateOptions:
        """Return the settings of a layer's updates, in which `gamma_sal` is a number or None."""
        options = {f.name: getattr(self, f.name) for f in fields(UpdateOptions)}
        if layer.ablate is False:
            options |= {"gamma_sal": None, "min_salient": None}
        elif layer.gamma_sal is not None:
            options |= {"gamma_sal": layer.gamma_sal, "min_salient": None}
        elif self.gamma_sal == AUTO:
            is_matrix = len(shape) == 2
            chosen = _GAMMA_SAL_OF_MATRICES if is_matrix else _GAMMA_SAL_OF_KERNELS
            options["gamma_sal"] = chosen if self.min_salient is None else None
        return UpdateOptions(**options)
