"""Latencies of one network in three forms, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from network import CondensedMlp

from srigl_core.benchmarks.reproduce.mlp import FloatArray, activation_after

Call = Callable[[], object]

DENSE, CSR, OURS = "dense", "CSR", "srigl"

SAMPLE_SECONDS = 5e-4
"""A sample repeats a call for about this long, so that the resolution of the clock is enough."""


def contenders(network: CondensedMlp, x: FloatArray) -> dict[str, Call]:
    """Return the forward pass of `x` as dense NumPy, SciPy's CSR, and srigl, on one thread."""
    return {
        DENSE: _dense(network, x),
        CSR: _csr(network, x),
        OURS: partial(network.on(threads=1), x),
    }


def _dense(network: CondensedMlp, x: FloatArray) -> Call:
    """Examples are rows; a single one is a vector, which BLAS multiplies faster than a matrix."""
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
    """Examples are columns in all layers, so that SciPy's products need no copy."""
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


def interleaved(calls: Mapping[str, Call], *, rounds: int) -> dict[str, list[float]]:
    """Return `rounds` samples of each call, in seconds.

    The calls take turns, so that a disturbance of the machine affects all of them alike, and each
    round begins with another call.
    """
    names = list(calls)
    repeats = {name: _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for first in range(rounds):
        for i in range(len(names)):
            name = names[(first + i) % len(names)]
            samples[name].append(_sample(calls[name], repeats[name]))
    return samples


def _repeats(call: Call) -> int:
    call()  # compiles, and warms the caches
    return max(1, round(SAMPLE_SECONDS / max(min(_sample(call, 1) for _ in range(3)), 1e-7)))


def _sample(call: Call, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats
