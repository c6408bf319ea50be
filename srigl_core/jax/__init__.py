"""SRigL in JAX: a condensed layer for ``jit``, ``grad`` and ``vmap``, and sparse training.

`condensed_linear` computes on the CPU with the backends of `srigl_core.condensed_matmul`, also in
jitted functions. These take `Connections` as arguments, and are not compiled again after a mask
update unless neurons are ablated or the fan-in changes. The JAX page of the documentation describes
the cost of a call. For GPUs call a plan of the backend 'cupy' with JAX arrays, outside of ``jit``.
"""

from srigl_core._install import install_command
from srigl_core.errors import BackendUnavailableError

try:
    import jax as _  # noqa: F401
except ModuleNotFoundError as error:
    raise BackendUnavailableError(
        f"srigl_core.jax needs the package {error.name!r}, which is not installed: "
        f"{install_command('jax')}"
    ) from error

from srigl_core.jax.condensed_matmul import condensed_linear
from srigl_core.jax.connections import Connections, from_condensed, to_condensed
from srigl_core.jax.dense_gradient import with_dense_gradient
from srigl_core.jax.mask_update import SriglUpdate, remap_state, srigl_update
from srigl_core.jax.quantized_matmul import quantized_linear
from srigl_core.jax.training import SRigL

__all__ = [
    "Connections",
    "SRigL",
    "SriglUpdate",
    "condensed_linear",
    "from_condensed",
    "quantized_linear",
    "remap_state",
    "srigl_update",
    "to_condensed",
    "with_dense_gradient",
]
