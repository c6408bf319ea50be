"""Switch pool threads to IEEE arithmetic while they run a kernel (SPEC 2, subnormals).

The public functions do that for the calling thread. A pool thread has its own mode, which it
inherits from the thread that started the pool.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["honour_subnormals", "restore_float_mode"]

_MACHINE = platform.machine().lower()
_IS_X86 = _MACHINE in ("x86_64", "amd64", "i386", "i686")
_IS_ARM = _MACHINE in ("aarch64", "arm64")
_I32, _I64 = ir.IntType(32), ir.IntType(64)
# MXCSR: flush-to-zero and denormals-are-zero. FPCR: flush-to-zero, of 16-bit numbers too.
_X86_FLUSH, _ARM_FLUSH = (1 << 15) | (1 << 6), (1 << 24) | (1 << 19)


@intrinsic
def honour_subnormals(typing_context: Any) -> Any:
    """Make this thread compute with subnormals, and return its previous mode as uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _IS_X86:
            slot = cgutils.alloca_once(builder, _I32)
            _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), slot)
            mode = builder.load(slot)
            builder.store(builder.and_(mode, _I32(~_X86_FLUSH & 0xFFFFFFFF)), slot)
            _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), slot)
            return builder.zext(mode, _I64)
        if _IS_ARM:
            mode = _call(builder, "llvm.aarch64.get.fpcr", _I64)
            cleared = builder.and_(mode, _I64(~_ARM_FLUSH & 0xFFFFFFFFFFFFFFFF))
            _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), cleared)
            return mode
        return _I64(0)

    return types.uint64(), generate


@intrinsic
def restore_float_mode(typing_context: Any, mode: Any) -> Any:
    """Restore the mode that `honour_subnormals` returned."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _IS_X86:
            slot = cgutils.alloca_once(builder, _I32)
            builder.store(builder.trunc(args[0], _I32), slot)
            _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), slot)
        elif _IS_ARM:
            _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), args[0])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    byte_pointer = ir.IntType(8).as_pointer()
    args = tuple(
        builder.bitcast(arg, byte_pointer) if isinstance(arg.type, ir.PointerType) else arg
        for arg in args
    )
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)
