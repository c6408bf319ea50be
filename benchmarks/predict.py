"""Predicted times of the CUDA kernels on well-known GPUs, without a device.

The launch model of the backend chooses lanes and grid for the device's properties, and predicts the
cycles. The floor is the time below which no kernel can go (`roofline`), from the rates of the data
sheet. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from srigl_core._arrays.dtypes import value_dtype
from srigl_core.backends.cupy_gpu.device import DeviceProperties
from srigl_core.backends.cupy_gpu.launch_model import (
    Counts,
    GradientLaunch,
    LaunchModel,
    StreamLaunch,
    TileLaunch,
)
from srigl_core.benchmarks.cases import HEADLINE, Case, Layer, gpu_cases, matching
from srigl_core.benchmarks.roofline import GpuPeaks, least_time, work_of

__all__ = [
    "GPUS",
    "Gpu",
    "Prediction",
    "against_dense",
    "in_the_docs",
    "predicted",
    "predictions",
    "printed",
    "table",
]

COPY_SHARE = 0.9
"""Estimated share of the data sheet's memory bandwidth that a copy reaches."""

SHARED_BYTES_A_CYCLE = 128

_SPARSITIES = (0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Gpu:
    """A GPU, as its data sheet and CUDA's tables describe it.

    Parameters
    ----------
    properties : DeviceProperties
    clock : float
        Cycles a second, at the boost clock or at an estimate of what is sustained.
    bandwidth : float
        Bytes of memory a second.
    multiply_adds : int
        In float32, of a multiprocessor in a cycle.
    """

    properties: DeviceProperties
    clock: float
    bandwidth: float
    multiply_adds: int

    @property
    def peaks(self) -> GpuPeaks:
        """The peak rates."""
        cycles = self.properties.processors * self.clock
        return GpuPeaks(
            copy_bandwidth=COPY_SHARE * self.bandwidth,
            multiply_adds=self.multiply_adds * cycles,
            shared_bandwidth=SHARED_BYTES_A_CYCLE * cycles,
            between_marks=0.0,
        )


def _properties(
    name: str,
    processors: int,
    block_kib: int,
    processor_kib: int,
    architecture: int,
    threads: int = 2048,
) -> DeviceProperties:
    shared_bytes = block_kib << 10, processor_kib << 10
    return DeviceProperties(name, processors, *shared_bytes, threads, architecture)


GPUS = (
    Gpu(_properties("TITAN V", 80, 96, 96, 70), 1.455e9, 653e9, 64),
    Gpu(_properties("A100", 108, 163, 164, 80), 1.41e9, 1.555e12, 64),
    Gpu(_properties("H100", 132, 227, 228, 90), 1.755e9, 3.35e12, 128),
    Gpu(_properties("H200", 132, 227, 228, 90), 1.9e9, 4.8e12, 128),
    Gpu(_properties("RTX 4090", 128, 99, 100, 89, 1536), 2.52e9, 1.008e12, 128),
    Gpu(_properties("B200-like", 148, 227, 228, 100), 1.85e9, 8e12, 128),
)


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a case on a GPU, in microseconds.

    Parameters
    ----------
    gpu : str
    case : Case
    launch : str
        Lanes and grid of the kernels.
    counts : tuple of Counts
        What they do.
    time, floor : float
        The predicted time of the kernels, and the time below which none can go.
    bound : str
        The resource that bounds the floor.
    """

    gpu: str
    case: Case
    launch: str
    counts: tuple[Counts, ...]
    time: float
    floor: float
    bound: str


def predicted(case: Case, gpu: Gpu) -> Prediction:
    """Predict the time of a forward or a backward case.

    Arrays come from memory at the rate of a copy, or from the second-level cache; the slower one of
    memory and the kernels' cycles counts. A backward pass is the gradients of x and of the values.
    """
    layer, dtype = case.layer, value_dtype(case.dtype)
    size = layer.n_out, layer.n_in, layer.n_active, layer.fan_in
    model = LaunchModel(gpu.properties, *size)
    launches: tuple[StreamLaunch | TileLaunch | GradientLaunch, ...]
    if case.operation == "backward":
        launches = model.tile(case.batch, dtype, of_columns=True), model.gradient(case.batch, dtype)
    else:
        launches = (model.forward(case.batch, dtype),)
    work, peaks = work_of(case, gpu.peaks), gpu.peaks
    floor, bound = least_time(work, peaks)
    seconds = sum(launch.cycles for launch in launches) / gpu.clock
    seconds = max(seconds, work.moved / peaks.copy_bandwidth)
    of_columns = case.operation == "backward"
    counts = tuple(
        model.counts(launch, case.batch, dtype, of_columns=of_columns) for launch in launches
    )
    launch = "; ".join(map(str, launches))
    times = 1e6 * seconds, 1e6 * floor
    return Prediction(gpu.properties.name, case, launch, counts, *times, bound)


def predictions(only: Sequence[str] = (), gpus: Iterable[Gpu] = GPUS) -> list[Prediction]:
    """Return the predictions for the products that `srigl bench gpu` measures, in two dtypes.

    Parameters
    ----------
    only : sequence of str
        As in ``srigl bench gpu --only``.
    gpus : iterable of Gpu
    """
    cases = [
        replace(case, dtype=dtype)
        for case in gpu_cases(quick=False)
        for dtype in ("float32", "float16")
        if case.operation != "update" and not case.cold
    ]
    return [predicted(case, gpu) for gpu in gpus for case in matching(cases, only)]


def in_the_docs() -> list[Prediction]:
    """Return the predictions of docs/gpu.md: the paper's layer, on its GPU and on the H200."""
    layers = [Layer.random(*HEADLINE, sparsity) for sparsity in _SPARSITIES]
    cases = [
        *(
            Case("forward", layer, batch=batch)
            for layer in layers
            for batch in (1, 8, 64, 256, 2048)
        ),
        *(Case("backward", layers[1], batch=batch) for batch in (64, 256, 2048)),
    ]
    shown = [gpu for gpu in GPUS if gpu.properties.name in ("TITAN V", "H200")]
    return [predicted(case, gpu) for gpu in shown for case in cases]


def table(rows: Iterable[Prediction]) -> str:
    """Return the predictions as a table in Markdown."""
    lines = [
        "| GPU | operation | layer | batch | launch | launches | barriers | trips | multiply-adds "
        "| predicted, us | floor, us | bound by |",
        "|-|-|-|-:|-|-:|-:|-:|-:|-:|-:|-|",
    ]
    for row in rows:
        layer = row.case.layer
        cells = (
            row.gpu,
            row.case.operation,
            f"{layer.name}, {layer.sparsity:.0%}, {row.case.dtype}",
            str(row.case.batch),
            row.launch,
            str(sum(each.launches for each in row.counts)),
            *(
                "; ".join(str(getattr(each, name)) for each in row.counts)
                for name in ("barriers", "trips", "multiply_adds")
            ),
            f"predicted {row.time:.1f}",
            f"{row.floor:.1f}",
            row.bound,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def against_dense(gpus: Iterable[Gpu] = GPUS) -> str:
    """Return a table of where dense products on tensor cores are predicted to be faster.

    It is of the headline layer in 16 bits, by sparsity; a plan says the same of its weight.
    """
    sizes = [Layer.random(*HEADLINE, sparsity) for sparsity in _SPARSITIES]
    lines = [
        f"| GPU | dense, {sizes[0].name} | {' | '.join(f'{s:.0%}' for s in _SPARSITIES)} |",
        f"|-|-|{'-|' * len(sizes)}",
    ]
    for gpu in gpus:
        for dtype in ("float16", "bfloat16"):
            models = [
                LaunchModel(gpu.properties, size.n_out, size.n_in, size.n_active, size.fan_in)
                for size in sizes
            ]
            found = [model.against_dense(value_dtype(dtype)) for model in models]
            cells = [gpu.properties.name, dtype, *(words or "no tensor cores" for words in found)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def printed(only: Sequence[str] = ()) -> str:
    """Return what `srigl bench gpu --predict` prints.

    With predictions in 16 bits, the comparison with tensor cores follows.
    """
    rows = predictions(only)
    narrow = any(row.case.dtype == "float16" for row in rows)
    return table(rows) + (f"\n{against_dense()}" if narrow else "")
