"""Working memory inside a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from srigl_core.backends.numba_cpu.compiling import kernel

__all__ = ["registers", "scratch"]


@kernel()
def scratch(size, like):
    """Return uninitialised memory of the dtype of `like`, aligned to a cache line."""
    spare = 64 // like.itemsize
    memory = np.empty(size + spare, like.dtype)
    skip = (-memory.ctypes.data % 64) // like.itemsize
    return memory[skip : skip + size]


@intrinsic(prefer_literal=True)
def registers(typing_context: Any, size: Any, like: Any) -> Any:
    """Return uninitialised memory of the dtype of `like` on the stack, of a constant size.

    It is for a vector whose lanes are used one by one. LLVM keeps it in registers where it can.
    The caller must not return it.
    """
    if not isinstance(size, types.IntegerLiteral):
        raise TypingError("the size must be a constant of the source")
    n, line = size.literal_value, types.Array(like.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(line.dtype)
        itemsize = context.get_abi_sizeof(element)
        memory = cgutils.alloca_once(builder, ir.ArrayType(element, n))
        memory.align = 64
        array, intp = make_array(line)(context, builder), context.get_constant
        populate_array(
            array,
            data=builder.bitcast(memory, element.as_pointer()),
            shape=[intp(types.intp, n)],
            strides=[intp(types.intp, itemsize)],
            itemsize=intp(types.intp, itemsize),
            meminfo=None,
        )
        return array._getvalue()

    return line(size, like), generate
