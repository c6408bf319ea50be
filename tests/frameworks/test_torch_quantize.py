"""Quantised models: each layer gives the bits of the plan on the same arrays."""

import copy
import io
import pickle

import numpy as np
import pytest

import srigl_core
from srigl_core import CondensedWeight, FileFormatError, QuantizedWeight, SriglError, ValueTypeError
from srigl_core.reference import random_mask

torch = pytest.importorskip("torch")

from torch import library, nn  # noqa: E402

from srigl_core.torch import (  # noqa: E402
    CondensedConv2d,
    CondensedLinear,
    QuantizedLinear,
    SRigL,
    condense,
    freeze,
    load_model,
    quantize,
    report,
    save_model,
    to_csr,
    to_masked_dense,
)
from srigl_core.torch.tensors import as_numpy, torch_dtype  # noqa: E402

INPUTS = ["float", "int8"]
both = pytest.mark.parametrize("inputs", INPUTS)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES |= {"float32": torch.float32, "float64": torch.float64}


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(n_in, n_out, fan_in, n_active=None, *, seed=0, bias=True, dtype=np.float32, **options):
    rng = np.random.default_rng(seed)
    sizes = {"fan_in": fan_in, "n_active": n_active}
    weight = CondensedWeight.random((n_out, n_in), **sizes, dtype=dtype, rng=rng)
    offset = rng.standard_normal(n_out).astype(weight.dtype) if bias else None
    options.setdefault("nnz_budget", min(weight.nnz + 3, n_in * n_out))
    return CondensedLinear.from_condensed(weight, offset, **options)


def perceptron(dtype=np.float32):
    first, last = layer_of(12, 20, 5, 15, dtype=dtype), layer_of(20, 4, 7, seed=1, dtype=dtype)
    return nn.Sequential(first, nn.ReLU(), last)


def condensed(model):
    masks = {}
    for name, module in model.named_modules():
        weights = {name: getattr(module, "weight", None)}
        if isinstance(module, nn.MultiheadAttention):
            weights = {f"{name}.in_proj_weight": module.in_proj_weight}
        for key, weight in weights.items():
            if weight is not None and weight.ndim > 1:
                shape = (len(weight), weight[0].numel())
                mask = random_mask(shape, fan_in=max(1, shape[1] // 3), rng=0)
                masks[key] = mask.reshape(weight.shape)
    return condense(model, masks)


def convolutional():
    first = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
    return condensed(nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))).eval()


def signal():
    return condensed(nn.Sequential(nn.Conv1d(3, 8, 5, dilation=2, padding="same"))).eval()


def encoder():
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    return condensed(nn.TransformerEncoder(layer, 2)).eval()


MODELS = {
    perceptron: (5, 12),
    convolutional: (2, 3, 9, 8),
    signal: (2, 3, 11),
    encoder: (2, 5, 12),
}
models = pytest.mark.parametrize("make", MODELS)


def called(plan, x, bias, activation=None, dtype=None):
    """Return what a plan gives, in the type of a layer's results."""
    dtype = torch_dtype(np.result_type(as_numpy(x), np.float32)) if dtype is None else dtype
    out = torch.empty(*x.shape[:-1], plan.weight.shape[0], dtype=dtype)
    offset = None if bias is None else as_numpy(bias)
    plan(as_numpy(x), offset, activation=activation, out=as_numpy(out))
    return out


class Calls:
    """Inputs and results of the quantised layers of a model while it is called."""

    def __init__(self, model):
        self.seen = []
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.register_forward_hook(self)

    def __call__(self, module, x, y):
        self.seen.append((module, x[0], y))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert np.array_equal(as_numpy(tensor).tobytes(), as_numpy(state[name]).tobytes())


# ---------------------------------------------------------------- the product


@both
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (33, 12), (2, 3, 12), (0, 12)], ids=str)
def test_a_layer_gives_the_bits_of_the_plan(shape, activation, inputs):
    layer = layer_of(12, 40, 5, 31, activation=activation)
    plan = srigl_core.prepare(layer.to_condensed().quantize(), inputs=inputs)
    bias, (made,) = layer.bias.detach(), quantize(nn.Sequential(layer), inputs=inputs)
    x = numbers(*shape)
    assert torch.equal(made(x), called(plan, x, bias, activation))


@both
@pytest.mark.parametrize("of_x", DTYPES)
@pytest.mark.parametrize("of_layer", DTYPES)
def test_results_have_the_type_that_the_condensed_layer_gave(of_layer, of_x, inputs):
    layer, x = layer_of(12, 20, 5, 15, dtype=of_layer), numbers(6, 12, dtype=DTYPES[of_x])
    if {of_layer, of_x} == {"float16", "bfloat16"}:
        for module in (layer, quantize(nn.Sequential(layer), inputs=inputs)):
            with pytest.raises(ValueTypeError, match="float16"):
                module(x)
        return
    expected, bias = layer(x).dtype, layer.bias.detach()
    plan = srigl_core.prepare(layer.to_condensed().quantize(), inputs=inputs)
    y = quantize(nn.Sequential(layer), inputs=inputs)(x)
    assert y.dtype is expected
    assert torch.equal(y, called(plan, x, bias, dtype=expected))


@both
def test_a_wide_bias_is_not_rounded_to_the_type_of_the_result(inputs):
    weight, bias = layer_of(12, 6, 3).to_condensed().quantize(), numbers(6)
    layer = QuantizedLinear(weight, bias, inputs=inputs, dtype=torch.bfloat16)
    x = torch.zeros(1, 12, dtype=torch.bfloat16)
    plan = srigl_core.prepare(weight, inputs=inputs)
    assert torch.equal(layer(x), called(plan, x, bias, dtype=torch.bfloat16))
    x, wide = numbers(50, 12, dtype=torch.bfloat16), QuantizedLinear(weight, bias, inputs=inputs)
    assert torch.equal(layer(x), wide(x).bfloat16())


@both
@models
def test_each_layer_of_a_model_gives_the_bits_of_its_plan(make, inputs):
    model, x = make(), numbers(*MODELS[make])
    weights = [
        module.to_condensed() for module in model.modules() if isinstance(module, CondensedLinear)
    ]
    before = model(x)
    assert quantize(model, inputs=inputs) is model
    assert not any(isinstance(module, CondensedLinear) for module in model.modules())
    calls = Calls(model)
    with torch.no_grad():
        y = model(x)
    assert (y.shape, y.dtype) == (before.shape, before.dtype)
    layers = list(dict.fromkeys(module for module, *_ in calls.seen))
    assert sorted(w.nnz for w in weights) == sorted(layer.values.numel() for layer in layers)
    for layer, given, result in calls.seen:
        weight = next(w for w in weights if w.quantize() == layer.to_quantized())
        plan = srigl_core.prepare(weight.quantize(), inputs=inputs)
        assert torch.equal(result, called(plan, given, layer.bias))


def test_inputs_of_any_strides_are_taken():
    model = quantize(perceptron())
    for x in (numbers(12, 3).t(), numbers(3, 24)[:, ::2], numbers(2, 12, 3).transpose(1, 2)):
        assert torch.equal(model(x), model(x.contiguous()))


@both
def test_activations_of_a_stack_are_applied_and_layers_of_other_kinds_stay_between(inputs):
    model = quantize(perceptron(), inputs=inputs, exclude="0")
    model.append(layer_of(4, 6, 2)).append(nn.Dropout()).append(nn.GELU())
    model.append(quantize(nn.Sequential(layer_of(6, 3, 2)), inputs=inputs)[0]).eval()
    with torch.no_grad():
        for x in (numbers(5, 12), numbers(5, 12), numbers(5, 12), numbers(2, 3, 12).double()):
            expected = x
            for module in model:
                expected = module(expected)
            torch.testing.assert_close(model(x), expected)


def test_a_layer_with_wide_results_is_not_computed_in_a_narrow_chain():
    model = quantize(perceptron(np.float64))
    with torch.no_grad():
        results = [model(numbers(5, 12)) for _ in range(3)]
        y = model[2](model[1](model[0](numbers(5, 12))))
    assert all(torch.equal(result, y) for result in results)
    assert y.dtype is torch.float64


# ---------------------------------------------------------------- what becomes of a model


@both
def test_the_tensors_are_buffers_and_nothing_can_be_trained(inputs):
    layer = layer_of(12, 40, 5, 31).eval()
    (made,) = quantize(nn.Sequential(layer), inputs=inputs)
    weight = layer.to_condensed().quantize()
    assert not list(made.parameters())
    assert not made.training
    assert made.state_dict().keys() == {"values", "scale", "indices", "active", "bias"}
    assert made.to_quantized() == weight
    assert np.array_equal(made.values, weight.values)
    assert (made.values.dtype, made.scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(made.bias, layer.bias)
    assert not made.bias.requires_grad
    assert (made.n_active, made.fan_in, made.inputs) == (31, 5, inputs)
    assert repr(made) == (
        f"QuantizedLinear(in_features=12, out_features=40, fan_in=5, n_active=31, bias=True, "
        f"inputs={inputs})"
    )


def test_excluded_layers_and_dense_ones_stay_as_they_are():
    model = nn.Sequential(*perceptron(), nn.Linear(4, 2))
    quantize(model, exclude=["2", nn.Linear])
    kinds = [QuantizedLinear, nn.ReLU, CondensedLinear, nn.Linear]
    assert [type(module) for module in model] == kinds
    quantize(model, inputs="int8")  # those that are left
    assert [getattr(module, "inputs", None) for module in model] == ["float", None, "int8", None]


def test_a_layer_in_two_places_stays_one():
    layer = layer_of(6, 6, 2)
    model = quantize(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2]


class Derived(CondensedLinear):
    pass


def with_hook():
    model = perceptron()
    model[2].register_forward_hook(lambda *_: None)
    return model


def with_state_hook():
    model = perceptron()
    model[2].register_state_dict_post_hook(lambda *_: None)
    return model


def with_adapter():
    model = perceptron()
    model[2].add_module("lora", nn.Linear(12, 4))
    return model


def with_number(number):
    model = perceptron()
    with torch.no_grad():
        model[2].values[3] = number
    return model


def derived():
    made = Derived(12, 4, fan_in=3, rng=0)
    return nn.Sequential(layer_of(12, 12, 3), made)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (perceptron, {"inputs": "int4"}, SriglError, "inputs='int4' is unknown; use one of float"),
        (perceptron, {"exclude": "fc"}, SriglError, "no layer or parameter 'fc'"),
        (
            perceptron,
            {"exclude": ["0", "2"]},
            SriglError,
            "no condensed layer that is not excluded",
        ),
        (perceptron, {"exclude": [3]}, ValueTypeError, "exclude"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), {}, SriglError, "condense\\(model, masks\\)"),
        (lambda: layer_of(4, 3, 2), {}, SriglError, "the model itself is a CondensedLinear"),
        (lambda: with_number(np.nan), {}, SriglError, "layer '2': .* not finite .* exclude"),
        (lambda: with_number(np.inf), {"inputs": "int8"}, SriglError, "layer '2': .* in 1 of 28"),
        (with_hook, {}, SriglError, "layer '2' has hooks"),
        (with_adapter, {}, SriglError, "layer '2' has lora, which would be lost"),
        (with_state_hook, {}, SriglError, "layer '2' has hooks"),
        (derived, {}, SriglError, "layer '1' is of type Derived"),
        (
            lambda: nn.Sequential(layer_of(4, 1, 2), layer_of(133_145, 1, 133_145)),
            {"inputs": "int8"},
            SriglError,
            "layer '1': fan_in=133,145 exceeds 133,144",
        ),
    ],
)
def test_what_cannot_be_quantized_is_named_and_the_model_is_not_changed(
    make, options, error, message
):
    model = make()
    modules, state = list(model.modules()), state_of(model)
    with pytest.raises(error, match=message):
        quantize(model, **options)
    assert list(model.modules()) == modules
    assert_same_state(model, state)


def test_what_is_no_model_or_no_quantized_weight_is_an_error():
    with pytest.raises(ValueTypeError, match=r"must be a torch\.nn\.Module"):
        quantize(3)
    weight = layer_of(4, 3, 2).to_condensed()
    with pytest.raises(ValueTypeError, match=r"QuantizedWeight, got CondensedWeight; .*quantize"):
        QuantizedLinear(weight)
    with pytest.raises(SriglError, match=r"bias has shape \(4,\), but must have \(3,\)"):
        QuantizedLinear(weight.quantize(), np.zeros(4))
    with pytest.raises(ValueTypeError, match="int8"):
        QuantizedLinear(weight.quantize(), dtype=torch.int8)


# ---------------------------------------------------------------- gradients


@both
def test_results_can_be_had_in_grad_mode_and_a_gradient_is_an_error(inputs):
    model = nn.Sequential(nn.Linear(12, 12), *quantize(perceptron(), inputs=inputs))
    y = model(numbers(5, 12))
    assert torch.equal(y.detach(), model(numbers(5, 12)).detach())
    with pytest.raises(SriglError, match=r"for inference and has no gradients; .*no_grad"):
        y.sum().backward()
    assert model[0].weight.grad is None


@pytest.mark.filterwarnings("ignore:Error detected in", "ignore::DeprecationWarning")
def test_derivatives_of_transforms_and_compiled_models_are_errors():
    model, x = quantize(perceptron()), numbers(5, 12)
    for call in (
        lambda: torch.func.grad(lambda x: model(x).sum())(x),
        lambda: torch.func.jvp(model, (x,), (x,)),
    ):
        with pytest.raises(SriglError, match="has no gradients"):
            call()
    with pytest.raises(Exception, match="has no gradients"):
        torch.compile(model, backend="aot_eager")(x.requires_grad_()).sum().backward()


def test_a_quantized_model_cannot_be_trained_sparse():
    model = quantize(perceptron())
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(SriglError):
        SRigL(model, optimizer, sparsity=0.5, schedule=100)


# ---------------------------------------------------------------- compilers and transforms


@both
def test_compiled_and_exported_models_give_the_same_bits(inputs):
    model, x = quantize(perceptron(), inputs=inputs), numbers(5, 12)
    modules = nn.Sequential(model[0], nn.ReLU(), model[2])
    expected = modules(x)
    compiled = torch.compile(modules, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    batch = {"input": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(modules, (x,), dynamic_shapes=batch)
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.module()(x[:3]), modules(x[:3]))


@both
def test_the_operator_passes_the_checks_of_pytorch(inputs):
    layer = quantize(nn.Sequential(layer_of(12, 20, 5, 15)), inputs=inputs)[0]
    tensors = layer.values, layer.scale, layer.indices, layer.active, layer.bias
    arguments = numbers(5, 12), *tensors, 20, 12, torch.float32, inputs, "relu"
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(torch.ops.srigl_core.quantized_linear, arguments, test_utils=checks)


def test_mapped_inputs_and_autocast():
    model, x = quantize(perceptron()), numbers(4, 5, 12)
    assert torch.equal(torch.vmap(model)(x), model(x))
    assert torch.equal(torch.vmap(model, 1, 1)(x), model(x))
    with torch.autocast("cpu"):
        y = model[0](x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, model[0](x.bfloat16()).bfloat16())


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(saved(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_give_the_same_bits(copied):
    for make, shape in MODELS.items():
        model, x = quantize(make(), inputs="int8"), numbers(*shape)
        with torch.no_grad():
            expected = model(x)  # so that there are plans
            assert torch.equal(copied(model)(x), expected)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@both
def test_a_state_is_loaded_into_another_model(inputs):
    model, x = quantize(perceptron(), inputs=inputs), numbers(5, 12)
    other = nn.Sequential(layer_of(12, 20, 5, 15, seed=7), nn.ReLU(), layer_of(20, 4, 7, seed=8))
    quantize(other, inputs=inputs)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(saved(model.state_dict()), weights_only=True))
    assert torch.equal(other(x), model(x))
    assert other[0].to_quantized() == model[0].to_quantized()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(15, 5)}, "0.values of the state is torch.float32 of shape"),
        ({"values": torch.zeros(5, 15, dtype=torch.int8)}, "0.values of the state is .*5, 15"),
        ({"values": torch.full((15, 5), -128, dtype=torch.int8)}, "'0': values holds -128"),
        ({"scale": torch.zeros(15)}, "'0': scale holds 0.0"),
        ({"scale": torch.ones(15).half()}, "0.scale of the state is torch.float16"),
        ({"indices": torch.full((15, 5), 12, dtype=torch.int32)}, "'0': indices"),
        ({"active": torch.zeros(15, dtype=torch.int32)}, "'0': active"),
    ],
)
def test_a_state_that_is_no_quantized_weight_is_refused(change, message):
    model, x = quantize(perceptron()), numbers(5, 12)
    expected, before = model(x), state_of(model[0])
    state = state_of(model) | {f"0.{name}": tensor for name, tensor in change.items()}
    with pytest.raises(SriglError, match=message):
        model.load_state_dict(state)
    assert_same_state(model[0], before)
    assert torch.equal(model(x), expected)


def test_states_of_condensed_and_quantized_models_do_not_load_into_the_other():
    model, quantized = perceptron(), quantize(perceptron())
    with pytest.raises(SriglError, match=r"0\.values of the state is torch\.float32"):
        quantized.load_state_dict(model.state_dict())
    with pytest.raises(SriglError, match=r"0\.values of the state has shape \(15, 5\)"):
        model.load_state_dict(quantized.state_dict())


def test_writes_are_noticed():
    layer, x = quantize(nn.Sequential(layer_of(12, 6, 3)))[0], numbers(5, 12)
    for with_inference_mode in (False, True):
        with torch.inference_mode(with_inference_mode):
            for own in (layer, copy.deepcopy(layer)):
                own(x)
                own.scale.mul_(2)
                plan = srigl_core.prepare(own.to_quantized())
                assert torch.equal(own(x), called(plan, x, own.bias))
                own.values.neg_()
                plan = srigl_core.prepare(own.to_quantized())
                assert torch.equal(own(x), called(plan, x, own.bias))


def test_new_tensors_are_noticed():
    layer, x = quantize(nn.Sequential(layer_of(12, 6, 3)))[0], numbers(5, 12)
    layer(x)
    for seed in range(1, 5):
        other = quantize(nn.Sequential(layer_of(12, 6, 3, seed=seed)))[0]
        layer.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(layer(x), other(x))
        del other


@both
@pytest.mark.parametrize("move", ["half", "bfloat16", "float", "double"])
def test_a_change_of_dtype_changes_inputs_and_results_and_not_the_weight(move, inputs):
    model = quantize(perceptron(), inputs=inputs)
    weights = [model[i].to_quantized() for i in (0, 2)]
    moved = getattr(copy.deepcopy(model), move)()
    dtype = moved[0].bias.dtype
    assert [moved[i].to_quantized() for i in (0, 2)] == weights
    x = numbers(5, 12, dtype=dtype)
    assert moved(x).dtype is moved[0].dtype is moved[0].weight.dtype is dtype
    plan, bias = srigl_core.prepare(weights[0], inputs=inputs), moved[0].bias
    assert torch.equal(moved[0](x), called(plan, x, bias, None, dtype))
    back = moved.float()
    assert [back[i].to_quantized() for i in (0, 2)] == weights
    assert back(numbers(5, 12)).dtype is torch.float32


def test_a_model_without_memory_gets_its_numbers_from_a_state():
    model, x = quantize(perceptron()), numbers(5, 12)
    empty = copy.deepcopy(model).to("meta")
    assert empty(x.to("meta")).shape == (5, 4)
    assert empty.half()(x.half().to("meta")).dtype is torch.float16
    empty.float().to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))


# ---------------------------------------------------------------- files, reports, other forms


@both
@models
@pytest.mark.parametrize("into", ["dense", "condensed", "quantized"])
def test_a_file_is_loaded_into_a_model_of_any_form(into, make, inputs, tmp_path):
    torch.manual_seed(0)
    model, x = quantize(make(), inputs=inputs), numbers(*MODELS[make])
    save_model(model, tmp_path / "model")
    torch.manual_seed(1)
    fresh = make()
    if into == "dense":
        to_masked_dense(fresh)
    elif into == "quantized":
        quantize(fresh)
    load_model(tmp_path / "model", fresh)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert_same_state(fresh, state_of(model))
    stored = srigl_core.load_condensed(tmp_path / "model")
    quantized = [each for each in stored.values() if isinstance(each, QuantizedWeight)]
    assert len(quantized) == len(report(model).layers)


def test_a_file_keeps_activation_and_takes_the_models_dtype(tmp_path):
    layer = layer_of(12, 20, 5, 15, activation="gelu", dtype="bfloat16")
    model = quantize(nn.Sequential(layer))
    save_model(model, tmp_path / "model")
    for dtype in (torch.bfloat16, torch.float32):
        fresh = load_model(tmp_path / "model", nn.Sequential(nn.Linear(12, 20).to(dtype)))[0]
        assert (fresh.dtype, fresh.activation) == (dtype, "gelu")
        assert fresh.to_quantized() == model[0].to_quantized()
    load_model(tmp_path / "model", quantize(nn.Sequential(layer_of(12, 20, 3))))
    with pytest.raises(SriglError, match="layer '0' of the file is"):
        load_model(tmp_path / "model", nn.Sequential(nn.Linear(12, 21)))
    model[0].register_buffer("zero_point", torch.ones(1))
    with pytest.raises(SriglError, match="layer '0' also has 'zero_point'"):
        save_model(model, tmp_path / "other")


def test_a_file_with_a_damaged_description_is_refused(tmp_path):
    path = tmp_path / "model"
    save_model(quantize(nn.Sequential(layer_of(12, 20, 5)), inputs="int8"), path)
    whole = path.read_bytes()
    for old, new in ((b'int8\\"', b'int9\\"'), (b'float32\\"', b'float31\\"')):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(FileFormatError):
            load_model(path, nn.Sequential(nn.Linear(12, 20)))


@both
def test_the_report_lists_quantized_layers(inputs):
    model = quantize(nn.Sequential(*perceptron(), nn.Linear(4, 2)), inputs=inputs, exclude="0")
    layers = report(model).layers
    assert [(layer.name, layer.dtype) for layer in layers] == [("0", "float32"), ("2", "int8")]
    weight = model[2].to_quantized()
    assert layers[1].condensed_bytes == weight.nbytes
    assert (layers[1].fan_in, layers[1].n_active, layers[1].shape) == (7, 4, (4, 20))
    assert list(report(model).left) == ["3"]
    assert "int8" in str(report(model))


def test_dense_forms_have_the_dequantized_weights():
    model = quantize(convolutional(), inputs="int8")
    weights = [model[i].linear.to_quantized().to_dense() for i in (0, 2)]
    csr = to_csr(model)
    for i, weight in zip((0, 2), weights, strict=True):
        assert np.array_equal(csr[str(i)].toarray(), weight)
        assert np.array_equal(model[i].weight.flatten(1), weight)
    assert isinstance(freeze(model)[0], CondensedConv2d)
    to_masked_dense(model)
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    for i, weight in zip((0, 2), weights, strict=True):
        assert np.array_equal(model[i].weight.detach().flatten(1), weight)


def test_condense_refuses_a_quantized_layer():
    model = nn.Sequential(quantize(nn.Sequential(layer_of(4, 4, 2)))[0], nn.Linear(4, 4))
    mask = random_mask((4, 4), fan_in=2, rng=0)
    with pytest.raises(SriglError, match="layer '0' is condensed already"):
        condense(model, {"0": mask, "1": mask})
