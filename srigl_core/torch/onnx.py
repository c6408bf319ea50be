"""A model as an ONNX file, by PyTorch's exporter.

PyTorch does not know how to export the condensed product. So in a copy of the model each condensed
layer is replaced by the same product in standard operators, with features on the first axis:

    (x[indices] * values).sum(0)        indices, values: (k, n_active)

Of the forms that read connected inputs only, ONNX Runtime is fastest with this one: it gathers
whole rows and adds along the first axis. The values of a quantised layer are stored as int8, and a
``DequantizeLinear`` multiplies them by the scales.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from srigl_core._arrays.checks import check_integer
from srigl_core._files import write_whole
from srigl_core._install import install_command
from srigl_core.errors import BackendUnavailableError, SriglError, ValueTypeError
from srigl_core.torch.conv import CondensedConv, CondensedConv1d, CondensedConv2d
from srigl_core.torch.conversion import dense_layer
from srigl_core.torch.linear import ACTIVATION_FUNCTIONS, CondensedLinear
from srigl_core.torch.quantized_linear import QuantizedLinear
from srigl_core.torch.replacement import (
    PACKED,
    condensed_modules,
    linear_of,
    packed_weight,
    replace_modules,
)
from srigl_core.torch.sharded_tensors import check_not_sharded
from srigl_core.torch.tensors import from_numpy

__all__ = ["FORMS", "export_onnx", "without_fast_attention"]

FORMS = ("condensed", "masked-dense")

_LEAST_OPSET = 18
"""The oldest opset that PyTorch's exporter writes."""


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    example_input: Any,
    *,
    form: str = "condensed",
    opset: int = 18,
    dynamic_batch: bool = True,
) -> None:
    """Write a model to an ONNX file, as it computes in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Any that `torch.onnx.export` takes, with or without condensed layers. It is not changed.
    path : path-like
    example_input : torch.Tensor, tuple or dict
        The argument of ``model.forward``, a tuple of its arguments, or a dict of them by name. An
        argument may be a tuple, list or dict of tensors, or None or a number, which becomes a
        constant. The file's inputs have the names of the arguments; a tensor that is not in a
        tuple or dict is called ``input``. A result that is one tensor is called ``output``.
    form : {"condensed", "masked-dense"}
        What condensed layers become: a product of the connected inputs, or one with a dense weight.
    opset : int
        At least 18.
    dynamic_batch : bool
        Leave the length of each input's first axis open, and those of other axes unless the model
        needs the example's length, or it is 1.

    Raises
    ------
    SriglError
        If PyTorch cannot export the model; names the layer that has no translation. Or if an
        argument is out of range. No file is written.
    ValueTypeError
        If `model` is no module, or `example_input` no tensor.
    BackendUnavailableError
        If the packages ``onnx`` and ``onnxscript`` are not installed.

    Notes
    -----
    Condensed layers with 16-bit values add up in float32 in both forms, and round once (SPEC 2).
    Other layers are exported as PyTorch exports them. On the CPU, ONNX Runtime has few operators
    for bfloat16, and no ``Erf``, which GELU needs, for float64: export ``model.float()`` instead.

    The form "condensed" makes the file small, but not fast: all the products are written to memory
    before they are added up. ONNX Runtime's dense product is faster, also at 90% sparsity; for
    speed take "masked-dense".
    """
    if not isinstance(model, nn.Module):
        raise ValueTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_not_sharded(model)
    args, kwargs = _arguments(model, example_input)
    for x in pytree.tree_leaves((args, kwargs)):
        if dynamic_batch and isinstance(x, torch.Tensor) and x.ndim < 2:
            raise SriglError(
                f"example_input has shape {tuple(x.shape)}, without an axis for the batch; add "
                f"one, or pass dynamic_batch=False"
            )
    if form not in FORMS:
        raise SriglError(f"form={form!r} is unknown; use one of {', '.join(FORMS)}")
    onnx = _onnx()
    newest = int(onnx.defs.onnx_opset_version())
    opset = check_integer(opset, "opset", least=_LEAST_OPSET, most=newest)

    model = copy.deepcopy(model).eval()
    with without_fast_attention():
        result = _result(model, args, kwargs)
        exported = _checked(
            onnx,
            _with_standard_layers(model, form),
            args,
            kwargs,
            dynamic_batch=dynamic_batch,
            input_names=["input"] if isinstance(example_input, torch.Tensor) else None,
            output_names=["output"] if isinstance(result, torch.Tensor) else None,
            opset_version=opset,
        )
    write_whole(path, exported.SerializeToString())


def _onnx() -> Any:
    try:
        importlib.import_module("onnxscript")  # PyTorch's exporter needs it
        return importlib.import_module("onnx")
    except ImportError as error:
        raise BackendUnavailableError(
            f"export_onnx needs the packages onnx and onnxscript ({error}); install them: "
            f"{install_command('onnx')}"
        ) from error


# ---------------------------------------------------------------- arguments


def _arguments(model: Any, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of ``model.forward``."""
    leaves = pytree.tree_leaves(example_input)
    odd = [x for x in leaves if not isinstance(x, torch.Tensor | int | float | str | NoneType)]
    if odd or not any(isinstance(x, torch.Tensor) for x in leaves):
        raise ValueTypeError(
            f"example_input must be a torch.Tensor, or a tuple or dict of them, got "
            f"{type((odd or [example_input])[0]).__name__}"
        )
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, dict) and _binds(model, example_input):
        bound = inspect.signature(model.forward).bind(**example_input)
        return bound.args, bound.kwargs
    return (example_input,), {}


def _binds(model: Any, names: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(**names)
    except TypeError:  # the dict is an argument itself
        return False
    return True


def _open_axes(
    model: Any, args: Any, kwargs: Any, is_open: Any, *, batch: Any = "batch"
) -> dict[str, Any]:
    """Return the axes whose length stays open, by argument, in the structure of the arguments.

    Parameters
    ----------
    is_open : iterable
        For each leaf of the arguments, a shape in which the lengths that stay open are no integers.
        The first axis of each stays open anyway.
    batch : str or dim
        The first axis of the first argument.
    """
    shapes, lengths = iter(is_open), iter([batch])
    auto, dynamic = torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC

    def axes_of(x: Any) -> dict[int, Any] | None:
        shape = next(shapes)
        if not isinstance(x, torch.Tensor):
            return None
        # PyTorch finds out which lengths are the same, and warns if they have been named twice.
        return {0: next(lengths, dynamic)} | {
            axis: auto for axis in range(1, x.ndim) if not isinstance(shape[axis], int)
        }

    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(axes_of, value) for name, value in arguments.items()}


def _traced_shapes(model: Any, args: Any, kwargs: Any) -> list[Any] | None:
    """Return the arguments' shapes, symbolic where the model takes any length; None if it fails.

    PyTorch's ONNX exporter leaves lengths open that the model does not take.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    anything = [(None,) * x.ndim if isinstance(x, torch.Tensor) else None for x in leaves]
    axes = _open_axes(model, args, kwargs, anything, batch=torch.export.Dim.DYNAMIC)
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=axes, strict=False)
    except (RuntimeError, ValueError, TypeError):  # torch.onnx.export will say why
        return None
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = [values.get(name) for name in program.graph_signature.user_inputs]
    return [
        [_length(length) for length in value.shape] if isinstance(value, torch.Tensor) else None
        for value in inputs
    ]


def _length(length: Any) -> int | None:
    """Return a length of a trace, or None if it is open."""
    if isinstance(length, int):
        return length
    known: int | None = length.node.maybe_as_int()
    return known


# ---------------------------------------------------------------- PyTorch's exporter


@contextlib.contextmanager
def without_fast_attention() -> Iterator[None]:
    """Keep PyTorch's attention layers from their fused kernels.

    These have no translation to ONNX, and take no weights but tensors.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _result(model: Any, args: Any, kwargs: Any) -> Any:
    """Call the model: its own errors are clearer than those of a trace."""
    # A model may write to its inputs.
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise SriglError(f"the model does not take example_input: {error}") from error


def _checked(
    onnx: Any, model: Any, args: Any, kwargs: Any, *, dynamic_batch: bool, **options: Any
) -> Any:
    """Return a model as a valid ``ModelProto``, with as many open lengths as it allows."""

    def exported(dynamic_shapes: Any) -> Any:
        return _valid(
            onnx, _exported(model, args, kwargs, dynamic_shapes=dynamic_shapes, **options)
        )

    if not dynamic_batch:
        return exported(None)
    leaves = pytree.tree_leaves((args, kwargs))
    fixed = [getattr(x, "shape", None) for x in leaves]
    shapes = _traced_shapes(model, args, kwargs)
    if shapes is not None and len(shapes) == len(leaves):
        with contextlib.suppress(SriglError):
            return exported(_open_axes(model, args, kwargs, shapes))
    return exported(_open_axes(model, args, kwargs, fixed))


def _valid(onnx: Any, exported: Any) -> Any:
    try:
        onnx.checker.check_model(exported, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise SriglError(
            f"PyTorch's exporter has no valid translation of the model: {error}; change the layer "
            f"that this names, or try another opset than {exported.opset_import[0].version}"
        ) from error
    return exported


def _exported(model: Any, args: Any, kwargs: Any, *, opset_version: int, **options: Any) -> Any:
    """Return a model as ONNX's ``ModelProto``.

    Raises
    ------
    SriglError
        If PyTorch cannot export it, or not for this opset.
    """
    try:
        # PyTorch takes a dict at the end of `args` for keyword arguments.
        end: tuple[Any, ...] = ({},) if args and isinstance(args[-1], dict) else ()
        program = torch.onnx.export(
            model,
            (*args, *end),
            kwargs=kwargs,
            opset_version=opset_version,
            verbose=False,
            **options,
        )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).partition("\n\n")[0].split())
        operator = re.search(r"\[target=torch\.ops\.([\w.]+)\]", str(error))
        if operator is None:
            raise SriglError(
                f"PyTorch cannot export the model: {reason}; the model must not decide by a "
                f"tensor's numbers, and by the batch's length only with dynamic_batch=False"
            ) from error
        layer = _layer_with(operator[1], model, args, kwargs)
        raise SriglError(
            f"PyTorch's exporter has no translation of {layer}: "
            f"{reason}; export the model without it, or put a layer in its place that "
            f"torch.onnx.export takes"
        ) from error
    written = program.model.opset_imports[""]
    if written != opset_version:
        raise SriglError(
            f"opset={opset_version}: PyTorch can export the model for opset {written} only"
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of source files
    return program.model_proto


def _layer_with(operator: str, model: Any, args: Any, kwargs: Any) -> str:
    """Return the name of the first layer that calls one of PyTorch's operators."""
    program = torch.export.export(model, args, kwargs).run_decompositions()
    for node in program.graph.nodes:
        if str(node.target) == operator:
            name, cls = list(node.meta["nn_module_stack"].values())[-1]
            return f"layer {name!r} ({cls.rpartition('.')[2]})"
    return operator


# ---------------------------------------------------------------- condensed layers


def _with_standard_layers(model: Any, form: str) -> Any:
    """Replace a model's condensed layers by ones that PyTorch can export; return the model."""
    if isinstance(model, (*PACKED, CondensedConv)):
        model = nn.Sequential(model).eval()
    layers = condensed_modules(model, PACKED)
    for name, layer in layers.items():
        if type(layer) not in (*PACKED, CondensedConv1d, CondensedConv2d):
            raise SriglError(
                f"layer {name!r} is of type {type(layer).__name__}, and what that adds to a "
                f"condensed layer would be lost; export the model without it"
            )
        if getattr(linear_of(layer), "inputs", "float") != "float":
            raise SriglError(
                f"layer {name!r} quantises its inputs, for which ONNX has no operator with the "
                f"same result; export a model that was quantised with inputs='float'"
            )
    made = {layer: _StandardLayer(layer, form) for layer in set(layers.values())}
    replace_modules(model, {name: made[layer] for name, layer in layers.items()})
    return model


class _StandardLayer(nn.Module):  # type: ignore[misc] # torch is untyped here
    """A condensed layer in standard operators, with sums in float32 or float64."""

    def __init__(self, layer: Any, form: str) -> None:
        super().__init__()
        linear = linear_of(layer)
        self.dtype, self.is_quantized = linear.dtype, isinstance(linear, QuantizedLinear)
        if self.is_quantized:  # 16-bit results do not make its weights 16-bit numbers
            linear.dtype = torch.promote_types(linear.dtype, torch.float32)
        self.activation = ACTIVATION_FUNCTIONS[linear.activation or "none"]
        if form == "masked-dense":
            self.product = dense_layer(layer)
        elif layer is linear:
            self.product = _GatheredProduct(linear)
        else:
            layer.linear = _GatheredProduct(linear)
            self.product = layer

    def forward(self, x: Any) -> Any:
        result = torch.promote_types(x.dtype, self.dtype)
        sums = torch.promote_types(result, torch.float32)
        # A bias that is wider than the product is rounded to the product's dtype first.
        product = sums if self.is_quantized else result
        tensors = {name: p.to(product).to(sums) for name, p in self.product.named_parameters()}
        z = functional_call(self.product, tensors, (x.to(sums),))
        return self.activation(z).to(result)


class _GatheredProduct(nn.Module):  # type: ignore[misc] # torch is untyped here
    """The product of a condensed layer from its connected inputs, without the activation."""

    def __init__(self, layer: CondensedLinear | QuantizedLinear) -> None:
        super().__init__()
        weight, device = packed_weight(layer), layer.values.device
        self.in_features, self.out_features = layer.in_features, layer.out_features
        bias, values = layer.bias, from_numpy(weight.values.T).to(device)
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.scale = None
        if isinstance(layer, QuantizedLinear):
            self.register_buffer("values", values.contiguous())
            self.scale = layer.scale
        else:
            self.values = nn.Parameter(values)
        indices = from_numpy(weight.indices.T.astype(np.int32).reshape(-1))
        self.register_buffer("indices", indices.to(device))
        self.register_buffer("active", from_numpy(weight.active).to(device))

    def forward(self, x: Any) -> Any:
        torch._check(x.shape[-1] == self.in_features)  # so that this length is not open
        k, n_active = self.values.shape
        values = self.values
        if self.scale is not None:
            values = _dequantized(values, self.scale, x.dtype)
        gathered = x.movedim(-1, 0).index_select(0, self.indices).unflatten(0, (k, n_active))
        z = (gathered * values.reshape(k, n_active, *[1] * (x.ndim - 1))).sum(0)
        if n_active < self.out_features:
            z = z.new_zeros(self.out_features, *z.shape[1:]).index_copy(0, self.active, z)
        z = z.movedim(0, -1)
        return z if self.bias is None else z + self.bias


def _dequantized(values: Any, scale: Any, dtype: Any) -> Any:
    """Return ``values * scale``, (k, n_active), by ONNX's own operator if it has the dtype."""
    if dtype is torch.float64:
        return values.to(dtype) * scale.to(dtype)
    options = {"attrs": {"axis": 1}, "dtype": scale.dtype, "shape": values.shape}
    return torch.onnx.ops.symbolic("DequantizeLinear", (values, scale), **options)
