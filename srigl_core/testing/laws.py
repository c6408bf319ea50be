"""All laws that backends obey."""

from __future__ import annotations

from srigl_core.testing.chain_laws import CHAIN_LAWS
from srigl_core.testing.gradient_laws import GRADIENT_LAWS
from srigl_core.testing.law import Law
from srigl_core.testing.product_laws import PRODUCT_LAWS
from srigl_core.testing.quantized_laws import QUANTIZED_LAWS
from srigl_core.testing.remap_laws import REMAP_LAWS
from srigl_core.testing.update_laws import UPDATE_LAWS

__all__ = ["LAWS", "laws_page"]

LAWS: tuple[Law, ...] = (
    *PRODUCT_LAWS,
    *GRADIENT_LAWS,
    *QUANTIZED_LAWS,
    *CHAIN_LAWS,
    *UPDATE_LAWS,
    *REMAP_LAWS,
)
"""The laws of products, gradients, chains, mask updates and remapped optimiser state; each name is
unique."""


def laws_page() -> str:
    """Return a list of all laws, as Markdown."""
    lines = ["# Laws", "", "`srigl verify` tries these laws on a kernel; `--list` prints them."]
    for operation in dict.fromkeys(law.operation for law in LAWS):
        lines += ["", f"## {operation}", ""]
        lines += [
            f"- `{law.name}`: {law.statement} Compared with {law.against}, {law.tolerance}."
            for law in LAWS
            if law.operation == operation
        ]
    return "\n".join(lines)
