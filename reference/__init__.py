"""The executable definition, in NumPy: it reads like the paper, and puts correctness before speed.

`condensed_matmul` is a module with `forward`, `backward` and `dense_gradient`, and
`quantized_matmul` one with the products of quantised weights; they compute on two-dimensional
arrays and check nothing. For arguments of any shape, checked, call
``srigl_core.condensed_matmul(..., backend="reference")``.
"""

from srigl_core.reference.activations import activate
from srigl_core.reference.baselines import update_rigl, update_set, update_static
from srigl_core.reference.condensed_matmul import dense_gradient
from srigl_core.reference.condensed_update import update_condensed
from srigl_core.reference.distributions import LayerBudget, erk, nnz_budget, uniform
from srigl_core.reference.explain import UpdateExplanation, explain_update
from srigl_core.reference.init import random_mask, random_unstructured_mask, sparse_init
from srigl_core.reference.mask_update import remap_state, update_mask
from srigl_core.reference.schedule import UpdateSchedule

__all__ = [
    "LayerBudget",
    "UpdateExplanation",
    "UpdateSchedule",
    "activate",
    "dense_gradient",
    "erk",
    "explain_update",
    "nnz_budget",
    "random_mask",
    "random_unstructured_mask",
    "remap_state",
    "sparse_init",
    "uniform",
    "update_condensed",
    "update_mask",
    "update_rigl",
    "update_set",
    "update_static",
]
