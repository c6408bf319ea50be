"""brainevent's product with a fixed number of connections, through JAX."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import brainevent
import jax
import jax.numpy as jnp
import numpy as np

from srigl_core.benchmarks.cases import Case
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender, unless_compiled
from srigl_core.benchmarks.problems import Batch, Problem

__all__ = ["contenders"]


def contenders(device: str) -> list[Contender]:
    """Return the product, on one thread.

    XLA starts its threads once, as many as there are cores. It is shown a single core here, since
    one process cannot measure it on one thread and then on two.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        jax.devices()
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
    return [Contender("brainevent", "gather", "forward", _product, unfit=_unfit)]


def _product(problem: Problem) -> Bind:
    weight = problem.weight
    values, indices = jnp.asarray(weight.values), jnp.asarray(weight.indices.astype(np.int32))
    bias, shape = jnp.asarray(problem.bias), weight.shape

    def bind(batch: Batch) -> Call:
        """Take JAX arrays with inputs as columns; the transposition is not timed."""
        x = jnp.asarray(batch.x[0] if len(batch.x) == 1 else batch.x.T)
        product = brainevent.fcnmv if x.ndim == 1 else brainevent.fcnmm
        compiled = jax.jit(
            lambda x: product(values, indices, x, shape=shape, transpose=False).T + bias
        )
        return lambda: compiled(x).block_until_ready()

    return bind


def _unfit(case: Case) -> str:
    return unless_compiled(case) or ("" if case.threads == 1 else "runs on one thread here")
