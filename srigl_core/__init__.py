"""Dynamic sparse training with structured sparsity: the format, the definition, the kernels.

Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024 (arXiv 2305.02299).
Importing this imports NumPy, and no backend: `condensed_matmul` finds backends by entry point when
it first needs one.
"""

from srigl_core._api import (
    condensed_matmul,
    condensed_matmul_backward,
    update_condensed,
    update_mask,
)
from srigl_core._c_source import export_c
from srigl_core._chain import Chain, chain
from srigl_core._format.checkpoint import load_arrays
from srigl_core._format.condense_arrays import condense_arrays
from srigl_core._format.connections import Connections
from srigl_core._format.file import load_condensed, save_condensed
from srigl_core._format.packed_weight import MemoryReport
from srigl_core._format.quantize_file import quantize_file
from srigl_core._format.stored_layers import StoredLayer, load_layers
from srigl_core._format.weight import CondensedWeight, QuantizedWeight
from srigl_core._model_report import LayerReport, ModelReport, report_file
from srigl_core._plan import Plan, QuantizedPlan, prepare
from srigl_core._recommendation import Recommendation, recommend
from srigl_core._registry import BackendStatus, get_backend, list_backends
from srigl_core._training.condensed_trainer import CondensedTrainer
from srigl_core._training.config import LayerOptions, TrainingConfig
from srigl_core._training.methods import LayerState, Method, list_methods
from srigl_core._training.sparse_trainer import SparseTrainer
from srigl_core._update import CondensedUpdate, MaskUpdate, UpdateOptions, UpdateSettings
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
    "Chain",
    "CondensedTrainer",
    "CondensedUpdate",
    "CondensedWeight",
    "Connections",
    "FileFormatError",
    "LayerOptions",
    "LayerReport",
    "LayerState",
    "MaskUpdate",
    "MatmulGradients",
    "MemoryReport",
    "Method",
    "ModelReport",
    "Plan",
    "PreparedWeight",
    "QuantizedPlan",
    "QuantizedWeight",
    "Recommendation",
    "SparseTrainer",
    "SriglError",
    "StoredLayer",
    "TrainingConfig",
    "UpdateOptions",
    "UpdateSettings",
    "ValueTypeError",
    "__version__",
    "chain",
    "condense_arrays",
    "condensed_matmul",
    "condensed_matmul_backward",
    "export_c",
    "get_backend",
    "list_backends",
    "list_methods",
    "load_arrays",
    "load_condensed",
    "load_layers",
    "prepare",
    "quantize_file",
    "recommend",
    "report_file",
    "save_condensed",
    "update_condensed",
    "update_mask",
    "warmup",
]

__version__ = "0.1.0"
