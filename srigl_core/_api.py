"""The public functions: choose the backend, check the arguments, call it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from srigl_core._arrays.libraries import common_library, device_of
from srigl_core._arrays.operations import HOST_ARRAYS
from srigl_core._format.weight import CondensedWeight, QuantizedWeight, check_condensed
from srigl_core._plan import plan_of
from srigl_core._product_plan import ProductPlan
from srigl_core._product_spec import checked_threads
from srigl_core._registry import check_dtype, get_backend
from srigl_core._update import (
    CondensedUpdate,
    GradientRows,
    MaskUpdate,
    UpdateSettings,
    checked_condensed_update,
    checked_update,
)
from srigl_core.contract import Backend, MatmulGradients

__all__ = [
    "apply_update",
    "condensed_matmul",
    "condensed_matmul_backward",
    "update_condensed",
    "update_mask",
]

Array = TypeVar("Array")

_BLOCK_NUMBERS = 1 << 18
"""Numbers in a block of gradient rows, if the caller asks for no other size."""


def condensed_matmul(
    x: Array,
    weight: CondensedWeight | QuantizedWeight,
    bias: Any | None = None,
    *,
    activation: str | None = None,
    compact: bool = False,
    out: Any | None = None,
    inputs: str = "float",
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> Array:
    """Return ``act(x @ (W*M).T + bias)`` computed from the connected inputs only.

    Parameters
    ----------
    x : array, (..., n_in)
        float16, bfloat16, float32 or float64, any strides: a NumPy, PyTorch, JAX or CuPy array, or
        an object with ``__dlpack__``, ``__array_interface__`` or ``__cuda_array_interface__``. It
        is not copied, and never written.
    weight : CondensedWeight or QuantizedWeight, (n_out, n_in)
    bias : array, (n_out,), or None
        Of the same library and on the same device as `x`. Cast to the result's dtype, or to float32
        if the inputs are quantised.
    activation : str or None
        One of `srigl_core.contract.ACTIVATIONS`: "none", "relu", "gelu" (the erf form),
        "gelu_tanh" or "silu". None is "none".
    compact : bool
        Return the columns of active neurons only, for inference. Otherwise an ablated neuron
        outputs ``act(bias)``.
    out : array, (..., n_out) or (..., n_active), or None
        Array to write the result to, of any value type and of the library of `x`. It must not
        share memory with an input. JAX arrays are read-only and cannot be `out`.
    inputs : {"float", "int8"}
        With "float" the inputs stay as they are. With "int8", of a quantised weight only, each row
        of `x` is quantised too.
    backend : str, Backend or None
        As in `get_backend`.
    threads : int or None
        The most threads to use; None is the backend's default. Never changes the result.

    Returns
    -------
    array, (..., n_out), or (..., n_active) if `compact`
        `out`, or a new array of dtype ``numpy.result_type(x, values)``, where the values of a
        quantised weight count as float32. It is of the library and on the device of `x`, and
        carries no gradient: use `srigl_core.torch` and `srigl_core.jax` for autograd and tracing.
        For any other object that exports its memory, such as a TensorFlow
        tensor, the result is a NumPy array, or a CuPy array on a CUDA device;
        ``tf.experimental.dlpack.from_dlpack(y.__dlpack__())`` imports it without a copy.

    Raises
    ------
    SriglError
        If a shape does not fit, `activation` is unknown, `out` cannot be written, `inputs` does not
        fit the weight, or the backend that was named does not offer the product.
    ValueTypeError
        If a dtype is not supported, float16 meets bfloat16, arrays are of several libraries or on
        several devices, or one holds no numbers (tracers, fake and meta tensors).
    BackendUnavailableError
        If the backend that was named cannot run here.

    Notes
    -----
    SPEC 2; the paper's condensed layer, sec. 4.4; SPEC 6 for quantised weights. Sums of
    floating-point terms are kept in float32, or in float64 where either input is float64, and are
    rounded once. The weight keeps the plan of each backend that
    it was used with. Cost O(batch * n_active * k).

    Examples
    --------
    >>> import numpy as np
    >>> weight = CondensedWeight(np.array([[2.0]]), [[1]], active=[0], shape=(2, 3))
    >>> condensed_matmul(np.array([[1.0, 10.0, 100.0]]), weight, np.array([0.5, 0.25]))
    array([[20.5 ,  0.25]])
    """
    operation = "quantized_matmul"
    if not isinstance(weight, QuantizedWeight):
        check_condensed(weight)
        operation = "condensed_matmul"
    device = device_of(x)
    if backend is not None or device != "cpu":  # plan_of finds the usual one faster
        backend = get_backend(backend, operation=operation, device=device, inputs=inputs)
    plan: ProductPlan = plan_of(weight, backend, inputs)
    return plan(x, bias, activation=activation, compact=compact, out=out, threads=threads)


def condensed_matmul_backward(
    grad: Any,
    x: Any | None,
    weight: CondensedWeight,
    *,
    wrt: Iterable[str] = ("x", "values", "bias"),
    out: MatmulGradients | None = None,
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> MatmulGradients:
    """Return the gradients of the product before the activation.

    Parameters
    ----------
    grad : array, (..., n_out)
        dL/dz, for the full (not the compact) output.
    x : array, (..., n_in), or None
        The forward pass's input; needed for "values".
    weight : CondensedWeight, (n_out, n_in)
    wrt : iterable of {"x", "values", "bias"}
        The gradients to compute.
    out : MatmulGradients or None
        Arrays to write to, of any value type; where one is None a new array is made.
    backend, threads
        As in `condensed_matmul`.

    Returns
    -------
    MatmulGradients
        Arrays of the library and on the device of `grad`. ``x`` has dtype
        ``result_type(grad, values)``; ``values`` and ``bias`` have the widest dtype that takes
        part, at least float32. Gradients that are not in `wrt` are None.

    Raises
    ------
    SriglError
        If a shape does not fit, or `out` cannot be written.
    ValueTypeError
        If a dtype is not supported.
    BackendUnavailableError
        If the backend that was named cannot run here.

    Notes
    -----
    SPEC 2, Backward: a NaN in `grad` at an ablated neuron, or in `x` at an unconnected column,
    reaches neither dx nor dvalues. Cost O(batch * n_active * k).
    """
    check_condensed(weight)
    chosen = get_backend(backend, operation="condensed_matmul_backward", device=device_of(grad))
    return plan_of(weight, chosen).backward(grad, x, wrt=wrt, out=out, threads=threads)


def update_mask(
    weight: Any,
    grad: Any,
    mask: Any,
    *,
    nnz_budget: int,
    drop_fraction: float,
    gamma_sal: float | None = 0.3,
    min_salient: int | None = None,
    saliency_scope: str = "inactive",
    grown_init: float = 0.0,
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> MaskUpdate:
    """Return the SRigL update of one layer's mask.

    Parameters
    ----------
    weight : array, (n_out, n_in) or (out, in, kh, kw)
        The dense weight after the optimiser's step, of any value type.
    grad : array, same shape
        The dense gradient G of that step, the mean over the window.
    mask : array of bool, same shape
        All three arrays must be of one library and on one device.
    nnz_budget, drop_fraction, gamma_sal, min_salient, saliency_scope, grown_init
        As in `UpdateSettings`.
    backend : str, Backend or None
        As in `get_backend`; all give the same bits.
    threads : int or None
        The most threads to use; never changes the result.

    Returns
    -------
    MaskUpdate
        New arrays. Mask and weight have the weight's shape, library and device; arrays of row
        numbers and counts are NumPy arrays.

    Raises
    ------
    SriglError
        If a setting is out of range, shapes differ, a number that counts is not finite, or the
        budget leaves the active neurons no weight. Nothing is changed.
    BackendUnavailableError
        If the backend that was named cannot run here.

    Notes
    -----
    SPEC 4; the paper, sec. 3. Ties go to the lowest flat index.
    """
    settings = UpdateSettings(
        nnz_budget,
        drop_fraction,
        gamma_sal=gamma_sal,
        min_salient=min_salient,
        saliency_scope=saliency_scope,
        grown_init=grown_init,
    )
    return apply_update(weight, grad, mask, settings, backend=backend, threads=threads)


def apply_update(
    weight: Any,
    grad: Any,
    mask: Any,
    settings: UpdateSettings,
    *,
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> MaskUpdate:
    """Return the SRigL update of one layer's mask, with its settings in one object.

    Arguments, result and errors are those of `update_mask`.
    """
    chosen = get_backend(backend, operation="update_mask", device=device_of(weight))
    threads = checked_threads(threads)
    common_library({"weight": weight, "grad": grad, "mask": mask})
    arrays = getattr(chosen, "arrays", HOST_ARRAYS)

    def algorithm(weight: Any, grad: Any, *others: Any, **options: Any) -> MaskUpdate:
        check_dtype(chosen, "input", "weight", arrays.dtype(weight))
        check_dtype(chosen, "input", "grad", arrays.dtype(grad))
        return chosen.update_mask(weight, grad, *others, **options)

    return checked_update(
        algorithm,
        weight,
        grad,
        mask,
        settings,
        arrays=arrays,
        finite=not chosen.capabilities.checks_finite,
        threads=threads,
    )


def update_condensed(
    weight: CondensedWeight,
    gradient_rows: GradientRows,
    settings: UpdateSettings,
    *,
    block_rows: int | None = None,
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> CondensedUpdate:
    """Return the SRigL update of one condensed layer: no dense array is ever made.

    Parameters
    ----------
    weight, gradient_rows, settings
        As in `srigl_core.reference.update_condensed`, the definition.
    block_rows : int or None
        Rows in a block; None is about 2^18 numbers. Never changes the result.
    backend : str, Backend or None
        As in `get_backend`; all give the same bits.
    threads : int or None
        The most threads to use; never changes the result.

    Returns
    -------
    CondensedUpdate

    Raises
    ------
    SriglError
        As in `srigl_core.reference.update_condensed`.
    BackendUnavailableError
        If the backend that was named cannot run here.
    """
    chosen: Any = get_backend(backend, operation="update_condensed")
    check_condensed(weight)
    check_dtype(chosen, "value", "values", weight.dtype)
    check_dtype(chosen, "index", "indices", weight.indices.dtype)
    return checked_condensed_update(
        chosen.update_condensed,
        weight,
        gradient_rows,
        settings,
        block_rows=max(1, _BLOCK_NUMBERS // weight.shape[1]) if block_rows is None else block_rows,
        threads=checked_threads(threads),
    )
