"""The condensed layer as a PyTorch module."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from srigl_core._activations import activation_named
from srigl_core._arrays.checks import as_float_array, check_flag, check_generator, check_integer
from srigl_core._format.connections import Connections
from srigl_core._format.weight import CondensedWeight, check_condensed
from srigl_core.errors import SriglError, ValueTypeError
from srigl_core.reference.distributions import nnz_budget as budget_of
from srigl_core.reference.init import sparse_init
from srigl_core.torch.activations import ACTIVATION_FUNCTIONS
from srigl_core.torch.capture import is_capturing
from srigl_core.torch.eager import condensed_product, inference_product
from srigl_core.torch.packing import condensed_weight, packing_of
from srigl_core.torch.sharded_tensors import is_sharded, laid_out, whole
from srigl_core.torch.tensors import as_numpy, from_numpy, numpy_dtype, torch_dtype
from srigl_core.torch.weight_view import HasDenseWeight, dense_weight

__all__ = ["ACTIVATION_FUNCTIONS", "CondensedLinear", "dense_like", "set_like", "weight_of"]

_MOST = 2**31 - 1
"""The indices are int32, because PyTorch cannot index with unsigned integers."""


class CondensedLinear(HasDenseWeight, nn.Module):  # type: ignore[misc] # torch is untyped here
    """A linear layer with constant fan-in and without a dense weight.

    It computes ``y = activation(x @ (W * M).T + bias)`` from the connected inputs only. Any
    optimiser can train it, and no dense gradient is computed. `srigl_core.torch.SRigL` moves its
    connections. All tensors keep their shapes when the mask changes, so optimiser state, compiled
    graphs and `DistributedDataParallel` stay valid.

    Parameters
    ----------
    in_features, out_features : int
    nnz_budget : int or None
        Length of `values`, B. Exactly one of `nnz_budget`, `sparsity` and `fan_in` must be set.
    sparsity : float or None
        In [0, 1). The budget follows by `srigl_core.reference.nnz_budget`.
    fan_in : int or None
        The budget is ``out_features * fan_in``.
    bias : bool
    activation : str or None
        One of `srigl_core.contract.ACTIVATIONS`. The product's kernel applies it if no gradient is
        recorded.
    device : torch.device or None
    dtype : torch.dtype or None
        float16, bfloat16, float32 or float64.
    rng : numpy.random.Generator, int or None
        Generator or seed for the connections and the values. None draws a seed from PyTorch's
        generator.

    Attributes
    ----------
    values : torch.nn.Parameter, (nnz_budget,)
        The ``n_active * fan_in`` active weights row by row, then zeros, whose gradient is zero.
    indices : torch.Tensor of int32, (nnz_budget,)
        The column of each value, ascending within a row, then zeros.
    active : torch.Tensor of int32, (out_features,)
        The rows that are not ablated, ascending, then -1.
    counts : torch.Tensor of int64, (2,)
        The number of active neurons and the fan-in.
    bias : torch.nn.Parameter, (out_features,), or None
    weight : torch.Tensor, (out_features, in_features)
        The masked dense weight for code that looks at it. Read-only, without a gradient.

    Raises
    ------
    SriglError
        If a number is out of range, or not exactly one of the budgets is set.

    Notes
    -----
    SPEC 1 and 2. Initial values and biases are uniform within ``sqrt(1 / fan_in)`` (SPEC 5), as in
    `torch.nn.Linear`. Each call compares the tensors with what was packed, and packs them again
    if they were written, in whatever way; `srigl_core.torch.freeze` leaves that out.

    Examples
    --------
    >>> import torch
    >>> layer = CondensedLinear(16, 4, fan_in=3, rng=0)
    >>> layer
    CondensedLinear(in_features=16, out_features=4, fan_in=3, n_active=4, nnz_budget=12, bias=True)
    >>> layer(torch.ones(2, 16)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        nnz_budget: int | None = None,
        sparsity: float | None = None,
        fan_in: int | None = None,
        bias: bool = True,
        activation: str | None = None,
        device: Any | None = None,
        dtype: Any | None = None,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        budget = _checked_budget(in_features, out_features, nnz_budget, sparsity, fan_in)
        bias = check_flag(bias, "bias")
        self._allocate((out_features, in_features), budget, bias, activation, device, dtype)
        if not self.values.is_meta:
            self.reset_parameters(rng)

    def _allocate(
        self,
        shape: tuple[int, int],
        nnz_budget: int,
        bias: bool,
        activation: str | None,
        device: Any | None,
        dtype: Any | None,
    ) -> None:
        activation_named(activation)
        super().__init__()
        self.out_features, self.in_features = shape
        self.activation = activation
        self.values = nn.Parameter(torch.zeros(nnz_budget, device=device, dtype=dtype))
        n_out = self.out_features
        for name, length, integers in (
            ("indices", nnz_budget, torch.int32),
            ("active", n_out, torch.int32),
            ("counts", 2, torch.int64),
        ):
            self.register_buffer(name, torch.zeros(length, dtype=integers, device=device))
        numbers = torch.zeros(n_out, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if numbers is None else nn.Parameter(numbers))

    def reset_parameters(self, rng: np.random.Generator | int | None = None) -> None:
        """Draw connections, values and bias. All neurons become active.

        Parameters
        ----------
        rng : numpy.random.Generator, int or None
            As in the constructor.
        """
        if rng is None:
            rng = int(torch.randint(2**63 - 1, ()))
        rng = check_generator(rng)
        fan_in = check_integer(self.nnz_budget // self.out_features, "fan_in", least=1)
        shape = (self.out_features, self.in_features)
        connections = Connections.random(shape, fan_in=fan_in, rng=rng)
        packed = np.ones(connections.indices.shape, np.bool_)
        dtype = numpy_dtype(self.values.dtype)
        drawn = sparse_init(packed, "torch_default", rng=rng, dtype=dtype)
        self.load_condensed_(CondensedWeight.from_connections(drawn, connections))
        if self.bias is not None:
            numbers = rng.uniform(-1, 1, self.out_features) / np.sqrt(fan_in)
            with torch.no_grad():
                self.bias.copy_(torch.from_numpy(numbers))

    @classmethod
    def from_condensed(
        cls,
        weight: CondensedWeight,
        bias: Any | None = None,
        *,
        nnz_budget: int | None = None,
        activation: str | None = None,
        device: Any | None = None,
    ) -> CondensedLinear:
        """Return a layer with the connections and values of a condensed weight.

        Parameters
        ----------
        weight : CondensedWeight
        bias : torch.Tensor or array, (n_out,), or None
            Copied.
        nnz_budget : int or None
            Length of `values`; None is the weight's number of values.
        activation : str or None
        device : torch.device or None

        Raises
        ------
        SriglError
            If `weight` has more than `nnz_budget` values, or `bias` has the wrong shape.
        """
        check_condensed(weight)
        n_out, n_in = weight.shape
        budget = weight.nnz if nnz_budget is None else nnz_budget
        budget = _checked_budget(n_in, n_out, budget, None, None, least=weight.nnz)
        dtype = torch_dtype(weight.dtype)
        layer = cls.__new__(cls)
        layer._allocate(weight.shape, budget, False, activation, device, dtype)
        layer.load_condensed_(weight)
        if bias is not None:
            # Read by NumPy, which refuses tensors that are sparse or without numbers.
            is_tensor = isinstance(bias, torch.Tensor)
            numbers = from_numpy(as_float_array(as_numpy(bias) if is_tensor else bias, "bias"))
            if numbers.shape != (n_out,):
                raise SriglError(f"bias has shape {tuple(numbers.shape)}, but must have {(n_out,)}")
            layer.bias = nn.Parameter(numbers.to(device=layer.values.device, copy=True))
        return layer

    @classmethod
    def from_linear(
        cls, linear: Any, mask: Any, *, nnz_budget: int | None = None
    ) -> CondensedLinear:
        """Return a layer with the weights of `linear` where `mask` is True.

        Device, dtype, mode and `requires_grad` are kept; numbers are copied.

        Parameters
        ----------
        linear : torch.nn.Linear
        mask : torch.Tensor or ndarray of bool, (out_features, in_features)
            A constant fan-in mask: each row has the same number of True, or none.
        nnz_budget : int or None
            Length of `values`; None is the mask's number of True.

        Raises
        ------
        SriglError
            If `mask` is not constant fan-in. The message names the rows.
        ValueTypeError
            If `linear` is not a linear layer, or `mask` is not bool.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueTypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        mask = as_numpy(mask) if isinstance(mask, torch.Tensor) else mask
        weight = CondensedWeight.from_dense(as_numpy(linear.weight), mask)
        layer = cls.from_condensed(weight, nnz_budget=nnz_budget, device=linear.weight.device)
        set_like(linear, layer, _copy(linear.bias))
        return layer

    def to_linear(self) -> Any:
        """Return a `torch.nn.Linear` with the masked dense weight and without an activation.

        Device, dtype, mode and `requires_grad` are kept; numbers are copied.
        """
        values = whole(self.values.detach())
        dense = values.new_zeros((self.out_features, self.in_features))
        rows, columns, n_used = self._places()
        dense[rows, columns] = values[:n_used].view(columns.shape)
        return dense_like(self, dense, _copy(self.bias))

    def to_condensed(self) -> CondensedWeight:
        """Return a copy of connections and values in the host's memory.

        If ``fully_shard`` has sharded the values, every rank must call this.
        """
        buffers = self.indices, self.active, self.counts
        return condensed_weight(whole(self.values), *buffers, self.in_features)

    def _connections(self) -> Connections:
        """Return the connections, without the values, which may be sharded."""
        values = torch.zeros(self.values.shape, dtype=self.values.dtype)
        buffers = self.indices, self.active, self.counts
        return condensed_weight(values, *buffers, self.in_features).connections

    def load_condensed_(self, weight: CondensedWeight) -> None:
        """Copy connections and values into the layer's tensors.

        Parameters
        ----------
        weight : CondensedWeight, (out_features, in_features)
            Rounded to the dtype of `values`.

        Raises
        ------
        SriglError
            If its shape differs, or it has more than `nnz_budget` values. The layer is not changed.
        """
        check_condensed(weight)
        if weight.shape != (self.out_features, self.in_features) or weight.nnz > self.nnz_budget:
            raise SriglError(
                f"{weight!r} does not fit a layer of shape {(self.out_features, self.in_features)} "
                f"with room for {self.nnz_budget} values; make a layer with from_condensed"
            )
        parts = (
            (self.values, from_numpy(weight.values.reshape(-1)), 0),
            (self.indices, torch.from_numpy(weight.indices.reshape(-1).astype(np.int32)), 0),
            (self.active, torch.from_numpy(weight.active.astype(np.int32)), -1),
            (self.counts, torch.tensor([weight.n_active, weight.fan_in]), 0),
        )
        with torch.no_grad():
            for tensor, numbers, filler in parts:
                numbers = nn.functional.pad(numbers, (0, len(tensor) - len(numbers)), value=filler)
                tensor.copy_(laid_out(numbers.to(tensor.dtype), tensor))

    @property
    def nnz_budget(self) -> int:
        """Length of `values`, B."""
        return int(self.values.shape[0])

    @property
    def n_active(self) -> int:
        """Number of neurons that are not ablated."""
        return int(self.counts[0])

    @property
    def fan_in(self) -> int:
        """Inputs of each active neuron, k."""
        return int(self.counts[1])

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def mask(self) -> Any:
        """The mask, (out_features, in_features), a new tensor of bool."""
        shape = (self.out_features, self.in_features)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
        rows, columns, _ = self._places()
        mask[rows, columns] = True
        return mask

    def dense_of(self, values: Any) -> Any:
        """Return the masked dense weight of the layer's `values`, all of them."""
        return dense_weight(values, self.indices, self.active, self.counts, self.in_features)

    def _weight_of(self) -> tuple[Any, tuple[int, ...]]:
        return self, (self.out_features, self.in_features)

    def _places(self) -> tuple[Any, Any, int]:
        """Return rows and columns of the connections, for indexing, and their number."""
        n_active, fan_in = self.counts.tolist()
        rows = self.active[:n_active].long()[:, None]
        columns = self.indices[: n_active * fan_in].long().view(n_active, fan_in)
        return rows, columns, n_active * fan_in

    def plan(self) -> Any:
        """Return the plan of the layer's product, for the numbers that it has now."""
        indices, active, counts = (self._buffers[name] for name in ("indices", "active", "counts"))
        return packing_of(self.values, indices, active, counts, self.in_features).plan

    def product(self, x: Any, activation: str) -> Any:
        """Return the product with `x` and an activation, without a gradient."""
        return inference_product(*self._arguments(x), activation)

    def _arguments(self, x: Any) -> tuple[Any, ...]:
        buffers = self._buffers  # faster than attribute access
        return (
            x,
            self.values,
            buffers["indices"],
            buffers["active"],
            buffers["counts"],
            self.bias,
            self.in_features,
        )

    def forward(self, x: Any) -> Any:
        """Return the product with `x`, (..., in_features), as (..., out_features)."""
        activation = self.activation or "none"
        if torch.is_grad_enabled():
            return ACTIVATION_FUNCTIONS[activation](condensed_product(*self._arguments(x)))
        return self.product(x, activation)

    def extra_repr(self) -> str:
        """Return sizes, activation and whether there is a bias."""
        names = ["in_features", "out_features"]
        names += [] if self.counts.is_meta else ["fan_in", "n_active"]
        sizes = [f"{name}={getattr(self, name)}" for name in [*names, "nnz_budget"]]
        activation = [] if self.activation is None else [f"activation={self.activation}"]
        return ", ".join([*sizes, f"bias={self.bias is not None}", *activation])

    def _replicate_for_data_parallel(self) -> Any:
        if torch.is_grad_enabled() and is_capturing(self.indices):
            raise SriglError(
                "a mask update needs the layer's inputs and gradients, but does not see those of "
                "replicas; use DistributedDataParallel in place of DataParallel, or train masked"
            )
        return super()._replicate_for_data_parallel()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_state(self, state: Any, prefix: str) -> None:
        """Raise SriglError if the layer would have no valid mask after loading `state`."""
        if prefix + "weight" in state and prefix + "values" not in state:
            raise SriglError(
                f"{prefix}weight of the state is a dense weight, but the layer is condensed; load "
                f"it into the dense model first, then condense that"
            )
        tensors: dict[str, Any] = {}
        for name, own in {**self._parameters, **self._buffers}.items():
            new = tensors[name] = state.get(prefix + name, own)
            if new is not None and own is not None and new.shape != own.shape:
                raise SriglError(
                    f"{prefix + name} of the state has shape {tuple(new.shape)}, but the layer's "
                    f"has {tuple(own.shape)}; make the layer with the same features and nnz_budget"
                )
        del tensors["bias"]
        if any(tensor.is_meta for tensor in tensors.values()):
            return
        if is_sharded(tensors["values"]):  # any values are valid
            tensors["values"] = torch.zeros(self.values.shape, dtype=self.values.dtype)
        try:
            condensed_weight(**tensors, n_in=self.in_features)
        except SriglError as error:
            raise SriglError(f"the state has no valid mask, {prefix}{error}") from error


def weight_of(layer: Any) -> Any:
    """Return the weight parameter of a condensed or a dense linear layer."""
    return layer.values if isinstance(layer, CondensedLinear) else layer.weight


def set_like(source: Any, layer: Any, bias: Any | None) -> Any:
    """Set the bias of a new linear layer, and its mode and `requires_grad` to those of `source`."""
    weight_of(layer).requires_grad_(weight_of(source).requires_grad)
    if bias is not None:
        trained = weight_of(source) if source.bias is None else source.bias
        layer.bias = nn.Parameter(bias, requires_grad=trained.requires_grad)
    return layer.train(source.training)


def dense_like(source: Any, weight: Any, bias: Any | None) -> Any:
    """Return an ``nn.Linear`` with mode and `requires_grad` of `source`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return set_like(source, linear, bias)


def _copy(bias: Any | None) -> Any | None:
    return None if bias is None else bias.detach().clone()


def _checked_budget(
    n_in: int,
    n_out: int,
    nnz_budget: int | None,
    sparsity: float | None,
    fan_in: int | None,
    *,
    least: int | None = None,
) -> int:
    """Check sizes and budgets, and return the number of values, at least `least` or `n_out`."""
    check_integer(n_in, "in_features", least=1, most=_MOST)
    check_integer(n_out, "out_features", least=1, most=_MOST)
    if (nnz_budget is not None) + (sparsity is not None) + (fan_in is not None) != 1:
        raise SriglError(
            f"nnz_budget={nnz_budget!r}, sparsity={sparsity!r} and fan_in={fan_in!r}: exactly one "
            f"of them must be set"
        )
    if fan_in is not None:
        return n_out * check_integer(fan_in, "fan_in", least=1, most=n_in)
    if sparsity is not None:
        nnz_budget = budget_of(n_in * n_out, sparsity)
    least = n_out if least is None else least
    return check_integer(nnz_budget, "nnz_budget", least=least, most=n_in * n_out)
