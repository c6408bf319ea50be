"""What of the definition a kernel takes on: problems beyond that are not put to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from srigl_core._arrays.dtypes import VALUE_TYPES
from srigl_core.contract import ACTIVATIONS, OPERATIONS, Backend, Capabilities
from srigl_core.errors import SriglError

__all__ = ["OPTIONAL_SETTINGS", "KernelCapabilities", "capabilities_of", "in_full", "left_out"]

INDEX_TYPES = ("uint16", "uint32")

OPTIONAL_SETTINGS = frozenset({"gamma_sal", "min_salient", "saliency_scope", "grown_init"})
"""Settings of an update that a kernel may do without: it then has those of no ablation, the \
paper's scope, and zeros where weights grow."""


@dataclass(frozen=True, repr=False)
class KernelCapabilities(Capabilities):
    """The capabilities of a backend, and what a bare kernel may leave out besides.

    Of a function, what its parameters tell is added (`srigl_core.testing.FunctionBackend`): one
    without a parameter ``bias`` takes none.

    Parameters
    ----------
    device, operations, value_dtypes, index_dtypes, priority
        As in `Capabilities`.
    activations : frozenset of str
        Those of `srigl_core.contract.ACTIVATIONS` that it computes.
    bias : bool
        Whether it adds one.
    ablation : bool
        Whether neurons may be ablated: otherwise all are active.
    strides : bool
        Whether arrays may have any strides and alignment: otherwise they are in C order, and
        aligned.
    out : bool
        Whether it writes results in place, in any value type: otherwise it returns them.
    settings : frozenset of str
        Those of `OPTIONAL_SETTINGS` that its mask update takes.

    Raises
    ------
    SriglError
        If there is no operation, type, activation or setting of a name.
    """

    activations: frozenset[str] = frozenset(ACTIVATIONS)
    bias: bool = True
    ablation: bool = True
    strides: bool = True
    out: bool = True
    settings: frozenset[str] = OPTIONAL_SETTINGS

    def __post_init__(self) -> None:
        known = {
            "operations": OPERATIONS,
            "value_dtypes": VALUE_TYPES,
            "index_dtypes": INDEX_TYPES,
            "activations": ACTIVATIONS,
            "settings": OPTIONAL_SETTINGS,
        }
        for name, names in known.items():
            object.__setattr__(self, name, frozenset(getattr(self, name)))
            unknown = set(getattr(self, name)).difference(names)
            if unknown:
                raise SriglError(
                    f"{name} has {', '.join(map(repr, sorted(unknown)))}; use some of "
                    f"{', '.join(sorted(names))}"
                )

    def __repr__(self) -> str:
        """Return Python for it: what is not the default, in the same order each time."""
        told = []
        for part in fields(self):
            value = getattr(self, part.name)
            if value != part.default:
                names = isinstance(value, frozenset)
                told.append(f"{part.name}={sorted(value) if names else value!r}")
        return f"KernelCapabilities({', '.join(told)})"


def capabilities_of(backend: Backend) -> KernelCapabilities:
    """Return what a backend declares, in full."""
    return in_full(backend.capabilities)


def in_full(able: Capabilities) -> KernelCapabilities:
    """Return capabilities with what a bare kernel may leave out, and all of it left in."""
    if isinstance(able, KernelCapabilities):
        return able
    return KernelCapabilities(**{part.name: getattr(able, part.name) for part in fields(able)})


def left_out(able: KernelCapabilities) -> list[str]:
    """Return, in words, what no problem for such a kernel has."""
    missing = _missing(VALUE_TYPES, able.value_dtypes)
    if able.operations - {"update_mask"}:
        missing += [f"{name} indices" for name in _missing(INDEX_TYPES, able.index_dtypes)]
        flags = {"ablated neurons": able.ablation, "strides": able.strides, "out=": able.out}
        missing += [name for name, is_able in flags.items() if not is_able]
    if "condensed_matmul" in able.operations:
        missing += ["bias"] * (not able.bias)
        missing += [f"activation {name}" for name in _missing(ACTIVATIONS, able.activations)]
    if "update_mask" in able.operations:
        missing += _missing(sorted(OPTIONAL_SETTINGS), able.settings)
    return missing


def _missing(names: Iterable[str], taken: frozenset[str]) -> list[str]:
    return [name for name in names if name not in taken]
