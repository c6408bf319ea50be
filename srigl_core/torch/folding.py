"""Removal of ablated neurons from a model without a change of its results (SPEC 5, Folding).

An ablated neuron n outputs the constant ``c = act(b[n])``. If only elementwise activations follow
before the next linear layer, ``W_next[:, n] * c`` is added to the next layer's bias, and the neuron
and column n are removed. The rows of a condensed next layer keep their fan-in: another column with
value 0 replaces a removed one.
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
from srigl_core.errors import SriglError
from srigl_core.torch.conv import CondensedConv
from srigl_core.torch.linear import (
    ACTIVATION_FUNCTIONS,
    CondensedLinear,
    dense_like,
    set_like,
    weight_of,
)
from srigl_core.torch.quantized_linear import QuantizedLinear
from srigl_core.torch.replacement import has_hooks
from srigl_core.torch.sequential import CondensedSequential
from srigl_core.torch.sharded_tensors import check_not_sharded
from srigl_core.torch.targets import check_module

__all__ = ["Folding", "fold_ablated"]

_FORWARDS = (nn.Sequential.forward, CondensedSequential.forward)
_ELEMENTWISE = (nn.Dropout, nn.GELU, nn.Identity, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh)


@dataclass(frozen=True)
class Folding:
    """The result of `fold_ablated`; printing it gives a line for each layer.

    Parameters
    ----------
    removed : dict of str to int
        The number of removed neurons, by layer.
    left : dict of str to str
        The reason why ablated neurons were not removed, by layer.
    """

    removed: dict[str, int]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name}: {n} ablated neurons removed" for name, n in self.removed.items()]
        lines += [f"{name}: not changed, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "no layer has ablated neurons"


@dataclass
class _Place:
    """A module of a chain and its place in the model."""

    owner: Any
    attribute: str
    name: str
    module: Any


def fold_ablated(model: Any, example_input: Any | None = None) -> Folding:
    """Remove ablated neurons, in place, where this does not change the model's results.

    It is possible in an ``nn.Sequential`` where activations and then another linear layer follow a
    linear layer; nested ones are searched too. Linear layers are `CondensedLinear` and
    ``nn.Linear``. Activations are ``ReLU``, ``GELU``, ``SiLU``, ``Sigmoid``, ``Tanh``,
    ``Identity``, ``Dropout`` in evaluation mode, and that of a `CondensedLinear`.

    Parameters
    ----------
    model : torch.nn.Module
    example_input : torch.Tensor, tuple of torch.Tensor, or None
        If set, the model is evaluated with this input before and after the change, and both results
        must agree up to rounding. This finds models that use the layers of an ``nn.Sequential`` in
        other ways than one after the other.

    Returns
    -------
    Folding
        The removed neurons of each layer, and why others were kept. The ablated neurons of an
        ``nn.Linear`` are its rows of zeros.

    Raises
    ------
    SriglError
        If the result for `example_input` differs. The model is not changed.
    ValueTypeError
        If `model` is not a module.

    Notes
    -----
    Results differ by rounding only. A row of the next layer that lost a column has another one with
    value 0, through which a NaN or an infinity can reach it. Changed layers have new parameters.

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
    check_not_sharded(model)
    check_module(model)
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
            reason = _obstacle(ablated, place, between, following, uses)
            if reason is None and following is not None:
                constants = _constants(place.module, ablated, between)
                if np.isfinite(constants).all():
                    place.module, following.module = (
                        _without_neurons(place.module, ablated),
                        _without_inputs(following.module, ablated, constants),
                    )
                    removed[place.name] = int(ablated.sum())
                    changed += [place, following]
                    continue
                reason = "as the output of an ablated neuron is not finite"
            left[place.name] = str(reason)
    for name, reason in _outside_chains(model):
        if name not in removed:
            left.setdefault(name, reason)
    _commit(model, changed, example_input)
    return Folding(removed, left)


# ---------------------------------------------------------------- chains of modules


def _chains(model: Any) -> Iterator[list[_Place]]:
    """Yield the modules of each outermost nn.Sequential in the order of their use."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        owner = modules[name.rpartition(".")[0]]
        is_part = bool(name) and _is_chain(owner) and not has_hooks(module)
        if _is_chain(module) and not is_part:
            yield list(_places(module, name))


def _is_chain(module: Any) -> bool:
    """Return whether a module only calls its parts one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward in _FORWARDS


def _places(chain: Any, prefix: str) -> Iterator[_Place]:
    # named_children() would leave out the second use of a module.
    for attribute, module in chain._modules.items():
        name = f"{prefix}.{attribute}" if prefix else attribute
        if _is_chain(module) and not has_hooks(module):
            yield from _places(module, name)
        else:
            yield _Place(chain, attribute, name, module)


def _uses(model: Any) -> dict[int, int]:
    """Return how often each module and parameter is used, by ``id``."""
    counts: dict[int, int] = {}
    parts = [m for _, m in model.named_modules(remove_duplicate=False)]
    parts += [p for _, p in model.named_parameters(remove_duplicate=False)]
    for part in parts:
        counts[id(part)] = counts.get(id(part), 0) + 1
    return counts


def _following(chain: list[_Place], i: int) -> tuple[list[_Place], _Place | None]:
    """Return the activations that follow a place, and the place after them."""
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
    if isinstance(place.module, QuantizedLinear):
        return "as it is quantised; call fold_ablated before quantize"
    if following is None:
        return "as no linear layer follows in its nn.Sequential"
    if type(following.module) not in (nn.Linear, CondensedLinear):
        return f"as {following.name} ({type(following.module).__name__}) follows it"
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
            return f"as {part.name} is used more than once in the model"
    return None


def _outside_chains(model: Any) -> Iterator[tuple[str, str]]:
    """Yield the layers with ablated neurons, and the reason to keep one that is in no chain."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, CondensedConv):
            inner.add(id(module.linear))
            if _ablated(module.linear).any():
                yield name, "as it is a convolution"
        elif id(module) not in inner and _ablated(module).any():
            yield name, "as it is in no nn.Sequential"


# ---------------------------------------------------------------- new layers


def _ablated(layer: Any) -> NDArray[np.bool_]:
    """Return which neurons of a linear layer are ablated; empty for other modules."""
    if type(layer) in (CondensedLinear, QuantizedLinear):
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
    """Return the outputs of the ablated neurons after the activations."""
    with torch.no_grad():
        bias = weight_of(layer).new_zeros(len(ablated)) if layer.bias is None else layer.bias
        constants = bias[torch.from_numpy(ablated).to(bias.device)]
        activation = getattr(layer, "activation", None)
        if activation not in (None, "none"):
            constants = ACTIVATION_FUNCTIONS[activation](constants)
        for place in between:
            constants = place.module(constants)
        numbers: NDArray[np.float64] = constants.double().cpu().numpy()
        return numbers


def _without_neurons(layer: Any, ablated: NDArray[np.bool_]) -> Any:
    """Return a layer without the ablated neurons."""
    kept = torch.from_numpy(np.flatnonzero(~ablated)).to(weight_of(layer).device)
    bias = None if layer.bias is None else layer.bias.detach()[kept]
    if isinstance(layer, nn.Linear):
        return dense_like(layer, layer.weight.detach()[kept], bias)
    old = layer.to_condensed()
    shape = old.n_active, old.shape[1]
    weight = CondensedWeight(old.values, old.indices, np.arange(old.n_active), shape)
    return _condensed_like(layer, weight, bias)


def _without_inputs(layer: Any, dropped: NDArray[np.bool_], constants: NDArray[np.float64]) -> Any:
    """Return a layer without the dropped inputs; its bias has their contributions."""
    if isinstance(layer, nn.Linear):
        dense, device = layer.weight.detach(), layer.weight.device
        gone, kept = (torch.from_numpy(np.flatnonzero(d)).to(device) for d in (dropped, ~dropped))
        addend = dense[:, gone].double() @ torch.from_numpy(constants).to(device)
        return dense_like(layer, dense[:, kept], _with_addend(layer, addend))
    old = layer.to_condensed()
    inputs = np.zeros(len(dropped))
    inputs[dropped] = constants
    is_dropped = dropped[old.indices]
    terms = np.where(is_dropped, old.values.astype(np.float64) * inputs[old.indices], 0)
    sums = np.zeros(old.shape[0])
    sums[old.active] = terms.sum(axis=1)
    addend = torch.from_numpy(sums).to(layer.values.device)
    return _condensed_like(layer, _repacked(old, dropped), _with_addend(layer, addend))


def _with_addend(layer: Any, addend: Any) -> Any:
    """Return a layer's bias plus a float64 vector, rounded once."""
    if layer.bias is None:
        return addend.to(weight_of(layer).dtype)
    return (layer.bias.detach().double() + addend).to(layer.bias.dtype)


def _repacked(old: CondensedWeight, dropped: NDArray[np.bool_]) -> CondensedWeight:
    """Return a weight without the dropped columns, and with the same fan-in if enough are left.

    In each row the lowest unused columns, with value 0, replace the dropped ones.
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


def _condensed_like(layer: Any, weight: CondensedWeight, bias: Any | None) -> Any:
    options = {"activation": layer.activation, "device": layer.values.device}
    return set_like(layer, CondensedLinear.from_condensed(weight, **options), bias)


# ---------------------------------------------------------------- replacement and check


def _commit(model: Any, changed: list[_Place], example_input: Any | None) -> None:
    """Replace layers, and undo it if the result for `example_input` differs."""
    before = [(p.owner, p.attribute, getattr(p.owner, p.attribute)) for p in changed]
    expected = None if example_input is None else _result(model, example_input)
    for place in changed:
        setattr(place.owner, place.attribute, place.module)
    if example_input is None:
        return
    try:
        difference = _difference(_result(model, example_input), expected)
    except Exception as error:  # a model may raise anything
        difference = f"fails on example_input ({type(error).__name__}: {error})"
    if difference:
        for owner, attribute, module in before:
            setattr(owner, attribute, module)
        raise SriglError(
            f"the model {difference} without the ablated neurons of its nn.Sequentials, so it uses "
            f"their layers in other ways than one after the other; it was not changed"
        )


def _result(model: Any, example_input: Any) -> Any:
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    # The model runs twice and may write to its inputs.
    inputs = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            return model.eval()(*inputs)
    finally:
        for module, mode in modes:
            module.training = mode


def _difference(result: Any, expected: Any) -> str:
    """Describe a difference that exceeds rounding, or return an empty string."""
    if isinstance(expected, Mapping):
        result, expected = ([part[key] for key in expected] for part in (result, expected))
    if isinstance(expected, tuple | list):
        return next(filter(None, map(_difference, result, expected)), "")
    if not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
        return ""
    if result.shape != expected.shape:
        return f"gives a result of shape {tuple(result.shape)} instead of {tuple(expected.shape)}"
    differs = (result != expected) & ~(result.isnan() & expected.isnan())
    if not differs.any():
        return ""
    # A generous bound: rounding errors are relative to the terms of sums, not to the results.
    scale = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 1.0
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * max(1.0, scale)
    largest = float((result.double() - expected.double())[differs].abs().max())
    return "" if largest <= allowed else f"gives a result that differs by {largest:.3g}"
