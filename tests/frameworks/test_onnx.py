"""Models as ONNX files: onnxruntime gives the numbers that PyTorch does."""

import copy
import math
import sys

import numpy as np
import pytest

from srigl_core import BackendUnavailableError, CondensedWeight, SriglError
from srigl_core._arrays.dtypes import value_dtype
from srigl_core.contract import ACTIVATIONS
from srigl_core.testing.bounds import first_violation
from srigl_core.testing.oracles import expected_product

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

from srigl_core.torch import CondensedConv2d, CondensedLinear, quantize  # noqa: E402
from srigl_core.torch.onnx import FORMS, export_onnx  # noqa: E402
from srigl_core.torch.tensors import numpy_dtype  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own


def layer_of(shape, fan_in, n_active, *, dtype="float32", bias=True, seed=0, activation=None):
    rng, dtype = np.random.default_rng(seed), value_dtype(dtype)
    weight = CondensedWeight.random(shape, fan_in=fan_in, n_active=n_active, dtype=dtype, rng=rng)
    offset = rng.standard_normal(shape[0]).astype(dtype) if bias else None
    budget = min(weight.nnz + 3, shape[0] * shape[1])
    return CondensedLinear.from_condensed(weight, offset, nnz_budget=budget, activation=activation)


def conv_of(in_channels, out_channels, kernel_size, n_active, *, activation=None, **geometry):
    n_in = in_channels * math.prod(kernel_size)
    linear = layer_of((out_channels, n_in), min(7, n_in), n_active, activation=activation)
    return CondensedConv2d(linear, kernel_size, **geometry)


def numbers(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def run(path, *inputs):
    """Return the results of a file in onnxruntime, each operator as it stands there."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


class Several(nn.Module):
    """Layers with the same input, each with a result; NumPy has the dtype `outside`."""

    def __init__(self, layers, dtype=torch.float32, outside=torch.float32):
        super().__init__()
        self.layers, self.dtype, self.outside = nn.ModuleList(layers), dtype, outside

    def forward(self, x):
        return tuple(layer(x.to(self.dtype)).to(self.outside) for layer in self.layers)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.shared = layer_of((16, 16), 4, 12)
        self.body = nn.Sequential(self.shared, nn.GELU(), nn.LayerNorm(16), self.shared)
        self.body[1].register_forward_hook(lambda module, inputs, result: 2 * result)

    def forward(self, x, memory):
        y = x + self.attention(x, memory, memory)[0]
        y += self.body(y) * torch.cos(x)
        return nn.functional.silu(y), y[:, -1]


def convolutional():
    return nn.Sequential(
        nn.ReLU(inplace=True),
        conv_of(3, 8, (3, 3), 6, padding=(1, 1), activation="relu"),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(2, padding=1, ceil_mode=True),
        nn.Conv2d(8, 6, 3, padding="same", padding_mode="replicate", groups=2),
        conv_of(6, 6, (1, 1), 6),
        nn.AdaptiveAvgPool2d(2),
        nn.Sequential(nn.Flatten(), nn.Dropout()),
        layer_of((10, 24), 9, 8, activation="gelu"),
        nn.Softmax(-1),
    )


MODELS = {
    "block": (Block, [(5, 7, 16), (5, 3, 16)]),
    "convolutional": (convolutional, [(1, 3, 8, 6)]),
    "one layer": (lambda: layer_of((8, 16), 4, 6), [(5, 7, 16)]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_gives_the_same_in_onnxruntime_for_any_batch(which, form, tmp_path):
    make, shapes = MODELS[which]
    model = make()
    example = tuple(numbers(*shape) for shape in shapes)
    before = copy.deepcopy((model.state_dict(), example))
    path = tmp_path / "model.onnx"
    export_onnx(model, path, example if len(example) > 1 else example[0], form=form)
    assert model.training
    torch.testing.assert_close((model.state_dict(), example), before, rtol=0, atol=0)
    model.eval()
    for n_rows in (5, 1, 3):
        inputs = [numbers(n_rows, *shape[1:], seed=n_rows) for shape in shapes]
        got, want = run(path, *inputs), model(*inputs)
        for one, other in zip(got, want if isinstance(want, tuple) else [want], strict=True):
            np.testing.assert_allclose(one, other.detach().numpy(), rtol=2e-5, atol=2e-6)


class Attention(nn.Module):
    """Attention, an encoder layer with condensed parts, shapes in ``forward``, nested results."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 12, batch_first=True)
        self.encoder.linear1 = layer_of((12, 16), 4, 10)
        self.encoder.linear2 = layer_of((16, 12), 3, 16)

    def forward(self, tokens):
        x = tokens["x"] + tokens["offsets"][0]
        x = self.attention(x, x, x)[0].reshape(x.shape[0] * x.shape[1], 16).view(x.shape)
        y = self.encoder(x)
        return {"mean": y.mean(1), "all": (y, x)}


class Convolutions(nn.Module):
    """A dense Conv1d beside condensed layers, and a mean over the image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 4, 3, padding=1), layer_of((6, 4), 2, 5)
        self.image = conv_of(4, 5, (3, 3), 5, padding=(1, 1))

    def forward(self, x):
        x = self.first(x)
        image = self.image(x[..., None] * x[:, :, None])
        return self.second(x.mean(2)), image.mean((2, 3))


def tokens_of(n_rows, n_tokens):
    x = numbers(n_rows, n_tokens, 16, seed=n_rows)
    return {"x": x, "offsets": (x / 2,)}


OPEN = {
    "attention": (Attention, [(tokens_of(2, 5),), (tokens_of(3, 7),)], [16, 16]),
    "convolutions": (Convolutions, [numbers(2, 3, 9), numbers(4, 3, 6)], [None]),
    "keywords": (
        lambda: layer_of((8, 16), 4, 6),
        [{"x": numbers(2, 5, 16)}, {"x": numbers(3, 4, 16)}],
        [16],
    ),
}


@pytest.mark.parametrize("which", OPEN)
def test_all_lengths_are_open_that_the_model_leaves_open(which, tmp_path, monkeypatch):
    """At other lengths than the example's; the last axis has the length that the model needs."""
    make, examples, last = OPEN[which]
    model, path = make(), tmp_path / "model.onnx"
    export_onnx(model, path, examples[0])
    assert torch.backends.mha.get_fastpath_enabled()
    shapes = [entry.type.tensor_type.shape.dim for entry in onnx.load(path).graph.input]
    assert [shape[-1].dim_value or None for shape in shapes] == last
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    for example in examples:
        model.eval()
        if isinstance(example, dict):
            want = model(**example)
        else:
            want = model(*example) if isinstance(example, tuple) else model(example)
        leaves = torch.utils._pytree.tree_leaves
        inputs = [leaf for leaf in leaves(example) if leaf is not None]
        for one, other in zip(run(path, *inputs), leaves(want), strict=True):
            np.testing.assert_allclose(one, other.detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "x_dtype", "activations"),
    [
        ("float16", "float16", ACTIVATIONS),
        ("bfloat16", "bfloat16", ACTIVATIONS),
        ("bfloat16", "float32", ACTIVATIONS),
        ("float32", "float32", ACTIVATIONS),
        # GELU needs Erf of float64, which onnxruntime does not have.
        ("float64", "float64", [name for name in ACTIVATIONS if name != "gelu"]),
    ],
)
def test_a_condensed_layer_is_within_the_bound_of_its_definition(
    dtype, x_dtype, activations, form, tmp_path
):
    layers = [
        layer_of(shape, fan_in, n_active, dtype=dtype, bias=bias, activation=activation, seed=seed)
        for activation in activations
        for seed, (shape, fan_in, n_active, bias) in enumerate(
            [((33, 70), 60, 20, True), ((40, 70), 1, 40, False)]
        )
    ]
    x = numbers(3, 4, 70, dtype=getattr(torch, x_dtype)) * 3
    outside = torch.float32 if x_dtype == "bfloat16" else x.dtype
    path = tmp_path / "layers.onnx"
    export_onnx(Several(layers, x.dtype, outside), path, x.to(outside), form=form)
    rounded_x = x.double().numpy().astype(value_dtype(x_dtype))
    for layer, got in zip(layers, run(path, x.to(outside)), strict=True):
        bias = None if layer.bias is None else layer.bias.detach().double().numpy()
        outcome = expected_product(layer.to_condensed(), rounded_x, bias, layer.activation)
        rounded = got.astype(rounded_x.dtype)
        np.testing.assert_array_equal(rounded, got)
        assert first_violation(rounded, outcome) is None


def test_what_is_not_connected_does_not_reach_the_result(tmp_path):
    layer = layer_of((6, 10), 3, 4)
    x = numbers(3, 10)
    unconnected = [c for c in range(10) if not layer.mask[:, c].any()]
    rows = layer.mask[:, 0].nonzero().flatten().tolist()
    assert unconnected
    assert rows
    x[0, unconnected], x[1, 0] = float("nan"), float("inf")
    export_onnx(layer, tmp_path / "layer.onnx", x)
    (got,) = run(tmp_path / "layer.onnx", x)
    assert np.isfinite(got[0]).all()
    assert np.flatnonzero(~np.isfinite(got[1])).tolist() == rows


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_the_condensed_file_is_small_and_only_an_open_batch_is_open(dynamic_batch, tmp_path):
    layer, x = layer_of((256, 640), 32, 256), numbers(2, 640)
    for form in FORMS:
        export_onnx(layer, tmp_path / form, x, form=form, dynamic_batch=dynamic_batch)
        graph = onnx.load(tmp_path / form).graph
        for (entry,), name, n in ((graph.input, "input", 640), (graph.output, "output", 256)):
            batch, features = entry.type.tensor_type.shape.dim
            assert (entry.name, features.dim_value) == (name, n)
            assert (batch.dim_param, batch.dim_value) == (
                ("batch", 0) if dynamic_batch else ("", 2)
            )
    sizes = [(tmp_path / form).stat().st_size for form in FORMS]
    assert sizes[0] < sizes[1] / 5


GEOMETRIES = [
    {"stride": (2, 1)},
    {"dilation": (1, 2), "padding": "same"},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"padding": "valid", "stride": (3, 2)},
    {"padding": (1, 2), "padding_mode": "circular"},
]


@pytest.mark.parametrize(("form", "opset"), [(FORMS[0], 18), (FORMS[1], 21)])
def test_a_condensed_convolution_is_the_same_in_onnxruntime(form, opset, tmp_path):
    model = Several([conv_of(4, 6, (3, 2), 5, activation="gelu", **one) for one in GEOMETRIES])
    x, path = numbers(2, 4, 9, 8), tmp_path / "convolutions.onnx"
    export_onnx(model, path, x, form=form, opset=opset)
    made = onnx.load(path)
    assert [entry.version for entry in made.opset_import] == [opset]
    assert any(node.op_type == "Conv" for node in made.graph.node) is (form == "masked-dense")
    for got, want in zip(run(path, x), model(x), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=2e-5, atol=2e-6)


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_quantized_layer_stays_within_the_bound(dtype, form, tmp_path):
    narrow = "float64" if dtype is torch.float64 else "float16"
    wide = torch.promote_types(dtype, torch.float32)
    layers = [layer_of((20, 12), 5, 15, dtype=narrow)]
    layers.append(layer_of((9, 12), 3, 9, bias=False, dtype=numpy_dtype(wide).name))
    model = Several(map(quantize, map(nn.Sequential, layers)), dtype, wide)
    x = numbers(6, 12, dtype=dtype)
    export_onnx(model, tmp_path / "model.onnx", x, form=form)
    graph = onnx.load(tmp_path / "model.onnx").graph
    int8 = [tuple(i.dims) for i in graph.initializer if i.data_type == onnx.TensorProto.INT8]
    if form == "condensed" and dtype is not torch.float64:
        assert int8 == [(5, 15), (3, 9)]
        assert [node.op_type for node in graph.node].count("DequantizeLinear") == 2
    for (layer,), y in zip(model.layers, run(tmp_path / "model.onnx", x), strict=True):
        bias = None if layer.bias is None else layer.bias.numpy().astype(y.dtype)
        expected = expected_product(layer.to_quantized(), x.numpy(), bias, "none")
        result = y.astype(numpy_dtype(torch.promote_types(dtype, layer.dtype)))
        assert first_violation(result, expected) is None


def test_a_layer_that_quantizes_its_inputs_is_not_exported(tmp_path):
    model = quantize(nn.Sequential(layer_of((4, 4), 2, 4)), inputs="int8")
    with pytest.raises(SriglError, match=r"layer '0' quantises its inputs, .* inputs='float'"):
        export_onnx(model, tmp_path / "model.onnx", numbers(2, 4))
    assert not list(tmp_path.iterdir())


class Narrower(CondensedLinear):
    pass


def hooked():
    model = nn.Sequential(layer_of((8, 8), 2, 8))
    model[0].register_forward_hook(lambda module, inputs, result: 2 * result)
    return model


X, IMAGE = torch.zeros(2, 8), torch.zeros(2, 4, 5, 5)
UNTRANSLATED = nn.Sequential(nn.ReLU(), nn.Sequential(nn.FractionalMaxPool2d(2, output_size=2)))
POOL = nn.MaxPool2d(2, padding=1, ceil_mode=True)  # a window in the padding, which ONNX counts
BAD = {
    "module": ("model", X, {}, "model must be a torch.nn.Module, got str"),
    "tensor": (nn.ReLU(), 3, {}, "example_input must be a torch.Tensor.*got int"),
    "array": (nn.ReLU(), (X, X.numpy()), {}, "example_input must be a torch.Tensor.*got ndarray"),
    "batch": (nn.ReLU(), X[0], {}, "without an axis for the batch"),
    "form": (nn.ReLU(), X, {"form": "dense"}, "form='dense' is unknown; use one of condensed"),
    "old opset": (nn.ReLU(), X, {"opset": 17}, "opset=17"),
    "new opset": (nn.ReLU(), X, {"opset": 999}, "opset=999"),
    "inputs": (nn.Bilinear(8, 8, 8), X, {}, "does not take example_input: .*missing 1 required"),
    "features": (layer_of((8, 9), 2, 8), X, {}, "does not take example_input: .*n_in=9"),
    "hooks": (hooked(), X, {}, "layer '0' has hooks, which would be lost"),
    "subclass": (nn.Sequential(Narrower(8, 8, fan_in=2)), X, {}, "layer '0' is of type Narrower"),
    "branch": (
        Of(lambda x: x if x.sum() > 0 else -x),
        X,
        {},
        "cannot export the model: .*decide by a tensor's numbers",
    ),
    "length": (
        Of(lambda x: x + torch.ones(2, 8)),
        X,
        {},
        "cannot export the model: .*dynamic_batch=False",
    ),
    "operator": (
        *(UNTRANSLATED, IMAGE, {}),
        r"no translation of layer '1.0' \(FractionalMaxPool2d\): .*aten.fractional_max_pool2d",
    ),
    "translation": (
        POOL,
        IMAGE,
        {"dynamic_batch": False},
        "no valid translation .*node_max_pool2d",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_exported_is_named_and_no_file_written(what, tmp_path):
    model, example, options, message = BAD[what]
    with pytest.raises(SriglError, match=message):
        export_onnx(model, tmp_path / "model.onnx", example, **options)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_pytorch_does_not_reach_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxscript.version_converter.convert_version", lambda *_, **__: None)
    with pytest.raises(SriglError, match=r"opset=20: PyTorch .* opset 18 only"):
        export_onnx(nn.ReLU(), tmp_path / "model.onnx", X, opset=20)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_what_installs_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailableError, match=rf"{package} .*pip install onnx onnxscript"):
        export_onnx(nn.ReLU(), tmp_path / "model.onnx", X)
