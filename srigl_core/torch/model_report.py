"""What a model's condensed layers are, and what they save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from srigl_core._cost_model import dense_nanoseconds
from srigl_core._plan import plan_of
from srigl_core.contract import Backend
from srigl_core.torch.replacement import condensed_modules, linear_of

__all__ = ["BATCHES", "LayerReport", "ModelReport", "report"]

BATCHES = (1, 64)
"""Rows of a product for which a speed-up is told."""


@dataclass(frozen=True)
class LayerReport:
    """One condensed layer.

    Parameters
    ----------
    name : str
    shape : tuple of int
        Of the dense weight, (n_out, n_in); of a convolution, flattened.
    sparsity : float
        Share of the dense weight that is inactive.
    fan_in, n_active : int
    condensed_bytes, dense_bytes : int
        Of the weight, as `srigl_core.CondensedWeight.memory_report` counts them.
    speed_ups : tuple of float or None
        How many times faster than the masked dense product it is expected to be with one thread, by
        the model of `srigl_core.recommend`, for each of `BATCHES`; below 1 dense is faster. None
        where the backend has no such model, and off the CPU. An image is as many rows of a
        convolution's product as its result has places.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    fan_in: int
    n_active: int
    condensed_bytes: int
    dense_bytes: int
    speed_ups: tuple[float | None, ...]


@dataclass(frozen=True)
class ModelReport:
    """A model's condensed layers; printing it gives a table.

    Parameters
    ----------
    layers : tuple of LayerReport
    """

    layers: tuple[LayerReport, ...]

    @property
    def condensed_bytes(self) -> int:
        """Bytes of all the condensed weights."""
        return sum(layer.condensed_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that they would have dense."""
        return sum(layer.dense_bytes for layer in self.layers)

    def __str__(self) -> str:
        table = [
            (
                *("layer", "shape", "sparsity", "fan-in", "active", "bytes", "dense bytes"),
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
                    f"{layer.condensed_bytes:,}",
                    f"{layer.dense_bytes:,}",
                    *("-" if times is None else f"{times:.2f}x" for times in layer.speed_ups),
                )
            )
        total = f"{self.condensed_bytes:,}", f"{self.dense_bytes:,}"
        table.append(("total", "", "", "", "", *total, *("" for _ in BATCHES)))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        )


def report(model: Any, *, backend: str | Backend | None = None) -> ModelReport:
    """Return what a model's condensed layers are and what they save; print it for a table.

    Parameters
    ----------
    model : torch.nn.Module
    backend : str, Backend or None
        Whose speed to tell, as in `srigl_core.get_backend`.

    Returns
    -------
    ModelReport

    Raises
    ------
    ValueTypeError
        If `model` is no module.
    """
    layers = condensed_modules(model)
    return ModelReport(
        tuple(_layer_report(name, linear_of(layer), backend) for name, layer in layers.items())
    )


def _layer_report(name: str, linear: Any, backend: str | Backend | None) -> LayerReport:
    weight = linear.to_condensed()
    speed_ups: tuple[float | None, ...] = (None,) * len(BATCHES)
    if linear.values.is_cpu:
        plan = plan_of(weight, backend)
        times = [(plan.nanoseconds(batch), dense_nanoseconds(weight, batch)) for batch in BATCHES]
        speed_ups = tuple(None if ours is None else dense / ours for ours, dense in times)
    size = weight.memory_report()
    return LayerReport(
        name,
        weight.shape,
        weight.sparsity,
        weight.fan_in,
        weight.n_active,
        size.condensed,
        size.dense,
        speed_ups,
    )
