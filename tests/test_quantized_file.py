"""Quantized weights in files: their arrays, their version, and what is refused (SPEC 6)."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from srigl_core import (
    CondensedWeight,
    FileFormatError,
    QuantizedWeight,
    load_condensed,
    save_condensed,
)
from srigl_core._format import file as file_module

VERSION, LAYERS = "srigl_core.format_version", "srigl_core.layers"


def quantized(shape=(5, 7), fan_in=3, n_active=4):
    return CondensedWeight.random(shape, fan_in=fan_in, n_active=n_active, rng=0).quantize()


def metadata_of(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def test_a_quantized_weight_comes_back_bit_for_bit(tmp_path):
    for weight in (quantized(), quantized((40, 300), 17, 33), quantized((2, 70_000), 2, 1)):
        save_condensed(tmp_path / "w", weight)
        assert load_condensed(tmp_path / "w") == {"weight": weight}


def test_quantized_weights_lie_beside_others(tmp_path):
    floats = CondensedWeight.random((4, 5), fan_in=2, dtype="bfloat16", rng=1)
    tensors = {"fc1": quantized(), "fc2": floats, "fc1.bias": np.arange(5.0)}
    save_condensed(tmp_path / "w", tensors)
    loaded = load_condensed(tmp_path / "w")
    assert loaded["fc1"] == tensors["fc1"]
    assert loaded["fc2"] == floats
    assert loaded["fc1.bias"].tolist() == tensors["fc1.bias"].tolist()


def test_the_arrays_are_plain_ones(tmp_path):
    weight = quantized()
    save_condensed(tmp_path / "w", {"fc": weight})
    arrays = load_file(tmp_path / "w")
    assert arrays.keys() == {"fc.values", "fc.scale", "fc.indices", "fc.active"}
    assert (arrays["fc.values"].dtype, arrays["fc.scale"].dtype) == (np.int8, np.float32)
    np.testing.assert_array_equal(arrays["fc.values"], weight.values)
    np.testing.assert_array_equal(arrays["fc.scale"], weight.scale)
    layers = json.loads(metadata_of(tmp_path / "w")[LAYERS])
    assert layers == {"fc": {"shape": [5, 7], "dtype": "int8"}}


def test_older_readers_refuse_the_file_by_its_version(tmp_path, monkeypatch):
    floats = CondensedWeight.random((4, 5), fan_in=2, rng=1)
    save_condensed(tmp_path / "floats", floats)
    save_condensed(tmp_path / "both", {"a": floats, "b": quantized()})
    assert metadata_of(tmp_path / "floats")[VERSION] == "1"
    assert metadata_of(tmp_path / "both")[VERSION] == "2"
    types = {"1": file_module._VALUE_TYPES["1"]}  # those of a reader before quantised weights
    monkeypatch.setattr(file_module, "_VALUE_TYPES", types)
    assert load_condensed(tmp_path / "floats") == {"weight": floats}
    with pytest.raises(FileFormatError, match="format version '2', but this srigl-core reads '1'"):
        load_condensed(tmp_path / "both")


def parts():
    values = np.array([[3, -127], [0, 127]], np.int8)
    return {
        "w.values": values,
        "w.scale": np.array([0.5, 0.25], np.float32),
        "w.indices": np.array([[0, 3], [1, 2]], np.uint16),
        "w.active": np.array([0, 2]),
    }


def saved(folder, arrays, *, dtype="int8", version="2"):
    layers = json.dumps({"w": {"shape": [3, 4], "dtype": dtype}})
    save_file(arrays, folder / "w", metadata={VERSION: version, LAYERS: layers})
    return folder / "w"


def test_the_parts_of_a_quantized_weight_load(tmp_path):
    weight = load_condensed(saved(tmp_path, parts()))["w"]
    assert isinstance(weight, QuantizedWeight)
    assert weight.to_dense()[0].tolist() == [1.5, 0, 0, -63.5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": np.array([[3, -128], [0, 127]], np.int8)}, "values holds -128"),
        ({"values": np.ones((2, 2), np.uint8)}, "values are uint8, but int8 is stored as int8"),
        ({"values": np.ones((2, 2), np.float32)}, "values are float32, but int8"),
        ({"values": np.ones((2, 3), np.int8)}, r"values has shape \(2, 3\)"),
        ({"values": None}, r"lacks 'w\.values'"),
        ({"scale": None}, r"lacks 'w\.scale'"),
        ({"scale": np.ones(3, np.float32)}, r"scale has shape \(3,\)"),
        ({"scale": np.ones((2, 1), np.float32)}, r"scale has shape \(2, 1\)"),
        ({"scale": np.ones(2)}, "scale has dtype float64"),
        ({"scale": np.ones(2, np.int32)}, "scale of dtype 'int32'"),
        ({"scale": np.array([1, 0], np.float32)}, r"scale holds 0\.0"),
        ({"scale": np.array([1, -1], np.float32)}, r"scale holds -1\.0"),
        ({"scale": np.array([np.nan, 1], np.float32)}, "scale holds nan"),
        ({"scale": np.array([1, np.inf], np.float32)}, "scale holds inf"),
        ({"indices": np.array([[3, 0], [1, 2]], np.uint16)}, "strictly ascending"),
        ({"indices": np.array([[0, 4], [1, 2]], np.uint16)}, "holds 4"),
        ({"indices": np.array([[0, 3], [1, 2]], np.uint32)}, "indices are uint32, but must be"),
        ({"active": np.array([2, 0])}, "strictly ascending"),
    ],
)
def test_a_part_of_a_quantized_weight_that_is_wrong_is_an_error(tmp_path, changed, message):
    arrays = parts() | {f"w.{name}": array for name, array in changed.items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(FileFormatError, match=f"layer 'w'.*{message}"):
        load_condensed(saved(tmp_path, arrays))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "1"}, "dtype 'int8' is none of float16, bfloat16, float32, float64"),
        ({"dtype": "int16"}, "dtype 'int16' is none of .*, int8"),
        ({"dtype": "float32"}, "values are int8, but float32 is stored as float32"),
        ({"version": "3"}, "format version '3', but this srigl-core reads '1' and '2'"),
    ],
)
def test_metadata_that_does_not_fit_a_quantized_weight_is_an_error(tmp_path, options, message):
    with pytest.raises(FileFormatError, match=message):
        load_condensed(saved(tmp_path, parts(), **options))
