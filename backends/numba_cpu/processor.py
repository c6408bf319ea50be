"""What the kernels may ask of the processor that Numba compiles for.

That is the machine's own unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES says otherwise.
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
    "has_half_precision",
    "target_features",
    "vector_bytes",
]

_FIRST_LEVEL, _SECOND_LEVEL = 32 << 10, 512 << 10
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@functools.cache
def target_features() -> frozenset[str]:
    """Return the features that compiled code may use, by LLVM's names.

    A processor that NUMBA_CPU_NAME names is trusted with those of NUMBA_CPU_FEATURES alone: what
    the machine has besides is not meant to be used then.
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
    """Whether kernels may hold 16 float32 in a register, and look up in two of them."""
    return "avx512f" in target_features()


def has_half_precision() -> bool:
    """Whether there are instructions that convert float16; LLVM calls a function where not."""
    return bool(target_features() & {"f16c", "avx512f", "fullfp16", "neon"})


def vector_bytes() -> int:
    """Return the bytes of a vector register, of which there are 32 if it has 64 bytes, else 16."""
    return 64 if has_avx512() else 32


@functools.cache
def cache_bytes() -> tuple[int, int]:
    """Return the bytes of a core's first-level data cache and of its second-level cache."""
    found = {1: _FIRST_LEVEL, 2: _SECOND_LEVEL}
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size")
            )
            if kind != "Instruction" and int(level) in found and size.endswith("K"):
                found[int(level)] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    return found[1], found[2]


def describe_processor() -> dict[str, object]:
    """Return what is compiled for, and which kernels that allows."""
    return {
        "compiles for": numba.config.CPU_NAME or llvm.get_host_cpu_name(),
        "register lookup": "yes" if has_avx512() else "no: needs AVX-512",
    }
