"""How arrays are divided between devices, in JAX versions whose types say so."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["array_like", "sharded_as", "vary", "varying_axes"]


def varying_axes(array: Any) -> frozenset[Any]:
    """Return the axes of a ``shard_map`` over which an array may differ between devices."""
    if not hasattr(jax, "typeof"):  # before JAX 0.6
        return frozenset()
    aval = jax.typeof(array)
    axes: frozenset[Any] = (
        aval.manual_axis_type.varying
        if hasattr(aval, "manual_axis_type")
        else getattr(aval, "vma", frozenset())
    )
    return axes


def vary(array: Any, axes: frozenset[Any]) -> Any:
    """Mark an array as varying over more axes; its gradient is then summed over them."""
    if not axes:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, tuple(axes), to="varying")
    return jax.lax.pvary(array, tuple(axes))


def array_like(aval: Any, n_axes: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the type of an array whose first `n_axes` axes are sharded as those of another."""
    options = {}
    if getattr(aval, "sharding", None) is not None:
        kept = aval.sharding.spec[:n_axes]
        spec = PartitionSpec(*kept, *[None] * (len(shape) - n_axes))
        options["sharding"] = NamedSharding(aval.sharding.mesh, spec)
    return aval.update(shape=shape, dtype=dtype, weak_type=False, **options)


def sharded_as(array: Any, aval: Any) -> Any:
    """Return an array with the sharding of a type; only on a mesh of explicit axes they differ."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty or jax.typeof(array).sharding == sharding:
        return array
    return jax.sharding.reshard(array, sharding)
