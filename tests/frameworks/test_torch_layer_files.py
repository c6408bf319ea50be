"""Files of PyTorch models and checkpoints, read without the model."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from srigl_core import (  # noqa: E402
    FileFormatError,
    chain,
    export_c,
    load_arrays,
    load_condensed,
    load_layers,
    quantize_file,
    report_file,
)
from srigl_core.cli.app import app  # noqa: E402
from srigl_core.torch import (  # noqa: E402
    CondensedConv2d,
    CondensedLinear,
    condense,
    load_model,
    quantize,
    report,
    save_model,
)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    first = CondensedLinear(16, 12, fan_in=3, rng=0, activation="relu")
    return nn.Sequential(first, nn.LayerNorm(12), CondensedLinear(12, 4, fan_in=2, rng=1)).to(dtype)


def dense_model():
    return nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 4))


def mask():
    rows = torch.zeros(12, 16, dtype=torch.bool)
    rows[:, :4] = True
    return rows


def masked_model():
    torch.manual_seed(0)
    made = dense_model()
    with torch.no_grad():
        made[0].weight.mul_(mask())
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_of_a_model_are_read_without_it(tmp_path, dtype):
    path, saved = tmp_path / "model", model(dtype)
    save_model(saved, path)
    layers = load_layers(path)
    assert list(layers) == ["0", "2"]
    for name, layer in layers.items():
        module = saved[int(name)]
        assert layer.weight == module.to_condensed()
        assert str(layer.bias.dtype) == str(module.bias.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(layer.bias.astype(float), module.bias.detach().double())
    assert (layers["0"].activation, layers["2"].activation) == ("relu", "none")
    assert load_condensed(path)["1.weight"].shape == (12,)
    assert report_file(path).layers == report(saved).layers


def test_a_file_of_a_model_gives_its_results_as_a_chain(tmp_path):
    path = tmp_path / "model"
    saved = nn.Sequential(*(model()[i] for i in (0, 2)))
    save_model(saved, path)
    x = torch.randn(5, 16)
    with torch.inference_mode():
        expected = saved(x).numpy()
    np.testing.assert_allclose(
        chain(load_layers(path).values())(x.numpy()), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("inputs", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_file_is_that_of_the_quantised_model(tmp_path, inputs, dtype):
    path, to = tmp_path / "model", tmp_path / "int8"
    convolution = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4))
    rows = torch.zeros(4, 2, 2, 2, dtype=torch.bool)
    rows[:, :, 0] = True
    condense(convolution, {"0": rows})
    assert isinstance(convolution[0], CondensedConv2d)
    saved = nn.ModuleDict({"linear": model(), "convolution": convolution}).to(dtype)
    save_model(saved, path)
    quantize_file(path, to, inputs=inputs)
    quantize(saved, inputs=inputs)
    fresh = nn.ModuleDict(
        {
            "linear": dense_model(),
            "convolution": nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)),
        }
    ).to(dtype)
    load_model(to, fresh)
    state = fresh.state_dict()
    assert state.keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert repr(fresh) == repr(saved)


def test_a_model_that_is_one_layer_is_read_and_exported(tmp_path):
    save_model(model()[0], tmp_path / "model")
    layers = load_layers(tmp_path / "model")
    assert list(layers) == [""]
    source, _ = export_c(layers, tmp_path / "c")
    assert "void layers_layer(" in source.read_text()


@pytest.mark.parametrize("key", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_is_condensed_as_the_model_would_be(tmp_path, key, prefix):
    state = {prefix + name: tensor for name, tensor in masked_model().state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "dense.pt")
    torch.save({"0.weight": mask()}, tmp_path / "masks.pt")
    arguments = [tmp_path / "dense.pt", "--masks", tmp_path / "masks.pt", "-o", tmp_path / "out"]
    result = CliRunner().invoke(app, ["condense", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    tensors = load_condensed(tmp_path / "out")
    expected = condense(masked_model(), {"0": mask()})
    assert list(load_layers(tmp_path / "out")) == ["0"]
    assert tensors["0"] == expected[0].to_condensed()
    np.testing.assert_array_equal(tensors["2.weight"], expected[2].weight.detach())


def test_a_checkpoint_of_bfloat16_is_read(tmp_path):
    torch.save(dense_model().bfloat16().state_dict(), tmp_path / "dense.pt")
    assert load_arrays(tmp_path / "dense.pt")["0.weight"].dtype.name == "bfloat16"


class Unknown:
    """What a checkpoint must not need."""


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    path = tmp_path / "dense.pt"
    torch.save({"model": dense_model().state_dict(), "config": Unknown()}, path)
    with pytest.raises(FileFormatError, match=r"more than tensors.*save its state of the model"):
        load_arrays(path)
    result = CliRunner().invoke(
        app, ["condense", str(path), "--masks", "nonzero", "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "no state of a model"),
        ({}, "no state of a model"),
        ({"model": {"a": "text"}}, "'a' must be a tensor"),
        ([torch.ones(2)], "holds a list"),
    ],
)
def test_a_checkpoint_without_arrays_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "dense.pt")
    with pytest.raises(FileFormatError, match=message):
        load_arrays(tmp_path / "dense.pt")
