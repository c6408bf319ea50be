"""Dynamic sparse training with structured sparsity: the format, the definition, the kernels.

Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024 (arXiv 2305.02299).
Importing this imports NumPy and SciPy, and no backend: `condensed_matmul` finds those by entry
point when they are first needed.
"""

from srigl_core._api import condensed_matmul, condensed_matmul_backward, update_mask
from srigl_core._format.connections import CondensedMask
from srigl_core._format.file import load_condensed, save_condensed
from srigl_core._format.weight import CondensedWeight, MemoryReport
from srigl_core._plan import Plan, prepare
from srigl_core._recommendation import Recommendation, recommend
from srigl_core._registry import BackendStatus, get_backend, list_backends
from srigl_core._training.condensed_trainer import CondensedTrainer
from srigl_core._training.trainer import SparseTrainer
from srigl_core._training.training_state import LayerOptions
from srigl_core._update import MaskUpdate, UpdateSettings
from srigl_core._warmup import warmup
from srigl_core.contract import Backend, Capabilities, MatmulGradients, PreparedWeight
from srigl_core.errors import (
    BackendUnavailableError,
    FileFormatError,
    SriglError,
    ValueTypeError,
)

__all__ = [
    "Backend",
    "BackendStatus",
    "BackendUnavailableError",
    "Capabilities",
    "CondensedMask",
    "CondensedTrainer",
    "CondensedWeight",
    "FileFormatError",
    "LayerOptions",
    "MaskUpdate",
    "MatmulGradients",
    "MemoryReport",
    "Plan",
    "PreparedWeight",
    "Recommendation",
    "SparseTrainer",
    "SriglError",
    "UpdateSettings",
    "ValueTypeError",
    "__version__",
    "condensed_matmul",
    "condensed_matmul_backward",
    "get_backend",
    "list_backends",
    "load_condensed",
    "prepare",
    "recommend",
    "save_condensed",
    "update_mask",
    "warmup",
]

__version__ = "0.1.0"
