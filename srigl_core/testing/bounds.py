"""The a-priori error bound of SPEC 2, the only tolerance for products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core.contract import ACTIVATIONS
from srigl_core.reference.activations import activate

__all__ = ["FloatLimits", "Outcome", "first_violation", "float_limits"]


@dataclass(frozen=True)
class FloatLimits:
    """The limits of a float type."""

    roundoff: float  # unit roundoff, u
    smallest: float  # positive subnormal, eta
    largest: float  # finite number

    @property
    def overflow(self) -> float:
        """The smallest magnitude that rounds to infinity."""
        return self.largest * (1 + self.roundoff)


_LIMITS = {
    "float16": FloatLimits(2.0**-11, 2.0**-24, 65504.0),
    "bfloat16": FloatLimits(2.0**-8, 2.0**-133, float(2**128 - 2**120)),
    "float32": FloatLimits(2.0**-24, 2.0**-149, float(2**128 - 2**104)),
    "float64": FloatLimits(2.0**-53, 5e-324, float(np.finfo(np.float64).max)),
}


def float_limits(dtype: np.dtype[Any]) -> FloatLimits:
    """Return the limits of one of the four value types."""
    return _LIMITS[dtype.name]


@dataclass(frozen=True)
class Outcome:
    """The expected value of a sum of products, and what bounds the error of a result."""

    z: NDArray[np.longdouble]  # the sum, bias included, before the activation
    scale: NDArray[np.longdouble]  # the sum of the finite terms' magnitudes, s
    terms: NDArray[np.int64]  # the number of products in each sum, n; broadcastable to z
    accumulator: np.dtype[Any]
    activation: str = "none"
    is_rounded: bool = False  # whether `z` is a result's own sum, rounding included (SPEC 6)

    def of_neurons(self, neurons: NDArray[np.int64]) -> Outcome:
        """Return the outcome of some neurons, by their row numbers."""
        return replace(
            self,
            z=self.z[..., neurons],
            scale=self.scale[..., neurons],
            terms=np.broadcast_to(self.terms, self.z.shape)[..., neurons],
        )

    # A product is compared in every output type, so what the types share is computed once.

    @cached_property
    def y(self) -> NDArray[np.float64]:
        """The sum after the activation."""
        with np.errstate(all="ignore"):
            return activate(self.z.astype(np.float64), self.activation)

    @cached_property
    def unchecked(self) -> NDArray[np.bool_]:
        """Where the sum of magnitudes exceeds half the accumulator's largest number."""
        return np.asarray(self.scale > float_limits(self.accumulator).largest / 2)

    @cached_property
    def _bound_before_rounding(self) -> NDArray[np.longdouble]:
        """How far the result may be from `y` before it is rounded to its type."""
        limits = float_limits(self.accumulator)
        with np.errstate(all="ignore"):
            n = self.terms + 2.0
            inside = 2 * n * limits.roundoff * self.scale + n * limits.smallest
            inside *= not self.is_rounded
            if self.activation != "none":
                inside *= ACTIVATIONS[self.activation].lipschitz
                inside += 8 * limits.roundoff * (np.abs(self.z) + np.abs(self.y))
        return inside

    def bound(self, dtype: np.dtype[Any]) -> NDArray[np.float64]:
        """Return how far a result of `dtype` may be from `y`, elementwise; inf where unchecked."""
        limits = float_limits(dtype)
        with np.errstate(all="ignore"):
            rounding = limits.roundoff * np.abs(self.y) + limits.smallest
            bound = self._bound_before_rounding + rounding
            return np.where(self.unchecked, np.inf, bound).astype(np.float64)


def first_violation(result: NDArray[Any], outcome: Outcome) -> tuple[tuple[int, ...], str] | None:
    """Return index and message of the first element of `result` that SPEC 2 does not allow.

    Where the sum of magnitudes exceeds half the accumulator's largest number nothing is checked.
    Where the result may overflow its dtype, infinity of the right sign is allowed. Where the
    expected value is infinity or NaN, so must be the result.
    """
    limits = float_limits(result.dtype)
    expected, bound = outcome.y, outcome.bound(result.dtype)
    got = result.astype(np.float64)
    with np.errstate(all="ignore"):
        finite = np.isfinite(expected) & np.isfinite(outcome.z)
        within = np.abs(got - expected) <= bound
        may_overflow = np.abs(expected) + bound >= limits.overflow
        overflowed = may_overflow & (got == np.copysign(np.inf, expected))
        same_class = (got == expected) | (np.isnan(got) & np.isnan(expected))
    allowed = outcome.unchecked | np.where(finite, within | overflowed, same_class)
    if allowed.all():
        return None
    where = tuple(int(i) for i in np.argwhere(~allowed)[0])
    wanted, value = float(expected[where]), float(got[where])
    message = f"at {where}: expected {wanted!r}, got {value!r}"
    if finite[where]:
        message += f", which differs by {abs(value - wanted):.3g}"
        message += f" where the bound is {bound[where]:.3g}"
    return where, message
