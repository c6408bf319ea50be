"""The sizes and expected speed-ups of condensed layers, as a table."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial

from srigl_core._arrays.checks import check_flag
from srigl_core._cost_model import DENSE, dense_nanoseconds
from srigl_core._format.stored_layers import load_layers
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._plan import plan_of
from srigl_core._recommendation import recommend
from srigl_core.contract import Backend

__all__ = ["BATCHES", "LayerReport", "ModelReport", "report_file", "report_layer"]

BATCHES = (1, 64)
"""The batch sizes of the reported speed-ups."""


@dataclass(frozen=True)
class LayerReport:
    """One condensed layer.

    Parameters
    ----------
    name : str
    shape : tuple of int
        Shape of the dense weight, (n_out, n_in); that of a convolution is flattened.
    sparsity : float
        Share of the dense weight that is inactive.
    fan_in, n_active : int
    dtype : str
        Type of the values; "int8" for a quantised layer.
    condensed_bytes, dense_bytes : int
        Bytes of the weight, as in `srigl_core.CondensedWeight.memory_report`; the dense ones in the
        same type.
    speed_ups : tuple of float or None
        Expected speed-up over the masked dense product with one thread, for each of `BATCHES`, by
        the model of `srigl_core.recommend`, unless they were measured. Below 1 the dense product is
        faster. None if the backend has no model, or on another device than the CPU. In a
        convolution each place of the result is a row of the product.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    fan_in: int
    n_active: int
    dtype: str
    condensed_bytes: int
    dense_bytes: int
    speed_ups: tuple[float | None, ...]


@dataclass(frozen=True)
class ModelReport:
    """The condensed layers of a model or a file; printing it gives a table.

    Parameters
    ----------
    layers : tuple of LayerReport
    left : dict of str to str
        The dense matrices of the model by layer name, and why they are not condensed.
    """

    layers: tuple[LayerReport, ...]
    left: dict[str, str] = field(default_factory=dict)

    @property
    def condensed_bytes(self) -> int:
        """Bytes of all the condensed weights."""
        return sum(layer.condensed_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weights."""
        return sum(layer.dense_bytes for layer in self.layers)

    def __str__(self) -> str:
        table = [
            (
                *(
                    "layer",
                    "shape",
                    "sparsity",
                    "fan-in",
                    "active",
                    "values",
                    "bytes",
                    "dense bytes",
                ),
                *(f"speed-up at {batch}" for batch in BATCHES),
            )
        ]
        for layer in self.layers:
            n_out, n_in = layer.shape
            table.append(
                (
                    layer.name,
                    f"{n_out} x {n_in}",
                    f"{layer.sparsity:.1%}",
                    f"{layer.fan_in}",
                    f"{layer.n_active} of {n_out}",
                    layer.dtype,
                    f"{layer.condensed_bytes:,}",
                    f"{layer.dense_bytes:,}",
                    *("-" if times is None else f"{times:.2f}x" for times in layer.speed_ups),
                )
            )
        total = f"{self.condensed_bytes:,}", f"{self.dense_bytes:,}"
        table.append(("total", "", "", "", "", "", *total, *("" for _ in BATCHES)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
        return "\n".join(lines)


def report_file(
    path: str | os.PathLike[str],
    *,
    backend: str | Backend | None = None,
    measure: bool = False,
) -> ModelReport:
    """Return sizes and expected speed-ups of the layers in a file; print it for a table.

    Parameters
    ----------
    path : path-like
        A file that `save_condensed` or `srigl_core.torch.save_model` wrote.
    backend : str, Backend or None
        The backend of the speed-ups, as in `get_backend`.
    measure : bool
        Measure the speed-ups in this process, as `recommend` does, with the default numbers of
        threads. That takes about 0.1 s for each layer and batch, and memory for the dense weight.

    Returns
    -------
    ModelReport
        Its dictionary `left` is empty: a file does not say which arrays are weights.

    Raises
    ------
    FileFormatError
        As in `load_layers`.
    OSError
        If the file cannot be read.
    """
    measure = check_flag(measure, "measure")
    return ModelReport(
        tuple(
            report_layer(name, each.weight, each.inputs, backend, measure=measure)
            for name, each in load_layers(path).items()
        )
    )


def report_layer(
    name: str,
    weight: CondensedWeight | QuantizedWeight,
    inputs: str,
    backend: str | Backend | None,
    *,
    on_cpu: bool = True,
    measure: bool = False,
) -> LayerReport:
    """Return size and speed-ups of a layer; the speed-ups are None unless `on_cpu`."""
    speed_ups: tuple[float | None, ...] = (None,) * len(BATCHES)
    if measure:
        timed = partial(recommend, weight, inputs=inputs, backend=backend, measure=True)
        speed_ups = tuple(timed(batch=batch).speed_up for batch in BATCHES)
    elif on_cpu:
        plan = plan_of(weight, backend, inputs)
        times = [(plan.nanoseconds(batch), dense_nanoseconds(weight, batch)) for batch in BATCHES]
        speed_ups = tuple(None if ours is None else dense[DENSE] / ours for ours, dense in times)
    size, counts = weight.memory_report(), (weight.sparsity, weight.fan_in, weight.n_active)
    return LayerReport(
        name, weight.shape, *counts, weight.dtype.name, size.condensed, size.dense, speed_ups
    )
