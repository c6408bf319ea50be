"""Products with a packed weight: arguments are checked once, and the backend is called."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from srigl_core._arrays.checks import check_flag, check_integer
from srigl_core._arrays.dtypes import accumulator_dtype, result_dtype, value_dtype
from srigl_core._arrays.libraries import common_library
from srigl_core._arrays.operations import HOST_ARRAYS, ArrayOps
from srigl_core._cost_model import compared, dense_nanoseconds
from srigl_core._fast_path import PLAIN, FastPath
from srigl_core._format.packed_weight import PackedWeight
from srigl_core._product_spec import ArraySpec, bias_dtype, checked_threads, product_spec
from srigl_core._registry import check_dtype, get_backend
from srigl_core.contract import ACTIVATIONS, Backend, PreparedProduct
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["BoundToProcess", "ProductPlan", "merged_rows"]

Array = TypeVar("Array")

_BATCHES_DESCRIBED = (1, 2, 4, 8, 16, 64, 256)


class BoundToProcess:
    """Base class of plans: immutable, so that a copy is the plan itself, and not pickled."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        raise ValueTypeError("a plan belongs to its process; pickle its weight, and prepare that")


@dataclass(frozen=True, eq=False, repr=False)
class ProductPlan(FastPath, BoundToProcess):
    """A packed weight laid out for one backend; immutable, callable and printable.

    Made by `prepare`. One plan may be called from many threads at once.

    Attributes
    ----------
    weight : PackedWeight
    backend : Backend
    threads : int or None
    inputs : {"float", "int8"}
        Whether the product takes inputs as they are, or quantises them.
    arrays : ArrayOps
        The backend's array operations.
    """

    operation: ClassVar[str] = "condensed_matmul"
    """The operation that the backend must offer."""

    weight: PackedWeight
    backend: Backend
    _prepared: PreparedProduct
    threads: int | None
    inputs: str = "float"
    arrays: ArrayOps = field(init=False)
    _matmul_fast: Callable[..., None] | None = field(init=False)
    _usual: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        weight = self.weight
        can_multiply = self.operation in self.backend.capabilities.operations
        fast = getattr(self._prepared, "matmul_fast", None) if can_multiply else None
        dtype = accumulator_dtype(weight.float_dtype)
        usual = (dtype, *weight.shape, weight.n_active == weight.shape[0])
        object.__setattr__(self, "arrays", getattr(self.backend, "arrays", HOST_ARRAYS))
        object.__setattr__(self, "_matmul_fast", fast)
        object.__setattr__(self, "_usual", usual)

    def __call__(
        self,
        x: Array,
        bias: Any | None = None,
        *,
        activation: str | None = None,
        compact: bool = False,
        out: Any | None = None,
        threads: int | None = None,
        workspace: Any | None = None,
    ) -> Array:
        """Return the product; arguments and errors are those of `srigl_core.condensed_matmul`.

        Parameters
        ----------
        x : array, (..., n_in)
        bias : array, (n_out,), or None
        activation : str or None
            One of `srigl_core.contract.ACTIVATIONS`.
        compact : bool
        out : array, (..., n_out) or (..., n_active), or None
        threads : int or None
            Overrides the plan's.
        workspace : array of uint8, (at least `workspace_bytes`,), or None
            Memory for a GPU backend to use during the call; None allocates from a pool.

        Returns
        -------
        array, (..., n_out), or (..., n_active) if `compact`
            An array of the library of `x`.
        """
        threads = self.threads if threads is None else checked_threads(threads)
        if workspace is None:
            product: Array | None = self.fast_product(x, bias, activation, compact, threads, out)
            if product is not None:
                return product
        with self.arrays.execution_context(x):
            result: Array = self._multiply(x, bias, activation, compact, out, threads, workspace)
            return result

    def _multiply(
        self,
        x: Any,
        bias: Any | None,
        activation: str | None,
        compact: bool,
        out: Any | None,
        threads: int | None,
        workspace: Any | None,
    ) -> Any:
        weight, arrays, like = self.weight, self.arrays, x
        compact = check_flag(compact, "compact")
        if self.operation not in self.backend.capabilities.operations:
            get_backend(self.backend, operation=self.operation)
        library = common_library({"x": x, "bias": bias, "out": out})
        x = arrays.as_float_array(x, "x")
        if bias is not None:
            bias = arrays.as_float_array(bias, "bias")
        spec = product_spec(
            self._input_spec(x, "x"),
            weight.shape,
            weight.float_dtype,
            bias_shape=None if bias is None else bias.shape,
            activation=activation,
            n_columns=weight.n_active if compact else None,
            inputs=self.inputs,
        )
        inputs = {"x": x} if bias is None else {"x": x, "bias": bias}
        result = self._result_array(out, spec.shape, spec.dtype, inputs)
        options = self._workspace(workspace, {**inputs, "out": result})
        if math.prod(spec.shape):
            flat = merged_rows(result)
            self._prepared.matmul(
                merged_rows(x),
                None if bias is None else arrays.round_to(bias, spec.bias_dtype),
                activation=spec.activation.name,
                compact=compact,
                out=flat,
                threads=threads,
                **options,
            )
            self._copy_back(result, flat)
        if out is None:
            return arrays.to_caller(result, like)
        library.written(out)
        return out

    def write_product(
        self,
        x: Any,
        bias: Any | None,
        *,
        activation: str,
        out: Any,
        threads: int | None,
        values: Any | None = None,
    ) -> None:
        """Write a product of checked two-dimensional arrays to `out`, for framework operators.

        Parameters
        ----------
        x : array of the backend, (batch, n_in), batch >= 1
        bias : array of the backend, (n_out,), or None
        activation : str
        out : array of the backend, (batch, n_out)
            Of any value type. Shares no memory with the inputs.
        threads : int or None
        values : array of the backend, (at least nnz,), or None
            Numbers in place of the weight's, if `takes_device_values`.
        """
        dtype = self._usual[0]
        if self._matmul_fast is not None and all(
            array.dtype is dtype and array.flags.num & PLAIN == PLAIN
            for array in ((x, out) if bias is None else (x, out, bias))
        ):
            self._matmul_fast(x, bias, ACTIVATIONS[activation].code, out, threads)
            return
        arrays = self.arrays
        with arrays.execution_context(x):
            if bias is not None:
                product = result_dtype(arrays.dtype(x), self.weight.float_dtype)
                bias = arrays.round_to(bias, bias_dtype(product, self.inputs))
            self._prepared_with(values).matmul(
                x, bias, activation=activation, compact=False, out=out, threads=threads
            )

    @property
    def takes_device_values(self) -> bool:
        """Whether products can read values from the caller's memory, at each call anew."""
        return hasattr(self._prepared, "with_device_values")

    def _prepared_with(self, values: Any | None) -> Any:
        prepared: Any = self._prepared
        return prepared if values is None else prepared.with_device_values(values)

    def warm(self, batches: Iterable[int] | int, dtypes: Iterable[DTypeLike] | None = None) -> None:
        """Make all that products and gradients of some batches need, before the first call.

        Without it the first call makes what it needs. While a CUDA graph is captured nothing can be
        made, so a plan that is called there must have been called or warmed before.

        Parameters
        ----------
        batches : iterable of int, or int
            Numbers of rows of x.
        dtypes : iterable of dtypes, or None
            Of x, the gradient and the results; None is the weight's.

        Raises
        ------
        SriglError
            If a batch is not a positive integer.
        ValueTypeError
            If a dtype is not a value type.
        """
        batches = [batches] if isinstance(batches, int) else batches
        batches = [check_integer(batch, "batch", least=1) for batch in batches]
        given = [self.weight.float_dtype] if dtypes is None else dtypes
        types = [value_dtype(dtype, "dtype") for dtype in given]
        warm: Any = getattr(self._prepared, "warm", None)
        for batch, dtype in itertools.product(batches, types):
            if warm is not None:
                warm(batch, dtype)

    def workspace_bytes(self, batch: int, dtype: DTypeLike | None = None) -> int:
        """Return the size of a `workspace` that suffices for inputs in C order, in bytes.

        Parameters
        ----------
        batch : int
            Rows of x, at most.
        dtype : dtype or None
            Of x, the gradient and the results; None is the weight's.

        Returns
        -------
        int
            0 for a backend that takes no workspace.
        """
        count = getattr(self._prepared, "workspace_bytes", None)
        batch = check_integer(batch, "batch", least=0)
        dtype = value_dtype(self.weight.float_dtype if dtype is None else dtype, "dtype")
        return 0 if count is None or not batch else int(count(batch, dtype))

    def describe(self) -> dict[str, object]:
        """Describe the backend, the kernel, the layout and its bytes, in a new dict.

        A backend with a model of its speed adds estimates of the speed-up over dense products, in
        the weight's numbers and in int8, and says where one of them is faster.
        """
        facts = {
            "backend": self.backend.name,
            "threads": "backend's default" if self.threads is None else self.threads,
            **self._prepared.describe(),
        }
        for batch in _BATCHES_DESCRIBED:
            ours = self.nanoseconds(batch)
            if ours is not None:
                dense = dense_nanoseconds(self.weight, batch)
                facts[f"estimate at batch {batch}"] = compared(ours, dense)
        return facts

    def nanoseconds(self, batch: int) -> float | None:
        """Estimate the single-threaded time of a product; None if the backend has no model.

        Parameters
        ----------
        batch : int
            Rows of x.
        """
        estimate = getattr(self._prepared, "nanoseconds", None)
        return None if estimate is None else float(estimate(batch))

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self.describe().items())
        return f"{type(self).__name__}({self.weight!r}, {facts})"

    def _input_spec(self, array: Any, what: str) -> ArraySpec:
        dtype = self.arrays.dtype(array)
        check_dtype(self.backend, "input", what, dtype)
        return ArraySpec(tuple(array.shape), dtype)

    def _result_array(
        self, out: object, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: dict[str, Any]
    ) -> Any:
        if out is None:
            return self.arrays.empty(shape, dtype)
        return self.arrays.as_out(out, shape, inputs)

    def _copy_back(self, array: Any, flat: Any) -> None:
        if flat is not array and not self.arrays.share_memory(array, flat):
            self.arrays.assign(array, flat.reshape(array.shape))

    def _workspace(self, workspace: Any | None, others: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword argument for the caller's workspace, if there is one."""
        if workspace is None:
            return {}
        if not hasattr(self._prepared, "workspace_bytes"):
            raise SriglError(f"backend {self.backend.name!r} takes no workspace; leave it out")
        return {"workspace": self.arrays.as_workspace(workspace, others)}


def merged_rows(array: Any) -> Any:
    """Merge the leading axes: a view of `array`, or a copy where its strides forbid a view."""
    return array if array.ndim == 2 else array.reshape(-1, array.shape[-1])
