"""What a call costs beside its kernel, by the library that it comes from.

``python -m srigl_core.benchmarks.overhead OUT.json``. A layer of 16 inputs and 16 neurons of one
connection each, batch 1, one thread, all in turns: what is measured is the call. Libraries that are
not installed are left out.
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
from srigl_core._machine import cpu_name, n_cores
from srigl_core._registry import get_backend
from srigl_core.benchmarks.timing import Hot, interleaved
from srigl_core.benchmarks.versions import versions

__all__ = ["calls", "main"]

SIZE = 16
SECONDS = 5.0


def calls() -> dict[str, Callable[[], object]]:
    """Return a call for each way, by what it is called from."""
    weight = srigl_core.CondensedWeight.random((SIZE, SIZE), fan_in=1, rng=0)
    plan = srigl_core.prepare(weight, backend="numba", threads=1)
    kernel = get_backend("numba").prepare(weight).quick_matmul  # type: ignore[attr-defined]
    x = np.ones((1, SIZE), np.float32)
    found: dict[str, Callable[[], object]] = {
        "the backend's own call": lambda: kernel(x, None, "none", False, 1),
        "NumPy, plan": lambda: plan(x),
    }
    if importlib.util.find_spec("torch"):
        found |= _torch_calls(weight, plan, x)
    if importlib.util.find_spec("jax"):
        found |= _jax_calls(weight, plan, x)
    return found


def _torch_calls(
    weight: srigl_core.CondensedWeight, plan: srigl_core.Plan, x: Any
) -> dict[str, Callable[[], object]]:
    import torch

    from srigl_core.torch import CondensedLinear

    torch.set_num_threads(1)
    given, layer = torch.from_numpy(x), CondensedLinear.from_condensed(weight)
    dense = layer.to_linear()

    def without_gradient(module: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return module(given)

        return call

    return {
        "PyTorch, plan": lambda: plan(given),
        "PyTorch, CondensedLinear in inference mode": without_gradient(layer),
        "PyTorch, CondensedLinear": lambda: layer(given),
        "PyTorch, nn.Linear in inference mode": without_gradient(dense),
        "PyTorch, nn.Linear": lambda: dense(given),
    }


def _jax_calls(
    weight: srigl_core.CondensedWeight, plan: srigl_core.Plan, x: Any
) -> dict[str, Callable[[], object]]:
    import jax

    from srigl_core.jax import condensed_linear, from_condensed

    given = jax.device_put(x)
    values, connections = from_condensed(weight)
    jitted = jax.jit(condensed_linear)
    nothing = jax.jit(lambda x: x + 1)
    return {
        "JAX, plan": lambda: plan(given),
        "JAX, condensed_linear within jit": lambda: jitted(
            given, values, connections
        ).block_until_ready(),
        "JAX, condensed_linear outside of jit": lambda: condensed_linear(
            given, values, connections
        ).block_until_ready(),
        "JAX, x + 1 within jit": lambda: nothing(given).block_until_ready(),
    }


def main(out: Path) -> None:
    """Measure, print a line for each call, and write the JSON."""
    made = calls()
    for call in made.values():
        call()
    times = interleaved({name: Hot(call) for name, call in made.items()}, seconds=SECONDS)
    micro = {name: float(f"{1e6 * timing.median:.4g}") for name, timing in times.items()}
    for name, median in micro.items():
        print(f"{name:<45}{median:8.2f} us")
    content = {
        "benchmark": "overhead",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": n_cores()},
        "versions": versions("torch", "jax"),
        "layer": f"{SIZE} inputs, {SIZE} neurons of one connection, batch 1, float32, one thread",
        "median_us": micro,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
