"""Features of the processor that Numba compiles for.

It is this machine's processor unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES names another.
"""

from __future__ import annotations

import functools
from pathlib import Path

import llvmlite.binding as llvm
import numba

__all__ = [
    "cache_bytes",
    "describe_processor",
    "has_avx512",
    "has_byte_lookup",
    "has_byte_products",
    "has_half_precision",
    "target_features",
    "vector_bytes",
    "vector_registers",
]

_FIRST_LEVEL, _SECOND_LEVEL = 32 << 10, 512 << 10
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@functools.cache
def target_features() -> frozenset[str]:
    """Return the features that compiled code may use, by LLVM's names.

    If NUMBA_CPU_NAME names another processor, these are only the features in NUMBA_CPU_FEATURES.
    """
    named = numba.config.CPU_NAME
    features = numba.config.CPU_FEATURES
    if features is None:
        if named is not None and named != llvm.get_host_cpu_name():
            return frozenset()
        features = llvm.get_host_cpu_features().flatten()
    words = [word.strip() for word in features.split(",")]
    return frozenset(word[1:] for word in words if word.startswith("+"))


def has_avx512() -> bool:
    """Whether registers hold 16 float32."""
    return "avx512f" in target_features()


def has_byte_lookup() -> bool:
    """Whether one instruction looks up 64 bytes in two registers."""
    return target_features() >= {"avx512f", "avx512bw", "avx512vbmi"}


def has_byte_products() -> bool:
    """Whether one instruction looks up 64 bytes, and another adds four of their products a lane."""
    return has_byte_lookup() and "avx512vnni" in target_features()


def has_half_precision() -> bool:
    """Whether there are instructions that convert float16; otherwise LLVM calls a function."""
    return bool(target_features() & {"f16c", "avx512f", "fullfp16", "neon"})


def vector_bytes() -> int:
    """Return the bytes of a vector register: 64 with AVX-512, 32 with AVX, else 16."""
    if has_avx512():
        return 64
    return 32 if "avx" in target_features() else 16


def vector_registers() -> int:
    """Return the number of vector registers: 32 with AVX-512 and on ARM, else 16."""
    return 32 if has_avx512() or "neon" in target_features() else 16


@functools.cache
def cache_bytes() -> tuple[int, int]:
    """Return the bytes of a core's first-level data cache and of its second-level cache."""
    sizes = {1: _FIRST_LEVEL, 2: _SECOND_LEVEL}
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, cache_type, size = (
                (index / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size")
            )
            if cache_type != "Instruction" and int(level) in sizes and size.endswith("K"):
                sizes[int(level)] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    return sizes[1], sizes[2]


def describe_processor() -> dict[str, object]:
    """Return the target processor, and whether it can run the kernels that look up bytes."""
    return {
        "compiles for": numba.config.CPU_NAME or llvm.get_host_cpu_name(),
        "byte planes": "yes" if has_byte_lookup() else "no: needs AVX-512 VBMI",
        "byte products": "yes" if has_byte_products() else "no: needs AVX-512 VBMI and VNNI",
    }
