"""Layers as C source: compilers take it without a warning, and its functions obey the laws.

Each layer of a problem is compiled by itself and called by ctypes. Compilers that are not installed
are skipped. For Clang, Zig's is used then, from the package ziglang, with fewer problems and types.
"""

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from srigl_core import CondensedWeight, export_c, prepare
from srigl_core.contract import accumulator_dtype, round_to
from srigl_core.testing import KernelCapabilities, check_kernel

if sys.platform == "win32":
    pytest.skip("the options are those of GCC and Clang on POSIX", allow_module_level=True)

STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

LARGEST = 20_000
"""Numbers of a problem: compilers take long to read more constants."""

ROWS = 5

ZIG = [sys.executable, "-m", "ziglang", "cc"]


@pytest.fixture(params=["gcc", "clang"])
def compiler(request):
    """Return the command of a C compiler."""
    if found := shutil.which(request.param):
        return [found]
    if request.param == "clang" and importlib.util.find_spec("ziglang"):
        return ZIG
    pytest.skip(f"{request.param} is not installed")


def compiled(command, source, *options):
    done = subprocess.run(
        [*command, *options, str(source), "-lm"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def n_problems(compiler):
    return 1 if compiler == ZIG else 6


class Library:
    """The functions of layers, each compiled and loaded by itself."""

    def __init__(self, *command):
        self.command, self.loaded = command, {}

    def __call__(self, x, layer):
        """Return the product, in the type that the function computes."""
        weight, *_, inputs = layer
        real = accumulator_dtype(weight.float_dtype)
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(x.astype(real))
        y = np.full((len(x), weight.shape[0]), 7, real)
        scratch = [np.empty(weight.shape[1], np.int8)] if inputs == "int8" else []
        function = self.load(layer)
        arrays = [ctypes.c_void_p(array.ctypes.data) for array in (x, y, *scratch)]
        function(ctypes.c_size_t(len(x)), *arrays)
        return y

    def load(self, layer):
        with tempfile.TemporaryDirectory() as folder:
            source, _ = export_c({"fc": layer}, folder, name="net")
            key = hashlib.sha256(source.read_bytes()).digest()
            if key not in self.loaded:
                built = Path(folder, "net.so")
                compiled(self.command, source, "-fPIC", "-shared", "-o", built)
                function = ctypes.CDLL(str(built)).net_fc  # stays loaded after its file is deleted
                function.restype = None
                self.loaded[key] = function
        return self.loaded[key]


def kernel(library):
    def c_source(x, weight, bias, activation):
        result = np.result_type(x, weight.values)
        return round_to(library(x, (weight, bias, activation, "float")), result)

    return c_source


def quantized_kernel(library):
    def c_source(x, weight, inputs, bias, activation):
        result = np.result_type(x, weight.scale)
        return round_to(library(x, (weight, bias, activation, inputs)), result)

    return c_source


@pytest.mark.parametrize(
    "dtypes", [("float32", "float16"), ("bfloat16",), ("float64",)], ids=lambda names: names[-1]
)
def test_the_functions_obey_the_laws_of_products(compiler, dtypes):
    if compiler == ZIG and "float32" not in dtypes:
        pytest.skip("Zig starts slowly")
    capabilities = KernelCapabilities(value_dtypes=frozenset(dtypes), largest_problem=LARGEST)
    function = kernel(Library(*compiler, *STRICT, "-O2"))
    check_kernel(function, capabilities=capabilities, max_examples=n_problems(compiler))


def test_the_functions_obey_the_laws_of_quantised_products(compiler):
    capabilities = KernelCapabilities(value_dtypes=frozenset({"float32"}), largest_problem=LARGEST)
    function = quantized_kernel(Library(*compiler, *STRICT, "-O2"))
    options = {"capabilities": capabilities, "max_examples": n_problems(compiler)}
    check_kernel(function, "quantized_matmul", **options)


CLASHES = [
    *(("NET", "H"), ("LAYERS", "H"), ("NET", "H_INCLUDED"), ("quantize", "row"), ("relu", "float")),
    *(("gelu", "float"), ("from", "float16"), ("math", "fc"), ("stdint", "fc"), ("stddef", "fc")),
    *(("FP", "NAN"), ("SIZE", "MAX"), ("INT8", "MAX"), ("UINT", "FAST8.MAX"), ("HUGE", "VAL")),
    *(("MATH", "ERRNO"), ("M", "PI"), ("WCHAR", "MIN"), ("static", "assert"), ("const", "cast")),
    *(("thread", "local"), ("and", "eq"), ("co", "await"), ("int8", "t")),
]
"""Names of files and layers that together are words of C or C++, or names in use."""


def test_no_name_clashes_with_c_or_the_headers(tmp_path):
    compiler, cpp = shutil.which("gcc"), shutil.which("g++")
    if not compiler or not cpp:
        pytest.skip("gcc and g++ are not both installed")
    weight = CondensedWeight.random((6, 8), fan_in=3, rng=0)
    halves = CondensedWeight.random((6, 8), fan_in=3, dtype="float16", rng=0)
    kinds = {
        "": (weight, None, "gelu", "float"),
        "b": (weight.quantize(), None, "relu", "int8"),
        "c": (halves, None, None, "float"),
    }
    for number, (stem, layer) in enumerate(CLASHES):
        folder = tmp_path / str(number)
        named = {layer + end: kind for end, kind in kinds.items()}
        source, header = export_c(named, folder, name=stem)
        compiled([compiler], source, *STRICT, f"-I{folder}", "-c", "-o", str(folder / "object"))
        text = f'#include <cmath>\n#include <cstdint>\n#include <cfloat>\n#include "{header}"\n'
        (folder / "user.cpp").write_text(text)
        options = "-std=c++20", "-Werror", f"-I{folder}", "-fsyntax-only"
        compiled([cpp], folder / "user.cpp", *options)


def layers():
    """Return a layer of each kind: types, activations, ablated neurons, wide indices."""
    rng = np.random.default_rng(0)
    activations = ("none", "relu", "gelu", "gelu_tanh", "silu")
    made = {}
    for i, dtype in enumerate(("float32", "float64", "float16", "bfloat16", "int8", "int8")):
        shape = (12, 70_000) if i % 2 else (13, 40)
        floats = dtype if dtype != "int8" else "float32"
        weight = CondensedWeight.random(shape, fan_in=7 - i, n_active=12 - i, dtype=floats, rng=rng)
        weight = weight.quantize() if dtype == "int8" else weight
        bias = rng.standard_normal(shape[0]) if i % 3 else None
        inputs = "int8" if i == 5 else "float"
        made[f"{dtype}.{i}"] = (weight, bias, activations[i % 5], inputs)
    return made


def program(made):
    """Return a program that reads a batch for each layer and writes the results."""
    calls = []
    for name, (weight, *_, inputs) in made.items():
        function = f"net_{name.replace('.', '_')}"
        n_in, n_out = f"{function.upper()}_N_IN", f"{function.upper()}_N_OUT"
        real = "double" if weight.float_dtype == np.float64 else "float"
        scratch = ", scratch" if inputs == "int8" else ""
        calls.append(f"""    {{
        {real} *x = malloc(ROWS * {n_in} * sizeof *x), *y = malloc(ROWS * {n_out} * sizeof *y);
        int8_t *scratch = malloc({n_in});
        if (fread(x, sizeof *x, ROWS * {n_in}, stdin) != ROWS * {n_in})
            return 1;
        {function}(ROWS, x, y{scratch});
        if (fwrite(y, sizeof *y, ROWS * {n_out}, stdout) != ROWS * {n_out})
            return 1;
        free(x), free(y), free(scratch);
    }}
""")
    includes = '#include "net.h"\n#include <stdio.h>\n#include <stdlib.h>\n'
    return f"{includes}#define ROWS {ROWS}\nint main(void)\n{{\n{''.join(calls)}}}\n"


@pytest.mark.parametrize("options", [("-O3",), SANITIZED], ids=["optimised", "sanitised"])
def test_a_program_without_python_gives_the_products_of_the_reference(compiler, tmp_path, options):
    if compiler == ZIG and options == SANITIZED:
        pytest.skip("Zig has no sanitizer of addresses")
    made = layers()
    source, _ = export_c(made, tmp_path, name="net")
    (tmp_path / "main.c").write_text(program(made))
    built = tmp_path / "program"
    compiled((*compiler, *STRICT, *options), source, tmp_path / "main.c", "-o", built)
    rng = np.random.default_rng(1)
    batches = {
        name: rng.standard_normal((ROWS, layer[0].shape[1])).astype(
            accumulator_dtype(layer[0].float_dtype)
        )
        for name, layer in made.items()
    }
    given = b"".join(x.tobytes() for x in batches.values())
    done = subprocess.run([built], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    results, start = done.stdout, 0
    for name, (weight, bias, activation, inputs) in made.items():
        plan = prepare(weight, inputs=inputs, backend="reference")
        expected = plan(batches[name], bias, activation=activation)
        end = start + expected.nbytes
        y = np.frombuffer(results[start:end], expected.dtype).reshape(expected.shape)
        start = end
        if inputs == "int8" and activation == "none":
            np.testing.assert_array_equal(y, expected, err_msg=name)
        else:
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert start == len(results)


def test_no_contraction_changes_the_bits_of_int8_products(compiler):
    """With fused multiply-adds, what a compiler may contract is what it does contract."""
    described = Path("/proc/cpuinfo")
    if not described.exists() or " fma " not in described.read_text():
        pytest.skip("no x86 processor that is known to fuse multiply-adds")
    library = Library(*compiler, "-std=gnu11", "-O3", "-mfma", "-ffp-contract=fast")
    rng = np.random.default_rng(0)
    weight = CondensedWeight.random((64, 128), fan_in=30, n_active=60, rng=rng).quantize()
    bias = rng.standard_normal(64).astype(np.float32)
    x = rng.standard_normal((50, 128)).astype(np.float32)
    expected = prepare(weight, inputs="int8", backend="reference")(x, bias)
    y = library(x, (weight, bias, "none", "int8"))
    np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    "target",
    [
        "aarch64-macos",
        "x86_64-macos",
        "x86_64-windows-gnu",
        "aarch64-linux-musl",
        "riscv64-linux-gnu",
    ],
)
def test_the_source_compiles_for_other_systems(target, tmp_path):
    pytest.importorskip("ziglang")
    source, _ = export_c(layers(), tmp_path)
    compiled((*ZIG, "-target", target, *STRICT, "-O1", "-c"), source, "-o", tmp_path / "net.o")


def test_it_does_not_compile_with_fast_math(compiler, tmp_path):
    weight = CondensedWeight.random((4, 8), fan_in=2, rng=0)
    source, _ = export_c({"fc": (weight, None, None)}, tmp_path)
    command = [*compiler, "-c", "-ffast-math", str(source), "-o", str(tmp_path / "net.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "compile this without -ffast-math" in done.stderr


def test_the_header_is_also_for_cpp(tmp_path):
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    export_c(layers(), tmp_path, name="net")
    (tmp_path / "main.cpp").write_text('#include "net.h"\nint main() { return 0; }\n')
    compiled(
        (found, "-Wall", "-Wextra", "-Werror", "-pedantic"),
        tmp_path / "main.cpp",
        "-o",
        tmp_path / "program",
    )
