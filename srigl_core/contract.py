"""The contract of a backend: the two protocols it implements and the capabilities it declares.

A backend never validates. Its arguments have passed the argument validation of the public
functions and plans, so arrays have the shapes, dtypes and memory order stated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import ArrayLike, NDArray

from srigl_core._activations import ACTIVATIONS, Activation
from srigl_core._arrays.dtypes import VALUE_TYPES, accumulator_dtype, round_to
from srigl_core._arrays.operations import ArrayOps
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._product_spec import QUANTIZED_INPUTS
from srigl_core._update import CondensedUpdate, MaskUpdate, UpdateSettings

__all__ = [
    "ACTIVATIONS",
    "OPERATIONS",
    "QUANTIZED_INPUTS",
    "Activation",
    "ArrayOps",
    "Backend",
    "Capabilities",
    "ChainLayer",
    "ChainPreparer",
    "CondensedUpdater",
    "MatmulGradients",
    "PreparedProduct",
    "PreparedWeight",
    "QuantizedPreparer",
    "accumulator_dtype",
    "round_to",
]

OPERATIONS = (
    "condensed_matmul",
    "condensed_matmul_backward",
    "update_mask",
    "update_condensed",
    "quantized_matmul",
    "chain",
)
"""Operations that a backend may declare. Chains work without "chain", by a call for each layer."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Parameters
    ----------
    device : str
        The device of its arrays: "cpu" or "cuda".
    operations : frozenset of str
        The operations that it implements, of `OPERATIONS`; by default the first three.
    value_dtypes : frozenset of str
        The dtypes that it takes for the values of a weight.
    input_dtypes : frozenset of str
        The dtypes that it takes for inputs, gradients, dense weights and results.
    index_dtypes : frozenset of str
        The dtypes that it takes for indices, of "uint16" and "uint32".
    quantized_inputs : frozenset[str]
        Of the operation "quantized_matmul", the products that it computes, of `QUANTIZED_INPUTS`:
        "float" with inputs as they are, "int8" with quantised inputs.
    priority : int
        Where no backend is named, the one of highest priority that can run is used.
    checks_finite : bool
        Whether `update_mask` itself raises SriglError for numbers that are not finite, in place of
        `ArrayOps.count_nonfinite` before it.
    largest_problem : int
        How large the problems of `srigl_core.testing` may be, in numbers read and written: a slow
        kernel takes less. The report says which sizes it leaves out.
    """

    device: str = "cpu"
    operations: frozenset[str] = frozenset(OPERATIONS[:3])
    value_dtypes: frozenset[str] = frozenset(VALUE_TYPES)
    input_dtypes: frozenset[str] = frozenset(VALUE_TYPES)
    index_dtypes: frozenset[str] = frozenset({"uint16", "uint32"})
    quantized_inputs: frozenset[str] = frozenset(QUANTIZED_INPUTS)
    priority: int = 0
    checks_finite: bool = False
    largest_problem: int = 5_000_000


@dataclass(frozen=True, eq=False)
class MatmulGradients:
    """Gradients of a condensed matmul; None for those that are not asked for.

    Parameters
    ----------
    x : ndarray or None
        dL/dx, `(..., n_in)`.
    values : ndarray or None
        dL/dvalues, `(n_active, k)`.
    bias : ndarray or None
        dL/dbias, `(n_out,)`.
    """

    x: NDArray[Any] | None = None
    values: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None


class PreparedProduct(Protocol):
    """A weight in a backend's own layout; immutable, and safe to share among threads.

    Some methods are optional:

    - ``matmul_fast(x, bias, code, out, threads)`` is the fast path. It writes the product of
      C-ordered, aligned NumPy arrays that all have the accumulator's dtype: `x` (n_in,) or
      (batch, n_in), `bias` (n_out,) or None, and `out` (n_out,) or (batch, n_out) with batch >= 1.
      `code` is the activation's. It is called outside of `ArrayOps.execution_context`, so it must
      honour subnormals itself.
    - ``nanoseconds(batch)`` estimates the single-threaded time of a product.
    - ``workspace_bytes(batch, dtype)`` returns the size of a `workspace` that suffices for inputs
      of that dtype in C order. With this method, `matmul` and `backward` take an argument
      ``workspace``: an array of uint8 to use during the call, or None.
    - ``warm(batch, dtype)`` makes all that products and gradients of that many rows need.
    - ``with_device_values(values)`` returns this layout for the numbers that an array of the
      backend, with at least nnz elements, has at each call.
    """

    def describe(self) -> Mapping[str, object]:
        """Describe the layout; at least the keys "kernel", "layout" and "bytes"."""
        ...

    def matmul(
        self,
        x: NDArray[Any],
        bias: NDArray[Any] | None,
        *,
        activation: str,
        compact: bool,
        out: NDArray[Any],
        threads: int | None,
    ) -> None:
        """Write act(x @ (W*M).T + bias) to `out` (SPEC 2, and SPEC 6 for quantised weights).

        Parameters
        ----------
        x : ndarray, (batch, n_in), batch >= 1
            Any of the input dtypes, any strides; must not be written.
        bias : ndarray, (n_out,), or None
            Of dtype result_type(x, values), where values of a quantised weight count as float32;
            of float32 if the inputs are quantised too.
        activation : str
            One of `ACTIVATIONS`.
        compact : bool
            Whether to leave out the columns of ablated neurons.
        out : ndarray, (batch, n_active if compact else n_out)
            Any of the input dtypes, any strides; shares no memory with the inputs. Write every
            element, rounded once from the accumulator.
        threads : int or None
            The most threads to use; None is the backend's default. Never changes a bit of `out`.
        """
        ...


class PreparedWeight(PreparedProduct, Protocol):
    """A condensed weight in a backend's own layout."""

    def backward(
        self,
        grad: NDArray[Any],
        x: NDArray[Any] | None,
        *,
        out: MatmulGradients,
        threads: int | None,
    ) -> None:
        """Write the gradients for which `out` has arrays (SPEC 2, Backward).

        Parameters
        ----------
        grad : ndarray, (batch, n_out), batch >= 1
            dL/dz, any input dtype, any strides.
        x : ndarray, (batch, n_in), or None
            The input of the forward pass; None if `out.values` is None.
        out : MatmulGradients
            Arrays of any input dtype and any strides; `x` is `(batch, n_in)`.
        threads : int or None
            As in `matmul`.
        """
        ...

    def with_values(self, weight: CondensedWeight) -> PreparedWeight:
        """Return this layout for a weight on the same connections."""
        ...


class Backend(Protocol):
    """A set of kernels; registered in the entry-point group ``srigl_core.backends``.

    The methods of operations that a backend does not declare are never called, and may be missing.

    The entry point names a class, or another callable without arguments, that returns a backend.
    Where the backend cannot run, the call or the import of the module raises
    `BackendUnavailableError`, whose message says what is missing and what to install. A backend
    whose arrays are not NumPy arrays has an attribute ``arrays``, an `ArrayOps`.

    An optional method ``runtime_info()`` returns a dict of facts for ``srigl info``. The entry
    "threads" is the number of threads that a call may have.
    """

    name: str
    capabilities: Capabilities

    def prepare(self, weight: CondensedWeight) -> PreparedWeight:
        """Return `weight` in this backend's layout."""
        ...

    def update_mask(
        self,
        weight: NDArray[Any],
        grad: NDArray[Any],
        mask: NDArray[Any],
        settings: UpdateSettings,
        *,
        threads: int | None,
    ) -> MaskUpdate:
        """Return the mask update of SPEC 4, bit for bit that of the reference.

        Parameters
        ----------
        weight, grad : ndarray, (n_out, n_in), C order
            Any of the input dtypes; `grad` is finite, and so is `weight` where `mask` is True,
            unless the capabilities declare `checks_finite`.
        mask : ndarray of bool, (n_out, n_in), C order
        settings : UpdateSettings
        threads : int or None
            As in `PreparedWeight.matmul`.
        """
        ...


class QuantizedPreparer(Protocol):
    """The method of a backend that declares the operation "quantized_matmul"."""

    def prepare_quantized(self, weight: QuantizedWeight, inputs: str) -> PreparedProduct:
        """Return a quantised weight in this backend's layout.

        Parameters
        ----------
        weight : QuantizedWeight
            With "int8", the fan-in is at most 133,144, so that sums fit int32.
        inputs : {"float", "int8"}
            One of the backend's `Capabilities.quantized_inputs`: the product to lay it out for.
        """
        ...


@dataclass(frozen=True, eq=False)
class ChainLayer:
    """A layer of a chain, as a backend receives it.

    Parameters
    ----------
    prepared : PreparedProduct
        What the backend made of the weight.
    bias : ndarray, (n_out,), or None
        In C order, of the dtype that all layers of the chain sum.
    code : int
        The activation's.
    """

    prepared: PreparedProduct
    bias: NDArray[Any] | None
    code: int


class ChainPreparer(Protocol):
    """The method of a backend that declares the operation "chain" (SPEC 7)."""

    def chain(self, layers: Sequence[ChainLayer]) -> Callable[..., None] | None:
        """Return the `matmul_fast` of a chain, or None to have it computed layer by layer.

        Parameters
        ----------
        layers : sequence of ChainLayer
            One or more, each with as many inputs as the one before has neurons. All sum one dtype.

        Returns
        -------
        callable or None
            Called as ``matmul_fast(x, None, 0, out, threads)`` with arrays as `PreparedProduct`
            describes them, from several threads at once. It writes the bits that the layers' own
            kernels give one after the other, for that batch.
        """
        ...


class CondensedUpdater(Protocol):
    """The method of a backend that declares the operation "update_condensed"."""

    def update_condensed(
        self,
        weight: CondensedWeight,
        gradient_rows: Callable[[int, int], ArrayLike],
        settings: UpdateSettings,
        *,
        block_rows: int,
        threads: int | None,
    ) -> CondensedUpdate:
        """Return the mask update of a condensed layer, bit for bit that of the reference.

        Parameters
        ----------
        weight : CondensedWeight
            Finite.
        gradient_rows : callable of two ints
            ``gradient_rows(start, stop)`` returns these rows of the dense gradient as a checked
            array of float32 or float64. Call it for consecutive blocks of at most `block_rows`
            rows; a second pass over all blocks returns the same numbers.
        settings : UpdateSettings
        block_rows : int
        threads : int or None
            As in `PreparedWeight.matmul`.
        """
        ...
