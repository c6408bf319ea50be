"""All laws that backends obey."""

from __future__ import annotations

from srigl_core.testing.gradient_laws import GRADIENT_LAWS
from srigl_core.testing.law import Law
from srigl_core.testing.product_laws import PRODUCT_LAWS
from srigl_core.testing.update_laws import UPDATE_LAWS

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (*PRODUCT_LAWS, *GRADIENT_LAWS, *UPDATE_LAWS)
"""Those of the product, of its gradients and of the mask update, each with a name of its own."""
