"""A backend of the GPU kernels on any `Device`: CuPy's, or a simulated one."""

from __future__ import annotations

from typing import Any

from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core.backends.cupy_gpu import mask_update
from srigl_core.backends.cupy_gpu.condensed_matmul import GpuPrepared
from srigl_core.backends.cupy_gpu.device import Device
from srigl_core.contract import OPERATIONS, Capabilities

__all__ = ["CAPABILITIES", "GpuBackend"]

CAPABILITIES = Capabilities(
    operations=frozenset({*OPERATIONS[:3], "quantized_matmul"}),
    quantized_inputs=frozenset({"float"}),
    checks_finite=True,
)
"""What the kernels can do, on any device."""


class GpuBackend:
    """CUDA kernels on a device.

    Parameters
    ----------
    device : Device
    name : str
    capabilities : Capabilities
    """

    def __init__(self, device: Device, name: str, capabilities: Capabilities) -> None:
        self.device = device
        self.name = name
        self.capabilities = capabilities

    def prepare(self, weight: CondensedWeight) -> GpuPrepared:
        """Return `weight` in this backend's layout."""
        return GpuPrepared(weight, self.device)

    def prepare_quantized(self, weight: QuantizedWeight, inputs: str) -> GpuPrepared:
        """Return a quantised weight in this backend's layout; `inputs` is "float"."""
        return GpuPrepared(weight, self.device)

    def update_mask(
        self,
        weight: Any,
        grad: Any,
        mask: Any,
        settings: UpdateSettings,
        *,
        threads: int | None,
    ) -> MaskUpdate:
        """Return the update of SPEC 4; `threads` has no effect."""
        return mask_update.srigl_update(weight, grad, mask, settings, device=self.device)
