"""Problems that can tell a right kernel from a wrong one, built from a source of choices.

The choices come from Hypothesis (`srigl_core.testing.strategies`), which shrinks a failure by
making each choice smaller: the first option of every list is the simplest. Or from a seeded
generator (`SeededChooser`), or they are those of an earlier problem (`RecordedChoices`). What a
kernel does not take on is not chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srigl_core.condensed_weight import CondensedWeight
from srigl_core.contract import ACTIVATIONS
from srigl_core.mask_update import UpdateSettings
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.kernel_capabilities import KernelCapabilities
from srigl_core.value_types import result_dtype, value_dtype

__all__ = [
    "BATCHES",
    "EVERYTHING",
    "LAYOUTS",
    "MAGNITUDES",
    "UPDATE_MAGNITUDES",
    "Chooser",
    "MatmulProblem",
    "RecordedChoices",
    "SeededChooser",
    "UpdateProblem",
    "any_mask",
    "array_of",
    "laid_out",
    "matmul_problem",
    "random_inputs",
    "random_numbers",
    "special_numbers",
    "update_problem",
    "with_subnormal_terms",
]

Option = TypeVar("Option")

SIZES = (1, 2, 3, 5, 8, 17, 33, 40)
BATCHES = (
    (1,),
    (2,),
    (),
    (3,),
    (7,),
    (8,),
    (9,),
    (2, 3),
    (16,),
    (17,),
    (32,),
    (33,),
    (65,),
    (130,),
    (0,),
)
MAGNITUDES = ("integers", "normal", "zeros", "cancelling", "subnormal", "huge", "spread")
UPDATE_MAGNITUDES = ("integers", "normal", "zeros", "subnormal", "spread", "close")
LAYOUTS = ("C", "F", "reversed", "every second", "shared rows", "offset by a byte")
DTYPE_PAIRS = (
    ("float32", "float32"),
    ("float64", "float64"),
    ("float32", "float64"),
    ("float64", "float32"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("float16", "float32"),
    ("bfloat16", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float64", "bfloat16"),
    ("float16", "float64"),
)
UPDATE_DTYPES = ("float32", "float64", "float16", "bfloat16")
EVERYTHING = KernelCapabilities()
WIDE = (50_000, 65_536)  # more columns than int16 can number, and all that uint16 can
WIDER = 70_000
DEEP = 1_025  # connections of a neuron: more than fit the vectors, warps and blocks that sum them
LARGE_PRODUCT = (130, 129, 33)  # n_out, n_in, batch: enough work for threads to be worth it
LARGE_LAYERS = ((401, 399), (3, WIDER))


class Chooser(ABC):
    """A source of choices.

    Attributes
    ----------
    made : list of int
        The choices so far, for `RecordedChoices`: an option by its place, a generator by its seed.
    """

    def __init__(self) -> None:
        self.made: list[int] = []

    @abstractmethod
    def _choose(self, least: int, most: int) -> int:
        """Return an integer within ``least..most``."""

    def integer(self, least: int, most: int) -> int:
        """Return an integer within ``least..most``."""
        self.made.append(self._choose(least, most))
        return self.made[-1]

    def pick(self, options: Sequence[Option]) -> Option:
        """Return one of `options`."""
        return options[self.integer(0, len(options) - 1)]

    def generator(self) -> np.random.Generator:
        """Return a generator for the bulk of the numbers."""
        return np.random.default_rng(self.integer(0, 2**32 - 1))


class SeededChooser(Chooser):
    """Choices from a seeded generator, the same on every machine.

    Parameters
    ----------
    *seed : int
    """

    def __init__(self, *seed: int) -> None:
        super().__init__()
        self._rng = np.random.default_rng(seed)

    def _choose(self, least: int, most: int) -> int:
        return int(self._rng.integers(least, most, endpoint=True))


class RecordedChoices(Chooser):
    """Choices made before, made again.

    Parameters
    ----------
    numbers : sequence of int
        What `Chooser.made` held.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self._left = iter(numbers)

    def _choose(self, least: int, most: int) -> int:
        return min(max(next(self._left), least), most)


@dataclass(frozen=True, eq=False)
class MatmulProblem:
    """A product and its gradients.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
    x : ndarray, (..., n_in)
    grad : ndarray, (..., n_out)
        Of the dtype of `x`.
    bias : ndarray, (n_out,), or None
    activation : str
    out_dtype : numpy.dtype
        A type to write results in.
    out_layout, layout : str
        Those of `LAYOUTS` that results are written in, and that `x` and `grad` have.
    """

    weight: CondensedWeight
    x: NDArray[Any]
    grad: NDArray[Any]
    bias: NDArray[Any] | None
    activation: str
    out_dtype: np.dtype[Any]
    out_layout: str
    layout: str

    @property
    def result_dtype(self) -> np.dtype[Any]:
        """Dtype of the product."""
        return result_dtype(self.x.dtype, self.weight.dtype)


@dataclass(frozen=True, eq=False)
class UpdateProblem:
    """A mask update.

    Parameters
    ----------
    weight, grad : ndarray, (n_out, n_in)
    mask : ndarray of bool, (n_out, n_in)
    settings : UpdateSettings
    """

    weight: NDArray[Any]
    grad: NDArray[Any]
    mask: NDArray[np.bool_]
    settings: UpdateSettings


def matmul_problem(choose: Chooser, able: KernelCapabilities = EVERYTHING) -> MatmulProblem:
    """Build a product: any shape, dtype, magnitude and memory layout, all numbers finite."""
    taken = [pair for pair in DTYPE_PAIRS if able.value_dtypes.issuperset(pair)]
    x_name, values_name = choose.pick(taken)
    x_dtype, values_dtype = value_dtype(x_name), value_dtype(values_name)
    lead, n_out, n_in, fan_in = _product_shape(choose, able)
    few = (n_out, 1, max(1, n_out // 2), max(1, n_out - 1))
    n_active = choose.pick(few) if able.ablation else n_out
    magnitude = choose.pick(MAGNITUDES)
    layout = choose.pick(LAYOUTS) if able.strides else "C"
    bias_dtypes = (None, x_dtype, np.dtype(np.float32), np.dtype(np.float64))
    bias_dtype = choose.pick(bias_dtypes) if able.bias else None
    activation = choose.pick([name for name in ACTIVATIONS if name in able.activations])
    out_dtype = result_dtype(x_dtype, values_dtype)
    if able.out:
        out_dtype = value_dtype(choose.pick(("float32", "float64", "float16", "bfloat16")))
    out_layout = choose.pick(LAYOUTS[:4]) if able.strides else "C"
    rng = choose.generator()
    pattern = CondensedWeight.random(
        (n_out, n_in), fan_in=fan_in, n_active=n_active, dtype=values_dtype, rng=rng
    )
    weight = pattern.with_values(random_numbers(rng, pattern.values.shape, values_dtype, magnitude))
    x = random_inputs(rng, weight, lead, x_dtype, magnitude)
    bias = None if bias_dtype is None else random_numbers(rng, (n_out,), bias_dtype, "normal")
    return MatmulProblem(
        weight,
        laid_out(x, layout),
        laid_out(random_numbers(rng, (*lead, n_out), x_dtype, magnitude), layout),
        bias,
        activation,
        out_dtype,
        out_layout,
        layout,
    )


def _product_shape(
    choose: Chooser, able: KernelCapabilities
) -> tuple[tuple[int, ...], int, int, int]:
    """Choose leading shape, n_out, n_in and fan-in: mostly small, and what only large ones show."""
    lead, n_out, n_in = choose.pick(BATCHES), choose.pick(SIZES), choose.pick(SIZES)
    kinds = []
    if "uint16" in able.index_dtypes:
        kinds += ["small"] * 14 + ["large", "deep", "wide"]
    if "uint32" in able.index_dtypes:
        kinds += ["wider"]
    kind = choose.pick(kinds)
    if kind == "large":
        n_out, n_in, batch = LARGE_PRODUCT
        return (batch,), n_out, n_in, n_in // 2
    if kind != "small":
        n_in = choose.pick({"deep": (DEEP,), "wide": WIDE, "wider": (WIDER,)}[kind])
        lead = lead[:1] and (min(lead[0], 9),)
    fan_in = choose.pick((1, n_in, max(1, n_in // 2), min(n_in, 7)))
    return lead, n_out, n_in, fan_in if kind == "deep" else min(fan_in, SIZES[-1])


def with_subnormal_terms(problem: MatmulProblem, *, values: bool) -> MatmulProblem:
    """Return a problem of the same shapes whose product and gradients have no other terms.

    Subnormal are the values, or else the inputs and gradients.
    """
    rng = np.random.default_rng(0)

    def numbers(like: NDArray[Any], *, subnormal: bool) -> NDArray[Any]:
        scale = float_limits(like.dtype).smallest if subnormal else 1.0
        most = 500 if subnormal else 4
        return np.asarray(rng.integers(1, most, like.shape) * scale).astype(like.dtype)

    weight = problem.weight
    x, grad = (numbers(part, subnormal=not values) for part in (problem.x, problem.grad))
    return replace(
        problem,
        weight=weight.with_values(numbers(weight.values, subnormal=values)),
        x=laid_out(x, problem.layout),
        grad=laid_out(grad, problem.layout),
        bias=None,
    )


def update_problem(choose: Chooser, able: KernelCapabilities = EVERYTHING) -> UpdateProblem:
    """Build a mask update: tie-rich or distinct numbers, any mask, any setting that works."""
    dtype = value_dtype(choose.pick([name for name in UPDATE_DTYPES if name in able.value_dtypes]))
    n_out, n_in = choose.pick(SIZES), choose.pick(SIZES)
    n_out, n_in = choose.pick(((n_out, n_in),) * 14 + LARGE_LAYERS)
    magnitude = choose.pick(UPDATE_MAGNITUDES)
    constant_fan_in = choose.pick((True, False))
    nnz_budget = choose.integer(n_out, n_out * n_in)
    drop_fraction = choose.pick((0.3, 0.0, 1.0, 0.05, 0.5, 0.9))
    taken = able.settings
    gamma_sal = choose.pick((0.3, None, 1.0, 0.9, 0.01, 0.6)) if "gamma_sal" in taken else None
    counted = gamma_sal is None and "min_salient" in taken and choose.integer(0, 1)
    min_salient = choose.integer(0, n_in) if counted else None
    scope = choose.pick(("inactive", "all")) if "saliency_scope" in taken else "inactive"
    grown_init = choose.pick((0.0, 0.5)) if "grown_init" in taken else 0.0
    rng = choose.generator()
    weight = random_numbers(rng, (n_out, n_in), dtype, magnitude)
    grad = random_numbers(rng, (n_out, n_in), dtype, magnitude)
    mask = any_mask(rng, (n_out, n_in), constant_fan_in=constant_fan_in)
    weight[~mask & (rng.random(mask.shape) < 0.5)] = 0
    settings = UpdateSettings(nnz_budget, drop_fraction, gamma_sal, min_salient, scope, grown_init)
    return UpdateProblem(weight, grad, mask, settings)


def random_inputs(
    rng: np.random.Generator,
    weight: CondensedWeight,
    lead: tuple[int, ...],
    dtype: np.dtype[Any],
    magnitude: str,
) -> NDArray[Any]:
    """Return inputs, (..., n_in), of one of `MAGNITUDES`."""
    shape = (*lead, weight.shape[1])
    x = random_numbers(rng, shape, dtype, magnitude)
    if magnitude == "cancelling":
        x[...] = np.where(rng.random(shape) < 0.5, _cancelling(rng, weight), x).astype(dtype)
    return x


def array_of(
    numbers: Any, dtype: str, layout: str = "C", shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    """Return an array of bool or of a value type, by name, in a memory layout of `LAYOUTS`."""
    array = np.array(numbers, bool if dtype == "bool" else value_dtype(dtype))
    return laid_out(array if shape is None else array.reshape(shape), layout)


def laid_out(array: NDArray[Any], layout: str) -> NDArray[Any]:
    """Return the numbers of `array` in a memory layout of `LAYOUTS`."""
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "reversed":
        return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    if layout == "every second":
        wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), 77, array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    if layout == "shared rows" and array.ndim > 1:
        return np.broadcast_to(array[:1], array.shape)
    if layout == "offset by a byte":
        memory = np.empty(array.nbytes + 1, np.uint8)[1:]
        shifted = memory.view(array.dtype).reshape(array.shape)
        shifted[...] = array
        return shifted
    return np.ascontiguousarray(array)


def any_mask(
    rng: np.random.Generator, shape: tuple[int, int], *, constant_fan_in: bool
) -> NDArray[np.bool_]:
    """Return a mask: of any constant fan-in and ablation, or of rows that differ."""
    n_out, n_in = shape
    if not constant_fan_in:
        return rng.random(shape) < rng.random()
    weight = CondensedWeight.random(
        shape,
        fan_in=int(rng.integers(1, n_in + 1)),
        n_active=int(rng.integers(1, n_out + 1)),
        rng=rng,
    )
    return weight.to_mask()


def random_numbers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], magnitude: str
) -> NDArray[Any]:
    """Return finite numbers, of one of `MAGNITUDES` or `UPDATE_MAGNITUDES`."""
    limits = float_limits(dtype)
    numbers: NDArray[Any]
    if magnitude == "integers":
        numbers = rng.integers(-4, 5, shape).astype(np.float64)
    elif magnitude == "zeros":
        numbers = rng.choice([0.0, -0.0, 1.0, -2.0], shape, p=[0.4, 0.3, 0.2, 0.1])
    elif magnitude == "subnormal":
        numbers = rng.integers(-9, 10, shape) * limits.smallest
        numbers = np.where(rng.random(shape) < 0.5, numbers, rng.integers(-3, 4, shape))
    elif magnitude == "close":
        signs = rng.choice([-1.0, 1.0], shape)
        numbers = signs * (1 + rng.integers(0, 16, shape) * 2 * limits.roundoff)
    elif magnitude == "huge":
        numbers = rng.standard_normal(shape) * np.sqrt(limits.largest) / 4
    elif magnitude == "spread":
        reach = 3.0 if dtype == np.float16 else 12.0
        numbers = rng.standard_normal(shape) * 10.0 ** rng.uniform(-reach, reach, shape)
    else:
        numbers = rng.standard_normal(shape)
    return np.asarray(numbers).astype(dtype)


def _cancelling(rng: np.random.Generator, weight: CondensedWeight) -> NDArray[np.float64]:
    """Return inputs, (n_in,), for which the first neuron's terms nearly cancel."""
    x = rng.standard_normal(weight.shape[1])
    values = weight.values[0].astype(np.float64)
    for left, right in zip(range(0, values.size - 1, 2), range(1, values.size, 2), strict=False):
        if values[left] and values[right]:
            ratio = values[left] / values[right]
            x[weight.indices[0, right]] = -x[weight.indices[0, left]] * ratio * (1 + 2.0**-20)
    return x


def special_numbers(shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Return NaN and infinities."""
    return np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf], shape)
