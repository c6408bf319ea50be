"""Condensed weights in files: bit for bit there and back, and no file does harm."""

import json
import os
import stat
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from srigl_core import (
    CondensedWeight,
    FileFormatError,
    QuantizedWeight,
    SriglError,
    ValueTypeError,
    condensed_matmul,
    load_condensed,
    save_condensed,
)
from srigl_core._format.file import FORMAT_VERSION

DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYERS, VERSION = "srigl_core.layers", "srigl_core.format_version"


def assert_same(found, expected):
    """Same kind, shape, dtype and bits."""
    assert type(found) is type(expected)
    if isinstance(expected, CondensedWeight):
        assert found == expected
    else:
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()


def assert_valid(weight):
    """Nothing in it can lead a kernel out of bounds."""
    arrays = weight.value_arrays.values()
    assert type(weight)(*arrays, weight.indices, weight.active, weight.shape) == weight
    assert not any(array.flags.writeable for array in arrays)
    if weight.shape[0] * weight.shape[1] < 10**6:
        x = np.ones((1, weight.shape[1]), weight.float_dtype)
        assert condensed_matmul(x, weight, backend="reference").shape == (1, weight.shape[0])


def random_bits(dtype, shape, seed):
    """Every bit pattern may come: NaN payloads, subnormals, -0.0."""
    size = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize
    raw = np.random.default_rng(seed).bytes(size * int(np.prod(shape)))
    return np.frombuffer(raw, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).reshape(shape)


def example_weight(dtype="float32", seed=0, shape=(5, 7), fan_in=3, n_active=4):
    weight = CondensedWeight.random(shape, fan_in=fan_in, n_active=n_active, dtype=dtype, rng=seed)
    return weight.with_values(random_bits(dtype, weight.values.shape, seed))


def network():
    return {
        "fc1": example_weight("float16", 1, (6, 9), 2, 5),
        "fc1.bias": np.linspace(-1, 1, 6),
        "block.0.fc": example_weight("bfloat16", 2, (3, 6), 4, 1),
        "out": example_weight("float64", 3, (2, 3), 3, 2),
        "steps": np.array(12, np.int64),
        "seen": np.array([[True, False]]),
        "empty": np.zeros((0, 3), np.float32),
    }


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_comes_back_bit_for_bit(tmp_path, dtype):
    weight = example_weight(dtype, shape=(40, 300), fan_in=17, n_active=33)
    path = tmp_path / "weight.safetensors"
    save_condensed(path, weight)
    (name, loaded), *others = load_condensed(path).items()
    assert (name, others) == ("weight", [])
    assert_same(loaded, weight)
    assert loaded.dtype.name == dtype


def test_layers_and_arrays_come_back_bit_for_bit(tmp_path):
    tensors = network()
    path = str(tmp_path / "network.safetensors")
    save_condensed(path, tensors)
    loaded = load_condensed(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)


def test_a_wide_layer_comes_back_with_uint32_indices(tmp_path):
    weight = CondensedWeight(np.ones((1, 2), np.float32), [[0, 65536]], [1], (2, 65537))
    save_condensed(tmp_path / "wide", weight)
    loaded = load_condensed(tmp_path / "wide")["weight"]
    assert_same(loaded, weight)
    assert loaded.indices.dtype == np.uint32


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    other=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
@example(name="", other="a.b")
@example(name='é\n"\\', other="__metadata__")
@example(name="a", other="a.values")
def test_any_names_come_back_unless_two_collide(tmp_path_factory, name, other):
    path = tmp_path_factory.getbasetemp() / "names.safetensors"
    tensors = {name: example_weight(), other: np.arange(3.0)}
    stored = {f"{name}.{part}" for part in ("values", "indices", "active")}
    if name == other:
        tensors = {name: tensors[name]}
    elif other in stored or other == "__metadata__":
        with pytest.raises(SriglError, match="rename"):
            save_condensed(path, tensors)
        return
    save_condensed(path, tensors)
    loaded = load_condensed(path)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert_same(loaded[key], tensor)


def test_arrays_of_any_layout_and_byte_order_come_back(tmp_path):
    base = np.arange(24.0).reshape(4, 6)
    tensors = {
        "strided": base[::2, ::-1],
        "fortran": np.asfortranarray(base),
        "scalar": base[1, 1:2],
    }
    save_condensed(tmp_path / "a", tensors | {"big": base.astype(">f4")})
    loaded = load_condensed(tmp_path / "a")
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array)
    np.testing.assert_array_equal(loaded["big"], base)
    assert loaded["big"].dtype == np.float32


def test_the_file_is_plain_safetensors(tmp_path):
    weight = example_weight("bfloat16")
    save_condensed(tmp_path / "a", {"fc": weight})
    arrays = load_file(tmp_path / "a")
    assert arrays.keys() == {"fc.values", "fc.indices", "fc.active"}
    np.testing.assert_array_equal(arrays["fc.values"], weight.values.view(np.uint16))
    np.testing.assert_array_equal(arrays["fc.indices"], weight.indices)
    np.testing.assert_array_equal(arrays["fc.active"], weight.active)
    header, _ = parts_of((tmp_path / "a").read_bytes())
    assert header["__metadata__"][VERSION] == FORMAT_VERSION
    layers = json.loads(header["__metadata__"][LAYERS])
    assert layers == {"fc": {"shape": [5, 7], "dtype": "bfloat16"}}


def test_metadata_of_ones_own_is_kept_beside_the_formats(tmp_path):
    path = tmp_path / "w.safetensors"
    own = {"activations": '{"fc1": "relu"}', "": "\N{SNOWMAN}"}
    save_condensed(path, {"fc1": example_weight()}, metadata=own)
    with safe_open(path, "np") as file:
        found = file.metadata()
    assert {name: found[name] for name in own} == own
    assert set(found) == set(own) | {LAYERS, VERSION}
    assert load_condensed(path)["fc1"] == example_weight()


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"a": 1}, ValueTypeError, r"metadata\['a'\] = 1 must be a string, got int"),
        ({1: "a"}, ValueTypeError, "metadata name 1 must be a string, got int"),
        (["a"], ValueTypeError, "metadata must be a mapping of names to strings, got list"),
        ({LAYERS: "{}"}, SriglError, "begins with 'srigl_core.', as the format's own; rename it"),
        ({"a": "\ud800"}, SriglError, "is not valid Unicode; change it"),
        ({"\ud800": "a"}, SriglError, "is not valid Unicode; change it"),
    ],
)
def test_metadata_that_cannot_be_stored_is_an_error(tmp_path, metadata, error, message):
    path = tmp_path / "w.safetensors"
    with pytest.raises(error, match=message):
        save_condensed(path, example_weight(), metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_what_was_loaded_does_not_depend_on_the_file_any_more(tmp_path):
    path = tmp_path / "a"
    save_condensed(path, network())
    loaded = load_condensed(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    path.unlink()
    for name, tensor in network().items():
        assert_same(loaded[name], tensor)


# ---------------------------------------------------------------- saving


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_condensed(path, network())
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save_condensed(path, example_weight())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        save_condensed(tmp_path / "folder", example_weight())
    (tmp_path / "folder").rmdir()
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueTypeError):
        save_condensed(path, {"fc": example_weight(), "text": "text"})
    assert path.read_bytes() == before
    save_condensed(path, example_weight())
    assert_same(load_condensed(path)["weight"], example_weight())
    assert os.listdir(tmp_path) == [path.name]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_condensed(tmp_path / "a", example_weight())
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a")]
    assert modes[0] == modes[1]


def test_saving_into_a_missing_folder_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_condensed(tmp_path / "missing" / "a", example_weight())
    with pytest.raises(FileNotFoundError, match="missing"):
        load_condensed(tmp_path / "missing")


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (np.ones(3), ValueTypeError, "tensors must be a CondensedWeight or a mapping"),
        ({"a": [1.0, 2.0]}, ValueTypeError, "'a' is list"),
        ({"a": None}, ValueTypeError, "'a' is NoneType"),
        ({"a": np.array(["x"])}, ValueTypeError, "'a' is dtype <U1"),
        ({"a": np.ones(2, complex)}, ValueTypeError, "complex128"),
        ({"a": np.ones(2, object)}, ValueTypeError, "object"),
        ({"a": np.ones(2, np.longdouble)}, ValueTypeError, "'a' is dtype"),
        ({1: np.ones(2)}, ValueTypeError, "tensor name 1 must be a string, got int"),
        ({"a\ud800": np.ones(2)}, SriglError, "not valid Unicode"),
        ({"__metadata__": np.ones(2)}, SriglError, "rename the array"),
        (
            {"a": example_weight(), "a.active": np.ones(2)},
            SriglError,
            r"two tensors .* 'a\.active'; rename",
        ),
    ],
)
def test_what_cannot_be_stored_is_an_error(tmp_path, tensors, error, message):
    with pytest.raises(error, match=message):
        save_condensed(tmp_path / "a", tensors)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- files that are not right


def parts_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def file_of(header, data):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module", params=["floats", "quantized"])
def content(folder, request):
    """The bytes of a file with two layers and a bias."""
    path = folder / "right.safetensors"
    tensors = {
        "a": example_weight("bfloat16"),
        "b": example_weight("float32", 1),
        "bias": np.ones(3),
    }
    if request.param == "quantized":
        tensors["a"] = CondensedWeight.random((5, 7), fan_in=3, n_active=4, rng=2).quantize()
    save_condensed(path, tensors)
    return path.read_bytes()


def load_bytes(folder, content):
    """Return what is loaded, or None for a FileFormatError; anything else escapes."""
    path = folder / "fuzzed.safetensors"
    path.write_bytes(content)
    tensors, reason = None, ""
    try:
        tensors = load_condensed(path)
    except FileFormatError as error:
        reason = str(error)
    if tensors is None:
        assert path.name in reason
        return None
    for tensor in tensors.values():
        if isinstance(tensor, CondensedWeight | QuantizedWeight):
            assert_valid(tensor)
        else:
            assert isinstance(tensor, np.ndarray)
    return tensors


def test_a_file_cut_off_anywhere_is_an_error(folder, content):
    assert load_bytes(folder, content) is not None
    for length in range(len(content)):
        assert load_bytes(folder, content[:length]) is None, length


@given(extra=st.binary(min_size=1, max_size=20))
def test_a_file_with_bytes_left_over_is_an_error(folder, content, extra):
    assert load_bytes(folder, content + extra) is None


@given(data=st.data(), n=st.integers(1, 3))
def test_flipped_bytes_give_an_error_or_valid_weights(folder, content, data, n):
    changed = bytearray(content)
    for _ in range(n):
        place = data.draw(st.integers(0, len(content) - 1))
        changed[place] ^= data.draw(st.integers(1, 255))
    load_bytes(folder, bytes(changed))


def test_every_flipped_byte_of_the_indices_gives_an_error_or_valid_weights(folder, content):
    header, data = parts_of(content)
    start = len(content) - len(data)
    outcomes = set()
    for name in ("a.indices", "a.active", "b.indices", "b.active"):
        for place in range(*header[name]["data_offsets"]):
            for flip in (0x01, 0x04, 0x80, 0xFF):
                changed = bytearray(content)
                changed[start + place] ^= flip
                outcomes.add(load_bytes(folder, bytes(changed)) is None)
    assert outcomes == {True, False}


def test_every_flipped_byte_of_the_header_gives_an_error_or_valid_weights(folder, content):
    header_length = len(content) - len(parts_of(content)[1])
    n_errors = 0
    for place in range(header_length):
        for flip in (0x01, 0x10, 0x80):
            changed = bytearray(content)
            changed[place] ^= flip
            n_errors += load_bytes(folder, bytes(changed)) is None
    assert n_errors > 1.5 * header_length


@given(garbage=st.binary(max_size=200))
@example(garbage=b"")
@example(garbage=b"\x02\0\0\0\0\0\0\0{}")
@example(garbage=b"\xff" * 8 + b"{}")
def test_bytes_that_are_no_file_are_an_error(folder, garbage):
    assert load_bytes(folder, garbage) is None


def saved(folder, arrays, layers, **metadata):
    """A safetensors file of these arrays and this metadata."""
    path = folder / "written.safetensors"
    layers = layers if isinstance(layers, str) else json.dumps(layers)
    metadata = {VERSION: FORMAT_VERSION, LAYERS: layers} | metadata
    save_file(arrays, path, metadata={k: v for k, v in metadata.items() if v is not None})
    return path


def right_parts():
    weight = CondensedWeight(
        np.array([[0.5, -1.0], [2.0, 0.0]], np.float32), [[0, 3], [1, 2]], [0, 2], (3, 4)
    )
    arrays = {"w.values": weight.values, "w.indices": weight.indices, "w.active": weight.active}
    return arrays, {"w": {"shape": [3, 4], "dtype": "float32"}}


def test_the_parts_as_they_should_be_load(folder):
    assert load_condensed(saved(folder, *right_parts()))["w"].nnz == 4


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("indices", np.array([[1, 2], [0, 3]], np.uint16)[:, ::-1].copy(), "strictly ascending"),
        ("indices", np.array([[0, 0], [1, 2]], np.uint16), "strictly ascending"),
        ("indices", np.array([[0, 4], [1, 2]], np.uint16), r"holds 4, but must lie in 0\.\.3"),
        ("indices", np.array([[0, 65535], [1, 2]], np.uint16), "holds 65535"),
        ("indices", np.array([[-1, 3], [1, 2]], np.int16), "holds -1"),
        (
            "indices",
            np.array([[0, 3], [1, 2]], np.uint32),
            "indices are uint32, but must be uint16",
        ),
        ("indices", np.array([[0, 3], [1, 2]], np.int64), "indices are int64, but must be uint16"),
        ("indices", np.array([[0, 3], [1, 2]], np.float32), "indices has dtype float32"),
        ("indices", np.array([0, 3, 1, 2], np.uint16), r"indices has shape \(4,\)"),
        ("indices", np.array([[0, 3, 1, 2]], np.uint16), r"indices of shape \(1, 4\)"),
        ("indices", np.array([[0, 3]], np.uint16), r"indices of shape \(1, 2\)"),
        ("active", np.array([2, 0]), "active must be strictly ascending"),
        ("active", np.array([0, 0]), "active must be strictly ascending"),
        ("active", np.array([0, 3]), r"active holds 3, but must lie in 0\.\.2"),
        ("active", np.array([-1, 2]), "active holds -1"),
        ("active", np.array([0, 1, 2]), r"active has shape \(3,\)"),
        ("active", np.array([0, 2], np.int32), "active are int32, but must be int64"),
        ("active", np.array([0, 2], np.uint64), "active are uint64, but must be int64"),
        ("values", np.ones((2, 2)), "values are float64, but float32 is stored as float32"),
        ("values", np.ones((2, 2), np.uint16), "values are uint16"),
        ("values", np.ones((2, 2), np.int32), "values are int32"),
        ("values", np.ones((3, 2), np.float32), r"values has shape \(3, 2\)"),
        ("values", np.ones((2, 1), np.float32), r"values has shape \(2, 1\)"),
        ("values", np.ones(4, np.float32), r"values has shape \(4,\)"),
        ("values", np.ones((0, 2), np.float32), r"values has shape \(0, 2\)"),
        ("values", None, r"layer 'w' lacks 'w\.values'"),
        ("indices", None, r"layer 'w' lacks 'w\.indices'"),
        ("active", None, r"layer 'w' lacks 'w\.active'"),
    ],
)
def test_a_part_that_is_wrong_is_an_error_that_names_the_layer(folder, part, array, message):
    arrays, layers = right_parts()
    arrays[f"w.{part}"] = array
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(FileFormatError, match=f"layer 'w'.*{message}|{message}"):
        load_condensed(saved(folder, arrays, layers))


@pytest.mark.parametrize(
    ("layers", "metadata", "message"),
    [
        (None, {VERSION: "3"}, "format version '3', but this srigl-core reads '1' and '2';"),
        (None, {VERSION: ""}, "format version ''"),
        (None, {VERSION: None}, "no srigl_core.format_version"),
        (None, {LAYERS: None}, "does not describe layers"),
        ("", {}, "does not describe layers"),
        ("[]", {}, "does not describe layers"),
        ("{", {}, "does not describe layers"),
        ("[" * 100_000, {}, "does not describe layers"),
        ('{"w": {"dtype": "float32", "shape": ' + "9" * 5000 + "}}", {}, "does not describe"),
        ({"w": {}}, {}, "does not describe layers"),
        ({"w": {"shape": [3, 4]}}, {}, "does not describe layers"),
        ({"w": {"shape": 3, "dtype": "float32"}}, {}, "does not describe layers"),
        ({"w": [3, 4]}, {}, "does not describe layers"),
        ({"w": {"shape": [3], "dtype": "float32"}}, {}, r"shape=\(3,\) must be a pair"),
        ({"w": {"shape": [3, 4, 1], "dtype": "float32"}}, {}, "must be a pair"),
        ({"w": {"shape": [3.0, 4], "dtype": "float32"}}, {}, "must be an integer"),
        ({"w": {"shape": [True, 4], "dtype": "float32"}}, {}, "must be an integer"),
        ({"w": {"shape": ["3", "4"], "dtype": "float32"}}, {}, "must be an integer"),
        ({"w": {"shape": "34", "dtype": "float32"}}, {}, "must be an integer"),
        ({"w": {"shape": [3, None], "dtype": "float32"}}, {}, "must be an integer"),
        ({"w": {"shape": [-3, 4], "dtype": "float32"}}, {}, "n_out=-3"),
        ({"w": {"shape": [3, 3], "dtype": "float32"}}, {}, "holds 3"),
        ({"w": {"shape": [2, 4], "dtype": "float32"}}, {}, "holds 2"),
        ({"w": {"shape": [1, 4], "dtype": "float32"}}, {}, "does not fit"),
        ({"w": {"shape": [3, 70000], "dtype": "float32"}}, {}, "uint16, but must be uint32"),
        ({"w": {"shape": [3, 2**33], "dtype": "float32"}}, {}, "n_in=8589934592"),
        ({"w": {"shape": [2**80, 4], "dtype": "float32"}}, {}, "n_out=1208925819614629174706176"),
        ({"w": {"shape": [3, 4], "dtype": "float16"}}, {}, "values are float32, but float16"),
        ({"w": {"shape": [3, 4], "dtype": "bfloat16"}}, {}, "bfloat16 is stored as uint16"),
        ({"w": {"shape": [3, 4], "dtype": "int8"}}, {}, "dtype 'int8' is none of"),
        ({"w": {"shape": [3, 4], "dtype": None}}, {}, "dtype None is none of"),
        ({"w": {"shape": [3, 4], "dtype": ["float32"]}}, {}, "is none of"),
        ({"v": {"shape": [3, 4], "dtype": "float32"}}, {}, r"layer 'v' lacks 'v\.values'"),
        ({"\ud800": {"shape": [3, 4], "dtype": "float32"}}, {}, r"lacks '\\ud800\.values'"),
    ],
)
def test_metadata_that_is_wrong_is_an_error(folder, layers, metadata, message):
    arrays, right = right_parts()
    with pytest.raises(FileFormatError, match=message) as failure:
        load_condensed(saved(folder, arrays, right if layers is None else layers, **metadata))
    str(failure.value).encode()  # can be printed, whatever the file's text


def test_a_name_of_both_a_layer_and_an_array_is_an_error(folder):
    arrays, layers = right_parts()
    arrays["w"] = np.ones(2)
    with pytest.raises(FileFormatError, match=r"\['w'\] name both a layer and an array"):
        load_condensed(saved(folder, arrays, layers))


def test_a_file_without_metadata_is_an_error(folder):
    save_file({"a": np.ones(2)}, folder / "plain")
    with pytest.raises(FileFormatError, match="not written by save_condensed"):
        load_condensed(folder / "plain")


def test_a_huge_shape_costs_nothing_to_load(folder):
    """The shape is a claim: nothing of its size is made."""
    arrays, layers = right_parts()
    layers["w"]["shape"] = [2**62, 65536]
    weight = load_condensed(saved(folder, arrays, layers))["w"]
    assert (weight.shape, weight.nnz) == ((2**62, 65536), 4)
    assert "n_active=2" in repr(weight)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=3), parts),
    max_leaves=6,
)
SHAPES = st.lists(st.integers(-1, 6) | st.integers(), min_size=0, max_size=3)


@given(
    layer=st.fixed_dictionaries({}, optional={
        "shape": st.just([3, 4]) | SHAPES | JSON,
        "dtype": st.sampled_from([*DTYPES, "int8"]) | JSON,
        "more": JSON,
    }) | JSON,
    name=st.sampled_from(["w", "v"]),
)  # fmt: skip
def test_any_metadata_gives_an_error_or_a_valid_weight(folder, layer, name):
    arrays, _ = right_parts()
    load_bytes(folder, saved(folder, arrays, {name: layer}).read_bytes())


NUMPY_DTYPES = st.sampled_from(
    [np.uint16, np.uint32, np.int64, np.uint8, np.int16, np.float16, np.float32, np.float64, bool]
)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_arrays_give_an_error_or_a_valid_weight(folder, data, dtype):
    """Mostly of the right dtype and shape, with numbers in range or not, in order or not."""
    n_out, n_in = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    n_active, fan_in = data.draw(st.integers(1, n_out)), data.draw(st.integers(1, n_in))
    shapes = {"values": (n_active, fan_in), "indices": (n_active, fan_in), "active": (n_active,)}
    stored = {"bfloat16": "uint16"}.get(dtype, dtype)
    dtypes = {"values": np.dtype(stored), "indices": np.uint16, "active": np.int64}
    arrays = {}
    for part in shapes:
        odd = data.draw(st.integers(0, 9)) == 0
        shape = (
            data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)) if odd else shapes[part]
        )
        kind = data.draw(NUMPY_DTYPES) if data.draw(st.integers(0, 9)) == 0 else dtypes[part]
        if np.dtype(kind).kind in "iu" and part != "values":
            least = 0 if np.dtype(kind).kind == "u" else -1
            array = data.draw(hnp.arrays(kind, shape, elements=st.integers(least, 6)))
            array = np.sort(array, axis=-1) if array.ndim and data.draw(st.booleans()) else array
        else:
            array = data.draw(hnp.arrays(kind, shape))
        if data.draw(st.integers(0, 19)):
            arrays[f"w.{part}"] = np.ascontiguousarray(array)
    layers = {"w": {"shape": [n_out, n_in], "dtype": dtype}}
    tensors = load_bytes(folder, saved(folder, arrays, layers).read_bytes())
    if tensors is not None:
        assert tensors["w"].shape == (n_out, n_in)
        assert tensors["w"].values.tobytes() == arrays["w.values"].tobytes()


@given(data=st.data())
def test_a_header_with_other_offsets_shapes_or_dtypes_does_no_harm(folder, content, data):
    header, body = parts_of(content)
    name = data.draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    entry = header[name]
    number = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 1.5])
    kind = data.draw(st.sampled_from(["offsets", "shape", "dtype", "swap", "drop"]))
    if kind == "offsets":
        entry["data_offsets"] = [data.draw(number), data.draw(number)]
    elif kind == "shape":
        entry["shape"] = data.draw(st.lists(number, max_size=3))
    elif kind == "dtype":
        names = [
            "F16",
            "BF16",
            "F32",
            "F64",
            "U8",
            "U16",
            "I16",
            "I64",
            "BOOL",
            "F8_E4M3",
            "C64",
            "",
        ]
        entry["dtype"] = data.draw(st.sampled_from(names))
    elif kind == "swap":
        other = data.draw(st.sampled_from([key for key in header if key != "__metadata__"]))
        header[name], header[other] = header[other], header[name]
    else:
        del entry[data.draw(st.sampled_from(sorted(entry)))]
    load_bytes(folder, file_of(header, body))
