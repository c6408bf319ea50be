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
    "VALUE_TYPES",
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
"""CUDA's names of the types of inputs and results, in the order of `OutputType` in numbers.cuh."""

VALUE_TYPES = {**CUDA_TYPES, "int8": "signed char"}
"""CUDA's names of the types of values, in the same order; those of 8 bits are quantised."""

POSITION_TYPES = {"int32": "int", "int64": "long long"}
"""CUDA's names of the types of positions in the condensed values."""

TILE_LANES = (1, 2, 4, 8)
STREAM_ROWS = (1, 2, 4, 8)
BIT_TYPES = {2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}
"""Types of the bits of a weight, by its bytes; the bits determine the order of magnitudes."""

OF_BITS = (
    *("count_weights", "count_digits", "count_ties"),
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
        *(
            tile_product(dtype, lanes, quantized=quantized)
            for dtype, lanes, quantized in product(CUDA_TYPES, TILE_LANES, (False, True))
        ),
        *(
            stream_product(dtype, rows, staged=staged, quantized=quantized)
            for dtype, rows, staged, quantized in product(
                CUDA_TYPES, STREAM_ROWS, (True, False), (False, True)
            )
        ),
        *(Variant("value_gradient.cu", f"sum_products<{name}>") for name in types),
        *(
            Variant("value_gradient.cu", f"add_splits<{name}, {positions}>")
            for name, positions in product(("float", "double"), POSITION_TYPES.values())
        ),
        *(
            Variant("arrays.cu", f"arrange<{name}, {positions}>")
            for name, positions in product(VALUE_TYPES.values(), POSITION_TYPES.values())
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


def tile_product(dtype: str, lanes: int, *, quantized: bool) -> Variant:
    """Return the batched product of inputs of `dtype`, with `lanes` lanes for each neuron.

    Values are of `dtype`, too, unless they are quantised.
    """
    values = VALUE_TYPES["int8" if quantized else dtype]
    return Variant("tile_product.cu", f"tile_product<{CUDA_TYPES[dtype]}, {lanes}, {values}>")


def stream_product(dtype: str, rows: int, *, staged: bool, quantized: bool) -> Variant:
    """Return the product of up to `rows` rows, with staged inputs in shared memory.

    Inputs and values have types as those of `tile_product`.
    """
    source, values = "Staged" if staged else "InPlace", VALUE_TYPES["int8" if quantized else dtype]
    name = f"stream_product<{CUDA_TYPES[dtype]}, {rows}, {source}, {values}>"
    return Variant("stream_product.cu", name)
