"""Median latencies of one network in several forms, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from srigl_core.demo.deployment import CondensedMlp, cpu_backends
from srigl_core.demo.mlp import activation_after

__all__ = ["CSR", "DENSE", "Timing", "contenders", "interleaved"]

FloatArray = NDArray[np.float32]
Call = Callable[[], object]

DENSE = "dense NumPy"
CSR = "SciPy CSR"

_SAMPLE_SECONDS = 5e-4
"""A sample repeats a shorter call for about as long as this, so that the clock does not matter."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples, and the quartiles around it."""

    median: float
    lower: float
    upper: float
    samples: int


def contenders(network: CondensedMlp, x: FloatArray) -> dict[str, Call]:
    """Return the forward pass of `x` in every form, each on one thread and in its best layout.

    Parameters
    ----------
    network : CondensedMlp
    x : ndarray of float32, (batch, n_in)

    Returns
    -------
    dict of str to callable
        Dense NumPy, SciPy CSR, and every available backend. BLAS is to be held to one thread by
        the caller.
    """
    calls: dict[str, Call] = {DENSE: _dense(network, x), CSR: _csr(network, x)}
    for backend in cpu_backends():
        calls[backend.name] = partial(network.on(backend, threads=1), x)
    return calls


def _dense(network: CondensedMlp, x: FloatArray) -> Call:
    """Rows are images; a single image is a vector, which BLAS multiplies faster than a matrix."""
    layers = [
        (weight.to_dense().T, network.biases[name], activation_after(name))
        for name, weight in network.weights.items()
    ]
    start = x[0] if x.shape[0] == 1 else x

    def forward() -> FloatArray:
        h = start
        for weight, bias, activation in layers:
            h = h @ weight
            h += bias
            if activation:
                np.maximum(h, 0, out=h)
        return h

    return forward


def _csr(network: CondensedMlp, x: FloatArray) -> Call:
    """Columns are images, from the first layer to the last: SciPy's products need no copy then."""
    single = x.shape[0] == 1
    layers = [
        (
            weight.to_csr(),
            network.biases[name] if single else network.biases[name][:, None],
            activation_after(name),
        )
        for name, weight in network.weights.items()
    ]
    start = x[0] if single else np.ascontiguousarray(x.T)

    def forward() -> FloatArray:
        h = start
        for weight, bias, activation in layers:
            h = weight @ h
            h += bias
            if activation:
                np.maximum(h, 0, out=h)
        return h

    return forward


def interleaved(calls: Mapping[str, Call], *, rounds: int) -> dict[str, Timing]:
    """Time calls in turns, so that what disturbs the machine disturbs all of them alike.

    Parameters
    ----------
    calls : mapping of str to callable
    rounds : int
        Samples of each; every round begins with another one.

    Returns
    -------
    dict of str to Timing
    """
    names = list(calls)
    repeats = {name: _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for first in range(rounds):
        for i in range(len(names)):
            name = names[(first + i) % len(names)]
            samples[name].append(_sample(calls[name], repeats[name]))
    return {name: _timing(seconds) for name, seconds in samples.items()}


def _repeats(call: Call) -> int:
    call()  # compiles, and warms the caches
    return max(1, round(_SAMPLE_SECONDS / max(min(_sample(call, 1) for _ in range(3)), 1e-7)))


def _sample(call: Call, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _timing(seconds: Sequence[float]) -> Timing:
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(seconds))
