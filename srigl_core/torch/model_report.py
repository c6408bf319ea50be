"""The sizes and expected speed-ups of a model's condensed layers."""

from __future__ import annotations

from typing import Any

from srigl_core._model_report import LayerReport, ModelReport, report_layer
from srigl_core.contract import Backend
from srigl_core.torch.replacement import (
    PACKED,
    condensed_modules,
    linear_of,
    packed_weight,
    why_not_condensed,
)
from srigl_core.torch.targets import dense_matrices

__all__ = ["report"]


def report(model: Any, *, backend: str | Backend | None = None) -> ModelReport:
    """Return sizes and expected speed-ups of a model's condensed layers; print it for a table.

    Parameters
    ----------
    model : torch.nn.Module
    backend : str, Backend or None
        The backend of the speed-ups, as in `srigl_core.get_backend`.

    Returns
    -------
    ModelReport

    Raises
    ------
    ValueTypeError
        If `model` is not a module.
    """
    layers = condensed_modules(model, PACKED)
    reports = [_layer_report(name, linear_of(layer), backend) for name, layer in layers.items()]
    return ModelReport(tuple(reports), dense_matrices(model, why_not_condensed))


def _layer_report(name: str, linear: Any, backend: str | Backend | None) -> LayerReport:
    inputs = getattr(linear, "inputs", "float")
    weight, on_cpu = packed_weight(linear), bool(linear.values.is_cpu)
    return report_layer(name, weight, inputs, backend, on_cpu=on_cpu)
