"""A model as an ONNX file of standard operators.

PyTorch's own exporter does not know the condensed product. Here the model is traced with
``torch.fx`` and each layer translated; a condensed one becomes, with features on the first axis,

    ReduceSum(Mul(Gather(x, indices), values))        indices, values: (k, n_active)

Gathering whole rows, and adding up along the first axis, is what ONNX Runtime does fastest of the
forms that keep to connected inputs.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from srigl_core._arrays.checks import check_integer
from srigl_core._format.file import write_whole
from srigl_core.errors import BackendUnavailableError, SriglError, ValueTypeError
from srigl_core.torch.conv import CondensedConv2d
from srigl_core.torch.linear import CondensedLinear
from srigl_core.torch.tensors import as_numpy

__all__ = ["FORMS", "export_onnx"]

FORMS = ("condensed", "masked-dense")

_LEAST_OPSET = 18
"""Since which Pad and ReduceSum take their axes as they are given here."""

_IR_VERSION = 8
"""That of opset 18, which readers of any age since know."""

_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


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
        That ``torch.fx`` can trace, of one tensor to one tensor. Supported are `CondensedLinear`,
        `CondensedConv2d`, ``Linear``, ``Conv2d``, ``BatchNorm1d``, ``BatchNorm2d``, ``LayerNorm``,
        ``MaxPool2d``, ``AvgPool2d``, ``AdaptiveAvgPool2d(1)``, ``Flatten``, ``Dropout``,
        ``Identity``, ``ReLU``, ``GELU``, ``SiLU``, ``Sigmoid``, ``Tanh`` and ``Softmax``; sums and
        products, `torch.flatten`, and these activations as functions.
    path : path-like
    example_input : torch.Tensor
        Its shape and dtype are those of the file's input, called ``input``; the output is called
        ``output``.
    form : {"condensed", "masked-dense"}
        What condensed layers become: a product of the connected inputs, or one with a dense weight.
    opset : int
        At least 18.
    dynamic_batch : bool
        Leave the length of the first axis open.

    Raises
    ------
    SriglError
        If a module or function has no translation, which it names, or an argument is out of range.
    ValueTypeError
        If `model` is no module, or `example_input` no tensor.
    BackendUnavailableError
        If the ``onnx`` package is not installed.

    Notes
    -----
    Sums are kept in float32, or float64 where the input or the weight is of that, whatever the
    type of 16 bits. The form "condensed" makes the file small, but not fast: it writes all the
    products to memory before it adds them up, and ONNX Runtime's dense product is faster, also at
    90% sparsity. For speed take "masked-dense" there, or the kernels of this library.
    """
    if not isinstance(model, nn.Module):
        raise ValueTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, torch.Tensor):
        raise ValueTypeError(
            f"example_input must be a torch.Tensor, got {type(example_input).__name__}; a model of "
            f"several inputs cannot be exported"
        )
    if form not in FORMS:
        raise SriglError(f"form={form!r} is unknown; use one of {', '.join(FORMS)}")
    if dynamic_batch and example_input.ndim < 2:
        raise SriglError(
            f"example_input has shape {tuple(example_input.shape)}, without an axis for the batch; "
            f"add one, or pass dynamic_batch=False"
        )
    onnx = _onnx()
    opset = check_integer(
        opset, "opset", least=_LEAST_OPSET, most=int(onnx.defs.onnx_opset_version())
    )
    graph = _Graph(onnx, form, opset)
    with _evaluating(model):
        traced, shapes = _traced(model, example_input)
        result = _translate(graph, traced, shapes)
    graph.nodes.append(onnx.helper.make_node("Identity", [result.name], ["output"]))
    ends = [
        onnx.helper.make_tensor_value_info(
            name,
            graph.kind(tensor.dtype),
            ["batch", *tensor.shape[1:]] if dynamic_batch else tensor.shape,
        )
        for name, tensor in (("input", _Tensor.like("input", example_input)), ("output", result))
    ]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "srigl_core", ends[:1], ends[1:], graph.constants),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=max(_IR_VERSION, _ir_version(onnx, opset)),
        producer_name="srigl-core",
    )
    onnx.checker.check_model(made, full_check=True)
    write_whole(Path(path), made.SerializeToString())


def _onnx() -> Any:
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise BackendUnavailableError(
            f"export_onnx needs the onnx package ({error}); install it: pip install "
            f'"srigl-core[onnx]"'
        ) from error


def _ir_version(onnx: Any, opset: int) -> int:
    """Return the oldest version of the file's format that may have `opset`."""
    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


# ---------------------------------------------------------------- the graph


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the graph, as it is with the example's batch."""

    name: str
    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def like(cls, name: str, tensor: Any) -> _Tensor:
        return cls(name, tuple(tensor.shape), tensor.dtype)

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass
class _Graph:
    """Nodes and constants as they are added."""

    onnx: Any
    form: str
    opset: int
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator and return its result's name."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, array: Any) -> str:
        """Add a constant and return its name."""
        name = f"c{len(self.constants)}"
        array = np.ascontiguousarray(array)
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def kind(self, dtype: Any) -> int:
        """Return ONNX's number of a PyTorch dtype."""
        names = {"float32": "FLOAT", "float64": "DOUBLE", "bool": "BOOL"}
        name = str(dtype).removeprefix("torch.")
        return int(getattr(self.onnx.TensorProto, names.get(name, name.upper())))

    def cast(self, x: str, dtype: Any, to: Any) -> str:
        """Return `x`, of `dtype`, as one of `to`."""
        return x if dtype == to else self.op("Cast", x, to=self.kind(to))


def _sum_dtype(*dtypes: Any) -> Any:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _numbers(tensor: Any, dtype: Any) -> NDArray[Any]:
    """Return a tensor as an array of float32 or float64, which hold numbers of 16 bits too."""
    return as_numpy(tensor.detach().to(dtype))


# ---------------------------------------------------------------- tracing


class _Tracer(fx.Tracer):  # type: ignore[misc] # torch is untyped here
    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        return type(m) in _MODULES or bool(super().is_leaf_module(m, module_qualified_name))


@contextmanager
def _evaluating(model: Any) -> Any:
    """Have the model in evaluation mode, without gradients, and as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _traced(model: Any, example_input: Any) -> tuple[Any, dict[Any, _Tensor]]:
    """Return the traced model, whose module `model` is called "0", and what each node gives."""
    root = nn.Sequential(model)
    try:
        traced = fx.GraphModule(root, _Tracer().trace(root))
    except (TypeError, ValueError, RuntimeError, NameError, fx.proxy.TraceError) as error:
        raise SriglError(
            f"the model cannot be traced by torch.fx ({error}); it must take one tensor, and not "
            f"decide by a tensor's numbers or shape: export a part of it that does so"
        ) from error
    try:
        root(example_input.clone())  # which a model may write to
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise SriglError(f"the model does not take example_input: {error}") from error
    ShapeProp(traced).propagate(example_input.clone())
    shapes = {}
    for node in traced.graph.nodes:
        found = node.meta.get("tensor_meta")
        if hasattr(found, "dtype"):
            shapes[node] = _Tensor.like(node.name, found)
    return traced, shapes


def _translate(graph: _Graph, traced: Any, shapes: dict[Any, _Tensor]) -> _Tensor:
    """Add a traced model to the graph and return its result."""
    made: dict[Any, _Tensor] = {}
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node):
                raise SriglError(
                    f"the model gives a {type(result).__name__}, but only models that give one "
                    f"tensor can be exported; wrap it to give one"
                )
            return made[result]
        if node.op == "placeholder":
            name = "input"
        elif node.op == "get_attr":
            owner, _, attribute = node.target.rpartition(".")
            name = graph.constant(as_numpy(getattr(modules[owner], attribute)))
        elif node.op == "call_module":
            name = _module(graph, node, modules[node.target], made, shapes)
        else:
            name = _function(graph, node, made, shapes)
        made[node] = _Tensor(name, shapes[node].shape, shapes[node].dtype)
    raise SriglError("the model gives nothing")


def _module(
    graph: _Graph, node: Any, module: Any, made: dict[Any, _Tensor], shapes: dict[Any, _Tensor]
) -> str:
    translate = _MODULES.get(type(module))
    name = node.target.removeprefix("0").removeprefix(".")
    if translate is None or len(node.args) != 1 or node.kwargs:
        raise SriglError(
            f"layer {name!r} ({type(module).__name__}) has no translation to ONNX here; these "
            f"have: {', '.join(sorted(kind.__name__ for kind in _MODULES))}; export the model "
            f"without that layer, or put one of these in its place"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise SriglError(
            f"layer {name!r} has hooks, which would be lost; remove them, or export without that "
            f"layer"
        )
    try:
        return translate(graph, module, made[node.args[0]], shapes[node])
    except SriglError as error:
        raise type(error)(f"layer {name!r}: {error}") from error


def _function(
    graph: _Graph, node: Any, made: dict[Any, _Tensor], shapes: dict[Any, _Tensor]
) -> str:
    called = node.target if isinstance(node.target, str) else node.target.__name__
    translate = _FUNCTIONS.get(called)
    if translate is None or node not in shapes:
        raise SriglError(
            f"the function {called!r} has no translation to ONNX here; these have: "
            f"{', '.join(sorted(_FUNCTIONS))}; export the model without it"
        )
    arguments = [made[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
    try:
        return translate(graph, shapes[node], *arguments, **node.kwargs)
    except TypeError as error:
        raise SriglError(
            f"the function {called!r} with arguments {node.args} and {node.kwargs} has no "
            f"translation to ONNX here"
        ) from error


# ---------------------------------------------------------------- activations


def _gelu(graph: _Graph, z: str, dtype: Any) -> str:
    if dtype is torch.float64:
        raise SriglError(
            "GELU in float64 needs Erf of that, which ONNX Runtime has not; convert the model with "
            "model.float(), or take the form of GELU by tanh"
        )
    error = graph.op("Erf", graph.op("Mul", z, _scalar(graph, math.sqrt(0.5), dtype)))
    twice = graph.op("Add", error, _scalar(graph, 1, dtype))
    return graph.op("Mul", graph.op("Mul", z, _scalar(graph, 0.5, dtype)), twice)


def _gelu_tanh(graph: _Graph, z: str, dtype: Any) -> str:
    cube = graph.op(
        "Mul", graph.op("Mul", z, z), graph.op("Mul", z, _scalar(graph, 0.044715, dtype))
    )
    inner = graph.op("Mul", graph.op("Add", z, cube), _scalar(graph, math.sqrt(2 / math.pi), dtype))
    twice = graph.op("Add", graph.op("Tanh", inner), _scalar(graph, 1, dtype))
    return graph.op("Mul", graph.op("Mul", z, _scalar(graph, 0.5, dtype)), twice)


def _silu(graph: _Graph, z: str, dtype: Any) -> str:
    return graph.op("Mul", z, graph.op("Sigmoid", z))


def _plain(kind: str) -> Callable[[_Graph, str, Any], str]:
    return lambda graph, z, dtype: graph.op(kind, z)


_Activation = Callable[[_Graph, str, Any], str]

_ACTIVATIONS: dict[str, _Activation] = {
    "none": lambda graph, z, dtype: z,
    "relu": _plain("Relu"),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}


def _scalar(graph: _Graph, number: float, dtype: Any) -> str:
    """Return a constant; `dtype` is a float one that NumPy has."""
    return graph.constant(as_numpy(torch.tensor(number, dtype=dtype)))


# ---------------------------------------------------------------- linear layers


def _linear(graph: _Graph, layer: Any, x: _Tensor, y: _Tensor) -> str:
    kind = _sum_dtype(x.dtype, layer.weight.dtype)
    weight = graph.constant(_numbers(layer.weight, kind).T)
    return _dense_product(graph, x, y, weight, layer.bias, kind, "none")


def _condensed_linear(graph: _Graph, layer: Any, x: _Tensor, y: _Tensor) -> str:
    kind = _sum_dtype(x.dtype, layer.values.dtype)
    activation = layer.activation or "none"
    if graph.form == "masked-dense":
        dense = layer.to_condensed().to_dense().astype(_numpy_dtype(kind))
        return _dense_product(graph, x, y, graph.constant(dense.T), layer.bias, kind, activation)
    last_first = [x.rank - 1, *range(x.rank - 1)]
    columns = graph.cast(x.name, x.dtype, kind)
    if x.rank > 1:
        columns = graph.op("Transpose", columns, perm=last_first)
    z = _condensed_rows(graph, layer, columns, x.rank, kind, y.dtype)
    if x.rank > 1:
        z = graph.op("Transpose", z, perm=[*range(1, x.rank), 0])
    z = _ACTIVATIONS[activation](graph, z, kind)
    return graph.cast(z, kind, y.dtype)


def _condensed_rows(
    graph: _Graph, layer: Any, columns: str, rank: int, kind: Any, result: Any
) -> str:
    """Add the product, before the activation, with features on the first of `rank` axes."""
    weight = layer.to_condensed()
    behind = (1,) * (rank - 1)
    values = weight.values.astype(_numpy_dtype(kind)).T.reshape(weight.fan_in, -1, *behind)
    indices = graph.constant(weight.indices.T.astype(np.int32))
    gathered = graph.op("Gather", columns, indices, axis=0)
    products = graph.op("Mul", gathered, graph.constant(values))
    z = graph.op("ReduceSum", products, graph.constant(np.array([0])), keepdims=0)
    if weight.n_active < layer.out_features:
        # A zero behind the active neurons, which all ablated ones are then taken from.
        ends = np.zeros(2 * rank, np.int64)
        ends[rank] = 1
        source = np.full(layer.out_features, weight.n_active)
        source[weight.active] = np.arange(weight.n_active)
        z = graph.op("Gather", graph.op("Pad", z, graph.constant(ends)), graph.constant(source))
    if layer.bias is not None:
        bias = _numbers(layer.bias.detach().to(result), kind).reshape(-1, *behind)
        z = graph.op("Add", z, graph.constant(bias))
    return z


def _dense_product(
    graph: _Graph,
    x: _Tensor,
    y: _Tensor,
    weight: str,
    bias: Any | None,
    kind: Any,
    activation: str,
) -> str:
    z = graph.op("MatMul", graph.cast(x.name, x.dtype, kind), weight)
    if bias is not None:
        z = graph.op("Add", z, graph.constant(_numbers(bias.detach().to(y.dtype), kind)))
    return graph.cast(_ACTIVATIONS[activation](graph, z, kind), kind, y.dtype)


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype is torch.float64 else np.float32)


# ---------------------------------------------------------------- convolutions


def _condensed_conv(graph: _Graph, conv: Any, x: _Tensor, y: _Tensor) -> str:
    layer = conv.linear
    kind = _sum_dtype(x.dtype, layer.values.dtype)
    activation = layer.activation or "none"
    image = _padded(graph, graph.cast(x.name, x.dtype, kind), conv.padding_mode, conv._paddings())
    if graph.form == "masked-dense":
        dense = layer.to_condensed().to_dense().astype(_numpy_dtype(kind))
        weight = dense.reshape(conv.out_channels, conv.in_channels, *conv.kernel_size)
        bias = [] if layer.bias is None else [_numbers(layer.bias.detach().to(y.dtype), kind)]
        constants = [graph.constant(array) for array in (weight, *bias)]
        z = graph.op("Conv", image, *constants, strides=conv.stride, dilations=conv.dilation)
    else:
        before, behind = conv._paddings()
        width = x.shape[3] + before[1] + behind[1]
        # Places of the padded image, its rows end to end, for each place of window and result.
        places = [
            np.arange(conv.kernel_size[i])[:, None] * conv.dilation[i]
            + np.arange(y.shape[2 + i]) * conv.stride[i]
            for i in range(2)
        ]
        rows, columns = places[0][:, None, :, None], places[1][None, :, None, :]
        places_of = (rows * width + columns).reshape(math.prod(conv.kernel_size), -1)
        shape = graph.constant(np.array([0, conv.in_channels, -1]))
        flat = graph.op("Reshape", image, shape)
        windows = graph.op("Gather", flat, graph.constant(places_of.astype(np.int64)), axis=2)
        n_places = y.shape[2] * y.shape[3]
        shape = graph.constant(np.array([0, layer.in_features, n_places]))
        first = graph.op("Transpose", graph.op("Reshape", windows, shape), perm=[1, 0, 2])
        z = _condensed_rows(graph, layer, first, 3, kind, y.dtype)
        shape = graph.constant(np.array([0, conv.out_channels, *y.shape[2:]]))
        z = graph.op("Reshape", graph.op("Transpose", z, perm=[1, 0, 2]), shape)
    return graph.cast(_ACTIVATIONS[activation](graph, z, kind), kind, y.dtype)


def _conv(graph: _Graph, conv: Any, x: _Tensor, y: _Tensor) -> str:
    kind = _sum_dtype(x.dtype, conv.weight.dtype)
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    paddings = (top, left), (bottom, right)
    image = _padded(graph, graph.cast(x.name, x.dtype, kind), conv.padding_mode, paddings)
    tensors = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
    constants = [graph.constant(_numbers(tensor, kind)) for tensor in tensors]
    z = graph.op(
        "Conv",
        image,
        *constants,
        strides=conv.stride,
        dilations=conv.dilation,
        group=conv.groups,
    )
    return graph.cast(z, kind, y.dtype)


def _padded(
    graph: _Graph, image: str, mode: str, paddings: tuple[tuple[int, int], tuple[int, int]]
) -> str:
    before, behind = paddings
    if not any((*before, *behind)):
        return image
    amounts = graph.constant(np.array([0, 0, *before, 0, 0, *behind]))
    if mode == "zeros":
        return graph.op("Pad", image, amounts)
    if mode == "circular" and graph.opset < 19:
        raise SriglError("padding_mode='circular' needs opset=19 or newer")
    return graph.op("Pad", image, amounts, mode=_PAD_MODES[mode])


# ---------------------------------------------------------------- other layers


def _batch_norm(graph: _Graph, norm: Any, x: _Tensor, y: _Tensor) -> str:
    if norm.running_mean is None:
        raise SriglError("it has no running statistics, and depends on the batch without them")
    mean = norm.running_mean
    parts = (
        torch.ones_like(mean) if norm.weight is None else norm.weight,
        torch.zeros_like(mean) if norm.bias is None else norm.bias,
        mean,
        norm.running_var,
    )
    constants = [graph.constant(as_numpy(part)) for part in parts]
    return graph.op("BatchNormalization", x.name, *constants, epsilon=norm.eps)


def _layer_norm(graph: _Graph, norm: Any, x: _Tensor, y: _Tensor) -> str:
    scale = torch.ones(norm.normalized_shape, dtype=x.dtype) if norm.weight is None else norm.weight
    parts = [scale] if norm.bias is None else [scale, norm.bias]
    constants = [graph.constant(as_numpy(part)) for part in parts]
    axis = -len(norm.normalized_shape)
    return graph.op("LayerNormalization", x.name, *constants, axis=axis, epsilon=norm.eps)


def _pair(setting: Any) -> list[int]:
    return [int(n) for n in (setting if isinstance(setting, tuple | list) else (setting, setting))]


def _max_pool(graph: _Graph, pool: Any, x: _Tensor, y: _Tensor) -> str:
    if pool.return_indices:
        raise SriglError("return_indices=True has no translation to ONNX here")
    kernel, stride = _pair(pool.kernel_size), _pair(pool.stride)
    padding, dilation = _pair(pool.padding), _pair(pool.dilation)
    for size, found, k, s, p, d in zip(
        x.shape[-2:], y.shape[-2:], kernel, stride, padding, dilation, strict=True
    ):
        if pool.ceil_mode and found != -((d * (k - 1) + 1 - size - 2 * p) // s) + 1:
            raise SriglError(
                f"with ceil_mode=True a window of size {k} lies in the padding alone, which "
                f"PyTorch leaves out and ONNX does not; change padding, or set ceil_mode=False"
            )
    return graph.op(
        "MaxPool",
        x.name,
        kernel_shape=kernel,
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        ceil_mode=int(pool.ceil_mode),
    )


def _average_pool(graph: _Graph, pool: Any, x: _Tensor, y: _Tensor) -> str:
    if pool.divisor_override is not None or pool.ceil_mode:
        raise SriglError("divisor_override and ceil_mode have no translation to ONNX here")
    return graph.op(
        "AveragePool",
        x.name,
        kernel_shape=_pair(pool.kernel_size),
        strides=_pair(pool.stride),
        pads=_pair(pool.padding) * 2,
        count_include_pad=int(pool.count_include_pad),
    )


def _global_average_pool(graph: _Graph, pool: Any, x: _Tensor, y: _Tensor) -> str:
    if _pair(pool.output_size) != [1, 1]:
        raise SriglError(f"output_size={pool.output_size} has no translation to ONNX here, only 1")
    return graph.op("GlobalAveragePool", x.name)


def _flattened(graph: _Graph, y: _Tensor, x: _Tensor, start_dim: int = 0, end_dim: int = -1) -> str:
    if start_dim != 1 or end_dim not in (-1, x.rank - 1):
        raise SriglError(
            f"flatten from axis {start_dim} to {end_dim} has no translation to ONNX here, only "
            f"from 1 to the last"
        )
    return graph.op("Flatten", x.name, axis=1)


def _softmax(graph: _Graph, module: Any, x: _Tensor, y: _Tensor) -> str:
    if module.dim is None:
        raise SriglError("its axis is left open; give dim")
    return graph.op("Softmax", x.name, axis=module.dim)


def _activated(graph: _Graph, x: _Tensor, translate: _Activation) -> str:
    """Add an activation, of 16-bit numbers in float32."""
    kind = _sum_dtype(x.dtype)
    return graph.cast(translate(graph, graph.cast(x.name, x.dtype, kind), kind), kind, x.dtype)


def _activation_module(translate: _Activation) -> Callable[[_Graph, Any, _Tensor, _Tensor], str]:
    return lambda graph, module, x, y: _activated(graph, x, translate)


def _activation_function(translate: _Activation) -> Callable[..., str]:
    return lambda graph, y, x, inplace=False: _activated(graph, x, translate)


def _gelu_of(approximate: str) -> _Activation:
    return _gelu if approximate == "none" else _gelu_tanh


def _elementwise(kind: str) -> Callable[..., str]:
    def translate(graph: _Graph, y: _Tensor, *parts: Any) -> str:
        names = [
            graph.cast(part.name, part.dtype, y.dtype)
            if isinstance(part, _Tensor)
            else _scalar(graph, part, y.dtype)
            for part in parts
        ]
        if len(names) != 2:
            raise TypeError
        return graph.op(kind, *names)

    return translate


_MODULES: dict[Any, Callable[[_Graph, Any, _Tensor, _Tensor], str]] = {
    CondensedLinear: _condensed_linear,
    CondensedConv2d: _condensed_conv,
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _global_average_pool,
    nn.Flatten: lambda graph, m, x, y: _flattened(graph, y, x, m.start_dim, m.end_dim),
    nn.Dropout: lambda graph, module, x, y: x.name,
    nn.Identity: lambda graph, module, x, y: x.name,
    nn.ReLU: _activation_module(_plain("Relu")),
    nn.GELU: lambda graph, m, x, y: _activated(graph, x, _gelu_of(m.approximate)),
    nn.SiLU: _activation_module(_silu),
    nn.Sigmoid: _activation_module(_plain("Sigmoid")),
    nn.Tanh: _activation_module(_plain("Tanh")),
    nn.Softmax: _softmax,
}

_FUNCTIONS: dict[str, Callable[..., str]] = {
    "add": _elementwise("Add"),
    "iadd": _elementwise("Add"),
    "mul": _elementwise("Mul"),
    "flatten": _flattened,
    "relu": _activation_function(_plain("Relu")),
    "gelu": lambda graph, y, x, approximate="none": _activated(graph, x, _gelu_of(approximate)),
    "silu": _activation_function(_silu),
    "sigmoid": _activation_function(_plain("Sigmoid")),
    "tanh": _activation_function(_plain("Tanh")),
}
