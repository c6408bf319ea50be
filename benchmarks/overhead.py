"""The overhead of a call, by the library whose arrays it takes.

``python -m srigl_core.benchmarks.overhead OUT.json``. The layer has 16 inputs and 16 neurons with
one connection each, at batch 1 on one thread, so that almost all of the time is overhead. A PyTorch
layer compares its numbers at each call, which takes longer in a large layer; one is measured with
and without. Libraries that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import srigl_core
from srigl_core._machine import cpu_name, n_cores, package_versions
from srigl_core._registry import get_backend
from srigl_core.benchmarks.pictures import calls as calls_picture
from srigl_core.benchmarks.timing import median_times

__all__ = ["PICTURE", "calls", "main"]

Calls = dict[str, Callable[[], object]]

PICTURE = "calls.svg"
SIZE = 16
SECONDS = 5.0
WIDE, WIDE_FAN_IN = (3072, 768), 307


def calls() -> Calls:
    """Return the calls to measure, by their descriptions."""
    weight = srigl_core.CondensedWeight.random((SIZE, SIZE), fan_in=1, rng=0)
    plan = srigl_core.prepare(weight, backend="numba", threads=1)
    kernel = get_backend("numba").prepare(weight).matmul_fast  # type: ignore[attr-defined]
    x, y = np.ones((1, SIZE), np.float32), np.empty((1, SIZE), np.float32)
    chain = srigl_core.chain(3 * [(weight, None, None)], backend="numba", threads=1)
    ways: Calls = {
        "the backend's own call": lambda: kernel(x, None, 0, y, 1),
        "NumPy, plan": lambda: plan(x),
        "NumPy, plans of three layers": lambda: plan(plan(plan(x))),
        "NumPy, chain of three layers": lambda: chain(x),
    }
    if importlib.util.find_spec("torch"):
        ways |= _torch_calls(weight, plan, x)
    if importlib.util.find_spec("jax"):
        ways |= _jax_calls(weight, plan, x)
    return ways


def _torch_calls(weight: srigl_core.CondensedWeight, plan: srigl_core.Plan, x: Any) -> Calls:
    import torch

    from srigl_core.torch import CondensedLinear, freeze

    torch.set_num_threads(1)
    tensor, layer = torch.from_numpy(x), CondensedLinear.from_condensed(weight)
    dense = layer.to_linear()
    wide = torch.ones(1, WIDE[0])
    large, frozen = (CondensedLinear(*WIDE, fan_in=WIDE_FAN_IN, rng=0) for _ in range(2))
    freeze(frozen)

    def without_gradient(module: Any, tensor: Any = tensor) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return module(tensor)

        return call

    return {
        "PyTorch, plan": lambda: plan(tensor),
        "PyTorch, CondensedLinear in inference mode": without_gradient(layer),
        "PyTorch, CondensedLinear": lambda: layer(tensor),
        "PyTorch, nn.Linear in inference mode": without_gradient(dense),
        "PyTorch, nn.Linear": lambda: dense(tensor),
        "PyTorch, 3072 to 768 at 90%": without_gradient(large, wide),
        "PyTorch, 3072 to 768 at 90%, frozen": without_gradient(frozen, wide),
    }


def _jax_calls(weight: srigl_core.CondensedWeight, plan: srigl_core.Plan, x: Any) -> Calls:
    import jax

    from srigl_core.jax import condensed_linear, from_condensed

    array = jax.device_put(x)
    arguments = (array, *from_condensed(weight))
    jitted, increment = jax.jit(condensed_linear), jax.jit(lambda x: x + 1)
    return {
        "JAX, plan": lambda: plan(array),
        "JAX, condensed_linear within jit": lambda: jitted(*arguments).block_until_ready(),
        "JAX, condensed_linear outside of jit": (
            lambda: condensed_linear(*arguments).block_until_ready()
        ),
        "JAX, x + 1 within jit": lambda: increment(array).block_until_ready(),
    }


def main(out: Path) -> None:
    """Measure, print a line for each call, and write the JSON and the picture beside it."""
    medians = median_times(calls(), SECONDS)
    for name, median in medians.items():
        print(f"{name:<45}{median:8.2f} us")
    content = {
        "benchmark": "overhead",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": n_cores()},
        "versions": package_versions("torch", "jax"),
        "layer": f"{SIZE} inputs, {SIZE} neurons of one connection, batch 1, float32, one thread",
        "median_us": medians,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    out.with_name(PICTURE).write_text(calls_picture(content), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
