"""Optimisers: finding them in wrappers, and how their state follows the connections (SPEC 4.8)."""

from __future__ import annotations

import copy
import enum
import inspect
import types
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.torch.sharded_tensors import local
from srigl_core.torch.targets import Target

__all__ = [
    "OptimizerRule",
    "check_optimizer",
    "find_optimizers",
    "groups_of",
    "register_optimizer",
    "remap_states",
    "replace_parameters",
]


@dataclass(frozen=True)
class OptimizerRule:
    """How SRigL treats the optimisers of one class.

    Parameters
    ----------
    start : mapping of str to float or callable
        The number that a new parameter's state starts with, by the state's name; or a function of
        the parameter group that returns it. State that it does not name is tried out.
    elementwise : bool or None
        Whether each number of a parameter is trained by itself, so that a matrix may be trained as
        a vector. None tries it out. Condensed layers need it.
    forget : callable or None
        A function of the optimiser that makes it start anew. It is called when connections change,
        for an optimiser whose state mixes the numbers of a parameter.
    refused : str or None
        Why the optimiser cannot train sparse weights.

    See Also
    --------
    register_optimizer
    """

    start: Mapping[str, float | Callable[[dict[str, Any]], float]] = field(default_factory=dict)
    elementwise: bool | None = None
    forget: Callable[[Any], None] | None = None
    refused: str | None = None


_rules: dict[type, OptimizerRule] = {}


def register_optimizer(cls: type, rule: OptimizerRule) -> None:
    """Say how SRigL treats the optimisers of a class and of its subclasses.

    Most optimisers need no rule. What they start a parameter with, and whether they need matrices,
    is tried out: a copy of the optimiser takes one or two steps with a tiny parameter of its own.
    Register a rule if that is not possible, or not right.

    Parameters
    ----------
    cls : type
        A subclass of torch.optim.Optimizer.
    rule : OptimizerRule

    Examples
    --------
    >>> import torch
    >>> class Scaled(torch.optim.SGD):
    ...     "Keeps a scale for each weight, which starts at the learning rate."
    >>> rule = OptimizerRule(start={"scale": lambda group: group["lr"]}, elementwise=True)
    >>> register_optimizer(Scaled, rule)
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueTypeError(f"cls={cls!r} must be a subclass of torch.optim.Optimizer")
    if not isinstance(rule, OptimizerRule):
        raise ValueTypeError(f"rule must be an OptimizerRule, got {type(rule).__name__}")
    _rules[cls] = rule


def _forget_history(optimizer: Any) -> None:
    """Restart LBFGS, whose vectors hold all its parameters one after another."""
    optimizer.state.clear()
    optimizer._numel_cache = None


register_optimizer(
    torch.optim.SparseAdam,
    OptimizerRule(refused="it takes sparse gradients only, and those of layers are dense"),
)
# A step with a gradient of zero would already raise it to eps.
register_optimizer(torch.optim.Adamax, OptimizerRule(start={"exp_inf": 0.0}))
register_optimizer(torch.optim.LBFGS, OptimizerRule(elementwise=True, forget=_forget_history))


def find_optimizers(optimizer: Any) -> list[Any]:
    """Return an optimiser and those inside it: of a wrapper, of a sequence.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer, an object that holds some, or a sequence of these
    """
    return [part for part in _parts(optimizer) if isinstance(part, torch.optim.Optimizer)]


def groups_of(optimizers: list[Any]) -> list[dict[str, Any]]:
    """Return the parameter groups of several optimisers; groups that they share appear once."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return list({id(group): group for group in groups}.values())


def check_optimizer(targets: dict[str, Target], optimizer: Any, mode: str) -> None:
    """Check that the optimiser updates every weight, and that SRigL can follow it.

    Raises
    ------
    SriglError
        If it lacks a weight, keeps copies of it, or cannot train it in this mode. The message names
        the layer and the optimiser.
    ValueTypeError
        If it is not an optimiser.
    """
    optimizers = find_optimizers(optimizer)
    if not optimizers:
        raise ValueTypeError(
            f"optimizer must be a torch.optim.Optimizer, or an object or a list that holds one, "
            f"got {type(optimizer).__name__}"
        )
    for part in optimizers:
        if getattr(part, "_overlap_with_ddp", False):
            raise SriglError(
                f"{_name(part)} with overlap_with_ddp=True steps before after_backward can mask "
                f"the gradients; use overlap_with_ddp=False"
            )
    # A wrapper's own groups do not tell which parameters are updated; those inside it do. But an
    # optimiser of something else, as of a schedule's dummy parameter, makes no wrapper.
    shapes = {tuple(target.parameter.shape) for target in targets.values()}
    wrapped = [part for part in optimizers if shapes & _shapes(_inner(part))]
    updating = [part for part in optimizers if _shards(part) or part not in wrapped]
    held = {id(p) for group in groups_of(updating) for p in group["params"]}
    shown = {id(p) for group in groups_of(optimizers) for p in group["params"]}
    tried: set[tuple[int, int, int]] = set()
    for target in targets.values():
        if id(target.parameter) in shown - held:
            raise SriglError(
                f"layer {target.name!r}: {_name(optimizers[0])} holds its weight, but the "
                f"optimizer inside it, {', '.join(map(_name, updating))}, does not: it updates "
                f"copies (master weights?), which SRigL cannot follow; pass an optimizer of the "
                f"model's own parameters"
            )
        if id(target.parameter) not in held:
            raise SriglError(
                f"layer {target.name!r}: the optimizer does not hold its weight; make it from "
                f"model.parameters() after the model is on its device (and after fully_shard), or "
                f"exclude the layer"
            )
        for part in _parts(optimizer):
            _check_copies(target, part)
        for part in optimizers:
            for group in part.param_groups:
                kind = id(part), id(group), target.parameter.ndim
                if kind not in tried and any(p is target.parameter for p in group["params"]):
                    _check_class(target, part, group, mode)
                    tried.add(kind)


def remap_states(
    optimizer: Any,
    changed: Sequence[tuple[Any, Callable[[Any, Any], Any]]],
    new_weight: float = 0.0,
) -> None:
    """Change, in place, the tensors of parameters' states that have the parameter's shape.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer or a wrapper
    changed : sequence of (parameter, remap)
        Parameters, and functions that take the old tensor and the number that a new weight's state
        starts with, and return the new tensor.
    new_weight : float
        The value of a new weight.
    """
    for part, state in _states(find_optimizers(optimizer)):
        forget = _rule(part).forget
        if forget is not None:
            forget(part)
            continue
        starts = _Starts(part, new_weight)
        for parameter, remap in changed:
            for path, tensor in _tensors(state.get(parameter, {})):
                # `p.data = state["old"]`, as SAM does it, makes a state the parameter itself.
                if tensor.shape == parameter.shape and not _share_memory(tensor, parameter):
                    tensor.copy_(remap(tensor, starts.of(parameter).get(path, 0)))


def replace_parameters(
    optimizer: Any, replaced: Sequence[tuple[Any, Any, Callable[[Any, Any], Any]]]
) -> None:
    """Replace parameters of an optimiser, and convert their state.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer or a wrapper
    replaced : sequence of (old, new, remap)
        Two parameters, and a function as in `remap_states` that returns a tensor of the new one's
        shape. State that holds a tensor of another shape is dropped.
    """
    optimizers = find_optimizers(optimizer)
    for part, state in _states(optimizers):
        forget = _rule(part).forget
        if forget is not None:
            forget(part)
        starts = _Starts(part, 0.0)
        for old, new, remap in replaced:
            if old in state:
                state_of_new = _converted(state.pop(old), old.shape, remap, starts.of(old))
                if state_of_new is not None:
                    state[new] = state_of_new
    new_of = {id(old): new for old, new, _ in replaced}
    for part in _parts(optimizer):
        # In place, because an optimiser may have other references to the lists, as LBFGS has.
        for name, value in _attributes(part).items():
            new_value = _with_references_replaced(value, new_of, set())
            if new_value is not value:
                vars(part)[name] = new_value
        if _shards(part):
            part._build_param_buckets()


def _name(optimizer: Any) -> str:
    return type(optimizer).__name__


def _rule(optimizer: Any) -> OptimizerRule:
    """Return the rule of the nearest class that has one."""
    rules = (_rules[cls] for cls in type(optimizer).__mro__ if cls in _rules)
    return next(rules, OptimizerRule())


def _shards(optimizer: Any) -> bool:
    """Return whether it is a ZeroRedundancyOptimizer, whose import would take long."""
    return hasattr(optimizer, "_build_param_buckets")


def _states(optimizers: list[Any]) -> list[tuple[Any, Any]]:
    """Return optimisers with their states; the inner optimiser's comes first where they share."""
    return list({id(part.state): (part, part.state) for part in optimizers}.values())


def _attributes(optimizer: Any) -> dict[str, Any]:
    """Return the attributes of an optimiser that may refer to parameters, besides its state."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in ("state", "step", "zero_grad") and not name.endswith("_hooks")
    }


def _inner(optimizer: Any) -> list[Any]:
    """Return the optimisers inside an optimiser."""
    return [part for part in find_optimizers(optimizer) if part is not optimizer]


def _parts(optimizer: Any) -> list[Any]:
    """Return an optimiser, or a wrapper of one, and those that it refers to."""
    found: dict[int, Any] = {}
    _collect_parts(optimizer, found)
    return list(found.values())


def _shapes(optimizers: list[Any]) -> set[tuple[int, ...]]:
    return {tuple(p.shape) for group in groups_of(optimizers) for p in group["params"]}


def _collect_parts(value: Any, found: dict[int, Any]) -> None:
    if isinstance(value, list | tuple):
        for part in value:
            _collect_parts(part, found)
    elif isinstance(value, Mapping):
        for part in value.values():
            _collect_parts(part, found)
    elif id(value) not in found and _can_step(value):
        found[id(value)] = value
        for name, part in _attributes(value).items():
            if name != "param_groups":
                _collect_parts(part, found)


def _can_step(value: Any) -> bool:
    """Return whether an object is an optimiser or a wrapper, which need not be a subclass."""
    is_object = hasattr(value, "__dict__") and not isinstance(
        value, nn.Module | torch.Tensor | type
    )
    return is_object and callable(getattr(value, "step", None))


def _check_copies(target: Target, optimizer: Any) -> None:
    """Refuse an optimiser that keeps weights, or numbers for them, outside of its state."""
    for name, value in _attributes(optimizer).items():
        if name == "param_groups":
            continue
        for _, tensor in _tensors(value):
            is_alike = tensor.shape == target.parameter.shape
            if is_alike and not isinstance(tensor, nn.Parameter):
                raise SriglError(
                    f"layer {target.name!r}: {_name(optimizer)}.{name} holds a tensor of its "
                    f"weight's shape, which SRigL cannot keep up to date; pass an optimizer that "
                    f"keeps it in its state"
                )


def _check_class(target: Target, optimizer: Any, group: dict[str, Any], mode: str) -> None:
    rule = _rule(optimizer)
    if rule.refused is not None:
        raise SriglError(
            f"layer {target.name!r}: {_name(optimizer)} cannot train it: {rule.refused}; use "
            f"another optimizer"
        )
    elementwise = rule.elementwise
    if mode == "condensed" and elementwise is None and not _inner(optimizer):
        elementwise = _tried_elementwise(optimizer, group, target.parameter)
    if mode == "condensed" and elementwise is False:
        raise SriglError(
            f"layer {target.name!r}: {_name(optimizer)} needs matrices or keeps state that is not "
            f"of its weight's shape, and a condensed layer's values are one vector; use "
            f"mode='masked', or another optimizer"
        )


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the tensors in nested dicts and lists, except scalars, each with its path."""
    if isinstance(value, torch.Tensor):
        if value.ndim > 0:
            yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, (*path, key))
    elif isinstance(value, list | tuple | deque):
        for key, part in enumerate(value):
            yield from _tensors(part, (*path, key))


def _converted(
    state: dict[Any, Any],
    shape: torch.Size,
    remap: Callable[[Any, Any], Any],
    start: Mapping[tuple[Any, ...], Any],
) -> dict[Any, Any] | None:
    """Return the state of a replaced parameter, or None if it cannot be converted."""
    if any(tensor.shape != shape and tensor.numel() > 1 for _, tensor in _tensors(state)):
        return None

    def convert(value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return remap(value, start.get(path, 0)) if value.shape == shape else value
        if isinstance(value, Mapping):
            return {key: convert(part, (*path, key)) for key, part in value.items()}
        if isinstance(value, list | deque):
            converted = copy.copy(value)
            for key, part in enumerate(value):
                converted[key] = convert(part, (*path, key))
            return converted
        return value

    return {key: convert(part, (key,)) for key, part in state.items()}


def _with_references_replaced(value: Any, new_of: dict[int, Any], seen: set[int]) -> Any:
    """Replace parameters in nested lists and dicts, in place, and return the new value."""
    if id(value) in new_of:
        return new_of[id(value)]
    if id(value) in seen or not isinstance(value, list | dict | tuple):
        return value
    seen.add(id(value))
    if isinstance(value, dict):
        old = list(value.items())
        new = [
            (new_of.get(id(key), key), _with_references_replaced(part, new_of, seen))
            for key, part in old
        ]
        if any(a is not c or b is not d for (a, b), (c, d) in zip(old, new, strict=True)):
            value.clear()
            value.update(new)
        return value
    parts = [_with_references_replaced(part, new_of, seen) for part in value]
    if isinstance(value, list):
        value[:] = parts
    elif any(part is not old for part, old in zip(parts, value, strict=True)):
        return tuple(parts)
    return value


def _share_memory(one: Any, other: Any) -> bool:
    one, other = local(one), local(other)
    return bool(one.data_ptr() == other.data_ptr() and one.device == other.device)


class _Starts:
    """The numbers that the state of new parameters starts with, by path.

    They are the optimiser's state after a step with a gradient of zero.
    """

    def __init__(self, optimizer: Any, new_weight: float) -> None:
        self._optimizer, self._new_weight = optimizer, new_weight
        groups = optimizer.param_groups
        self._groups = {id(p): group for group in groups for p in group["params"]}
        self._known: dict[Any, dict[tuple[Any, ...], Any]] = {}

    def of(self, parameter: Any) -> dict[tuple[Any, ...], Any]:
        """Return the numbers for a parameter; those of its group are tried out once."""
        group = self._groups.get(id(parameter))
        if group is None:
            return {}
        key = id(group), parameter.ndim, parameter.dtype, parameter.device
        if key not in self._known:
            self._known[key] = _tried_start(self._optimizer, group, parameter, self._new_weight)
        return self._known[key]


def _tried_start(
    optimizer: Any, group: dict[str, Any], parameter: Any, new_weight: float
) -> dict[tuple[Any, ...], Any]:
    start: dict[tuple[Any, ...], Any] = {}
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    fresh = torch.full(
        _trial_shape(parameter.ndim), new_weight, dtype=dtype, device=parameter.device
    )
    state = _try_out(optimizer, group, fresh, [torch.zeros_like(fresh)])
    for path, tensor in _tensors(state or {}):
        if tensor.shape == fresh.shape:
            first = tensor.flatten()[0]
            if first.isfinite() and (tensor == first).all():
                start[path] = first.item()
    for name, number in _rule(optimizer).start.items():
        start[(name,)] = number(group) if callable(number) else number
    return start


def _tried_elementwise(optimizer: Any, group: dict[str, Any], weight: Any) -> bool | None:
    """Return whether two steps with a weight and with its numbers in a row are the same."""
    # Larger than the blocks of numbers that share a scale in optimisers of few bits.
    shape = torch.Size((40, 120, 2, 3, 2)[: max(weight.ndim, 2)])
    vector = torch.linspace(-1, 1, shape.numel(), device=weight.device)
    gradients = [vector.cos() * 0.3, vector.sin() - 0.2]
    matrix = vector.clone().reshape(shape)
    state = _try_out(optimizer, group, matrix, [part.reshape(shape) for part in gradients])
    if state is None:
        return None
    if any(tensor.shape != matrix.shape and tensor.numel() > 1 for _, tensor in _tensors(state)):
        return False
    if not _is_plain(state, set()):
        return False  # an object that may hold state, such as a preconditioner
    if _try_out(optimizer, group, vector, gradients) is None:
        return False
    return bool(torch.allclose(matrix.flatten(), vector, rtol=1e-4, equal_nan=True))


def _trial_shape(ndim: int) -> tuple[int, ...]:
    """Return a small shape whose axes all differ."""
    return tuple(range(2, 2 + ndim))


def _try_out(
    optimizer: Any, group: dict[str, Any], fresh: Any, gradients: list[Any]
) -> dict[Any, Any] | None:
    """Step a fresh parameter, in place, with a copy of an optimiser.

    Returns
    -------
    dict or None
        The parameter's state; None if that cannot be tried out, for instance because a step needs a
        closure. Neither the optimiser nor the state of random numbers changes.
    """
    options = {k: value for k, value in group.items() if k not in ("params", "param_names")}
    devices = [fresh.device] if fresh.is_cuda else []
    for make in (_copied, _constructed):
        parameter = nn.Parameter(fresh.clone())
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices):
                warnings.simplefilter("ignore")
                trial = make(optimizer, {**copy.deepcopy(options), "params": [parameter]})
                if trial is None:
                    continue
                for gradient in gradients:
                    parameter.grad = gradient.clone()
                    type(trial).step(trial)
                fresh.copy_(parameter.detach())
                return dict(trial.state[parameter])
        except Exception:  # of a foreign class, whose errors cannot be known
            continue
    return None


def _copied(optimizer: Any, group: dict[str, Any]) -> Any | None:
    """Return a copy of an optimiser with one group, or None if it could reach other objects."""
    attributes = _attributes(optimizer)
    del attributes["param_groups"]
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not _is_plain(attributes, parameters):
        return None
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(copy.deepcopy(attributes))
    trial.__setstate__(
        {
            "defaults": copy.deepcopy(optimizer.defaults),
            "state": defaultdict(dict),
            "param_groups": [group],
        }
    )
    return trial


def _constructed(optimizer: Any, group: dict[str, Any]) -> Any | None:
    """Return a new optimiser of the same class; some make their state when they are made."""
    if _inner(optimizer):
        return None
    names = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in names}
    return type(optimizer)([group], **copy.deepcopy(defaults))


def _is_plain(value: Any, parameters: set[int]) -> bool:
    """Return whether a deep copy of a value refers to nothing of the original's model."""
    if isinstance(value, Mapping):
        return all(_is_plain(part, parameters) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set | deque):
        return all(_is_plain(part, parameters) for part in value)
    if isinstance(value, torch.Tensor):
        return not isinstance(value, nn.Parameter) and id(value) not in parameters
    return value is None or isinstance(value, _PLAIN_TYPES)


_PLAIN_TYPES = (
    int,
    float,
    complex,
    str,
    bytes,
    type,
    enum.Enum,
    torch.dtype,
    torch.device,
    types.FunctionType,
    types.BuiltinFunctionType,
)
