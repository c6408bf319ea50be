"""SRigL in JAX: a condensed layer for ``jit``, ``grad`` and ``vmap``, and the update of its mask.

`condensed_linear` computes on the CPU, by the same backends as `srigl_core.condensed_matmul`: JAX
calls them where a jitted function needs a product or a gradient, with views of its own memory:
quicker than by ``jax.pure_callback``, which is taken where JAX is older than 0.6.1, yet some tens
of microseconds (``python -m srigl_core.benchmarks.overhead`` measures it). JAX calls Python for it,
so a product waits for the thread that holds Python's lock. What is packed from the connections is
kept, by a key that travels with them. Values are compared with those of the last call, and put in
order where they differ; for one batch row that may take longer than the product, where a plan,
outside of ``jit``, is quicker.

An update changes the connections, not the shapes of arrays, unless neurons are ablated or the
fan-in changes: a jitted function takes `Connections` as arguments, and is not compiled again.

On a GPU it is refused. There, call a plan of backend 'cupy' with JAX's arrays, outside of ``jit``.
"""

from srigl_core.errors import BackendUnavailableError

try:
    import jax as _  # noqa: F401
except ModuleNotFoundError as error:
    raise BackendUnavailableError(
        f"srigl_core.jax needs the package {error.name!r}, which is not installed: "
        f"pip install 'srigl-core[jax]'"
    ) from error

from srigl_core.jax.condensed_matmul import condensed_linear
from srigl_core.jax.connections import Connections, from_condensed, to_condensed
from srigl_core.jax.mask_update import SriglUpdate, remap_state, srigl_update

__all__ = [
    "Connections",
    "SriglUpdate",
    "condensed_linear",
    "from_condensed",
    "remap_state",
    "srigl_update",
    "to_condensed",
]
