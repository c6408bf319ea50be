"""The reference as a backend: the definition itself, to check other backends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._update import CondensedUpdate, GradientRows, MaskUpdate, UpdateSettings
from srigl_core.contract import OPERATIONS, Capabilities, MatmulGradients
from srigl_core.reference import condensed_matmul, quantized_matmul
from srigl_core.reference.condensed_update import srigl_condensed_update
from srigl_core.reference.mask_update import srigl_update

__all__ = ["ReferenceBackend"]


class ReferenceBackend:
    """The definition, in NumPy; correctness comes before speed."""

    name = "reference"
    capabilities = Capabilities(
        operations=frozenset(OPERATIONS) - {"chain"}, priority=0, largest_problem=700_000
    )

    def prepare(self, weight: CondensedWeight) -> ReferencePrepared:
        """Return `weight` in its own condensed layout."""
        return ReferencePrepared(weight)

    def prepare_quantized(self, weight: QuantizedWeight, inputs: str) -> ReferenceQuantized:
        """Return `weight` in its own layout."""
        return ReferenceQuantized(weight, inputs)

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
        return srigl_update(weight, grad, mask, settings)

    def update_condensed(
        self,
        weight: CondensedWeight,
        gradient_rows: GradientRows,
        settings: UpdateSettings,
        *,
        block_rows: int,
        threads: int | None,
    ) -> CondensedUpdate:
        """Return the condensed update of SPEC 4."""
        return srigl_condensed_update(weight, gradient_rows, settings, block_rows=block_rows)


@dataclass(frozen=True, eq=False)
class ReferencePrepared:
    """A weight in its own condensed layout."""

    weight: CondensedWeight

    def describe(self) -> Mapping[str, object]:
        """Return kernel, layout and bytes."""
        return {"kernel": "NumPy, one connection at a time", "layout": "condensed", "bytes": 0}

    def matmul(
        self,
        x: NDArray[Any],
        bias: NDArray[Any] | None,
        *,
        activation: str,
        compact: bool,
        out: NDArray[Any],
        threads: int | None,
    ) -> None:
        """Write the product to `out`."""
        out[...] = condensed_matmul.forward(
            x, self.weight, bias, activation=activation, compact=compact, dtype=out.dtype
        )

    def backward(
        self,
        grad: NDArray[Any],
        x: NDArray[Any] | None,
        *,
        out: MatmulGradients,
        threads: int | None,
    ) -> None:
        """Write the gradients to `out`."""
        condensed_matmul.backward(grad, x, self.weight, out=out)

    def with_values(self, weight: CondensedWeight) -> ReferencePrepared:
        """Return the layout of another weight."""
        return ReferencePrepared(weight)


@dataclass(frozen=True, eq=False)
class ReferenceQuantized:
    """A quantised weight in its own layout."""

    weight: QuantizedWeight
    inputs: str

    def describe(self) -> Mapping[str, object]:
        """Return kernel, layout, inputs and bytes."""
        kernel = "NumPy, one connection at a time"
        return {"kernel": kernel, "layout": "condensed", "inputs": self.inputs, "bytes": 0}

    def matmul(
        self,
        x: NDArray[Any],
        bias: NDArray[Any] | None,
        *,
        activation: str,
        compact: bool,
        out: NDArray[Any],
        threads: int | None,
    ) -> None:
        """Write the product to `out`."""
        product = quantized_matmul.weight_only_product
        if self.inputs == "int8":
            product = quantized_matmul.int8_product
        out[...] = product(
            x, self.weight, bias, activation=activation, compact=compact, dtype=out.dtype
        )
