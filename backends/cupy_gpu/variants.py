"""The kernels that a plan can launch: for each, a file and a C++ name expression."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

__all__ = [
    "COMPILER_OPTIONS",
    "CUDA_TYPES",
    "STREAM_ROWS",
    "TILE_LANES",
    "Variant",
    "position_type",
    "stream_product",
    "tile_product",
    "variants",
]

COMPILER_OPTIONS = ("--std=c++17",)
"""Options of NVRTC, besides the architecture and the headers' folders."""

CUDA_TYPES = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
"""CUDA's names of the value types, in the order of `OutputType` in numbers.cuh."""

POSITION_TYPES = {"int32": "int", "int64": "long long"}
"""CUDA's names of the types of positions in the condensed values."""

TILE_LANES = (1, 2, 4, 8)
STREAM_ROWS = (1, 2, 4, 8)
BIT_TYPES = {2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}
"""Types of the bits of a weight, by its bytes; the bits determine the order of magnitudes."""

OF_BITS = (
    *("count_weights", "count_not_finite", "count_digits", "count_ties"),
    *("mark_largest", "fill_rows", "remap_weight"),
)


@dataclass(frozen=True)
class Variant:
    """One kernel.

    Parameters
    ----------
    file : str
        The ``.cu`` file, beside this module.
    name : str
        A C++ name expression.
    """

    file: str
    name: str


def variants() -> tuple[Variant, ...]:
    """Return all kernels that can be compiled."""
    types = CUDA_TYPES.values()
    return (
        *(tile_product(t, lanes) for t, lanes in product(CUDA_TYPES, TILE_LANES)),
        *(
            stream_product(t, rows, staged=staged)
            for t, rows, staged in product(CUDA_TYPES, STREAM_ROWS, (True, False))
        ),
        *(Variant("value_gradient.cu", f"sum_products<{name}>") for name in types),
        *(
            Variant("value_gradient.cu", f"add_splits<{name}, {positions}>")
            for name, positions in product(("float", "double"), POSITION_TYPES.values())
        ),
        *(
            Variant("arrays.cu", f"arrange<{name}, {positions}>")
            for name, positions in product(types, POSITION_TYPES.values())
        ),
        *(
            Variant("arrays.cu", f"{kernel}<{name}>")
            for kernel, name in product(("convert", "sum_columns"), types)
        ),
        *(
            Variant("mask_update.cu", f"{kernel}<{bits}>")
            for kernel, bits in product(OF_BITS, BIT_TYPES.values())
        ),
    )


def position_type(dtype: np.dtype[Any]) -> str:
    """Return CUDA's name of the type of an array of positions."""
    return POSITION_TYPES[dtype.name]


def tile_product(dtype: str, lanes: int) -> Variant:
    """Return the batched product of `dtype` with `lanes` lanes for each neuron."""
    return Variant("tile_product.cu", f"tile_product<{CUDA_TYPES[dtype]}, {lanes}>")


def stream_product(dtype: str, rows: int, *, staged: bool) -> Variant:
    """Return the product of up to `rows` rows, with staged inputs in shared memory."""
    source = "Staged" if staged else "InPlace"
    return Variant("stream_product.cu", f"stream_product<{CUDA_TYPES[dtype]}, {rows}, {source}>")
