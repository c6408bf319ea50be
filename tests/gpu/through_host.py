"""A backend for CUDA devices as one for NumPy's arrays: what the laws need to try it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.contract import MatmulGradients

__all__ = ["ThroughHost"]


class ThroughHost:
    """Copies what it is given to the device, and results back.

    Parameters
    ----------
    backend : GpuBackend
        On a real device.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.device = backend.device
        self.name = backend.name
        self.capabilities = replace(backend.capabilities, device="cpu")

    def prepare(self, weight: CondensedWeight) -> _Prepared:
        """Return `weight` in the backend's layout."""
        return _Prepared(self.backend.prepare(weight), self.device)

    def prepare_quantized(self, weight: QuantizedWeight, inputs: str) -> _Prepared:
        """Return a quantised weight in the backend's layout."""
        return _Prepared(self.backend.prepare_quantized(weight, inputs), self.device)

    def update_mask(
        self, weight: Any, grad: Any, mask: Any, settings: UpdateSettings, *, threads: int | None
    ) -> MaskUpdate:
        """Return the update of SPEC 4."""
        weight, grad, mask = (self.device.upload(array) for array in (weight, grad, mask))
        update = self.backend.update_mask(weight, grad, mask, settings, threads=threads)
        download = self.device.download
        return replace(update, mask=download(update.mask), weight=download(update.weight))


class _Prepared:
    def __init__(self, prepared: Any, device: Any) -> None:
        self._prepared, self._device = prepared, device

    def describe(self) -> Any:
        return self._prepared.describe()

    def with_values(self, weight: CondensedWeight) -> _Prepared:
        return _Prepared(self._prepared.with_values(weight), self._device)

    def matmul(self, x: Any, bias: Any, *, out: Any, **options: Any) -> None:
        result = self._device.empty(out.shape, out.dtype)
        self._prepared.matmul(self._upload(x), self._upload(bias), out=result, **options)
        out[...] = self._device.download(result)

    def backward(self, grad: Any, x: Any, *, out: MatmulGradients, threads: int | None) -> None:
        arrays = {"x": out.x, "values": out.values, "bias": out.bias}
        results = {
            name: None if array is None else self._device.empty(array.shape, array.dtype)
            for name, array in arrays.items()
        }
        on_device = MatmulGradients(**results)
        self._prepared.backward(self._upload(grad), self._upload(x), out=on_device, threads=threads)
        for name, array in arrays.items():
            if array is not None:
                array[...] = self._device.download(results[name])

    def _upload(self, array: Any) -> Any:
        return None if array is None else self._device.upload(array)
