"""SRigL for PyTorch: condensed layers, sparse training and conversion of models."""

from srigl_core._install import install_command
from srigl_core.errors import BackendUnavailableError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise BackendUnavailableError(
        f"srigl_core.torch needs PyTorch ({error}); install it: {install_command('torch')}"
    ) from error

import srigl_core.torch.transforms  # noqa: F401 # registers them
from srigl_core.torch.arrays import TorchArrays
from srigl_core.torch.attention import CondensedMultiheadAttention
from srigl_core.torch.conv import CondensedConv1d, CondensedConv2d
from srigl_core.torch.conversion import condense, to_csr, to_masked_dense
from srigl_core.torch.folding import Folding, fold_ablated
from srigl_core.torch.freezing import freeze, unfreeze
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.model_file import load_model, save_model
from srigl_core.torch.model_report import report
from srigl_core.torch.onnx import export_onnx
from srigl_core.torch.optimizers import OptimizerRule, register_optimizer
from srigl_core.torch.pruning import prune_to_constant_fan_in
from srigl_core.torch.quantization import quantize
from srigl_core.torch.quantized_linear import QuantizedLinear
from srigl_core.torch.released_checkpoint import load_released_checkpoint
from srigl_core.torch.sequential import CondensedSequential
from srigl_core.torch.training import SRigL

__all__ = [
    "CondensedConv1d",
    "CondensedConv2d",
    "CondensedLinear",
    "CondensedMultiheadAttention",
    "CondensedSequential",
    "Folding",
    "OptimizerRule",
    "QuantizedLinear",
    "SRigL",
    "TorchArrays",
    "condense",
    "export_onnx",
    "fold_ablated",
    "freeze",
    "load_model",
    "load_released_checkpoint",
    "prune_to_constant_fan_in",
    "quantize",
    "register_optimizer",
    "report",
    "save_model",
    "to_csr",
    "to_masked_dense",
    "unfreeze",
]
