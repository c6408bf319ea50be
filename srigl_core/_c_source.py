"""Layers as C: one source file and a header, which need nothing but C11 and its ``<math.h>``.

The functions are plain loops, without intrinsics, memory of their own or state. They compute what
the plans compute (SPEC 2 and 6). A product of int8 inputs has the reference's bits whatever the
compiler contracts: its one addition takes a product from a volatile variable, where it is rounded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.checks import as_float_array
from srigl_core._arrays.dtypes import accumulator_dtype, round_to
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._chain import in_layer, parsed_layer
from srigl_core._files import check_replaceable, checked_path, write_whole
from srigl_core._format.packed_weight import PackedWeight
from srigl_core._plan import check_inputs
from srigl_core._product_spec import ArraySpec, product_spec
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["C_ACTIVATIONS", "export_c"]

_TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "uint16_t",
    "bfloat16": "uint16_t",
    "int8": "int8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
}
"""The C types of arrays. C11 has no 16-bit floats, so that their bits are stored."""

C_ACTIVATIONS = {
    "none": "z",
    "relu": "z <= 0 ? 0 : z",
    "gelu": "0.5$f * z * (1 + erf$f(z / 1.4142135623730951$f))",
    "gelu_tanh": "0.5$f * z * (1 + tanh$f(0.7978845608028654$f * (z + 0.044715$f * z * z * z)))",
    "silu": "z / (1 + exp$f(-z))",
}
"""The formulas of `srigl_core.contract.ACTIVATIONS` in C; ``$f`` is "f" where z is a float."""

_WIDENED = {
    "float16": """
static inline float from_float16(uint16_t bits)
{
    union { uint32_t bits; float number; } wide = {((uint32_t)bits & 0x7fff) << 13};
    wide.number *= 0x1p112f; /* the exponent's bias is 15 in bits, and 127 in a float */
    if (wide.number >= 0x1p16f)
        wide.bits |= 0x7f800000; /* infinity or NaN */
    wide.bits |= ((uint32_t)bits & 0x8000) << 16;
    return wide.number;
}
""",
    "bfloat16": """
static inline float from_bfloat16(uint16_t bits)
{
    union { uint32_t bits; float number; } wide = {(uint32_t)bits << 16};
    return wide.number;
}
""",
}

_ACTIVATION = Template("""
static inline $real ${name}_$real($real z)
{
    return $formula;
}
""")

_QUANTIZE_ROW = """
/* Rounds a row to integers within -127..127 and returns their scale. The scale is NaN if a number
 * is not finite, and 0 if all are 0 or too small. */
static float quantize_row(const float *restrict x, int8_t *restrict rounded, size_t n)
{
    float largest = 0;
    int is_finite = 1;
    for (size_t c = 0; c < n; c++) {
        const float size = fabsf(x[c]);
        is_finite &= size < INFINITY;
        if (size > largest)
            largest = size;
    }
    const float factor = 127.0f / largest;
    const int is_zero = !is_finite || isinf(factor);
    for (size_t c = 0; c < n; c++)
        rounded[c] = is_zero ? 0 : (int8_t)rintf(x[c] * factor);
    if (is_zero)
        return is_finite ? 0 : NAN;
    return largest / 127.0f;
}
"""

_STANDARD_HEADER = re.compile(
    r"assert|complex|ctype|errno|fenv|float|inttypes|iso646|limits|locale|math|setjmp|signal|"
    r"std(align|arg|atomic|bool|def|int|io|lib|noreturn)|string|tgmath|threads|time|[uw]char|"
    r"wctype",
    re.IGNORECASE,
)
"""A header of such a name would hide the compiler's own where its folder is searched first."""

_TAKEN = {
    *("from_float16", "from_bfloat16", "quantize_row"),
    *(f"{name}_{real}" for name in C_ACTIVATIONS for real in ("float", "double")),
    *("static_assert", "thread_local", "and_eq", "not_eq", "or_eq", "xor_eq", "co_await"),
    *("co_return", "co_yield", "const_cast", "dynamic_cast", "reinterpret_cast", "static_cast"),
}
"""Names of the source's own functions, and words of C and C++."""

_MACRO = re.compile(
    r"(U?INT[0-9A-Z]*|U?CHAR|SCHAR|U?SHRT|U?L?LONG|DBL|FLT|FP|HUGE|LDBL|M|MATH|PTRDIFF|SIG|SIZE|"
    r"WCHAR|WINT)_[0-9A-Z_]*"
)
"""Names that the standard headers give to macros, or may."""

_FUNCTION = Template("""
void $function($parameters)
{
    for (size_t row = 0; row < batch; row++, x += $n_in, y += $n_out) {
        const $value_type *value = ${function}_values;
        const $index_type *index = ${function}_indices;
$before        for (size_t i = 0; i < $n_active; i++, value += $k, index += $k) {
$sum            y[$n] = $z;
        }
$after    }
}
""")

_FLOAT_SUM = Template("""\
            $real sums[4] = {0, 0, 0, 0}; /* no addition waits for the one before */
            size_t j = 0;
            for (; j + 4 <= $k; j += 4) {
                sums[0] += $first * x[index[j]];
                sums[1] += $second * x[index[j + 1]];
                sums[2] += $third * x[index[j + 2]];
                sums[3] += $fourth * x[index[j + 3]];
            }
            for (; j < $k; j++)
                sums[0] += $first * x[index[j]];
            const $real sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
""")

_INT8_SUM = Template("""\
            int32_t sum = 0;
            for (size_t j = 0; j < $k; j++)
                sum += value[j] * scratch[index[j]];
            const float unit = ${function}_scale[i] * s;
            /* volatile, so that the product is rounded before the bias is added to it */
            const volatile float v = sum == 0 && !isnan(s) ? 0 : (float)sum * unit;
""")

_SOURCE = Template("""\
/* $name.c: layers of a sparse network. Written by srigl-core $version; do not edit.
 *
 * Compile it as C11, with any optimisation but -ffast-math, and link the library of <math.h>. The
 * functions allocate nothing and keep nothing, so several threads may call them at once. Bits of
 * int8 products are those of the definition where float operations are rounded to float
 * (FLT_EVAL_METHOD is 0), to nearest even, and subnormals are not flushed.
 */
#include "$name.h"

#include <math.h>

#ifdef __FAST_MATH__
#error "compile this without -ffast-math, which takes numbers for finite that are not"
#endif
""")

_HEADER = Template("""\
/* $name.h: layers of a sparse network. Written by srigl-core $version; do not edit.
 *
 * A function computes a layer for `batch` rows: x has its inputs and y its results, row after row.
 * The arrays must not overlap.
 */
#ifndef $guard
#define $guard

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
$declarations
#ifdef __cplusplus
}
#endif

#endif
""")

_DECLARATION = Template("""
/* $description */
#define ${macro}_N_IN $n_in
#define ${macro}_N_OUT $n_out
void $function($parameters);
""")

_LINE = 96
"""Columns of the numbers in a line of the source."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A checked layer, and the name of its function."""

    name: str
    function: str
    weight: PackedWeight
    bias: NDArray[Any] | None
    activation: str
    inputs: str

    @property
    def real(self) -> str:
        """The C type of inputs and results."""
        return _TYPES[accumulator_dtype(self.weight.float_dtype).name]

    @property
    def is_int8(self) -> bool:
        return self.inputs == "int8"

    def parameters(self, qualifier: str = "") -> str:
        """Return the parameters of the function."""
        pointer = f"*{qualifier} " if qualifier else "*"
        scratch = f", int8_t {pointer}scratch" if self.is_int8 else ""
        return f"size_t batch, const {self.real} {pointer}x, {self.real} {pointer}y{scratch}"


def export_c(
    layers: Mapping[str, tuple[Any, ...]], folder: str | os.PathLike[str], *, name: str = "layers"
) -> list[Path]:
    """Write layers as C11 source: ``NAME.c`` and ``NAME.h``, with a function for each layer.

    Parameters
    ----------
    layers : mapping of str to tuple
        For each name (weight, bias, activation), and for a quantised weight its `inputs`, as
        `chain` takes them and `load_layers` returns them. The numbers become constants in the
        source.
    folder : path-like
        Made if it is missing. Each file is replaced as a whole.
    name : str
        Name of the files, and the beginning of the names of all functions. Characters that C does
        not allow in names become underscores.

    Returns
    -------
    list of Path
        The source and the header.

    Raises
    ------
    SriglError
        If there is no layer, or a part of one is not valid; the message names the layer. No file is
        written.
    ValueTypeError
        If `layers` is not a mapping of names to such tuples, or a part has a wrong type.
    OSError
        If a file cannot be written.

    Notes
    -----
    SPEC 2 and 6. The function of layer ``fc1`` in ``net.c`` is called as
    ``net_fc1(batch, x, y)``, and the header defines ``NET_FC1_N_IN`` and ``NET_FC1_N_OUT``.
    Inputs and results are ``float``, or ``double`` if the values are float64. With int8 inputs
    there is a fourth argument, ``scratch``, an array of n_in ``int8_t`` that the function writes.

    The source has no header but ``<math.h>``, ``<stdint.h>`` and ``<stddef.h>``. 16-bit values are
    stored as 16 bits. Sums are in the order of the connections, four at a time, so that a row has
    the same result in any batch. Subnormals are honoured unless the program flushes them.

    Examples
    --------
    >>> import srigl_core, tempfile
    >>> weight = srigl_core.CondensedWeight.random((8, 32), fan_in=4, rng=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in export_c({"fc1": (weight, None, "relu")}, folder, name="net")]
    ['net.c', 'net.h']
    """
    if not isinstance(layers, Mapping) or not all(isinstance(key, str) for key in layers):
        raise ValueTypeError(
            f"layers must be a mapping of names to tuples (weight, bias, activation), got "
            f"{type(layers).__name__}"
        )
    if not layers:
        raise SriglError("layers is empty; give at least one layer")
    stem = _stem(name)
    functions = _functions(stem, layers)
    checked = [
        in_layer(repr(key), _checked, key, functions[key], layer) for key, layer in layers.items()
    ]
    with honour_subnormals():
        texts = {".c": _source(stem, checked), ".h": _header(stem, checked)}
    target = checked_path(folder)
    target.mkdir(exist_ok=True)
    paths = {target / f"{stem}{ending}": text for ending, text in texts.items()}
    for path in paths:
        check_replaceable(path)
    for path, text in paths.items():
        write_whole(path, text.encode("ascii"))
    return list(paths)


def _checked(name: str, function: str, layer: Any) -> _Layer:
    weight, bias, activation, inputs = parsed_layer(layer if isinstance(layer, tuple) else (layer,))
    check_inputs(weight, inputs)
    if weight.shape[0] > 2**32:
        raise SriglError(f"it has {weight.shape[0]:,} neurons, more than the source can number")
    if bias is not None:
        bias = as_float_array(bias, "bias")
    spec = product_spec(
        ArraySpec((1, weight.shape[1]), accumulator_dtype(weight.float_dtype)),
        weight.shape,
        weight.float_dtype,
        bias_shape=None if bias is None else bias.shape,
        activation=activation,
        inputs=inputs,
    )
    if bias is not None:
        with honour_subnormals():
            bias = round_to(bias, spec.bias_dtype)
    return _Layer(name, function, weight, bias, activation, inputs)


# ---------------------------------------------------------------- names


def _stem(name: object) -> str:
    """Return the name of the files, as a C identifier."""
    if not isinstance(name, str):
        raise ValueTypeError(f"name must be a string, got {type(name).__name__}")
    stem = _identifier(name)
    is_usual = stem[:1].isalpha() and not _STANDARD_HEADER.fullmatch(stem)
    return stem if is_usual else f"layers_{stem}".rstrip("_")


def _identifier(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


def _functions(stem: str, names: Iterable[str]) -> dict[str, str]:
    """Return the names of functions by the layers' names, unique with all that begins with them."""
    functions: dict[str, str] = {}
    taken = _TAKEN | {_guard(stem).lower()}
    for name in names:
        first = f"{stem}_{_identifier(name) or 'layer'}"
        first = candidate = f"{first}_layer" if _MACRO.fullmatch(first) else first
        number = 1
        # Names that end in _t are types of headers, such as int8_t.
        while taken & (own := _names(candidate)) or candidate.endswith("_t"):
            number += 1
            candidate = f"{first}_{number}"
        taken |= own
        functions[name] = candidate
    return functions


def _guard(stem: str) -> str:
    """Return the macro that the header defines."""
    return f"{stem.upper()}_H_INCLUDED"


def _names(function: str) -> set[str]:
    """Return what the files call after a function, in lower case, since macros are upper case."""
    parts = ("values", "scale", "indices", "active", "bias", "n_in", "n_out")
    return {function.lower(), *(f"{function}_{part}".lower() for part in parts)}


def _plain(text: str) -> str:
    """Return a layer's name without what could end a comment or be a trigraph."""
    return re.sub(r"[^A-Za-z0-9_. -]", "_", text)


# ---------------------------------------------------------------- text


def _source(stem: str, layers: list[_Layer]) -> str:
    values = {layer.weight.dtype.name for layer in layers}
    activations = {(layer.activation, layer.real) for layer in layers} - {
        ("none", real) for real in ("float", "double")
    }
    parts = [_SOURCE.substitute(name=stem, version=_version())]
    parts += [text for dtype, text in _WIDENED.items() if dtype in values]
    for name, real in sorted(activations):
        formula = Template(C_ACTIVATIONS[name]).substitute(f="f" if real == "float" else "")
        parts.append(_ACTIVATION.substitute(name=name, real=real, formula=formula))
    if any(layer.is_int8 for layer in layers):
        parts.append(_QUANTIZE_ROW)
    for layer in layers:
        parts.append(f"\n/* ---- {_description(layer)} */\n")
        parts += [_array(f"{layer.function}_{part}", *of) for part, of in _arrays(layer).items()]
        parts.append(_function(layer))
    return "".join(parts)


def _header(stem: str, layers: list[_Layer]) -> str:
    declarations = [
        _DECLARATION.substitute(
            description=_description(layer),
            macro=layer.function.upper(),
            function=layer.function,
            parameters=layer.parameters(),
            n_out=layer.weight.shape[0],
            n_in=layer.weight.shape[1],
        )
        for layer in layers
    ]
    text = "".join(declarations)
    return _HEADER.substitute(name=stem, version=_version(), guard=_guard(stem), declarations=text)


def _version() -> str:
    # Imported here, since the package imports this module.
    from srigl_core import __version__

    return __version__


def _description(layer: _Layer) -> str:
    weight = layer.weight
    n_out, n_in = weight.shape
    facts = [f"{n_out} neurons of {n_in} inputs", f"fan-in {weight.fan_in}", weight.dtype.name]
    facts += [f"{n_out - weight.n_active} ablated"] * (n_out > weight.n_active)
    facts += ["int8 inputs"] * layer.is_int8
    facts += ["bias"] * (layer.bias is not None)
    facts += [layer.activation] * (layer.activation != "none")
    return f"{_plain(layer.name) or 'layer'}: {', '.join(facts)}"


def _arrays(layer: _Layer) -> dict[str, tuple[str, NDArray[Any]]]:
    """Return the C types and the numbers of a layer's arrays, by the ends of their names."""
    weight = layer.weight
    values = weight.values
    if values.dtype.itemsize == 2:
        values = values.view(np.uint16)
    arrays = {**weight.value_arrays, "values": values, "indices": weight.indices}
    if weight.n_active < weight.shape[0]:
        arrays["active"] = weight.active.astype(np.uint32)
    if layer.bias is not None:
        arrays["bias"] = layer.bias
    return {part: (_TYPES[array.dtype.name], array) for part, array in arrays.items()}


def _array(name: str, c_type: str, numbers: NDArray[Any]) -> str:
    suffix = "f" if c_type == "float" else ""
    flat = numbers.ravel().tolist()
    texts: Iterable[str] = map(str, flat)
    if numbers.dtype.kind == "f":
        texts = (_literal(each, suffix) for each in flat)
    lines, line = [], ""
    for text in texts:
        if line and len(line) + len(text) + 2 > _LINE:
            lines.append(line)
            line = ""
        line += f"{', ' if line else ''}{text}"
    body = ",\n    ".join([*lines, line])
    return f"static const {c_type} {name}[] = {{\n    {body}\n}};\n"


def _literal(number: float, suffix: str) -> str:
    """Return a number in hexadecimal, which no compiler rounds."""
    if np.isnan(number):
        return "NAN"
    if np.isinf(number):
        return "INFINITY" if number > 0 else "-INFINITY"
    digits, _, exponent = number.hex().partition("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}{suffix}"


def _function(layer: _Layer) -> str:
    weight, function, real = layer.weight, layer.function, layer.real
    n_out, n_in = weight.shape
    n = "i" if weight.n_active == n_out else f"{function}_active[i]"
    with_bias = "" if layer.bias is None else f" + {function}_bias[{n}]"
    before = after = ""
    if weight.n_active < n_out:
        alone = "0" if layer.bias is None else f"{function}_bias[n]"
        before += _each(n_out, f"y[n] = {alone}; /* that of ablated neurons */")
    if layer.activation != "none":
        after = _each(n_out, f"y[n] = {layer.activation}_{real}(y[n]);")
    if layer.is_int8:
        before += f"        const float s = quantize_row(x, scratch, {n_in});\n"
        text, z = _INT8_SUM.substitute(k=weight.fan_in, function=function), f"v{with_bias}"
    else:
        widen = f"from_{weight.dtype.name}({{}})" if weight.dtype.name in _WIDENED else "{}"
        places = {"first": "j", "second": "j + 1", "third": "j + 2", "fourth": "j + 3"}
        values = {key: widen.format(f"value[{place}]") for key, place in places.items()}
        text = _FLOAT_SUM.substitute(k=weight.fan_in, real=real, **values)
        scale = f"{function}_scale[i] * " if "scale" in weight.value_arrays else ""
        z = f"{scale}sum{with_bias}"
    return _FUNCTION.substitute(
        function=function,
        parameters=layer.parameters("restrict"),
        n_in=n_in,
        n_out=n_out,
        n_active=weight.n_active,
        k=weight.fan_in,
        value_type=_TYPES[weight.dtype.name],
        index_type=_TYPES[weight.indices.dtype.name],
        before=before,
        sum=text,
        n=n,
        z=z,
        after=after,
    )


def _each(n_out: int, statement: str) -> str:
    return f"        for (size_t n = 0; n < {n_out}; n++)\n            {statement}\n"
