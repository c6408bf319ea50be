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

from srigl_core._arrays.dtypes import result_dtype, value_dtype
from srigl_core._format.weight import CondensedWeight
from srigl_core._update import UpdateSettings
from srigl_core.contract import ACTIVATIONS
from srigl_core.errors import SriglError
from srigl_core.reference.mask_update import srigl_update
from srigl_core.testing.bounds import float_limits
from srigl_core.testing.kernel_capabilities import KernelCapabilities

__all__ = [
    "BATCHES",
    "DISTINCT_LAYOUTS",
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
OUT_LAYOUTS = ("C", "F", "reversed", "every second", "rows reversed", "F within a larger array")
DISTINCT_LAYOUTS = (*OUT_LAYOUTS, "offset by a byte")
LAYOUTS = (*DISTINCT_LAYOUTS, "shared rows", "shared columns")
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
    ("float64", "float16"),
    ("bfloat16", "float64"),
)
UPDATE_DTYPES = ("float32", "float64", "float16", "bfloat16")
EVERYTHING = KernelCapabilities()
WIDE = (50_000, 65_536)  # more columns than int16 can number, and all that uint16 can
WIDER = (70_000,)
DEEP = 1_025  # connections of a neuron: more than vectors, warps or blocks of threads sum at once
TALL = (1_100, 66_000)  # neurons: more than a block of threads, and than uint16 can number
LONG = 1_100  # rows of a batch
LARGE_PRODUCT = (130, 131, 200)  # n_out, n_in, batch: enough work for threads to be worth it
LARGE_LAYERS = ((401, 399), (3, 70_000), (1_100, 5))


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
        left = next(self._left, None)
        if left is None:
            raise SriglError(
                "the choices end before the problem is complete; they were made for a kernel of "
                "other capabilities, or by another version"
            )
        return min(max(left, least), most)


@dataclass(frozen=True, eq=False)
class MatmulProblem:
    """A product and its gradients.

    Parameters
    ----------
    weight : CondensedWeight, (n_out, n_in)
    x : ndarray, (..., n_in)
    grad : ndarray, (..., n_out)
    bias : ndarray, (n_out,), or None
    activation : str
    out_dtype : numpy.dtype
        A type to write results in.
    out_layout, layout, grad_layout, bias_layout : str
        Those of `LAYOUTS` that results are written in, and that `x`, `grad` and `bias` have.
    """

    weight: CondensedWeight
    x: NDArray[Any]
    grad: NDArray[Any]
    bias: NDArray[Any] | None
    activation: str
    out_dtype: np.dtype[Any]
    out_layout: str = "C"
    layout: str = "C"
    grad_layout: str = "C"
    bias_layout: str = "C"

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
    pairs = (*3 * DTYPE_PAIRS[:1], *DTYPE_PAIRS)  # what most calls are made with comes more often
    taken = [pair for pair in pairs if able.value_dtypes.issuperset(pair)]
    x_dtype, values_dtype = map(value_dtype, choose.pick(taken))
    lead, n_out, n_in, fan_in = _product_shape(choose, able)
    few = (n_out, 1, max(1, n_out // 2), max(1, n_out - 1))
    n_active = min(choose.pick(few), TALL[0]) if able.ablation else n_out
    magnitude = choose.pick(MAGNITUDES)
    layouts = LAYOUTS if able.strides else LAYOUTS[:1]
    layout, grad_layout, bias_layout = (choose.pick(layouts) for _ in range(3))
    grad_dtype = choose.pick(_grad_dtypes(x_dtype, values_dtype, able))
    bias_dtypes = (None, x_dtype, np.dtype(np.float32), np.dtype(np.float64))
    bias_dtype = choose.pick(bias_dtypes) if able.bias else None
    bias_magnitude = choose.pick(("normal", magnitude))
    activation = choose.pick([name for name in ACTIVATIONS if name in able.activations])
    out_dtype = result_dtype(x_dtype, values_dtype)
    if able.out:
        out_dtype = value_dtype(choose.pick(("float32", "float64", "float16", "bfloat16")))
    out_layout = choose.pick(OUT_LAYOUTS) if able.strides else "C"
    rng = choose.generator()
    weight = _random_weight(rng, (n_out, n_in), fan_in, n_active, values_dtype, magnitude)
    x = random_inputs(rng, weight, lead, x_dtype, magnitude)
    grad = random_numbers(rng, (*lead, n_out), grad_dtype, magnitude)
    bias = None
    if bias_dtype is not None:
        bias = laid_out(random_numbers(rng, (n_out,), bias_dtype, bias_magnitude), bias_layout)
    return MatmulProblem(
        weight,
        laid_out(x, layout),
        laid_out(grad, grad_layout),
        bias,
        activation,
        out_dtype,
        out_layout,
        layout,
        grad_layout,
        bias_layout,
    )


def _product_shape(
    choose: Chooser, able: KernelCapabilities
) -> tuple[tuple[int, ...], int, int, int]:
    """Choose leading shape, n_out, n_in and fan-in: mostly small, and what only large ones show."""
    kinds = []
    if "uint16" in able.index_dtypes:
        kinds += ["small"] * 30 + ["large", "deep", "tall", "long", "wide"]
    if "uint32" in able.index_dtypes:
        kinds += ["wider"]
    kind = choose.pick(kinds)  # first: a failure is made small choice by choice, in their order
    lead, n_out, n_in = choose.pick(BATCHES), choose.pick(SIZES), choose.pick(SIZES)
    if kind == "large":
        n_out, n_in, batch = LARGE_PRODUCT
        return (batch,), n_out, n_in, n_in // 2
    if kind == "deep":
        return _at_most(lead, 33), min(n_out, 8), DEEP, choose.pick((DEEP, DEEP // 2))
    if kind == "long":
        lead, n_out, n_in = (LONG,), min(n_out, 8), min(n_in, 8)
    elif kind == "tall":
        lead, n_out = _at_most(lead, 1), choose.pick(TALL if able.ablation else TALL[:1])
    elif kind in ("wide", "wider"):
        lead, n_in = _at_most(lead, 2), choose.pick(WIDE if kind == "wide" else WIDER)
    fan_in = choose.pick((1, n_in, max(1, n_in // 2), min(n_in, 7), min(n_in, 2)))
    return lead, n_out, n_in, min(fan_in, SIZES[-1])


def _at_most(lead: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return lead[:1] and (min(lead[0], rows),)


def _grad_dtypes(
    x_dtype: np.dtype[Any], values_dtype: np.dtype[Any], able: KernelCapabilities
) -> list[np.dtype[Any]]:
    """Return dtypes that a gradient may have beside such inputs, that of the inputs first."""
    others = {"float16": "bfloat16", "bfloat16": "float16"}
    refused = {others.get(x_dtype.name), others.get(values_dtype.name)}
    found = [value_dtype(name) for name in UPDATE_DTYPES if name in able.value_dtypes - refused]
    return [x_dtype, x_dtype, *found]


def _random_weight(
    rng: np.random.Generator,
    shape: tuple[int, int],
    fan_in: int,
    n_active: int,
    dtype: np.dtype[Any],
    magnitude: str,
) -> CondensedWeight:
    """Return a weight, whose first neuron is connected to the last column, and to the first."""
    pattern = CondensedWeight.random(shape, fan_in=fan_in, n_active=n_active, rng=rng)
    indices = pattern.indices.copy()
    indices[0, 0] = 0
    indices[0, -1] = shape[1] - 1
    values = random_numbers(rng, indices.shape, dtype, magnitude)
    return CondensedWeight(values, indices, pattern.active, shape)


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
        grad=laid_out(grad, problem.grad_layout),
        bias=None,
    )


def update_problem(choose: Chooser, able: KernelCapabilities = EVERYTHING) -> UpdateProblem:
    """Build a mask update: tie-rich or distinct numbers, any mask, any setting that works."""
    dtypes = [value_dtype(name) for name in UPDATE_DTYPES if name in able.value_dtypes]
    dtype = choose.pick(dtypes)
    grad_dtype = choose.pick((dtype, dtype, *dtypes))
    large = choose.pick((None,) * 24 + LARGE_LAYERS)
    n_out, n_in = choose.pick(SIZES), choose.pick(SIZES)
    n_out, n_in = large or (n_out, n_in)
    magnitude = choose.pick((*UPDATE_MAGNITUDES, "zeros", "zeros"))
    density = choose.pick((None, None, None, "any", "any", "any", "none", "all"))
    nnz_budget = choose.integer(choose.pick((n_out, n_out, n_out, 1)), n_out * n_in)
    drop_fraction = choose.pick((0.3, 0.0, 0.0, 1.0, 0.05, 0.5, 0.9, None))
    taken = able.settings
    gamma_sal = choose.pick((0.3, None, 1.0, 0.9, 0.01, 0.6)) if "gamma_sal" in taken else None
    is_too_little = choose.pick((False, False, False, True))
    counted = gamma_sal is None and "min_salient" in taken and choose.integer(0, 1)
    counts = (choose.integer(0, n_in), choose.pick((n_in + 1, 2**40)))
    min_salient = choose.pick((*3 * counts[:1], counts[1])) if counted else None
    scope = choose.pick(("inactive", "all")) if "saliency_scope" in taken else "inactive"
    grown_init = choose.pick((0.0, 0.5, -0.1, 1e-8)) if "grown_init" in taken else 0.0
    unseen = choose.pick((0.0, 0.0, np.nan))
    rng = choose.generator()
    weight = random_numbers(rng, (n_out, n_in), dtype, magnitude)
    grad = random_numbers(rng, (n_out, n_in), grad_dtype, magnitude)
    mask = any_mask(rng, (n_out, n_in), constant_fan_in=density is None)
    if density in ("none", "all"):
        mask[...] = density == "all"
    weight[~mask & (rng.random(mask.shape) < 0.5)] = unseen
    if drop_fraction is None:
        drop_fraction = _just_too_little(rng, int(np.count_nonzero(mask)))
    if gamma_sal is not None and is_too_little:
        gamma_sal = _just_too_little(rng, nnz_budget // n_out)
    settings = UpdateSettings(
        nnz_budget,
        drop_fraction,
        gamma_sal=gamma_sal,
        min_salient=min_salient,
        saliency_scope=scope,
        grown_init=grown_init,
    )
    if nnz_budget < n_out and not _is_enough(weight, grad, mask, settings):
        settings = replace(settings, nnz_budget=n_out)
    return UpdateProblem(weight, grad, mask, settings)


def _is_enough(
    weight: NDArray[Any], grad: NDArray[Any], mask: NDArray[np.bool_], settings: UpdateSettings
) -> bool:
    """Whether a budget of less than a weight for each neuron is one for each that survives."""
    try:
        srigl_update(weight, grad, mask, settings)
    except SriglError:
        return False
    return True


def _just_too_little(rng: np.random.Generator, whole: int) -> float:
    """Return a fraction of which `whole` times it is, in float64, below an integer by a hair."""
    return float(np.nextafter(rng.integers(1, max(whole, 1), endpoint=True) / max(whole, 1), 0))


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
        most = float_limits(dtype).largest
        cancelling = np.clip(_cancelling(rng, weight), -most, most).astype(dtype)
        x[...] = np.where(rng.random(shape) < 0.5, cancelling, x)
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
    if layout == "rows reversed":
        return np.ascontiguousarray(array[::-1])[::-1]
    if layout == "F within a larger array":
        larger = np.full((array.shape[0] + 1, *array.shape[1:]), 77, array.dtype, order="F")
        larger[:-1] = array
        return larger[:-1]
    if layout == "offset by a byte":
        memory = np.empty(array.nbytes + 1, np.uint8)[1:]
        shifted = memory.view(array.dtype).reshape(array.shape)
        shifted[...] = array
        return shifted
    if layout == "shared rows" and array.ndim > 1:
        return np.broadcast_to(array[:1], array.shape)
    if layout == "shared columns":
        return np.broadcast_to(array[..., :1], array.shape)
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
    """Return NaN, of few bits and of all, and infinities."""
    full = np.array([2**63 - 1, 2**64 - 1], np.uint64).view(np.float64)
    return np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf, *full], shape)
