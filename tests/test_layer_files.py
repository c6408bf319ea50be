"""Files of layers without a framework: read, quantised, condensed from dense arrays, reported."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import srigl_core
from srigl_core import (
    CondensedWeight,
    FileFormatError,
    QuantizedWeight,
    SriglError,
    StoredLayer,
    ValueTypeError,
    condense_arrays,
    load_arrays,
    load_condensed,
    load_layers,
    quantize_file,
    report_file,
    save_condensed,
)
from srigl_core._format.file import layer_metadata, weight_arrays

MODULES = "srigl_core.modules"


def weight(seed=0, **options):
    return CondensedWeight.random((6, 8), fan_in=3, n_active=4, rng=seed, **options)


def save_described(path, layers, modules, **arrays):
    """Write a file as `save_model` does."""
    for name, each in layers.items():
        arrays |= weight_arrays(name, each)
    save_file(arrays, path, metadata={**layer_metadata(layers), MODULES: json.dumps(modules)})


def metadata(path):
    with safe_open(path, "np") as file:
        return file.metadata()


# ---------------------------------------------------------------- load_layers


def test_layers_come_with_their_biases(tmp_path):
    path, bias = tmp_path / "layers", np.arange(6.0)
    quantized = weight(1).quantize()
    tensors = {"fc1": weight(), "fc1.bias": bias, "fc2": quantized, "other": np.ones(3)}
    save_condensed(path, tensors)
    layers = load_layers(path)
    assert list(layers) == ["fc1", "fc2"]
    assert layers["fc1"].weight == weight()
    np.testing.assert_array_equal(layers["fc1"].bias, bias)
    assert layers["fc2"] == StoredLayer(quantized, None, "none", "float")


def test_layers_have_what_their_modules_do(tmp_path):
    path = tmp_path / "model"
    modules = {
        "a": {"nnz_budget": 12, "activation": "relu"},
        "b": {"inputs": "int8", "dtype": "float32", "activation": None},
    }
    save_described(path, {"a": weight(), "b": weight().quantize()}, modules)
    layers = load_layers(path)
    assert layers["a"][2:] == ("relu", "float")
    assert layers["b"][2:] == ("none", "int8")


def test_layers_make_a_chain(tmp_path):
    path = tmp_path / "layers"
    first, second = weight(), CondensedWeight.random((2, 6), fan_in=2, rng=1).quantize()
    save_condensed(path, {"1": first, "1.bias": np.ones(6), "2": second})
    x = np.ones((3, 8), np.float32)
    chain = srigl_core.chain(load_layers(path).values(), backend="reference")
    inner = srigl_core.condensed_matmul(x, first, np.ones(6), backend="reference")
    expected = srigl_core.prepare(second, backend="reference")(inner)
    np.testing.assert_array_equal(chain(x), expected)


def test_a_bias_of_bfloat16_is_read(tmp_path):
    path, bias = tmp_path / "layers", np.array([0.5, -2, 3, 0, 1, 7], ml_dtypes.bfloat16)
    save_condensed(path, {"fc": weight(), "fc.bias": bias})
    assert load_layers(path)["fc"].bias.dtype == bias.dtype
    for read in (load_condensed, load_arrays):
        stored = read(path)["fc.bias"]
        assert stored.dtype == bias.dtype
        np.testing.assert_array_equal(stored.view(np.uint16), bias.view(np.uint16))


@pytest.mark.parametrize(
    ("bias", "module", "message"),
    [
        (np.ones(4), {}, r"layer 'fc': bias has shape \(4,\), but must have \(6,\)"),
        (np.ones(6, np.int32), {}, "layer 'fc': bias of dtype 'int32'"),
        (np.ones(6), {"activation": "swish"}, "layer 'fc': activation='swish'"),
        (np.ones(6), {"inputs": "int4"}, "layer 'fc': inputs='int4'"),
        (np.ones(6), [], "has no description"),
    ],
)
def test_a_layer_that_is_not_valid_is_named(tmp_path, bias, module, message):
    path = tmp_path / "model"
    save_described(path, {"fc": weight().quantize()}, {"fc": module}, **{"fc.bias": bias})
    with pytest.raises(FileFormatError, match=f"model': .*{message}"):
        load_layers(path)


# ---------------------------------------------------------------- report_file


def test_a_report_lists_the_layers_of_a_file(tmp_path):
    path = tmp_path / "layers"
    save_condensed(path, {"fc1": weight(), "fc2": weight(1).quantize(), "bias": np.ones(2)})
    report = report_file(path)
    first, second = report.layers
    assert (first.name, first.shape, first.fan_in, first.n_active) == ("fc1", (6, 8), 3, 4)
    assert (first.dtype, second.dtype) == ("float32", "int8")
    assert first.condensed_bytes == weight().nbytes
    assert report.dense_bytes == 6 * 8 * 5
    assert str(report).splitlines()[1].split()[:4] == ["fc1", "6", "x", "8"]
    assert all(each > 0 for layer in report.layers for each in layer.speed_ups)
    assert report_file(path, backend="reference").layers[0].speed_ups == (None, None)


# ---------------------------------------------------------------- quantize_file


def test_a_file_is_quantised_and_keeps_the_rest(tmp_path):
    path, to = tmp_path / "layers", tmp_path / "int8"
    done, bias = weight(1).quantize(), np.ones(6, ml_dtypes.bfloat16)
    save_condensed(path, {"a": weight(), "b": done, "a.bias": bias}, {"author": "me"})
    quantize_file(path, to)
    tensors = load_condensed(to)
    assert tensors["a"] == weight().quantize()
    assert tensors["b"] == done
    np.testing.assert_array_equal(tensors["a.bias"].view(np.uint16), bias.view(np.uint16))
    assert metadata(to)["author"] == "me"


def test_a_file_may_be_quantised_in_place(tmp_path):
    path = tmp_path / "layers"
    save_condensed(path, {"a": weight()})
    quantize_file(path, path)
    assert isinstance(load_condensed(path)["a"], QuantizedWeight)
    with pytest.raises(SriglError, match="nothing to quantise"):
        quantize_file(path, path)


def test_the_modules_of_a_quantised_file_say_so(tmp_path):
    path, to = tmp_path / "model", tmp_path / "int8"
    convolution = {"kernel_size": [1]}
    described = {"nnz_budget": 12, "activation": "relu", "convolution": convolution}
    save_described(path, {"a": weight(dtype="float16")}, {"a": described})
    quantize_file(path, to, inputs="int8")
    (module,) = json.loads(metadata(to)[MODULES]).values()
    kept = {"activation": "relu", "convolution": convolution}
    assert module == {"inputs": "int8", "dtype": "float16", **kept}
    assert load_layers(to)["a"].inputs == "int8"


@pytest.mark.parametrize(
    ("tensors", "inputs", "message"),
    [
        ({"a": weight()}, "int8", "for files of srigl_core.torch.save_model"),
        ({"a": weight()}, "int4", "inputs='int4' is unknown"),
        ({"a": weight().with_values(np.full((4, 3), np.inf, np.float32))}, "float", "layer 'a'"),
        ({"a": np.ones(3)}, "float", "nothing to quantise"),
    ],
)
def test_a_file_that_cannot_be_quantised_writes_nothing(tmp_path, tensors, inputs, message):
    path, to = tmp_path / "layers", tmp_path / "int8"
    save_condensed(path, tensors)
    with pytest.raises(SriglError, match=message):
        quantize_file(path, to, inputs=inputs)
    assert not to.exists()


# ---------------------------------------------------------------- condense_arrays


def dense_and_mask(seed=0):
    packed = weight(seed)
    return packed.to_dense(), packed.to_mask()


@pytest.mark.parametrize("key", ["fc1", "fc1.weight"])
def test_masked_weights_are_condensed_and_the_rest_is_kept(key):
    dense, mask = dense_and_mask()
    bias, other = np.ones(6), np.ones((4, 4))
    arrays = {"fc1.weight": dense, "fc1.bias": bias, "fc2.weight": other}
    condensed = condense_arrays(arrays, {key: mask})
    assert list(condensed) == ["fc1", "fc1.bias", "fc2.weight"]
    assert condensed["fc1"] == weight()
    assert condensed["fc1.bias"] is bias


def test_what_is_not_zero_is_active():
    dense, _ = dense_and_mask()
    arrays = {"a.weight": dense, "b.weight": np.ones((2, 2)), "running": np.zeros(4)}
    arrays |= {"n": np.zeros((), np.int64)}
    arrays |= {"zeros": np.zeros((2, 2)), "steps": np.zeros((2, 2), np.int64)}
    condensed = condense_arrays(arrays, "nonzero")
    assert [name for name, each in condensed.items() if isinstance(each, CondensedWeight)] == ["a"]
    assert condensed["a"] == weight()


def test_kernels_are_flattened_and_masks_may_be_all_true():
    dense, mask = dense_and_mask()
    arrays = {"conv.weight": dense.reshape(6, 2, 2, 2), "fc.weight": np.ones((2, 2))}
    masks = {"conv": mask.reshape(6, 2, 2, 2), "fc": np.ones((2, 2), bool)}
    condensed = condense_arrays(arrays, masks)
    assert condensed["conv"] == weight()
    assert condensed["fc.weight"] is arrays["fc.weight"]


@pytest.mark.parametrize("pattern", ["b", "b.weight", "b*"])
def test_excluded_weights_stay_dense(pattern):
    dense, _ = dense_and_mask()
    odd = np.array([[1.0, 0.0], [1.0, 1.0]])
    arrays = {"a.weight": dense, "b.weight": odd}
    with pytest.raises(
        SriglError, match=r"weight 'b\.weight': mask is not constant fan-in.*exclude"
    ):
        condense_arrays(arrays, "nonzero")
    assert condense_arrays(arrays, "nonzero", exclude=[pattern])["b.weight"] is odd


@pytest.mark.parametrize(
    ("masks", "exclude", "kind", "message"),
    [
        ("zero", (), SriglError, "masks='zero' is unknown"),
        (3, (), ValueTypeError, "masks must be a mapping"),
        ({"c": np.ones((6, 8), bool)}, (), SriglError, r"masks names 'c', .* a\.weight"),
        ({"a": np.ones((6, 8))}, (), ValueTypeError, r"mask of 'a\.weight' must be .* bool"),
        ({"a": np.ones((8, 6), bool)}, (), SriglError, r"mask of 'a\.weight' has shape"),
        ({"a": np.ones((6, 8), bool)}, (), SriglError, "nothing to condense"),
        ("nonzero", ["a"], SriglError, "nothing to condense"),
        ("nonzero", ["c"], SriglError, "exclude has 'c'"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, exclude, kind, message):
    dense, _ = dense_and_mask()
    with pytest.raises(kind, match=message):
        condense_arrays({"a.weight": dense}, masks, exclude=exclude)


def test_a_layer_cannot_take_the_name_of_another_array():
    dense, mask = dense_and_mask()
    for other in ("a", "a.weight"):
        arrays = {"a.weight": dense, "a": np.ones(2)}
        with pytest.raises(SriglError, match="another array's name"):
            condense_arrays(dict(sorted(arrays.items(), reverse=other == "a")), {"a": mask})


# ---------------------------------------------------------------- load_arrays


def test_arrays_of_a_safetensors_file_are_read(tmp_path):
    path = tmp_path / "dense.safetensors"
    arrays = {"w": np.ones((2, 3)), "mask": np.eye(2) > 0}
    save_file(arrays, path)
    read = load_arrays(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
