"""SciPy CSR: a widely available baseline, and a second oracle for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from srigl_core._arrays.dtypes import accumulator_dtype, round_to
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core.contract import Capabilities, MatmulGradients
from srigl_core.reference.activations import activate

__all__ = ["ScipyBackend"]

Array = NDArray[Any]


class ScipyBackend:
    """Products through ``scipy.sparse``, one thread."""

    name = "scipy"
    capabilities = Capabilities(
        operations=frozenset({"condensed_matmul", "condensed_matmul_backward", "quantized_matmul"}),
        quantized_inputs=frozenset({"float"}),
        priority=10,
    )

    def prepare(self, weight: CondensedWeight) -> CsrPrepared:
        """Return `weight` as a CSR matrix of its active rows."""
        dtype = accumulator_dtype(weight.dtype)
        return CsrPrepared(weight, {dtype: _csr(weight, dtype)})

    def prepare_quantized(self, weight: QuantizedWeight, inputs: str) -> CsrPrepared:
        """Return `weight` as CSR in float64, which holds each scale times value exactly."""
        return self.prepare(weight.dequantize(np.float64))


@dataclass(frozen=True, eq=False)
class CsrPrepared:
    """The active rows as CSR, (n_active, n_in), one matrix for each accumulator dtype.

    A matrix is made when its dtype is first used.
    """

    weight: CondensedWeight
    matrices: dict[np.dtype[Any], scipy.sparse.csr_array]

    def describe(self) -> Mapping[str, object]:
        """Return kernel, layout and bytes."""
        size = sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in self._all())
        return {"kernel": "scipy.sparse", "layout": "CSR of the active rows", "bytes": size}

    def matmul(
        self,
        x: Array,
        bias: Array | None,
        *,
        activation: str,
        compact: bool,
        out: Array,
        threads: int | None,
    ) -> None:
        """Write the product to `out`."""
        weight = self.weight
        dtype = accumulator_dtype(x.dtype, weight.dtype)
        with np.errstate(all="ignore"):
            product = (self._matrix(dtype) @ x.T.astype(dtype)).T
            offset = np.zeros(weight.shape[0], dtype) if bias is None else bias.astype(dtype)
            z = np.broadcast_to(offset, (x.shape[0], weight.shape[0])).copy()
            z[:, weight.active] += product
            z = z[:, weight.active] if compact else z
            if activation != "none":
                z = activate(z.astype(np.float64), activation)
            out[...] = round_to(z, out.dtype)

    def backward(
        self, grad: Array, x: Array | None, *, out: MatmulGradients, threads: int | None
    ) -> None:
        """Write the gradients to `out`."""
        weight = self.weight
        with np.errstate(all="ignore"):
            if out.x is not None:
                dtype = accumulator_dtype(grad.dtype, weight.dtype)
                dx = (self._matrix(dtype).T @ grad[:, weight.active].T.astype(dtype)).T
                out.x[...] = round_to(dx, out.x.dtype)
            if out.values is not None and x is not None:
                dtype = accumulator_dtype(grad.dtype, x.dtype, weight.dtype)
                dense = _full_csr(grad[:, weight.active].T.astype(dtype)) @ x.astype(dtype)
                dvalues = np.take_along_axis(dense, weight.indices.astype(np.int64), axis=1)
                out.values[...] = round_to(dvalues, out.values.dtype)
            if out.bias is not None:
                dbias = grad.sum(axis=0, dtype=accumulator_dtype(grad.dtype))
                out.bias[...] = round_to(dbias, out.bias.dtype)

    def with_values(self, weight: CondensedWeight) -> CsrPrepared:
        """Return a matrix of other values, which shares the column numbers and row pointers."""
        first = next(iter(self._all()))
        data = weight.values.ravel().astype(first.dtype)
        fresh = scipy.sparse.csr_array((data, first.indices, first.indptr), shape=first.shape)
        return replace(self, weight=weight, matrices={first.dtype: fresh})

    def _all(self) -> list[scipy.sparse.csr_array]:
        return list(self.matrices.values())

    def _matrix(self, dtype: np.dtype[Any]) -> scipy.sparse.csr_array:
        matrix = self.matrices.get(dtype)
        if matrix is None:
            matrix = self.matrices[dtype] = _csr(self.weight, dtype)
        return matrix


def _csr(weight: CondensedWeight, dtype: np.dtype[Any]) -> scipy.sparse.csr_array:
    """Return the active rows with every active weight stored, zeros included."""
    row_starts = np.arange(weight.n_active + 1) * weight.fan_in
    return scipy.sparse.csr_array(
        (weight.values.ravel().astype(dtype), weight.indices.ravel().astype(np.int64), row_starts),
        shape=(weight.n_active, weight.shape[1]),
    )


def _full_csr(dense: Array) -> scipy.sparse.csr_array:
    """Return `dense` with every entry stored: no zero is skipped, so that 0 * inf is NaN."""
    rows, columns = dense.shape
    return scipy.sparse.csr_array(
        (dense.ravel(), np.tile(np.arange(columns), rows), np.arange(rows + 1) * columns),
        shape=dense.shape,
    )
