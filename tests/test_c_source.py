"""Layers as C source: the names, the text and the errors. tests/slow compiles and runs it."""

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import srigl_core
from srigl_core import CondensedWeight, SriglError, ValueTypeError, export_c
from srigl_core._c_source import C_ACTIVATIONS
from srigl_core.contract import ACTIVATIONS

WEIGHT = CondensedWeight.random((6, 8), fan_in=3, n_active=4, rng=0)


def exported(folder, layers, **options):
    source, header = export_c(layers, folder, **options)
    return SimpleNamespace(source=source.read_text(), header=header.read_text())


def functions(text):
    return re.findall(r"^void (\w+)\(", text, re.MULTILINE)


def test_every_activation_has_a_formula_in_c():
    assert list(C_ACTIVATIONS) == list(ACTIVATIONS)


def test_a_file_has_a_function_for_each_layer(tmp_path):
    layers = {"fc1": (WEIGHT, np.ones(6), "relu"), "block.0/out": (WEIGHT.quantize(), None, None)}
    made = exported(tmp_path / "c", layers, name="my net")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"my_net.c", "my_net.h"}
    assert functions(made.source) == functions(made.header) == ["my_net_fc1", "my_net_block_0_out"]
    assert "#define MY_NET_FC1_N_IN 8\n#define MY_NET_FC1_N_OUT 6\n" in made.header
    assert set(re.findall(r"#include (.*)", made.source + made.header)) == {
        *('"my_net.h"', "<math.h>", "<stddef.h>", "<stdint.h>")
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.b", "a_b", "A.B"], ["n_a_b", "n_a_b_2", "n_A_B_3"]),
        (["", ".", "größe"], ["n_layer", "n_layer_2", "n_gr_e"]),
        (["fc", "fc_values"], ["n_fc", "n_fc_values_2"]),
        (["fc_n_in", "fc"], ["n_fc_n_in", "n_fc_2"]),
        (["0", "int", "t"], ["n_0", "n_int", "n_t_2"]),
        (["H.INCLUDED"], ["n_H_INCLUDED_2"]),  # the header's own macro, but for case
    ],
)
def test_names_are_valid_and_unique(tmp_path, names, expected):
    made = exported(tmp_path, dict.fromkeys(names, (WEIGHT, None, None)), name="n")
    assert functions(made.source) == expected


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        *(("3d", "layers_3d"), ("", "layers"), ("a-b", "a_b")),
        *(("math", "layers_math"), ("StdInt", "layers_StdInt"), ("maths", "maths")),
    ],
)
def test_the_files_have_a_valid_name(tmp_path, name, stem):
    export_c({"fc": (WEIGHT, None, None)}, tmp_path, name=name)
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.c", f"{stem}.h"}


def test_a_name_cannot_end_a_comment(tmp_path):
    made = exported(tmp_path, {"*/ int main(void) {} ??/\n": (WEIGHT, None, None)})
    for text in (made.source, made.header):
        assert "main(void)" not in text
        assert "??" not in text
        assert text.count("/*") == text.count("*/")


def test_sixteen_bit_values_take_sixteen_bits(tmp_path):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = np.array([[1, -2]], dtype)
        weight = CondensedWeight(values, [[0, 5]], [1], (3, 8))
        made = exported(tmp_path, {"fc": (weight, None, None)})
        first, second = values.view(np.uint16)[0]
        assert f"static const uint16_t layers_fc_values[] = {{\n    {first}, {second}\n}};" in (
            made.source
        )


def test_numbers_are_written_without_rounding(tmp_path):
    numbers = np.array([[0.1, -0.0, 1e-45, 3.4e38, np.inf, -np.inf, np.nan]], np.float32)
    weight = CondensedWeight(numbers, [range(7)], [0], (1, 7))
    made = exported(tmp_path, {"fc": (weight, None, None)})
    texts = re.search(r"layers_fc_values\[\] = \{\n([^}]*)\n\}", made.source)[1].split(",")
    *finite, infinity, minus, nan = [text.strip() for text in texts]
    assert (infinity, minus, nan) == ("INFINITY", "-INFINITY", "NAN")
    read = [np.float32(float.fromhex(text.removesuffix("f"))) for text in finite]
    np.testing.assert_array_equal(np.array(read).view(np.uint32), numbers[0, :4].view(np.uint32))


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        ({}, SriglError, "layers is empty"),
        ([(WEIGHT, None, None)], ValueTypeError, "mapping of names"),
        ({1: (WEIGHT, None, None)}, ValueTypeError, "mapping of names"),
        ({"fc": WEIGHT}, ValueTypeError, r"layer 'fc': expected \(weight, bias, activation\)"),
        ({"fc": (WEIGHT, None, "swish")}, SriglError, "layer 'fc': activation='swish' is unknown"),
        ({"fc": (WEIGHT, np.ones(4), None)}, SriglError, r"layer 'fc': bias has shape \(4,\)"),
        ({"fc": (WEIGHT, "bias", None)}, ValueTypeError, "layer 'fc': bias must be an array"),
        ({"fc": (WEIGHT, None, None, "int8")}, SriglError, "layer 'fc': .*needs a quantised"),
        ({"fc": (WEIGHT.quantize(), None, None, "int4")}, SriglError, "layer 'fc': inputs='int4'"),
    ],
)
def test_wrong_layers_are_named_and_nothing_is_written(tmp_path, layers, kind, message):
    with pytest.raises(kind, match=message):
        export_c(layers, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "missing" / "folder"):
        with pytest.raises(OSError, match=str(folder.name)):
            export_c({"fc": (WEIGHT, None, None)}, folder)


def test_no_file_is_written_where_one_cannot_be_replaced(tmp_path):
    (tmp_path / "net.h").mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        export_c({"fc": (WEIGHT, None, None)}, tmp_path, name="net")
    assert [path.name for path in tmp_path.iterdir()] == ["net.h"]


def test_the_sum_of_int8_products_must_fit_int32(tmp_path):
    n_in = 133_145
    weight = CondensedWeight.random((1, n_in), fan_in=n_in, rng=0).quantize()
    with pytest.raises(SriglError, match=r"layer 'fc': fan_in=133,145 exceeds"):
        export_c({"fc": (weight, None, None, "int8")}, tmp_path)
    assert srigl_core.export_c({"fc": (weight, None, None, "float")}, tmp_path)
