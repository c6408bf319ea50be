"""Call one layer from NumPy, PyTorch and JAX, and compare the bits of the results.

The inputs include subnormal numbers. XLA's threads flush them to zero, and the kernels do not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import srigl_core
import srigl_core.jax
import srigl_core.torch


def main() -> None:
    rng = np.random.default_rng(0)
    weight = srigl_core.CondensedWeight.random((768, 3072), fan_in=307, rng=rng)
    x = rng.standard_normal((8, 3072), dtype=np.float32)
    x[0] *= np.float32(1e-40)
    layer = srigl_core.torch.CondensedLinear.from_condensed(weight)
    values, connections = srigl_core.jax.from_condensed(weight)
    linear = srigl_core.jax.condensed_linear

    with torch.no_grad():
        results = {
            "NumPy, plan": srigl_core.prepare(weight)(x),
            "PyTorch, plan": srigl_core.prepare(weight)(torch.from_numpy(x)),
            "PyTorch, CondensedLinear": layer(torch.from_numpy(x)),
            "JAX, plan": srigl_core.prepare(weight)(jnp.asarray(x)),
            "JAX, condensed_linear": linear(x, values, connections),
            "JAX, condensed_linear under jit": jax.jit(linear)(x, values, connections),
        }
    expected = results["NumPy, plan"]
    table = Table("called from", "result", "same bits", "subnormal results")
    for name, result in results.items():
        numbers = np.asarray(result)
        same = np.array_equal(numbers.view(np.uint32), expected.view(np.uint32))
        tiny = np.count_nonzero((numbers != 0) & (np.abs(numbers) < np.finfo(np.float32).tiny))
        table.add_row(name, type(result).__name__, "yes" if same else "NO", str(tiny))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
