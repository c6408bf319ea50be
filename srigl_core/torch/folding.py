"""Ablated neurons removed from a model without a change of what it computes (SPEC 5, Folding).

An ablated neuron n gives the constant ``c = act(b[n])``. Where nothing but elementwise activations
lies before the next layer, ``W_next[:, n] * c`` is added to that one's bias, and the neuron and its
column there go. In a condensed next layer each row keeps its fan-in: in place of a column that went
it has another one, with value 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from srigl_core._format.weight import CondensedWeight
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.conv import CondensedConv2d
from srigl_core.torch.linear import ACTIVATION_FUNCTIONS, CondensedLinear
from srigl_core.torch.replacement import has_hooks

__all__ = ["Folding", "fold_ablated"]

_ELEMENTWISE = (
    nn.Dropout,
    nn.GELU,
    nn.Identity,
    nn.ReLU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
)


@dataclass(frozen=True)
class Folding:
    """What `fold_ablated` did; printing it gives a line for each layer.

    Parameters
    ----------
    removed : dict of str to int
        Neurons removed, by layer.
    left : dict of str to str
        Layers with ablated neurons that were left as they are, and why.
    """

    removed: dict[str, int]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name}: {n} ablated neurons removed" for name, n in self.removed.items()]
        lines += [f"{name}: left as it is, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no layer has ablated neurons"


@dataclass
class _Place:
    """A module of a chain, and where it is."""

    owner: Any
    attribute: str
    name: str
    module: Any


def fold_ablated(model: Any, example_input: Any | None = None) -> Folding:
    """Remove ablated neurons, in place, where what follows allows it exactly.

    That is where an ``nn.Sequential``, with others in it or not, has a linear layer, activations,
    and a linear layer again: `CondensedLinear` or ``nn.Linear``; ``ReLU``, ``GELU``, ``SiLU``,
    ``Sigmoid``, ``Tanh``, ``Identity``, ``Dropout`` in evaluation, and a `CondensedLinear`'s own.

    Parameters
    ----------
    model : torch.nn.Module
    example_input : torch.Tensor, tuple of such, or None
        What the model takes: it is run with it before and after, in evaluation mode, and must give
        the same up to rounding. That shows a model that uses the layers of an ``nn.Sequential`` in
        other ways than one after the other.

    Returns
    -------
    Folding
        Of layers with ablated neurons, those of ``nn.Linear`` being rows of zeros: how many were
        removed, or why they were left.

    Raises
    ------
    SriglError
        If the model gives something else for `example_input` afterwards; it is left as it was.
    ValueTypeError
        If `model` is no module.

    Notes
    -----
    Results differ by rounding alone. A row of the next layer that lost columns has others with
    value 0 instead, so that a NaN or infinity in one of these does reach it. Layers that changed
    are new ones, with new parameters.

    Examples
    --------
    >>> import torch
    >>> from srigl_core.torch import CondensedLinear
    >>> first = torch.nn.Linear(3, 4)
    >>> torch.nn.init.zeros_(first.weight[1:3].detach())
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    >>> model = torch.nn.Sequential(first, torch.nn.ReLU(), CondensedLinear(4, 2, fan_in=2))
    >>> print(fold_ablated(model))
    0: 2 ablated neurons removed
    >>> model[2].in_features
    2
    """
    if not isinstance(model, nn.Module):
        raise ValueTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    removed: dict[str, int] = {}
    left: dict[str, str] = {}
    changed: list[_Place] = []
    uses = _uses(model)
    for chain in _chains(model):
        for i, place in enumerate(chain):
            ablated = _ablated(place.module)
            if not ablated.any():
                continue
            between, following = _following(chain, i)
            why = _obstacle(ablated, place, between, following, uses)
            if why is None and following is not None:
                constants = _constants(place.module, ablated, between)
                if np.isfinite(constants).all():
                    place.module, following.module = (
                        _without_neurons(place.module, ablated),
                        _without_inputs(following.module, ablated, constants),
                    )
                    removed[place.name] = int(ablated.sum())
                    changed += [place, following]
                    continue
                why = "as a bias of one is not finite"
            left[place.name] = str(why)
    for name, why in _elsewhere(model):
        if name not in removed:
            left.setdefault(name, why)
    _commit(model, changed, example_input)
    return Folding(removed, left)


# ---------------------------------------------------------------- where


def _chains(model: Any) -> Iterator[list[_Place]]:
    """Yield the modules of each outermost nn.Sequential in the order they are used."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        owner = modules[name.rpartition(".")[0]]
        is_part = bool(name) and _is_chain(owner) and not has_hooks(module)
        if _is_chain(module) and not is_part:
            yield list(_places(module, name))


def _is_chain(module: Any) -> bool:
    """Whether a module does nothing but use its parts one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _places(chain: Any, prefix: str) -> Iterator[_Place]:
    # named_children() would leave out a module that is there for the second time.
    for attribute, module in chain._modules.items():
        name = f"{prefix}.{attribute}" if prefix else attribute
        if _is_chain(module) and not has_hooks(module):
            yield from _places(module, name)
        else:
            yield _Place(chain, attribute, name, module)


def _uses(model: Any) -> dict[int, int]:
    """Return how often each module and parameter is there, by ``id``."""
    counts: dict[int, int] = {}
    parts = [m for _, m in model.named_modules(remove_duplicate=False)]
    parts += [p for _, p in model.named_parameters(remove_duplicate=False)]
    for part in parts:
        counts[id(part)] = counts.get(id(part), 0) + 1
    return counts


def _following(chain: list[_Place], i: int) -> tuple[list[_Place], _Place | None]:
    """Return the activations behind a place, and what is behind them."""
    j = i + 1
    while j < len(chain) and type(chain[j].module) in _ELEMENTWISE:
        j += 1
    return chain[i + 1 : j], chain[j] if j < len(chain) else None


def _obstacle(
    ablated: NDArray[np.bool_],
    place: _Place,
    between: list[_Place],
    following: _Place | None,
    uses: dict[int, int],
) -> str | None:
    """Return why the ablated neurons of a place cannot be removed, or None."""
    if following is None:
        return "as no linear layer follows in its nn.Sequential"
    if type(following.module) not in (nn.Linear, CondensedLinear):
        return f"as {following.name} ({type(following.module).__name__}) lies behind it"
    if ablated.all():
        return "as none of its neurons is active"
    for part in (place, *between, following):
        if has_hooks(part.module):
            return f"as {part.name} has hooks"
        if isinstance(part.module, nn.Dropout) and part.module.training:
            return f"as {part.name} (Dropout) is in training mode; call model.eval() first"
    for part in (place, following):
        counted = (part.module, *part.module.parameters())
        if any(uses.get(id(one), 1) > 1 for one in counted):
            return f"as {part.name} is shared with another place of the model"
    return None


def _elsewhere(model: Any) -> Iterator[tuple[str, str]]:
    """Yield the layers with ablated neurons, and why one that was in no chain is left."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, CondensedConv2d):
            inner.add(id(module.linear))
            if _ablated(module.linear).any():
                yield name, "as it is a convolution"
        elif id(module) not in inner and _ablated(module).any():
            yield name, "as it is in no nn.Sequential"


# ---------------------------------------------------------------- what


def _ablated(layer: Any) -> NDArray[np.bool_]:
    """Return which neurons a layer computes nothing for, none if it is no linear layer."""
    if type(layer) is CondensedLinear:
        ablated = np.ones(layer.out_features, np.bool_)
        ablated[layer.active[: layer.n_active].cpu().numpy()] = False
        return ablated
    if type(layer) is nn.Linear:
        none_active: NDArray[np.bool_] = (layer.weight == 0).all(dim=1).cpu().numpy()
        return none_active
    return np.zeros(0, np.bool_)


def _constants(
    layer: Any, ablated: NDArray[np.bool_], between: list[_Place]
) -> NDArray[np.float64]:
    """Return what the ablated neurons give behind the activations."""
    with torch.no_grad():
        values = layer.values if isinstance(layer, CondensedLinear) else layer.weight
        bias = values.new_zeros(len(ablated)) if layer.bias is None else layer.bias
        constants = bias[torch.from_numpy(ablated).to(bias.device)]
        activation = getattr(layer, "activation", None)
        if activation not in (None, "none"):
            constants = ACTIVATION_FUNCTIONS[activation](constants)
        for place in between:
            constants = place.module(constants)
        numbers: NDArray[np.float64] = constants.double().cpu().numpy()
        return numbers


def _without_neurons(layer: Any, ablated: NDArray[np.bool_]) -> Any:
    """Return a layer with the active neurons alone."""
    kept = torch.from_numpy(np.flatnonzero(~ablated))
    bias = None if layer.bias is None else layer.bias.detach()[kept.to(layer.bias.device)]
    if isinstance(layer, nn.Linear):
        return _linear_like(layer, layer.weight.detach()[kept.to(layer.weight.device)], bias)
    old = layer.to_condensed()
    weight = CondensedWeight(
        old.values, old.indices, np.arange(old.n_active), (old.n_active, old.shape[1])
    )
    return _condensed_like(layer, weight, bias)


def _without_inputs(layer: Any, dropped: NDArray[np.bool_], constants: NDArray[np.float64]) -> Any:
    """Return a layer that has in its bias what the dropped inputs gave."""
    if isinstance(layer, nn.Linear):
        dense, device = layer.weight.detach(), layer.weight.device
        gone, kept = (torch.from_numpy(np.flatnonzero(d)).to(device) for d in (dropped, ~dropped))
        given = dense[:, gone].double() @ torch.from_numpy(constants).to(device)
        return _linear_like(layer, dense[:, kept], _raised(layer, given, dense.dtype))
    old = layer.to_condensed()
    everyone = np.zeros(len(dropped))
    everyone[dropped] = constants
    given = np.zeros(old.shape[0])
    goes = dropped[old.indices]
    terms = np.where(goes, old.values.astype(np.float64) * everyone[old.indices], 0)
    given[old.active] = terms.sum(axis=1)
    weight = _repacked(old, dropped)
    bias = _raised(layer, torch.from_numpy(given).to(layer.values.device), layer.values.dtype)
    return _condensed_like(layer, weight, bias)


def _raised(layer: Any, given: Any, kind: Any) -> Any:
    """Return a layer's bias with what is given to it, rounded once."""
    if layer.bias is None:
        return given.to(kind)
    return (layer.bias.detach().double() + given).to(layer.bias.dtype)


def _repacked(old: CondensedWeight, dropped: NDArray[np.bool_]) -> CondensedWeight:
    """Return a weight without the dropped columns, of the same fan-in if as many are left.

    A row that had a dropped column has the lowest one instead that it had not, with value 0.
    """
    renumbered = np.cumsum(~dropped) - 1
    n_in = int(np.count_nonzero(~dropped))
    fan_in = min(old.fan_in, n_in)
    values = np.zeros((old.n_active, fan_in), old.dtype)
    indices = np.empty((old.n_active, fan_in), np.int64)
    for row, (columns, numbers) in enumerate(zip(old.indices, old.values, strict=True)):
        stays = ~dropped[columns]
        kept = renumbered[columns[stays]]
        others = np.setdiff1d(np.arange(n_in), kept, assume_unique=True)
        both = np.concatenate([kept, others[: fan_in - len(kept)]])
        padded = np.zeros(fan_in, old.dtype)
        padded[: len(kept)] = numbers[stays]
        order = np.argsort(both)
        indices[row], values[row] = both[order], padded[order]
    return CondensedWeight(values, indices, old.active, (old.shape[0], n_in))


def _linear_like(layer: Any, weight: Any, bias: Any | None) -> Any:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    return _with_bias(made, layer, layer.weight, bias)


def _condensed_like(layer: Any, weight: CondensedWeight, bias: Any | None) -> Any:
    device = layer.values.device
    made = CondensedLinear.from_condensed(weight, activation=layer.activation, device=device)
    made.values.requires_grad_(layer.values.requires_grad)
    return _with_bias(made, layer, layer.values, bias)


def _with_bias(made: Any, layer: Any, weight: Any, bias: Any | None) -> Any:
    if bias is not None:
        like = weight if layer.bias is None else layer.bias
        made.bias = nn.Parameter(bias.clone(), requires_grad=like.requires_grad)
    return made.train(layer.training)


# ---------------------------------------------------------------- putting them in


def _commit(model: Any, changed: list[_Place], example_input: Any | None) -> None:
    """Put new layers in place, and the old ones back if the model gives something else then."""
    before = [(p.owner, p.attribute, getattr(p.owner, p.attribute)) for p in changed]
    wanted = None if example_input is None else _result(model, example_input)
    for place in changed:
        setattr(place.owner, place.attribute, place.module)
    if example_input is None:
        return
    try:
        got = _result(model, example_input)
        why = _difference(got, wanted)
    except Exception as error:  # a model may raise whatever it likes
        why = f"fails on example_input ({type(error).__name__}: {error})"
    if why:
        for owner, attribute, module in before:
            setattr(owner, attribute, module)
        raise SriglError(
            f"the model {why} with the ablated neurons of its nn.Sequentials removed, so it uses "
            f"their layers in other ways than one after the other; it is left as it was"
        )


def _result(model: Any, example_input: Any) -> Any:
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    # Copies, since a model may write to what it is given, and is run twice.
    inputs = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            return model.eval()(*inputs)
    finally:
        for module, mode in modes:
            module.training = mode


def _difference(got: Any, wanted: Any) -> str:
    """Say how two results differ by more than rounding does, or nothing."""
    if isinstance(wanted, Mapping):
        got, wanted = ([result[key] for key in wanted] for result in (got, wanted))
    if isinstance(wanted, tuple | list):
        return next(filter(None, map(_difference, got, wanted)), "")
    if not isinstance(wanted, torch.Tensor) or not wanted.is_floating_point():
        return ""
    if got.shape != wanted.shape:
        return f"gives a result of shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    differs = (got != wanted) & ~(got.isnan() & wanted.isnan())
    if not differs.any():
        return ""
    # Rounding is known to be relative to what is summed, not to the result: far less than this.
    scale = float(wanted[wanted.isfinite()].abs().max()) if wanted.isfinite().any() else 1.0
    allowed = torch.finfo(wanted.dtype).eps ** 0.5 * max(1.0, scale)
    far = float((got.double() - wanted.double())[differs].abs().max())
    return "" if far <= allowed else f"gives a result that differs by {far:.3g}"
