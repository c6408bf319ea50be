"""Models as ONNX files: onnxruntime gives the numbers that PyTorch does."""

import copy
import sys

import numpy as np
import pytest

from srigl_core import BackendUnavailableError, CondensedWeight, SriglError, ValueTypeError
from srigl_core.contract import ACTIVATIONS
from srigl_core.testing.bounds import first_violation
from srigl_core.testing.oracles import expected_product

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from torch import nn  # noqa: E402

from srigl_core.torch import CondensedConv2d, CondensedLinear  # noqa: E402
from srigl_core.torch.onnx_export import FORMS, export_onnx  # noqa: E402

STANDARD = {"Add", "Cast", "Erf", "Gather", "Identity", "MatMul", "Mul", "Pad", "ReduceSum"}
STANDARD |= {"Relu", "Sigmoid", "Tanh", "Transpose"}


def layer_of(shape, fan_in, n_active, *, dtype=np.float32, bias=True, seed=0, **options):
    rng = np.random.default_rng(seed)
    weight = CondensedWeight.random(shape, fan_in=fan_in, n_active=n_active, dtype=dtype, rng=rng)
    numbers = rng.standard_normal(shape[0]).astype(dtype) if bias else None
    budget = min(weight.nnz + 3, shape[0] * shape[1])
    return CondensedLinear.from_condensed(weight, numbers, nnz_budget=budget, **options)


def numbers(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path, x):
    return session_of(path).run(["output"], {"input": x.numpy()})[0]


def conv_of(in_channels, out_channels, kernel_size, n_active, **geometry):
    n_in = in_channels * kernel_size[0] * kernel_size[1]
    linear = layer_of((out_channels, n_in), min(7, n_in), n_active)
    return CondensedConv2d(linear, kernel_size, **geometry)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(layer_of((16, 16), 4, 12), nn.GELU(), nn.LayerNorm(16))
        self.scale = nn.Parameter(numbers(16))

    def forward(self, x):
        y = self.body(x) + x * self.scale
        y += 2 * torch.sigmoid(x)
        return nn.functional.silu(y).relu() + nn.functional.gelu(y, approximate="tanh")


def branches():
    return nn.Sequential(
        conv_of(3, 8, (3, 3), 6, padding=(1, 1)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding="same", padding_mode="replicate", bias=False),
        nn.BatchNorm2d(6, affine=False),
        nn.AvgPool2d((2, 1), padding=(1, 0)),
        nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Identity()),
        layer_of((10, 54), 9, 8, activation="gelu"),
        nn.BatchNorm1d(10),
        nn.Tanh(),
        nn.Linear(10, 4),
        nn.Softmax(-1),
    )


def pooled():
    return nn.Sequential(
        conv_of(5, 8, (1, 1), 6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sigmoid()
    )


MODELS = {
    "residual": (lambda: nn.Sequential(Residual(), nn.Linear(16, 3)), (5, 16)),
    "of three axes": (Residual, (5, 7, 16)),
    "convolutional": (branches, (5, 3, 8, 6)),
    "pooled": (pooled, (5, 5, 4, 3)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_gives_the_same_in_onnxruntime_for_any_batch(which, form, tmp_path):
    make, shape = MODELS[which]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "model.onnx", numbers(*shape), form=form)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], held) for name, held in before.items())
    model.eval()
    for n_rows in (5, 1, 3):
        x = numbers(n_rows, *shape[1:], seed=n_rows)
        got = run(tmp_path / "model.onnx", x)
        np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (dtype, activation)
        for dtype in ("float16", "float32", "float64")
        for activation in ACTIVATIONS
        if (dtype, activation) != ("float64", "gelu")  # which onnxruntime has not: it is refused
    ],
)
def test_a_condensed_layer_is_within_the_bound_of_its_definition(
    dtype, activation, bias, form, tmp_path
):
    for seed, (shape, fan_in, n_active) in enumerate(
        [((6, 10), 3, 4), ((1, 5), 5, 1), ((40, 70), 1, 40), ((33, 200), 60, 20)]
    ):
        options = {"dtype": np.dtype(dtype), "bias": bias, "activation": activation, "seed": seed}
        layer = layer_of(shape, fan_in, n_active, **options)
        x = numbers(3, 4, shape[1], dtype=getattr(torch, dtype)) * 3
        export_onnx(layer, tmp_path / "layer.onnx", x, form=form)
        offset = None if layer.bias is None else layer.bias.detach().numpy()
        outcome = expected_product(layer.to_condensed(), x.numpy(), offset, activation)
        got = run(tmp_path / "layer.onnx", x)
        assert got.dtype == np.dtype(dtype)
        assert first_violation(got, outcome) is None
        used = {node.op_type for node in onnx.load(tmp_path / "layer.onnx").graph.node}
        assert used <= STANDARD
        assert ("MatMul" in used) is (form == "masked-dense")


def test_a_weight_of_bfloat16_is_exact_beside_a_float32_input(tmp_path):
    layer = layer_of((12, 20), 5, 9).to(torch.bfloat16)
    x = numbers(4, 20)
    export_onnx(layer, tmp_path / "layer.onnx", x)
    offset = layer.bias.detach().float().numpy()
    outcome = expected_product(layer.to_condensed(), x.numpy(), offset, "none")
    assert first_violation(run(tmp_path / "layer.onnx", x), outcome) is None
    export_onnx(layer, tmp_path / "layer.onnx", x.bfloat16())
    kind = onnx.load(tmp_path / "layer.onnx").graph.output[0].type.tensor_type.elem_type
    assert kind == onnx.TensorProto.BFLOAT16


def test_what_is_not_connected_does_not_reach_the_result(tmp_path):
    layer = layer_of((6, 10), 3, 4)
    x = numbers(3, 10)
    unconnected = [c for c in range(10) if not layer.mask[:, c].any()]
    x[0, unconnected] = float("nan")
    rows = layer.mask[:, 0].nonzero().flatten().tolist()
    x[1, 0] = float("inf")
    export_onnx(layer, tmp_path / "layer.onnx", x)
    got = run(tmp_path / "layer.onnx", x)
    assert np.isfinite(got[0]).all()
    assert np.flatnonzero(~np.isfinite(got[1])).tolist() == rows
    assert unconnected
    assert rows


def test_the_condensed_file_is_small_and_the_fixed_one_has_no_open_axis(tmp_path):
    layer = layer_of((64, 640), 32, 64)
    for form in FORMS:
        export_onnx(layer, tmp_path / form, numbers(640), form=form, dynamic_batch=False)
        axes = onnx.load(tmp_path / form).graph.input[0].type.tensor_type.shape.dim
        assert [axis.dim_value for axis in axes] == [640]
        want = layer(numbers(640)).detach().numpy()
        np.testing.assert_allclose(run(tmp_path / form, numbers(640)), want, rtol=2e-5, atol=2e-6)
    sizes = [(tmp_path / form).stat().st_size for form in FORMS]
    assert sizes[0] < sizes[1] / 5
    export_onnx(layer, tmp_path / "open", numbers(2, 640))
    assert onnx.load(tmp_path / "open").graph.input[0].type.tensor_type.shape.dim[0].dim_param


GEOMETRIES = [
    {"stride": (2, 1)},
    {"dilation": (1, 2), "padding": "same"},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"padding": "valid", "stride": (3, 2)},
    {"padding": (1, 2), "padding_mode": "circular"},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_condensed_convolution_is_the_same_in_onnxruntime(geometry, form, tmp_path):
    conv = conv_of(4, 6, (3, 2), 5, **geometry)
    x = numbers(2, 4, 9, 8)
    opset = 19 if geometry.get("padding_mode") == "circular" else 18
    export_onnx(conv, tmp_path / "conv.onnx", x, form=form, opset=opset)
    assert onnx.load(tmp_path / "conv.onnx").opset_import[0].version == opset
    want = conv(x).detach().numpy()
    np.testing.assert_allclose(run(tmp_path / "conv.onnx", x), want, rtol=2e-5, atol=2e-6)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Two(nn.Module):
    def forward(self, x, y):
        return x


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Cosine(nn.Module):
    def forward(self, x):
        return torch.cos(x)


class Alpha(nn.Module):
    def forward(self, x):
        return torch.add(x, x, alpha=2)


def hooked():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_forward_hook(lambda module, inputs, result: 2 * result)
    return model


X = torch.zeros(2, 8)
IMAGE = torch.zeros(2, 4, 5, 5)
BAD = {
    "module": (
        nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ELU())),
        {},
        r"layer '1.0' \(ELU\) has no translation to ONNX here; these have: .*Conv2d",
    ),
    "function": (Cosine(), {}, "function 'cos' has no translation .*: add, flatten"),
    "arguments": (Alpha(), {}, "function 'add' with arguments"),
    "branch": (Branching(), {}, "cannot be traced by torch.fx"),
    "inputs": (Two(), {}, "missing 1 required.*must take one tensor"),
    "outputs": (Pair(), {}, "gives a tuple"),
    "shape": (nn.Linear(9, 8), {}, "does not take example_input"),
    "form": (nn.ReLU(), {"form": "dense"}, "form='dense' is unknown; use one of condensed"),
    "opset": (nn.ReLU(), {"opset": 17}, "opset=17"),
    "newest": (nn.ReLU(), {"opset": 999}, "opset=999"),
    "no batch": (nn.ReLU(), {"example_input": X[0]}, "without an axis for the batch"),
    "no tensor": (nn.ReLU(), {"example_input": 3}, "example_input must be a torch.Tensor, got int"),
    "wide": (
        nn.Sequential(nn.GELU()),
        {"example_input": X.double()},
        r"layer '0': GELU in float64.*model.float\(\)",
    ),
    "flatten": (nn.Flatten(0), {}, "layer '': flatten from axis 0"),
    "norm": (
        nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False)),
        {},
        "layer '0': it has no running statistics",
    ),
    "softmax": (nn.Sequential(nn.Softmax()), {}, "layer '0': its axis is left open"),
    "pool": (
        nn.Sequential(nn.AdaptiveAvgPool2d(2)),
        {"example_input": IMAGE},
        "layer '0': output_size=2",
    ),
    "ceil": (
        nn.Sequential(nn.AvgPool2d(2, ceil_mode=True)),
        {"example_input": IMAGE},
        "layer '0': .*ceil_mode",
    ),
    "window in the padding": (
        nn.Sequential(nn.MaxPool2d(2, padding=1, ceil_mode=True)),
        {"example_input": IMAGE},
        "layer '0': with ceil_mode=True a window of size 2 lies in the padding alone",
    ),
    "hooks": (hooked(), {}, "layer '0' has hooks, which would be lost"),
    "padding": (
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        {"example_input": IMAGE},
        "layer '0': padding_mode='circular' needs opset=19",
    ),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice for softmax")
@pytest.mark.parametrize("what", BAD)
def test_what_has_no_translation_is_named_and_no_file_written(what, tmp_path):
    model, options, message = BAD[what]
    example = options.get("example_input", X)
    options = {name: value for name, value in options.items() if name != "example_input"}
    with pytest.raises(SriglError, match=message):
        export_onnx(model, tmp_path / "model.onnx", example, **options)
    assert not list(tmp_path.iterdir())
    assert model.training


@pytest.mark.parametrize("size", [6, 7])
def test_a_pool_with_a_last_window_that_is_cut_off_is_the_same(size, tmp_path):
    model = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    export_onnx(model, tmp_path / "pool.onnx", x)
    np.testing.assert_array_equal(run(tmp_path / "pool.onnx", x), model(x).numpy())


def test_the_example_is_not_written(tmp_path):
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    export_onnx(nn.Sequential(nn.ReLU(inplace=True)), tmp_path / "model.onnx", x)
    assert torch.equal(x, before)


def test_arguments_of_another_kind_and_a_missing_package_are_said(tmp_path, monkeypatch):
    with pytest.raises(ValueTypeError, match=r"model must be a torch.nn.Module, got str"):
        export_onnx("model", tmp_path / "model.onnx", X)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendUnavailableError, match=r'pip install "srigl-core\[onnx\]"'):
        export_onnx(nn.ReLU(), tmp_path / "model.onnx", X)
