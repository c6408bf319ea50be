"""The gradient of all positions of a weight, without a dense product in the forward pass."""

from __future__ import annotations

from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from srigl_core.errors import SriglError

__all__ = ["with_dense_gradient"]


def with_dense_gradient(y: Any, x: Any, zeros: Any) -> Any:
    """Return `y`, and let the gradient of `zeros` be that of the dense weight.

    A mask update needs the gradient of inactive weights too. It is a product of `x` and the
    gradient of `y`, and only computed where the gradient of `zeros` is asked for.

    Parameters
    ----------
    y : array, (..., n_out)
        The result of a linear layer, before its activation.
    x : array, (..., n_in)
        Its input.
    zeros : array, (n_out, n_in)
        Is not read. The gradient has its dtype.

    Returns
    -------
    array, (..., n_out)
        `y` itself.

    Raises
    ------
    SriglError
        If shapes disagree.

    Notes
    -----
    SPEC 4: the gradient ``G``. It works under ``jit`` and ``vmap``, in reverse mode. Products of
    16-bit numbers are summed in float32.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> x, y = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])
    >>> loss = lambda zeros: (with_dense_gradient(y, x, zeros) * jnp.array([1.0, 10.0])).sum()
    >>> jax.grad(loss)(jnp.zeros((2, 2)))
    Array([[ 1.,  2.],
           [10., 20.]], dtype=float32)
    """
    if zeros.shape != (y.shape[-1], x.shape[-1]) or x.shape[:-1] != y.shape[:-1]:
        raise SriglError(
            f"y has shape {y.shape}, x {x.shape} and zeros {zeros.shape}, but they must be "
            f"(..., n_out), (..., n_in) and (n_out, n_in); pass the result and the input of one "
            f"layer"
        )
    return _unchanged(y, x, zeros)


def _forward(y: Any, x: Any, zeros: Any) -> tuple[Any, Any]:
    return y.value, (x.value, zeros.value) if zeros.perturbed else None


def _backward(kept: Any, grad: Any) -> tuple[Any, Any, Any]:
    if kept is None or isinstance(grad, SymbolicZero):
        return grad, None, None
    x, zeros = kept
    wide = jax.numpy.promote_types(jax.numpy.promote_types(x.dtype, grad.dtype), "float32")
    rows = (part.reshape(-1, part.shape[-1]).astype(wide) for part in (grad, x))
    return grad, None, jax.numpy.einsum("bo,bi->oi", *rows).astype(zeros.dtype)


_unchanged = jax.custom_vjp(lambda y, x, zeros: y)
_unchanged.defvjp(_forward, _backward, symbolic_zeros=True)
