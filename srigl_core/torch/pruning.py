"""Pruning of a trained model to a constant fan-in, in one shot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from srigl_core._arrays.checks import check_choice
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.distributions import DISTRIBUTIONS, erk, uniform
from srigl_core.torch.attention import PROJECTION_LAYERS, CondensedMultiheadAttention
from srigl_core.torch.replacement import CONVOLUTIONS, why_not_condensed
from srigl_core.torch.selection import Entry
from srigl_core.torch.sharded_tensors import check_not_sharded
from srigl_core.torch.targets import Target, find_targets

__all__ = ["METHODS", "prune_to_constant_fan_in"]

METHODS = ("magnitude", "wanda")


def prune_to_constant_fan_in(
    model: Any,
    sparsity: float,
    *,
    method: str = "magnitude",
    calibration: Any | None = None,
    distribution: str = "erk",
    include: Iterable[Entry] | Entry | None = None,
    exclude: Iterable[Entry] | Entry = (),
) -> dict[str, Any]:
    """Set all but the best weights of each neuron to zero, in place, and return the masks.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model with dense weights.
    sparsity : float
        Of all pruned layers together, in [0, 1).
    method : {"magnitude", "wanda"}
        The score of a weight. "magnitude" is its absolute value. "wanda" is that times the norm of
        its input over the calibration inputs (Sun et al. 2024).
    calibration : tensor, tuple, mapping, iterable of batches, or None
        Inputs of the model, which "wanda" needs: a batch, or a list or ``DataLoader`` of several. A
        batch is a tensor, a tuple of arguments, or a mapping of keyword arguments; within several,
        a list is a tuple. The model is called in evaluation mode.
    distribution : {"erk", "uniform"}
        Distribution of the weights over the layers, as in `TrainingConfig`.
    include, exclude : iterable of str or type
        Layers to prune and to leave: names, patterns and types, as in `SRigL`. By default all
        layers are pruned that `condense` takes.

    Returns
    -------
    dict of str to torch.Tensor
        New masks of bool by layer name, in the shapes of the weights. `condense` and the argument
        `masks` of `SRigL` take them.

    Raises
    ------
    SriglError
        If a setting is out of range, a layer's neurons would have less than one weight each, a
        weight or an input is not finite, `calibration` is missing or not used, or it does not reach
        a layer. The message names the layer, and the model is not changed.
    ValueTypeError
        If `model` is not a module, or `calibration` of another kind.

    Notes
    -----
    A layer gets the budget of SPEC 3, and each neuron ``budget // n_out`` weights; no neuron is
    ablated. Ties go to the lower column. All inputs are those of the dense model: layers are not
    pruned one after the other.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
    >>> model[0].weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.5], [4.0, 0.1, 0.2, 0.3]])
    >>> prune_to_constant_fan_in(model, 0.5)["0"]
    tensor([[False,  True,  True, False],
            [ True, False, False,  True]])
    """
    check_not_sharded(model)
    check_choice(method, "method", METHODS)
    check_choice(distribution, "distribution", DISTRIBUTIONS)
    if method == "wanda" and calibration is None:
        raise SriglError(
            "method='wanda' scores weights by the inputs of their layers; pass batches of them as "
            "calibration"
        )
    if method != "wanda" and calibration is not None:
        raise SriglError(
            f"calibration is given, but method={method!r} does not use it; leave it out, or pass "
            f"method='wanda'"
        )
    targets = find_targets(model, include, exclude, unsupported=why_not_condensed).targets
    fan_ins = _fan_ins(targets, sparsity, distribution)
    scores = {name: _rows(target).abs().double() for name, target in targets.items()}
    if calibration is not None:
        for name, norms in _input_norms(model, targets, calibration).items():
            scores[name] *= norms
    masks = {}
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise SriglError(
                f"layer {name!r}: a weight or an input is not finite; prune a model that works"
            )
        best = score.sort(dim=1, descending=True, stable=True).indices[:, : fan_ins[name]]
        mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
        masks[name] = targets[name].layout.from_rows(mask.reshape(targets[name].shape))
    with torch.no_grad():
        for name, target in targets.items():
            target.parameter.masked_fill_(~masks[name], 0)
    return masks


def _fan_ins(targets: Mapping[str, Target], sparsity: float, distribution: str) -> dict[str, int]:
    """Return the number of weights that each neuron of a layer keeps."""
    shapes = {name: target.shape for name, target in targets.items()}
    budgets = (erk if distribution == "erk" else uniform)(shapes, sparsity)
    fan_ins = {}
    for (name, shape), budget in zip(shapes.items(), budgets, strict=True):
        fan_ins[name] = budget.nnz_budget // shape[0]
        if not fan_ins[name]:
            raise SriglError(
                f"layer {name!r}: sparsity={sparsity} with distribution={distribution!r} leaves "
                f"{budget.nnz_budget} weights to {shape[0]} neurons, less than one each; lower the "
                f"sparsity, or exclude the layer"
            )
    return fan_ins


def _rows(target: Target) -> Any:
    """Return a layer's weight as a matrix, (n_out, n_in)."""
    return target.layout.to_rows(target.parameter.detach()).flatten(1)


# ---------------------------------------------------------------- calibration


class _Recorder(nn.Module):  # type: ignore[misc] # torch is untyped here
    """A linear layer without a bias that adds up the squares of its inputs."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.rows = rows
        self.out_features, self.in_features = rows.shape
        self.squares = torch.zeros(self.in_features, dtype=torch.float64, device=rows.device)
        self.has_rows = False

    def forward(self, x: Any) -> Any:
        """Return the product with the weight."""
        self.squares += x.double().square().reshape(-1, self.in_features).sum(0)
        self.has_rows |= x.numel() > 0
        return nn.functional.linear(x, self.rows)


def _input_norms(model: Any, targets: Mapping[str, Target], calibration: Any) -> dict[str, Any]:
    """Return the norm of each input of a layer over the calibration inputs."""
    recorders = {name: _Recorder(_rows(target)) for name, target in targets.items()}
    with _evaluating(model), _recording(targets, recorders), torch.no_grad():
        is_batch = isinstance(calibration, torch.Tensor | tuple | Mapping)
        for batch in [calibration] if is_batch else _batches(calibration):
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, torch.Tensor):
                model(batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                raise ValueTypeError(
                    f"a batch of calibration must be a tensor, a tuple of arguments or a mapping, "
                    f"got {type(batch).__name__}"
                )
    for name, recorder in recorders.items():
        if not recorder.has_rows:
            raise SriglError(
                f"layer {name!r}: no calibration input reached it; give batches in which every "
                f"layer takes part, or exclude it"
            )
    return {name: recorder.squares.sqrt() for name, recorder in recorders.items()}


def _batches(calibration: Any) -> Iterator[Any]:
    try:
        return iter(calibration)
    except TypeError:
        raise ValueTypeError(
            f"calibration must be a tensor, a tuple of arguments, a mapping or an iterable of "
            f"these, got {type(calibration).__name__}"
        ) from None


@contextmanager
def _recording(targets: Mapping[str, Target], recorders: Mapping[str, _Recorder]) -> Iterator[None]:
    """Let the recorders get the inputs of their layers."""
    # Attention computes with the weights of its parts, so they are recorded in a copy of it.
    attentions: dict[int, Any] = {}
    hooks = []
    for name, target in targets.items():
        module, probe = target.module, recorders[name]
        attention = next(
            (m for m in (module, target.parent) if type(m) is nn.MultiheadAttention), None
        )
        if attention is not None:
            if id(attention) not in attentions:
                attentions[id(attention)] = CondensedMultiheadAttention(attention)
                hooks.append(_hook(attention, attentions[id(attention)]))
            layer = PROJECTION_LAYERS.get(target.attribute, "out_proj")
            attentions[id(attention)].set_layer(layer, probe)
            continue
        convolution = CONVOLUTIONS.get(type(module))
        hooks.append(
            _hook(module, probe if convolution is None else convolution.like(module, probe))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(module: Any, probe: Callable[..., Any]) -> Any:
    """Call `probe` with the arguments of each call of a module, and return the hook's handle."""

    def call(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, nn.MultiheadAttention):
            probe(*args, **kwargs)
        else:  # it has one argument, whatever that is called
            probe(*args, *kwargs.values())

    return module.register_forward_pre_hook(call, with_kwargs=True)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Hold a model in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training
