"""Which layers are made sparse, where they have their neurons, and how condensed ones look."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest

from srigl_core import LayerOptions, SriglError, TrainingConfig, ValueTypeError
from srigl_core.reference import UpdateSchedule

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

from srigl_core.torch import (  # noqa: E402
    CondensedConv1d,
    CondensedLinear,
    CondensedMultiheadAttention,
    SRigL,
    condense,
    export_onnx,
    load_model,
    report,
    save_model,
    to_masked_dense,
)

SCHEDULE = UpdateSchedule(t_end=100, delta_t=2)


def attach(model, mode="masked", sparsity=0.5, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    srigl = SRigL(model, optimizer, sparsity=sparsity, schedule=SCHEDULE, mode=mode, **options)
    return srigl, optimizer


def trained(make, mode, shape, steps=5, **options):
    """Return a model after some steps, and its SRigL."""
    torch.manual_seed(0)
    model = make().double()
    srigl, optimizer = attach(model, mode, **options)
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
        result = model(x)
        target = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        (result - target).square().mean().backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    return model, srigl


def both(make, shape, **options):
    """Return a masked and a condensed model with the same training."""
    pair = [trained(make, mode, shape, **options) for mode in ("masked", "condensed")]
    (masked, first), (condensed, second) = pair
    for name in first.trainer.budgets:
        assert torch.equal(first.mask(name), second.mask(name))
    x = torch.randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(condensed(x), masked(x))
    return masked, condensed, first


def fan_ins(mask, groups=1, transposed=True):
    """Return the fan-ins of a mask, stored as (inputs, outputs / groups, ...)."""
    if transposed:
        grouped = mask.unflatten(0, (groups, -1)).transpose(1, 2)
        mask = grouped.flatten(0, 1)
    return set(mask.flatten(1).sum(1).tolist()) - {0}


# ---------------------------------------------------------------- the axis of the neurons


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class InOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 4
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return x @ self.weight


def gpt_block():
    return nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(6, 12))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_the_neurons_of_a_transposed_convolution_are_its_output_channels(cls, groups):
    axes = int(cls.__name__[-2])
    model, srigl = trained(
        lambda: nn.Sequential(cls(8, 4, 2, groups=groups)), "masked", (8,) + (3,) * axes
    )
    mask = srigl.mask("0")
    assert mask.shape == model[0].weight.shape
    assert fan_ins(mask, groups) == {srigl.trainer.fan_in["0"]}
    assert not model[0].weight[~mask].any()


@pytest.mark.parametrize("mode", ["masked", "condensed"])
def test_a_given_mask_has_the_shape_of_the_weight(mode):
    torch.manual_seed(0)
    model = gpt_block()
    _, srigl = trained(gpt_block, "masked", (8,))
    masks = {name: srigl.mask(name) for name in srigl.trainer.budgets}
    weight = model[0].weight.detach().clone()
    given, _ = attach(model, mode, None, masks=masks)
    assert all(torch.equal(given.mask(name), mask) for name, mask in masks.items())
    new = model[0].weight if mode == "masked" else model[0].weight.t()
    assert torch.equal(new, torch.where(masks["0"], weight, 0))


def test_gpts_conv1d_is_trained_in_both_modes_condensed_saved_and_loaded(tmp_path):
    masked, condensed, srigl = both(gpt_block, (8,))
    assert [type(layer) for layer in condensed[::2]] == [CondensedLinear] * 2
    assert fan_ins(srigl.mask("0")) == {srigl.trainer.fan_in["0"]}
    assert srigl.mask("0").shape == (8, 12)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = masked(x)
    torch.testing.assert_close(condense(masked, srigl)(x), expected)
    save_model(masked, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", gpt_block().double())
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(to_masked_dense(loaded)(x), expected)


def test_new_weights_are_drawn_for_the_neurons():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(400, 8))
    srigl, _ = attach(model, init="torch_default")
    bound = srigl.trainer.fan_in["0"] ** -0.5
    assert 0.9 * bound < model[0].weight.abs().max() <= bound


NO_NEURONS = {
    "embedding": (lambda: nn.Embedding(9, 8), "0", "is a table of embeddings"),
    "bag": (lambda: nn.EmbeddingBag(9, 8), "0", "is a table of embeddings"),
    "norm": (lambda: nn.LayerNorm((3, 8)), "0", "has no neurons"),
    "bias": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "0.bias_k", "is a bias"),
    "vector": (lambda: nn.Linear(8, 4), "0.bias", r"has a weight of shape \(4,\)"),
    "other axis": (InOut, "0", r"\(in_features, out_features\), but a neuron must be a row"),
}


@pytest.mark.parametrize("mode", ["masked", "condensed"])
@pytest.mark.parametrize("what", NO_NEURONS)
def test_a_parameter_without_neurons_is_refused_by_name(what, mode):
    make, name, message = NO_NEURONS[what]
    with pytest.raises(SriglError, match=f"layer '{name}' .*{message}"):
        attach(nn.Sequential(make(), nn.Linear(8, 8)), mode, include=[name])
    srigl, _ = attach(nn.Sequential(make(), nn.Linear(8, 8)), mode)
    assert what == "vector" or name in srigl.left_dense


def test_rows_of_a_parameter_of_an_unknown_module_are_its_neurons():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 10))
            self.layer = nn.Bilinear(4, 5, 6)

    srigl, _ = attach(Mine(), include=["table", "layer"])
    assert len(fan_ins(srigl.mask("table"), transposed=False)) == 1
    assert len(fan_ins(srigl.mask("layer"), transposed=False)) == 1


# ---------------------------------------------------------------- attention

ATTENTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "other sizes": {"kdim": 6, "vdim": 10, "batch_first": True},
    "without bias": {"bias": False, "num_heads": 1},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


class Attention(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.attention = nn.MultiheadAttention(**{"embed_dim": 8, "num_heads": 2} | options)

    def forward(self, *inputs, **options):
        return self.attention(*inputs, **options)


def attention_pair(options):
    torch.manual_seed(0)
    model = Attention(options).double()
    if model.attention.in_proj_bias is not None:
        nn.init.normal_(model.attention.in_proj_bias)
    condensed = copy.deepcopy(model)
    attach(model)
    attach(condensed, "condensed")
    return model, condensed


@pytest.mark.parametrize("what", ATTENTIONS)
def test_condensed_attention_has_the_interface_of_the_dense_one(what):
    options = ATTENTIONS[what]
    model, condensed = attention_pair(options)
    attention = condensed.attention
    assert isinstance(attention, CondensedMultiheadAttention)
    assert isinstance(attention.out_proj, CondensedLinear)
    sizes = [attention.embed_dim, attention.kdim, attention.vdim]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, 5, n, generator=generator, dtype=torch.float64) for n in sizes]
    if sizes[0] == sizes[1]:
        inputs = [inputs[0]] * 3
    if not attention.batch_first:
        inputs = [x.transpose(0, 1).contiguous() for x in dict.fromkeys(inputs)] * (
            4 - len(set(inputs))
        )
    causal = nn.Transformer.generate_square_subsequent_mask(5).double()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    heads = torch.randn(3 * attention.num_heads, 5, 5, generator=generator, dtype=torch.float64)
    for arguments in (
        {},
        {"need_weights": False},
        {"average_attn_weights": False, "key_padding_mask": padding},
        {"attn_mask": causal.isinf(), "need_weights": False, "key_padding_mask": padding},
        {"attn_mask": heads},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
    ):
        if "is_causal" in arguments and "add_bias_kv" in options:
            continue
        for expected, result in zip(
            model(*inputs, **arguments), condensed(*inputs, **arguments), strict=True
        ):
            assert (expected is None) == (result is None)
            if expected is not None:
                torch.testing.assert_close(result, expected)
    alone = [x[0] if attention.batch_first else x[:, 0] for x in inputs]
    torch.testing.assert_close(condensed(*alone), model(*alone))
    other = [alone[0], *(torch.cat([x, x[:1]]) for x in alone[1:])]
    torch.testing.assert_close(condensed(*other), model(*other))
    back = to_masked_dense(condensed)
    assert type(back.attention) is nn.MultiheadAttention
    torch.testing.assert_close(back(*inputs), model(*inputs))


def test_attention_says_what_it_takes():
    _, condensed = attention_pair({})
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    with pytest.raises(SriglError, match=r"attn_mask has shape \(2, 2\), but must be \(5, 5\)"):
        condensed(x, x, x, attn_mask=torch.zeros(2, 2))
    with pytest.raises(SriglError, match="key_padding_mask has shape"):
        condensed(x, x, x, key_padding_mask=torch.zeros(5, 3, dtype=torch.bool))
    with pytest.raises(SriglError, match="pass attn_mask too"):
        condensed(x, x, x, is_causal=True)


def transformer(**options):
    options = {"batch_first": True, "dropout": 0.0} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors will not be used
        layer = nn.TransformerEncoderLayer(16, 2, 32, **options)
        return nn.TransformerEncoder(layer, 2)


def test_attention_is_trained_alike_in_both_modes_saved_and_loaded(tmp_path):
    # Where one of a query's and a key's neuron is ablated, the other's gradient is rounding only.
    masked, condensed, srigl = both(transformer, (5, 16), gamma_sal=None)
    assert "layers.0.self_attn.in_proj_weight" in srigl.trainer.budgets
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = masked.eval()(x)
    again = condense(copy.deepcopy(masked), srigl)
    save_model(again, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", transformer().double()).eval()
    twice = load_model(tmp_path / "m.safetensors", loaded)
    for model in (condensed.eval(), again, twice, pickle.loads(pickle.dumps(again))):
        assert isinstance(model.layers[0].self_attn, CondensedMultiheadAttention)
        torch.testing.assert_close(model(x), expected)
    fresh = transformer().double()
    attach(fresh, "condensed", gamma_sal=None)
    fresh.load_state_dict(condensed.state_dict())
    torch.testing.assert_close(fresh.eval()(x), expected)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")
def test_condensed_attention_is_exported(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = nn.Sequential(transformer())
    attach(model, "condensed")
    x = torch.randn(2, 5, 16)
    export_onnx(model, tmp_path / "m.onnx", x)
    (result,) = runtime.InferenceSession(tmp_path / "m.onnx").run(None, {"input": x.numpy()})
    np.testing.assert_allclose(result, model.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-5)


PARTS = [(), ["layers.0"], ["*.self_attn"], ["*.linear?"], ["*.out_proj"], ["*.in_proj_weight"]]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("left_out", PARTS, ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_stock_encoders_compute_with_condensed_layers_in_training_and_evaluation(
    left_out, norm_first
):
    torch.manual_seed(0)
    model = transformer(norm_first=norm_first, activation="gelu").double()
    condensed = copy.deepcopy(model)
    attach(model, exclude=left_out)
    attach(condensed, "condensed", exclude=left_out)
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padding[2, 3:] = True
    for training, mask, grad in itertools.product((True, False), (None, padding), (True, False)):
        kept = slice(None) if mask is None else ~mask
        with torch.set_grad_enabled(grad):
            expected = model.train(training)(x, src_key_padding_mask=mask)
            result = condensed.train(training)(x, src_key_padding_mask=mask)
        torch.testing.assert_close(result[kept], expected[kept])


def test_a_condensed_layer_put_into_a_stock_encoder_by_hand_keeps_its_gradient():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).requires_grad_(False).eval()
    layer.linear1 = CondensedLinear(16, 32, fan_in=3, activation="relu")
    expected = layer.linear2(layer.linear1(layer.norm1(torch.zeros(2, 5, 16))))
    layer(torch.randn(2, 5, 16)).sum().backward()
    assert layer.linear1.values.grad.any()
    assert expected.shape == (2, 5, 16)


# ---------------------------------------------------------------- convolutions

SIGNALS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "padding": 1},
    {"kernel_size": 4, "stride": 2, "dilation": 2, "padding": 3, "bias": False},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("geometry", SIGNALS, ids=str)
def test_a_condensed_convolution_of_a_signal_is_the_masked_one(geometry, tmp_path):
    def make():
        return nn.Sequential(nn.Conv1d(4, 6, **geometry), nn.ReLU())

    masked, condensed, srigl = both(make, (4, 11))
    assert type(condensed[0]) is CondensedConv1d
    torch.testing.assert_close(condensed[0].weight, masked[0].weight.detach())
    save_model(condense(masked, srigl), tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", make().double())
    x = torch.randn(2, 4, 11, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), condensed(x))
    back = to_masked_dense(loaded)
    assert type(back[0]) is nn.Conv1d
    torch.testing.assert_close(back(x), condensed(x))


# ---------------------------------------------------------------- the dense weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weight_of_a_condensed_layer_is_the_masked_dense_one(dtype):
    mask = np.zeros((6, 8), np.bool_)
    mask[[0, 2, 5], 1:4] = True
    linear = nn.Linear(8, 6, dtype=dtype)
    layer = CondensedLinear.from_linear(linear, mask, nnz_budget=20)
    assert torch.equal(layer.weight, layer.to_linear().weight)
    assert torch.equal(layer.weight != 0, torch.from_numpy(mask))
    assert (layer.weight.dtype, layer.weight.device) == (dtype, torch.device("cpu"))
    assert (layer.weight.shape, layer.weight.requires_grad) == ((6, 8), False)
    assert isinstance(layer.weight, torch.Tensor)
    before = layer.weight
    with torch.no_grad():
        layer.values.mul_(2)
    assert torch.equal(before, 2 * torch.where(torch.from_numpy(mask), linear.weight, 0))
    assert layer.to("meta").weight.sum().is_meta
    x = torch.randn(2, 8, dtype=dtype)
    assert type(nn.functional.linear(x, before)) is torch.Tensor


def test_the_weight_is_described_without_its_numbers(monkeypatch):
    layer = CondensedLinear(768, 3072, sparsity=0.9, rng=0)
    monkeypatch.setattr("srigl_core.torch.weight_view.dense_weight", None)
    weight = layer.weight
    assert weight.dtype is torch.float32
    assert weight.device.type == "cpu"
    with torch.inference_mode():
        assert layer.weight.dtype is torch.float32
    assert weight.shape == weight.size() == (3072, 768)
    assert (weight.ndim, weight.numel(), weight.is_floating_point()) == (2, 3072 * 768, True)


WRITES = {
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(4, 8))),
    "tensor": lambda layer: setattr(layer, "weight", torch.zeros(4, 8)),
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(4, 8)),
    "in place": lambda layer: layer.weight.zero_(),
    "in place, data": lambda layer: layer.weight.data.mul_(2),
    "item": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "view": lambda layer: layer.weight.detach().t()[0].add_(1),
    "init": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "out": lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 1.0),
    "freezing": lambda layer: layer.weight.requires_grad_(False),
}


@pytest.mark.parametrize("what", WRITES)
def test_writes_to_the_weight_of_a_condensed_layer_are_refused(what):
    layer = CondensedLinear(8, 4, fan_in=2, rng=0)
    before = layer.to_linear().weight.clone()
    with pytest.raises(SriglError, match=r"is read-only, .* write to layer.values"):
        WRITES[what](layer)
    assert torch.equal(layer.to_linear().weight, before)
    assert not layer.weight.numpy().flags.writeable


def test_the_weight_can_be_traced():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = CondensedLinear(20, 10, fan_in=3, rng=1)

        def forward(self, x):
            weight = self.linear.weight
            return self.linear(x.to(weight.dtype)) + x @ weight.t() + weight.shape[0]

    model, x = Model(), torch.randn(3, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


# ---------------------------------------------------------------- which layers


class Zoo(nn.Module):
    """A model in which most layers cannot be condensed."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, 8), nn.Parameter(torch.zeros(1, 6, 8))
        self.linear = self.again = nn.Linear(8, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.pointwise, self.transposed = nn.Conv1d(8, 8, 1), nn.ConvTranspose1d(8, 8, 1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.volume, self.lazy = nn.Conv3d(1, 2, (1, 3, 3), padding="same"), nn.LazyLinear(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.again(self.linear(self.embedding(tokens) + self.position))
        x = self.hooked(self.frozen(self.pruned(self.spectral(self.normed(x)))))
        x = self.transposed(self.pointwise(self.depthwise(x.transpose(1, 2)))).transpose(1, 2)
        x = self.volume(x[:, None, None]).mean((1, 2))
        return self.head(self.recurrent(self.lazy(x))[0])


LEFT = {
    "embedding": "shares its weight with 'head'",
    "head": "shares its weight with 'embedding'",
    "position": "is no layer of a known type",
    "normed": "computes its weight",
    "spectral": "computes its weight",
    "pruned": "computes its weight",
    "frozen": "is frozen",
    "lazy": "has no weight yet",
    "recurrent.weight_ih_l0": "is no layer of a known type",
    "recurrent.weight_hh_l0": "is no layer of a known type",
}
NOT_CONDENSED = {
    "depthwise": "has groups=8",
    "hooked": "has hooks",
    "volume": "(Conv3d, weight) cannot be condensed",
    "transposed": "a transposed convolution has no condensed form",
}


@pytest.mark.parametrize("mode", ["masked", "condensed"])
def test_a_layer_that_cannot_be_sparse_is_left_and_listed_with_its_reason(mode):
    torch.manual_seed(0)
    model = Zoo()
    srigl, optimizer = attach(model, mode)
    expected = LEFT | (NOT_CONDENSED if mode == "condensed" else {})
    assert srigl.left_dense.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in srigl.left_dense[name]
        assert f"  {name} " in srigl.report()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(0, 11, (2, 6))).square().mean().backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    model.eval()(torch.randint(0, 11, (2, 6)))
    assert model.linear is model.again
    if mode == "masked":
        condense(model, srigl)
        assert {"depthwise", "volume", "transposed", "hooked"} <= report(model).left.keys()
    assert isinstance(model.again, CondensedLinear)


@pytest.mark.parametrize("name", [*LEFT, *NOT_CONDENSED])
def test_a_layer_that_is_named_and_cannot_be_sparse_is_an_error(name):
    for options in ({"include": ["linear", name]}, {"include": ["linear", f"{name}.weight"]}):
        if "." in name or name == "position":
            options = {"include": ["linear", name]}
        with pytest.raises(SriglError, match=f"layer '{name}' "):
            attach(Zoo(), "condensed", **options)
    if name in NOT_CONDENSED:
        mask = np.zeros(Zoo().get_submodule(name).weight.shape, np.bool_)
        mask[:, ::2] = True
        with pytest.raises(SriglError, match=f"layer '{name}' "):
            condense(Zoo(), {name: mask})
        config = TrainingConfig(layers={name: LayerOptions(sparsity=0.3)})
        for options in ({"config": config}, {"masks": {name: mask}}):
            with pytest.raises(SriglError, match=f"layer '{name}' .* options or a mask"):
                attach(Zoo(), "condensed", **options)


def network():
    return nn.Sequential(transformer(), nn.Flatten(), nn.Linear(80, 8), nn.Conv1d(8, 8, 1))


ODD = {
    "lazy norm": (nn.LazyBatchNorm1d, None),
    "lazy transposed": (lambda: nn.LazyConvTranspose2d(4, 3), "has no weight yet"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "torch.complex64"),
    "eight bits": (lambda: nn.Linear(4, 4).to(torch.float8_e5m2), "torch.float8_e5m2"),
    "empty": (lambda: nn.Conv1d(4, 0, 1), "is empty"),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), "computes its weight"),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))[0],
        "is quantised",
    ),
}


@pytest.mark.filterwarnings("ignore")  # what PyTorch says of old, empty and quantised layers
@pytest.mark.parametrize("mode", ["masked", "condensed"])
@pytest.mark.parametrize("what", ODD)
def test_an_odd_layer_does_not_stop_the_others(what, mode):
    make, reason = ODD[what]
    model = nn.Sequential(make(), nn.Linear(8, 8))
    srigl, _ = attach(model, mode)
    assert list(srigl.trainer.budgets) == ["1"]
    assert reason is None or reason in srigl.left_dense["0"]
    assert srigl.report()


SELECTIONS = {
    "names": (["2", "3.weight"], (), ["2", "3"]),
    "parameter": (
        ["0.layers.1.self_attn.in_proj_weight"],
        (),
        ["0.layers.1.self_attn.in_proj_weight"],
    ),
    "pattern": (["*.out_proj"], (), [f"0.layers.{i}.self_attn.out_proj" for i in range(2)]),
    "pattern of parameters": ("*1.self_attn.in_*", (), ["0.layers.1.self_attn.in_proj_weight"]),
    "subtree": (
        ["0.layers.0"],
        ["*.linear?"],
        ["0.layers.0.self_attn.in_proj_weight", "0.layers.0.self_attn.out_proj"],
    ),
    "type": (nn.Conv1d, (), ["3"]),
    "types of modules": (
        [nn.TransformerEncoder],
        [nn.MultiheadAttention],
        [f"0.layers.{i}.linear{j}" for i in range(2) for j in (1, 2)],
    ),
    "all others": (None, ["0"], ["2", "3"]),
}


@pytest.mark.parametrize("what", SELECTIONS)
def test_layers_are_chosen_by_names_patterns_subtrees_and_types(what):
    include, exclude, expected = SELECTIONS[what]
    srigl, _ = attach(network(), include=include, exclude=exclude)
    assert list(srigl.trainer.budgets) == expected


NOTHING = {
    "name": ({"include": ["0.layers.0.linear"]}, SriglError, r"it has .*0\.layers\.0\.linear1"),
    "pattern": ({"exclude": ["*.in_proj"]}, SriglError, r"no layer or parameter '\*.in_proj'"),
    "type": ({"include": [nn.Conv2d]}, SriglError, "no module of type Conv2d; .*Conv1d, Linear"),
    "nothing to train": ({"include": ["1"]}, SriglError, "'1' has no weight"),
    "refused": ({"include": [nn.LayerNorm]}, SriglError, "norm1' has a weight of shape"),
    "number": ({"exclude": [3]}, ValueTypeError, "exclude must hold names, .* got 3"),
}


@pytest.mark.parametrize("what", NOTHING)
def test_an_entry_that_matches_nothing_is_an_error_with_names_like_it(what):
    options, error, message = NOTHING[what]
    with pytest.raises(error, match=message):
        attach(network(), **options)


@pytest.mark.parametrize("mode", ["masked", "condensed"])
def test_the_report_has_the_sparsity_of_all_matrices(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), transformer())
    srigl, _ = attach(model, mode, sparsity=0.8)
    masks = {name: srigl.mask(name) for name in srigl.trainer.budgets}
    sparse = sum(mask.numel() for mask in masks.values())
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    assert srigl.trainer.sparsity == pytest.approx(zeros / sparse)
    assert srigl.total_sparsity == pytest.approx(zeros / (sparse + 50 * 16))
    assert f"all matrices of the model: {srigl.total_sparsity:.2%}" in srigl.report()
    assert "0  is a table of embeddings" in " ".join(
        srigl.report().split("left dense:")[1].split(" ")
    )


def test_a_layer_that_keeps_all_its_weights_stays_a_plain_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    masked, condensed, srigl = both(lambda: copy.deepcopy(model), (64,), sparsity=0.9)
    assert srigl.trainer.budgets["2"].is_dense
    assert srigl.trainer.sparse_layers == ["0"]
    assert type(condensed[2]) is nn.Linear
    assert isinstance(condensed[0], CondensedLinear)
    assert masked[2].weight.all()
