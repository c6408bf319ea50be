"""Compile kernels and fill caches before they are needed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from srigl_core._api import update_mask
from srigl_core._arrays.checks import check_choice, check_flag, check_integer
from srigl_core._arrays.dtypes import round_to, value_dtype
from srigl_core._chain import chain
from srigl_core._format.weight import CondensedWeight, QuantizedWeight, check_condensed
from srigl_core._plan import prepare
from srigl_core._product_spec import checked_threads
from srigl_core.contract import QUANTIZED_INPUTS, Backend
from srigl_core.errors import ValueTypeError

__all__ = ["warmup"]

_SHAPE, _FAN_IN, _SOME_ABLATED = (4096, 1024), 102, 3584  # enough work for threads at batch 1
_SMALL_FAN_IN = 10
"""A backend may have other kernels for so few connections and int8 inputs."""

_MOST_ROWS = 2**32


def warmup(
    *,
    batch: int | Iterable[int] = (1, 8, 64, 256),
    dtype: DTypeLike = "float32",
    backward: bool = False,
    update: bool = False,
    chains: bool = False,
    quantized: str | Iterable[str] = (),
    threads: int | None = None,
    backend: str | Backend | None = None,
    weight: CondensedWeight | QuantizedWeight | None = None,
) -> dict[str, float]:
    """Run a backend once in each given way, so that later calls find its kernels compiled.

    Parameters
    ----------
    batch : int or iterable of int
        Batch sizes of later calls. Similar sizes mostly share a kernel.
    dtype : dtype-like
        Dtype of the inputs: a value type or its name. Also that of the weight if `weight` is None.
    backward : bool
        Also run the gradients.
    update : bool
        Also run the mask update.
    chains : bool
        Also run each product as a chain of one layer, whose kernels a chain of more layers has too.
    quantized : str or iterable of str
        Also run products with the quantised weight, for these kinds of inputs: "float", "int8".
    threads : int or None
        Number of threads of later calls. None runs both one thread and the backend's default.
    backend : str, Backend or None
        As in `srigl_core.get_backend`.
    weight : CondensedWeight, QuantizedWeight or None
        The layer to use. None draws two of 90% sparsity, with and without ablated neurons, and for
        int8 inputs also one of 99%. Of a quantised weight, products with float inputs run unless
        `quantized` names others.

    Returns
    -------
    dict of str to float
        Seconds that each step took, in order.

    Raises
    ------
    SriglError
        If an argument is out of its range, or the backend does not offer the operation, or a
        quantised weight is to have gradients or an update.
    ValueTypeError
        If an argument has the wrong type.
    BackendUnavailableError
        If the backend asked for cannot run here.

    Notes
    -----
    Inputs are in C order, both writeable and read-only. Products run with and without a bias. If
    the backend keeps compiled kernels on disk, the next process only loads them.

    Examples
    --------
    >>> import srigl_core
    >>> layer = srigl_core.CondensedWeight.random((8, 16), fan_in=2, rng=0)
    >>> seconds = srigl_core.warmup(batch=(1, 64), update=True, backend="reference", weight=layer)
    >>> list(seconds)
    ['prepare', 'product, batch 1', 'product, batch 64', 'update']
    """
    value_type = value_dtype(dtype)
    backward, update = check_flag(backward, "backward"), check_flag(update, "update")
    chains = check_flag(chains, "chains")
    is_one = isinstance(quantized, str) or not isinstance(quantized, Iterable)
    kinds: list[Any] = [quantized] if is_one else [*quantized]
    for kind in kinds:
        check_choice(kind, "quantized", QUANTIZED_INPUTS)
    is_quantized = isinstance(weight, QuantizedWeight)
    if weight is not None and (backward or update or not is_quantized):
        check_condensed(weight)
    try:
        batches: tuple[Any, ...] = tuple(batch) if isinstance(batch, Iterable) else (batch,)
    except Exception as error:  # it may be any object, whose own code is run
        raise ValueTypeError(f"batch={batch!r} must be one or more integers") from error
    sizes = [check_integer(size, "batch", least=1, most=_MOST_ROWS) for size in batches]
    each_threads = (1, None) if threads is None else (checked_threads(threads),)
    rng = np.random.default_rng(0)
    seconds: dict[str, float] = {}

    def normal(*shape: int) -> NDArray[Any]:
        return round_to(rng.standard_normal(shape), value_type)

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[step] = time.perf_counter() - start

    with timed("prepare"):
        weights: list[Any] = [weight]
        if weight is None:
            weights = [
                _random_weight(value_type, rng, _FAN_IN, n_active)
                for n_active in (None, _SOME_ABLATED)
            ]
        trained = [] if is_quantized else [prepare(layer, backend=backend) for layer in weights]
        plans: list[Any] = [*trained]
        for layer, kind in itertools.product(weights, kinds or ["float"] * is_quantized):
            packed = layer if is_quantized else layer.quantize()
            plans.append(prepare(packed, inputs=kind, backend=backend))
        if weight is None and "int8" in kinds:
            sparse = _random_weight(value_type, rng, _SMALL_FAN_IN)
            plans.append(prepare(sparse.quantize(), inputs="int8", backend=backend))
    n_out, n_in = weights[0].shape
    for size in sizes:
        x, grad = normal(size, n_in), normal(size, n_out)
        inputs, biases = (x, _read_only(x)), (None, normal(n_out))
        with timed(f"product, batch {size}"):
            for plan, array, bias, n in itertools.product(plans, inputs, biases, each_threads):
                plan(array, bias, threads=n)
        if chains:
            with timed(f"chain, batch {size}"):
                for plan, n in itertools.product(plans, each_threads):
                    layers = [(plan.weight, normal(n_out), None, plan.inputs)]
                    chain(layers, backend=plan.backend)(x, threads=n)
        if backward:
            with timed(f"gradients, batch {size}"):
                for plan, array, n in itertools.product(trained, inputs, each_threads):
                    plan.backward(grad, array, threads=n)
    if update:
        with timed("update"):
            for layer, n in itertools.product(weights, each_threads):
                update_mask(
                    layer.to_dense(),
                    normal(n_out, n_in),
                    layer.to_mask(),
                    nnz_budget=layer.nnz,
                    drop_fraction=0.3,
                    backend=backend,
                    threads=n,
                )
    return seconds


def _random_weight(
    dtype: np.dtype[Any], rng: np.random.Generator, fan_in: int, n_active: int | None = None
) -> CondensedWeight:
    return CondensedWeight.random(_SHAPE, fan_in=fan_in, n_active=n_active, dtype=dtype, rng=rng)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view
