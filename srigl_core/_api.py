"""The public functions: find the backend, check the arguments, call it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from srigl_core._arrays.libraries import common_library, device_of
from srigl_core._arrays.operations import HOST_ARRAYS
from srigl_core._format.weight import CondensedWeight
from srigl_core._plan import check_condensed, checked_threads
from srigl_core._registry import check_dtype, get_backend
from srigl_core._update import MaskUpdate, UpdateSettings, checked_update
from srigl_core.contract import Backend, MatmulGradients

__all__ = ["condensed_matmul", "condensed_matmul_backward", "update_mask"]

Array = TypeVar("Array")


def condensed_matmul(
    x: Array,
    weight: CondensedWeight,
    bias: Any | None = None,
    *,
    activation: str | None = None,
    compact: bool = False,
    out: Any | None = None,
    backend: str | Backend | None = None,
    threads: int | None = None,
) -> Array:
    """Return ``act(x @ (W*M).T + bias)`` computed from the connected inputs only.

    Parameters
    ----------
    x : array, (..., n_in)
        float16, bfloat16, float32 or float64, any strides; NumPy's, PyTorch's, JAX's or CuPy's, or
        an object with ``__dlpack__``, ``__array_interface__`` or ``__cuda_array_interface__``.
        Read where it lies, and never written.
    weight : CondensedWeight, (n_out, n_in)
    bias : array, (n_out,), or None
        Of the same library and on the same device as `x`. Cast to the result's dtype.
    activation : {None, "none", "relu", "gelu", "gelu_tanh", "silu"}
        "gelu" is the erf form.
    compact : bool
        Return the columns of active neurons only, for inference. Otherwise an ablated neuron
        outputs ``act(bias)``.
    out : array, (..., n_out) or (..., n_active), or None
        Where to write, of any value type; must not share memory with an input. Of the same library
        as `x`. JAX arrays are read-only and cannot be `out`.
    backend : str, Backend or None
        As in `get_backend`.
    threads : int or None
        Threads to use at most; None is the backend's default. Never changes the result.

    Returns
    -------
    array, (..., n_out), or (..., n_active) if `compact`
        `out`, or a new array of dtype ``numpy.result_type(x, values)``, of the library and on the
        device that `x` is of. It carries no gradient: autograd and tracing are for
        `srigl_core.torch` and `srigl_core.jax`. For any other object that exports its memory,
        such as a TensorFlow tensor, the result is a NumPy array, or a CuPy array on a CUDA device;
        ``tf.experimental.dlpack.from_dlpack(y.__dlpack__())`` imports it without a copy.

    Raises
    ------
    SriglError
        If a shape does not fit, `activation` is unknown, or `out` cannot be written.
    ValueTypeError
        If a dtype is not supported, float16 meets bfloat16, arrays are of several libraries or on
        several devices, or one holds no numbers (tracers, fake and meta tensors).
    BackendUnavailableError
        If the backend asked for cannot run here.

    Notes
    -----
    SPEC 2: sums are kept in float32, in float64 where either input is float64, and rounded once.
    The weight keeps the plan of each backend it was used with. Cost O(batch * n_active * k). The
    paper's condensed layer, sec. 4.4.

    Examples
    --------
    >>> import numpy as np
    >>> weight = CondensedWeight(np.array([[2.0]]), [[1]], active=[0], shape=(2, 3))
    >>> condensed_matmul(np.array([[1.0, 10.0, 100.0]]), weight, np.array([0.5, 0.25]))
    array([[20.5 ,  0.25]])
    """
    check_condensed(weight)
    device = device_of(x)
    if backend is None and device == "cpu":
        plan = weight.plan()  # quicker than to look whether an object is a backend
    else:
        plan = weight.plan(get_backend(backend, operation="condensed_matmul", device=device))
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
        Arrays to write to, of any value type; those that are None are made.
    backend, threads
        As in `condensed_matmul`.

    Returns
    -------
    MatmulGradients
        Of the library and on the device that `grad` is of. ``x`` of dtype
        ``result_type(grad, values)``; ``values`` and ``bias`` of the widest type that takes part,
        float32 at least. None where not in `wrt`.

    Raises
    ------
    SriglError
        If a shape does not fit, or `out` cannot be written.
    ValueTypeError
        If a dtype is not supported.
    BackendUnavailableError
        If the backend asked for cannot run here.

    Notes
    -----
    SPEC 2, Backward: a NaN in `grad` at an ablated neuron, or in `x` at an unconnected column,
    reaches neither dx nor dvalues. Cost O(batch * n_active * k).
    """
    check_condensed(weight)
    chosen = get_backend(backend, operation="condensed_matmul_backward", device=device_of(grad))
    return weight.plan(chosen).backward(grad, x, wrt=wrt, out=out, threads=threads)


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
        All three of one library and on one device.
    nnz_budget, drop_fraction, gamma_sal, min_salient, saliency_scope, grown_init
        As in `UpdateSettings`.
    backend : str, Backend or None
        As in `get_backend`; all give the same bits.
    threads : int or None
        Threads to use at most; never changes the result.

    Returns
    -------
    MaskUpdate
        New arrays, mask and weight in the weight's shape and of its library and device; what tells
        of rows is NumPy's.

    Raises
    ------
    SriglError
        If a setting is out of range, shapes differ, a number that counts is not finite, or the
        budget leaves the active neurons no weight. Nothing is changed.
    BackendUnavailableError
        If the backend asked for cannot run here.

    Notes
    -----
    SPEC 4; the paper, sec. 3. Ties go to the lowest flat index.
    """
    settings = UpdateSettings(
        nnz_budget, drop_fraction, gamma_sal, min_salient, saliency_scope, grown_init
    )
    chosen = get_backend(backend, operation="update_mask", device=device_of(weight))
    threads = checked_threads(threads)
    common_library({"weight": weight, "grad": grad, "mask": mask})

    def algorithm(weight: Any, grad: Any, *others: Any, **options: Any) -> MaskUpdate:
        check_dtype(chosen, "weight", weight.dtype)
        check_dtype(chosen, "grad", grad.dtype)
        return chosen.update_mask(weight, grad, *others, **options)

    arrays = getattr(chosen, "arrays", HOST_ARRAYS)
    return checked_update(algorithm, weight, grad, mask, settings, arrays=arrays, threads=threads)
