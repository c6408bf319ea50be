"""The Numba backend: what it can do, and its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.contract import Capabilities, ChainLayer, PreparedProduct
from srigl_core.errors import BackendUnavailableError

try:
    import numba
except ModuleNotFoundError as error:
    raise BackendUnavailableError(
        f"backend 'numba' needs the package {error.name!r}, which is not installed: "
        f"pip install numba"
    ) from error

if numba.config.DISABLE_JIT:
    raise BackendUnavailableError(
        "backend 'numba' must compile its kernels; unset NUMBA_DISABLE_JIT, which forbids that"
    )

from srigl_core.backends.numba_cpu import mask_update
from srigl_core.backends.numba_cpu.cache_folder import describe_cache
from srigl_core.backends.numba_cpu.chained import Chained
from srigl_core.backends.numba_cpu.condensed_matmul import NumbaPrepared
from srigl_core.backends.numba_cpu.processor import describe_processor
from srigl_core.backends.numba_cpu.quantized_matmul import prepare_quantized
from srigl_core.backends.numba_cpu.threads import describe_threads

__all__ = ["NumbaBackend"]


class NumbaBackend:
    """Compiled, parallel CPU kernels."""

    name = "numba"
    capabilities = Capabilities(
        operations=Capabilities.operations | {"quantized_matmul", "chain"}, priority=20
    )

    def prepare(self, weight: CondensedWeight) -> NumbaPrepared:
        """Return `weight` in this backend's layout."""
        return NumbaPrepared(weight)

    def chain(self, layers: Sequence[ChainLayer]) -> Callable[..., None] | None:
        """Return the `matmul_fast` of a chain."""
        can_be_chained = all(hasattr(layer.prepared, "calls") for layer in layers)
        return Chained(layers).matmul_fast if can_be_chained else None

    def prepare_quantized(self, weight: QuantizedWeight, inputs: str) -> PreparedProduct:
        """Return `weight` in this backend's layout."""
        return prepare_quantized(weight, inputs)

    def update_mask(
        self,
        weight: NDArray[Any],
        grad: NDArray[Any],
        mask: NDArray[np.bool_],
        settings: UpdateSettings,
        *,
        threads: int | None,
    ) -> MaskUpdate:
        """Return the update of SPEC 4."""
        return mask_update.srigl_update(weight, grad, mask, settings, threads=threads)

    def runtime_info(self) -> dict[str, object]:
        """Return Numba's version, processor, threads and cache, for ``srigl info``."""
        return {
            "numba": numba.__version__,
            **describe_processor(),
            **describe_threads(),
            "cache directory": describe_cache(),
        }
