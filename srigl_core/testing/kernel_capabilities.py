"""What a kernel can do; it is tried on problems within these capabilities only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from srigl_core._arrays.dtypes import VALUE_TYPES
from srigl_core.contract import (
    ACTIVATIONS,
    OPERATIONS,
    QUANTIZED_INPUTS,
    Backend,
    Capabilities,
)
from srigl_core.errors import SriglError
from srigl_core.testing.problem_sizes import classes_too_large

__all__ = [
    "DISTINCT_LAYOUTS",
    "EVERYTHING",
    "KERNEL_OPERATIONS",
    "LAYOUTS",
    "OPTIONAL_SETTINGS",
    "REMAP_SETTINGS",
    "KernelCapabilities",
    "capabilities_of",
    "completed",
    "left_out",
]

_REMAPS = ("remap_state", "remap_condensed")
KERNEL_OPERATIONS = (*OPERATIONS, *_REMAPS)
"""Operations that have laws: those of a backend, and two of functions only (decision D75)."""

INDEX_TYPES = ("uint16", "uint32")

DISTINCT_LAYOUTS = (
    *("C", "columns of a wider array", "F", "every second", "F within a larger array"),
    *("reversed", "rows reversed", "offset by a byte"),
)
LAYOUTS = (*DISTINCT_LAYOUTS, "shared rows", "shared columns", "shared everywhere")
"""Memory layouts, the simplest first. PyTorch and JAX have no reversed array, and no GPU an array \
that is not aligned."""

OPTIONAL_SETTINGS = frozenset({"gamma_sal", "min_salient", "saliency_scope", "grown_init"})
"""Settings of an update that a kernel need not take: without them it ablates no neuron, looks for \
large gradients at inactive positions, and grows weights as zeros."""

REMAP_SETTINGS = frozenset({"start"})
"""A setting of a remap that a function need not take: without it state starts at zero."""


@dataclass(frozen=True, repr=False)
class KernelCapabilities(Capabilities):
    """The capabilities of a backend, and of a function that does less than a backend.

    A function's parameters narrow them (`srigl_core.testing.FunctionBackend`): without a parameter
    ``bias`` there is no bias.

    Parameters
    ----------
    device, value_dtypes, input_dtypes, index_dtypes, quantized_inputs, priority, checks_finite, \
largest_problem
        As in `Capabilities`.
    operations : frozenset of str
        The operations that it implements: those of `Capabilities`, "remap_state" and
        "remap_condensed".
    activations : frozenset of str
        The activations that it computes, from `srigl_core.contract.ACTIVATIONS`.
    bias : bool
        Whether it adds a bias.
    ablation : bool
        Whether neurons may be ablated. If False, all are active.
    layouts : frozenset of str
        The memory layouts that arrays may have, from `LAYOUTS`; "C" is always one of them.
    out : bool
        Whether it writes results in place, in any value type. If False, it returns them.
    settings : frozenset of str
        The settings that its mask updates take, from `OPTIONAL_SETTINGS`, and its remaps, from
        `REMAP_SETTINGS`.

    Raises
    ------
    SriglError
        If an operation, dtype, activation or setting is unknown.
    """

    activations: frozenset[str] = frozenset(ACTIVATIONS)
    bias: bool = True
    ablation: bool = True
    layouts: frozenset[str] = frozenset(LAYOUTS)
    out: bool = True
    settings: frozenset[str] = OPTIONAL_SETTINGS | REMAP_SETTINGS

    def __post_init__(self) -> None:
        known = {
            "operations": KERNEL_OPERATIONS,
            "value_dtypes": VALUE_TYPES,
            "index_dtypes": INDEX_TYPES,
            "quantized_inputs": QUANTIZED_INPUTS,
            "activations": ACTIVATIONS,
            "layouts": LAYOUTS,
            "settings": OPTIONAL_SETTINGS | REMAP_SETTINGS,
        }
        object.__setattr__(self, "layouts", {"C", *self.layouts})
        for name, names in known.items():
            object.__setattr__(self, name, frozenset(getattr(self, name)))
            unknown = getattr(self, name).difference(names)
            if unknown:
                raise SriglError(
                    f"{name} has {', '.join(map(repr, sorted(unknown)))}; use some of "
                    f"{', '.join(sorted(names))}"
                )

    def __repr__(self) -> str:
        """Return Python that makes it: what is not the default, in the same order each time."""
        arguments = []
        for part in fields(self):
            value = getattr(self, part.name)
            if value != part.default:
                names = isinstance(value, frozenset)
                arguments.append(f"{part.name}={sorted(value) if names else value!r}")
        return f"KernelCapabilities({', '.join(arguments)})"


EVERYTHING = KernelCapabilities()


def capabilities_of(backend: Backend) -> KernelCapabilities:
    """Return the capabilities that a backend declares, completed."""
    return completed(backend.capabilities)


def completed(capabilities: Capabilities) -> KernelCapabilities:
    """Return capabilities as `KernelCapabilities`, which by default restrict nothing."""
    if isinstance(capabilities, KernelCapabilities):
        return capabilities
    return KernelCapabilities(**vars(capabilities))


def left_out(capabilities: KernelCapabilities) -> list[str]:
    """Return what the problems for such a kernel leave out, in words."""
    updates, remaps = {"update_mask", "update_condensed"}, set(_REMAPS)
    missing = _missing(VALUE_TYPES, capabilities.value_dtypes)
    if capabilities.operations - {"update_mask", "remap_state"}:
        missing += [f"{name} indices" for name in _missing(INDEX_TYPES, capabilities.index_dtypes)]
        missing += ["ablated neurons"] * (not capabilities.ablation)
    if capabilities.operations - updates:
        layouts = [f"layout {name}" for name in _missing(LAYOUTS, capabilities.layouts)]
        missing += layouts if len(capabilities.layouts) > 1 else ["strides"]
    if capabilities.operations - updates - remaps:
        missing += ["out="] * (not capabilities.out)
    if "quantized_matmul" in capabilities.operations:
        kinds = _missing(QUANTIZED_INPUTS, capabilities.quantized_inputs)
        missing += [f"{kind} inputs of a quantised weight" for kind in kinds]
    if capabilities.operations & {"condensed_matmul", "quantized_matmul"}:
        missing += ["bias"] * (not capabilities.bias)
        missing += [f"activation {n}" for n in _missing(ACTIVATIONS, capabilities.activations)]
    if capabilities.operations & updates:
        missing += _missing(sorted(OPTIONAL_SETTINGS), capabilities.settings)
    if capabilities.operations & remaps:
        missing += _missing(sorted(REMAP_SETTINGS), capabilities.settings)
    return missing + classes_too_large(
        capabilities.largest_problem,
        products=bool(capabilities.operations - updates - remaps),
        updates=bool(capabilities.operations & (updates | remaps)),
    )


def _missing(names: Iterable[str], declared: frozenset[str]) -> list[str]:
    return [name for name in names if name not in declared]
