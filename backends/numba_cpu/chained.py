"""Products of a chain of layers in one native call (SPEC 7).

A layer's product is one call of a kernel, or one for each width of the tiles. A program lists
these calls for one shape of x: the addresses of the compiled code, and its arguments as they lie in
memory. `_run` makes the calls one after the other. It passes on the input, the result, and two
buffers that hold the results between layers in turn. The code is that which the plans of the
layers call, so the bits are theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from srigl_core.backends.numba_cpu.calling import (
    Arguments,
    Launcher,
    NativeCode,
    compiled_code,
    native_code,
)
from srigl_core.backends.numba_cpu.compiling import kernel
from srigl_core.backends.numba_cpu.scratch import scratch
from srigl_core.backends.numba_cpu.simd import flat
from srigl_core.backends.numba_cpu.threads import is_small

__all__ = ["Chained"]

Array = NDArray[Any]

MOST_PROGRAMS = 64
"""Shapes of x whose programs a chain keeps."""

INPUT, RESULT = -1, -2
"""Where a call reads or writes, if that is not a buffer, given in bytes from the first one."""

FIRST_CALL, CALL_WORDS = 1, 6
LINE = 64


class Program(NamedTuple):
    """The calls of a chain for one shape of x."""

    run: Callable[[Array, Array, Array], None]
    """Compiled code of `_run`."""
    words: Array
    """How many numbers the buffers hold; then for each call: the number of its words, addresses of
    its two functions, its number of items, where it reads and writes, and its arguments."""
    work: float
    """Estimated nanoseconds of the layer that takes longest, on one thread."""
    kept: Any
    """Arrays whose addresses are in `words`."""


class Chained:
    """A chain, prepared.

    Parameters
    ----------
    layers : sequence of ChainLayer
        Their `prepared` have the methods `calls` and `work`, as `NumbaPrepared` has them. Products
        with int8 inputs have them where `byte_products` computes them.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._programs: dict[tuple[int, ...], Program] = {}

    def matmul_fast(self, x: Array, bias: None, code: int, out: Array, threads: int | None) -> None:
        """Write the chain's result for `x` to `out`."""
        run, words, work, _ = self._programs.get(x.shape) or self._keep_program(x, out)
        if threads == 1 or is_small(threads, work):
            run(words, x, out)
        else:
            self._call_each(x, out, threads)

    def _keep_program(self, x: Array, out: Array) -> Program:
        if len(self._programs) == MOST_PROGRAMS:
            self._programs.clear()
        program = self._programs[x.shape] = self._make_program(x, out)
        return program

    def _call_each(self, x: Array, out: Array, threads: int | None) -> None:
        """Compute layer by layer, so that threads share the work of each."""
        *others, last = self._layers
        for layer in others:
            result = np.empty((*x.shape[:-1], layer.prepared.weight.shape[0]), x.dtype)
            layer.prepared.matmul_fast(x, layer.bias, layer.code, result, threads)
            x = result
        last.prepared.matmul_fast(x, last.bias, last.code, out, threads)

    def _make_program(self, x: Array, out: Array) -> Program:
        batch, itemsize = 1 if x.ndim == 1 else len(x), x.itemsize
        widest = max([0, *(layer.prepared.weight.shape[0] for layer in self._layers[:-1])])
        size = -(-batch * widest // LINE) * LINE
        buffers = [i % 2 * size * itemsize for i in range(len(self._layers) - 1)]
        ends = [INPUT, *buffers, RESULT]
        words, kept = [2 * size], []
        for layer, *places in zip(self._layers, ends[:-1], ends[1:], strict=True):
            n_out, n_in = layer.prepared.weight.shape
            arrays = np.empty((batch, n_in), x.dtype), np.empty((batch, n_out), x.dtype)
            calls = layer.prepared.calls(arrays[0], layer.bias, arrays[1], layer.code)
            for launch, n_items, arguments in calls:
                words += _call_words(launch, n_items, arguments, arrays, places)
                kept += [part for part in arguments if not any(part is each for each in arrays)]
        program = np.array(words, np.int64)
        work = max(layer.prepared.work(batch) for layer in self._layers)
        return Program(compiled_code(_run, (program, x, out)), program, work, kept)


def _call_words(
    launch: Launcher,
    n_items: int,
    arguments: Arguments,
    ends: tuple[Array, Array],
    places: Sequence[int],
) -> list[int]:
    """Return a call's part of a program; `ends` stand for x and out among the arguments.

    The layout keeps the code of its kernel, and the cache of `_passing` its own.
    """
    positions = tuple(
        next(i for i, argument in enumerate(arguments) if argument is end) for end in ends
    )
    code = launch.native(arguments)
    pass_on = _passing(code.signature[1], positions)
    words = _words(arguments)
    return [CALL_WORDS + len(words), pass_on.address, code.address, n_items, *places, *words]


def _words(arguments: Arguments) -> list[int]:
    """Return the words that a tuple of arrays, ints and such tuples has in compiled code."""
    words = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            owner = parent = 0
            data = argument.ctypes.data
            words += [owner, parent, argument.size, argument.itemsize, data]
            words += [*argument.shape, *argument.strides]
        elif isinstance(argument, tuple):
            words += _words(argument)
        else:
            words.append(argument)
    return words


@functools.cache
def _passing(arguments_type: Any, positions: tuple[int, ...]) -> NativeCode:
    """Return the native code that calls a kernel with arguments in memory.

    It is called as ``(kernel, n_items, arguments, x, out)``, with addresses. `positions` are those
    of x and out among the arguments.
    """

    @intrinsic
    def call(typing_context: Any, code: Any, n_items: Any, memory: Any, ends: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code, n_items, memory, ends = args
            pointer = context.get_value_type(arguments_type).as_pointer()
            stored = builder.load(builder.inttoptr(memory, pointer))
            for position, address in zip(
                positions, cgutils.unpack_tuple(builder, ends), strict=True
            ):
                array = context.make_array(arguments_type[position])(
                    context, builder, builder.extract_value(stored, position)
                )
                array.data = builder.inttoptr(address, array.data.type)
                stored = builder.insert_value(stored, array._getvalue(), position)
            argument_types = (types.int64, arguments_type)
            _call(context, builder, code, argument_types, (n_items, stored))
            return context.get_dummy_value()

        return types.void(code, n_items, memory, ends), generate

    @kernel()
    def pass_on(code, n_items, memory, x, out):
        call(code, n_items, memory, (x, out))

    return native_code(pass_on, (types.int64,) * 5)


@intrinsic
def _call_address(typing_context: Any, address: Any, numbers: Any) -> Any:
    """Call native code by its address; `numbers`, a tuple of int64, are its arguments."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, packed = args
        _call(context, builder, code, tuple(numbers), cgutils.unpack_tuple(builder, packed))
        return context.get_dummy_value()

    return types.void(address, numbers), generate


def _call(context: Any, builder: Any, address: Any, argument_types: Any, args: Any) -> None:
    """Call code of Numba's calling convention, and pass on its error."""
    convention = context.call_conv
    function = convention.get_function_type(types.none, argument_types)
    pointer = builder.inttoptr(address, ir.PointerType(function))
    status, _ = convention.call_function(builder, pointer, types.none, argument_types, args)
    with cgutils.if_unlikely(builder, status.is_error):
        convention.return_status_propagate(builder, status)


@kernel()
def _run(program, x, out):
    """Make the calls of a program."""
    # The buffers are an argument, so that they are kept until all calls have ended.
    ends = np.int64(x.ctypes.data), np.int64(out.ctypes.data)
    _call_all(program, ends, scratch(program[0], flat(x)))


@kernel()
def _call_all(program, ends, buffers):
    memory, at = np.int64(buffers.ctypes.data), FIRST_CALL
    while at < program.size:
        call = program[at:]
        source = ends[0] if call[4] == INPUT else memory + call[4]
        target = ends[1] if call[5] == RESULT else memory + call[5]
        arguments = np.int64(call[CALL_WORDS:].ctypes.data)
        _call_address(call[1], (call[2], call[3], arguments, source, target))
        at += call[0]
