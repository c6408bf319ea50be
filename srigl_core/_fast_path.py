"""The fast path of plans and chains, since all checks together take as long as a small product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from srigl_core._arrays.libraries import library_of
from srigl_core.contract import ACTIVATIONS

__all__ = ["PLAIN", "FastPath"]

PLAIN = 0x101
"""NumPy's flags of an array in C order and aligned: NPY_ARRAY_C_CONTIGUOUS and _ALIGNED."""
_WRITABLE = PLAIN | 0x400
_CODES = {name: activation.code for name, activation in ACTIVATIONS.items()}


class FastPath:
    """Base class of what multiplies plain arrays without further checks.

    Plain are C-ordered NumPy arrays of the dtype that is summed, and arrays of other libraries that
    become such without a copy.
    """

    _matmul_fast: Callable[..., None] | None
    """The backend's function for plain arrays of one or two axes, if it has one."""
    _usual: tuple[Any, ...]
    """What arguments are compared with: dtype, n_out, n_in, whether all neurons are active."""

    def fast_product(
        self,
        x: Any,
        bias: Any,
        activation: Any,
        compact: Any,
        threads: int | None,
        out: Any = None,
    ) -> Any | None:
        """Return the product, or None for arguments that need all the checks.

        Parameters
        ----------
        x, bias, activation, compact, out
            As given by the caller, unchecked.
        threads : int or None
            Checked.
        """
        if self._matmul_fast is None:
            return None
        if type(x) is not np.ndarray:
            return self._converted(x, bias, activation, compact, threads) if out is None else None
        dtype, n_out, n_in, is_full = self._usual
        shape = x.shape
        rank = len(shape)
        if (
            x.dtype is not dtype
            or not rank
            or shape[-1] != n_in
            or x.flags.num & PLAIN != PLAIN
            or not (compact is False or is_full)
            or not x.size
        ):
            return None
        if bias is not None and not (
            type(bias) is np.ndarray
            and bias.dtype is dtype
            and bias.shape == (n_out,)
            and bias.flags.num & PLAIN == PLAIN
        ):
            return None
        code = 0 if activation is None else type(activation) is str and _CODES.get(activation, -1)
        if code is False or code < 0:
            return None
        if out is None:
            out = np.empty((shape[0], n_out) if rank == 2 else (*shape[:-1], n_out), dtype)
        elif not (
            type(out) is np.ndarray
            and out.dtype is dtype
            and out.shape == (*shape[:-1], n_out)
            and out.flags.num & _WRITABLE == _WRITABLE
            and not np.may_share_memory(out, x)
            and (bias is None or not np.may_share_memory(out, bias))
        ):
            return None
        if rank < 3:
            self._matmul_fast(x, bias, code, out, threads)
        else:
            rows, results = x.reshape(-1, n_in), out.reshape(-1, n_out)
            self._matmul_fast(rows, bias, code, results, threads)
        return out

    def _converted(self, x: Any, bias: Any, *options: Any) -> Any | None:
        """Return the fast product of another library's arrays in that library, or None."""
        library = library_of(x)
        converted = library.as_numpy_fast(x)
        if converted is None:
            return None
        if bias is not None:
            is_alike = type(bias) is type(x) or library_of(bias) is library
            bias = library.as_numpy_fast(bias) if is_alike else None
            if bias is None:
                return None
        product = self.fast_product(converted, bias, *options)
        return None if product is None else library.to_caller(product, x)
