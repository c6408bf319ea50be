"""Check the GPU kernels: every law, and exact results at awkward shapes.

    python check_kernels.py [--examples N] [--seed N] [--setting NAME ...] [--only NAME ...]  # CPU
    python check_kernels.py --device [--examples N]                    # on a CUDA device, by CuPy

Prints one JSON object: what failed, how many examples were tried, and the variants launched. Under
the sanitizers (`host_device.run_sanitized`) memory errors end the process.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from host_device import KernelError, tight_empty
from simulated import KERNELS, SETTINGS, simulated_backend
from through_host import ThroughHost

from srigl_core import CondensedWeight, QuantizedWeight, get_backend, prepare, update_mask
from srigl_core._arrays.dtypes import VALUE_TYPES, round_to, value_dtype
from srigl_core.backends.cupy_gpu import launch_model
from srigl_core.backends.cupy_gpu.conversions import converted
from srigl_core.backends.cupy_gpu.gpu_backend import GpuBackend
from srigl_core.errors import SriglError
from srigl_core.testing import verify

SHAPES = [  # n_in, n_active, fan_in, batch
    *((100, 20, 60, batch) for batch in (1, 2, 4, 8)),
    (1, 1, 1, 1),
    (5, 9, 5, 3),
    (33, 70, 4, 8),
    (33, 1, 33, 9),
    (100, 70, 7, 33),
    (17, 300, 9, 20),
    (40, 33, 1, 70),
    (17, 600, 9, 3),  # more neurons than the warps of a small device have at once
    (700, 150, 33, 33),  # several trips to stage a tile, and passes of a block's warps
]
MOST_SEGMENTS = 40
BATCH_OF_FAR_INPUTS = 3
LAYERS = [(1, 1), (5, 600), (300, 7), (20, 257)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=4, help="of each law")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", nargs="*", default=list(SETTINGS))
    parser.add_argument("--kernels", type=Path, default=KERNELS)
    parser.add_argument("--only", nargs="*", help="exact checks to make, by what they are of")
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--exitfirst", action="store_true", help="nothing after a failure")
    parser.add_argument("--device", action="store_true")
    parser.add_argument(
        "--without-pool", action="store_true", help="each array in memory of its own, to be watched"
    )
    options = parser.parse_args(arguments)
    if options.device:
        sys.exit(_check_device(options))
    failures = []
    launched: set[Any] = set()
    examples = 0
    for name in options.setting:
        device = {"folder": options.kernels, "one_by_one": options.one_by_one}
        with simulated_backend(SETTINGS[name], **device) as backend:
            failed, count = _tried(name, backend, options)
            failures += failed
            examples += count
            launched |= backend.device.launched
    names = sorted(f"{variant.file} {variant.name}" for variant in launched)
    print(json.dumps({"failures": failures, "examples": examples, "launched": names}))


def _check_device(options: argparse.Namespace) -> int:
    """Check on the CUDA device; return the exit code."""
    try:
        backend = ThroughHost(get_backend("cupy"))
    except SriglError as error:
        print(error, file=sys.stderr)
        return 2
    if options.without_pool:
        import cupy

        cupy.cuda.set_allocator(None)
    failures, examples = _tried("device", backend, options)
    print(json.dumps({"failures": failures, "examples": examples}))
    return int(bool(failures))


def _tried(where: str, backend: Any, options: argparse.Namespace) -> tuple[list[str], int]:
    """Return what failed, and how many examples were tried."""
    failures, examples = [], 0
    for what, count in _checks(backend, options):
        examples += count
        if what:
            failures.append(f"{where}: {what}")
            if options.exitfirst:
                break
    return failures, examples


def _checks(backend: GpuBackend, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield what failed, "" if nothing, and how many examples were tried."""
    for check in [CHECKS[name] for name in options.only or CHECKS]:
        try:
            yield from check(backend)
        except KernelError as error:
            yield f"{check.__name__}: {error}", 1
    if options.examples:
        for result in verify(backend, max_examples=options.examples, seed=options.seed).results:
            yield str(result) if result.status == "failed" else "", result.examples


def _problems(backend: Any) -> Iterator[tuple[np.random.Generator, CondensedWeight, Any, Any]]:
    """Yield small integers, whose products are exact in each type."""
    shared_bytes = backend.device.properties.block_shared_bytes
    for number, ((n_in, n_active, fan_in, batch), name) in enumerate(
        (shape, name) for shape in SHAPES for name in VALUE_TYPES
    ):
        if n_in * 64 > MOST_SEGMENTS * shared_bytes:
            continue  # a simulated device would take minutes
        rng, dtype = np.random.default_rng(number), value_dtype(name)
        n_out = n_active + number % 3
        weight = CondensedWeight.random((n_out, n_in), fan_in=fan_in, n_active=n_active, rng=rng)
        values = rng.integers(-2, 3, weight.values.shape).astype(dtype)
        weight = CondensedWeight(values, weight.indices, weight.active, weight.shape)
        yield rng, weight, rng.integers(-2, 3, (batch, n_in)).astype(dtype), dtype


def _exact_products(backend: GpuBackend) -> Iterator[tuple[str, int]]:
    for rng, condensed, x, dtype in _problems(backend):
        bias = rng.integers(-2, 3, condensed.shape[0]).astype(dtype)
        for weight in (condensed, _quantized(condensed, rng)):
            expected = x.astype(float) @ weight.to_dense().astype(float).T + bias.astype(float)
            plan = prepare(weight, backend=backend)
            for compact in (False, True):
                got = plan(x, bias, compact=compact).astype(float)
                wanted = expected[:, weight.active] if compact else expected
                yield _difference(f"product of {weight}, {len(x)} rows", got, wanted), 1
            got = plan(x, bias, activation="relu").astype(float)
            yield _difference(f"relu of {weight}, {len(x)} rows", got, np.maximum(expected, 0)), 1


def _quantized(weight: CondensedWeight, rng: np.random.Generator) -> QuantizedWeight:
    """Return a weight on the same connections, whose scales are powers of two."""
    values = rng.integers(-127, 128, weight.values.shape).astype(np.int8)
    scale = 2.0 ** rng.integers(-3, 4, weight.n_active)
    return QuantizedWeight.from_connections(values, scale.astype(np.float32), weight.connections)


def _exact_gradients(backend: GpuBackend) -> Iterator[tuple[str, int]]:
    for rng, weight, x, dtype in _problems(backend):
        grad = rng.integers(-2, 3, (len(x), weight.shape[0])).astype(dtype)
        got = prepare(weight, backend=backend).backward(grad, x)
        wide = grad.astype(float)
        dense = wide.T @ x.astype(float)
        columns = weight.indices.astype(np.int64)
        expected = {
            "x": wide @ weight.to_dense().astype(float),
            "values": np.take_along_axis(dense[weight.active], columns, axis=1),
            "bias": wide.sum(axis=0),
        }
        for name, wanted in expected.items():
            what = f"gradient of {name} of {weight}, {len(x)} rows"
            yield _difference(what, getattr(got, name).astype(float), wanted), 1


def _exact_updates(backend: GpuBackend) -> Iterator[tuple[str, int]]:
    """Many ties, and rows longer and shorter than a block."""
    for number, (shape, name) in enumerate((s, n) for s in LAYERS for n in VALUE_TYPES):
        rng, dtype = np.random.default_rng(number), value_dtype(name)
        mask = rng.random(shape) < 0.3
        weight = rng.integers(-3, 4, shape).astype(dtype)
        grad = rng.integers(-3, 4, shape).astype(dtype)
        settings: dict[str, Any] = {
            "nnz_budget": max(shape[0], int(0.3 * mask.size)),
            "drop_fraction": (0.3, 0.05, 1.0)[number % 3],
            "gamma_sal": (0.3, 0.95)[number // 2 % 2],
            "saliency_scope": ("inactive", "all")[number % 2],
        }
        got = update_mask(weight, grad, mask, backend=backend, **settings)
        expected = update_mask(weight, grad, mask, backend="reference", **settings)
        what = f"update of {shape} {name}"
        yield _difference(f"mask, {what}", got.mask, expected.mask), 1
        yield _difference(f"weight, {what}", got.weight, expected.weight), 1


def _lent_memory(backend: GpuBackend) -> Iterator[tuple[str, int]]:
    """In the caller's memory results are the same, and no other is taken; too little is refused."""
    if isinstance(backend, ThroughHost):
        return
    for number, (batch, name) in enumerate(product((3, 40), VALUE_TYPES)):
        rng, dtype = np.random.default_rng(number), value_dtype(name)
        weight = CondensedWeight.random((9, 21), fan_in=5, n_active=7, rng=rng)
        x, grad = (rng.integers(-2, 3, (batch, n)).astype(dtype) for n in (21, 9))
        bias = rng.integers(-2, 3, 9).astype(np.float16)
        plan = prepare(weight, backend=backend)
        quantized = prepare(weight.quantize(), backend=backend)
        calls: dict[str, Callable[..., list[Any]]] = {
            "product": lambda x, g, memory, p=plan, b=bias: [p(x, b, workspace=memory)],
            "quantised product": lambda x, g, memory, p=quantized: [p(x, workspace=memory)],
            "gradients": lambda x, g, memory, p=plan: list(
                vars(p.backward(g, x, workspace=memory)).values()
            ),
        }
        strided = np.repeat(x, 2, axis=1)[:, ::2], np.repeat(grad, 2, axis=0)[::2]
        for what, call in calls.items():
            expected = call(x, grad, None)
            lender = quantized if what == "quantised product" else plan
            size = lender.workspace_bytes(batch, dtype)
            for arrays, lent in (((x, grad), size), (strided, 3 * size + 10_000)):
                made = backend.device.n_made
                results = call(*arrays, tight_empty(lent, np.uint8))
                yield ("" if backend.device.n_made == made else f"{what} took memory of its own"), 1
                for got, wanted in zip(results, expected, strict=True):
                    yield _difference(f"{what} in lent memory, {name}", got, wanted), 1
            try:
                call(*strided, tight_empty(16, np.uint8))
            except SriglError as error:
                yield "" if "workspace has 16 bytes" in str(error) else str(error), 1
            else:
                yield f"{what}: a workspace of 16 bytes sufficed", 1


def _not_finite(backend: GpuBackend) -> Iterator[tuple[str, int]]:
    """Gradients count everywhere and weights where they are active, each by its own type."""
    for number, names in enumerate(product(VALUE_TYPES, VALUE_TYPES)):
        rng, shape = np.random.default_rng(number), LAYERS[1 + number % (len(LAYERS) - 1)]
        mask, wrong = rng.random(shape) < 0.3, rng.random(shape) < 0.02
        finite = [rng.standard_normal(shape).astype(value_dtype(name)) for name in names]
        for i, where in enumerate((mask & wrong, wrong)):
            arrays = [array.copy() for array in finite]
            arrays[i][wrong] = rng.choice([np.inf, -np.inf, np.nan], np.count_nonzero(wrong))
            expected = f"is not finite in {np.count_nonzero(where)} of {mask.size}"
            try:
                update_mask(*arrays, mask, nnz_budget=shape[0], drop_fraction=0.3, backend=backend)
            except SriglError as error:
                yield "" if expected in str(error) else f"{error}, not: {expected}", 1
            else:
                yield f"an update with {names[i]} that {expected} passes", 1


def _conversions(backend: GpuBackend) -> Iterator[tuple[str, int]]:
    """Every type to every type, rounded once: also numbers halfway between two, and tiny ones."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(500) * 2.0 ** rng.integers(-160, 140, 500)
    halfway = 1 + rng.integers(0, 1 << 11, 500) * 2.0**-11 + rng.choice([0, 2.0**-40], 500)
    wide = np.concatenate([numbers, halfway, [0.0, -0.0, np.inf, -np.inf, np.nan]])
    for source, target in product(VALUE_TYPES, VALUE_TYPES):
        array = round_to(wide, value_dtype(source))
        exact = array if source in ("float32", "float64") else array.astype(np.float32)
        expected = round_to(exact, value_dtype(target))
        device = backend.device
        got = device.download(converted(device, device.upload(array), value_dtype(target)))
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        yield "" if same.all() else f"{source} to {target}: {(~same).sum()} wrong", 1


def _far_inputs(backend: GpuBackend) -> Iterator[tuple[str, int]]:
    """More inputs than 32 bits can address, of which a few are looked at; the rest is no memory."""
    if launch_model.MOST_STREAM_ROWS < BATCH_OF_FAR_INPUTS:
        return
    n_in = 1 << 30
    x = np.frombuffer(mmap.mmap(-1, 2 * BATCH_OF_FAR_INPUTS * n_in), np.float16).reshape(-1, n_in)
    indices = np.array([[0, 5], [5, n_in - 1]], np.uint32)
    x[:, [0, 5, n_in - 1]] = np.arange(1, 10).reshape(3, 3)
    weight = CondensedWeight(np.array([[1, 2], [3, 4]], np.float16), indices, [0, 1], (2, n_in))
    got = prepare(weight, backend=backend)(x).astype(float)
    columns = np.arange(1, 10).reshape(3, 3)
    expected = np.stack(
        [columns[:, 0] + 2 * columns[:, 1], 3 * columns[:, 1] + 4 * columns[:, 2]], axis=1
    )
    yield _difference("product of far inputs", got, expected), 1


CHECKS = {
    "products": _exact_products,
    "gradients": _exact_gradients,
    "updates": _exact_updates,
    "conversions": _conversions,
    "lent memory": _lent_memory,
    "not finite": _not_finite,
    "far inputs": _far_inputs,
}


def _difference(what: str, got: Any, expected: Any) -> str:
    if got.shape != expected.shape:
        return f"{what}: shape {got.shape} instead of {expected.shape}"
    places = np.argwhere(~(got == expected))
    if not places.size:
        return ""
    first = tuple(int(i) for i in places[0])
    return f"{what}: {len(places)} wrong, first {first}: {got[first]} instead of {expected[first]}"


if __name__ == "__main__":
    main()
