"""The compile gate: it reads what each kernel needs, and lets no other kernels pass."""

import functools
import json
import sys
from types import SimpleNamespace
from typing import NamedTuple

import compile_gate as gate
import pytest
from compile_gate import GateError, KernelReport, MissingCompilerError, compile_gate
from machine_code import Staging, staging_of

from srigl_core.backends.cupy_gpu.variants import COMPILER_OPTIONS

REASON = gate.missing_compiler()
UNREADABLE = REASON or gate.missing_disassembler()
RAW_MODULE = (*COMPILER_OPTIONS, "-ftz=true")  # what CuPy's own class would compile with


class Variant(NamedTuple):
    file: str
    name: str


GOOD = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "widen.cuh"

// __global__ void commented_out(float* out) {}
__constant__ float table[32];

template <typename T, int COLUMNS>
__global__ void __launch_bounds__(32 * (COLUMNS + 4)) product(T* out, const T* x) {
    __shared__ T tile[32 * COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) tile[c * 32 + threadIdx.x] = x[c * 32 + threadIdx.x];
    __syncthreads();
    float sum = table[threadIdx.x];
    for (int c = 0; c < COLUMNS; ++c) sum += widen(tile[c * 32 + (threadIdx.x ^ 1)]) * 3.0f;
    out[threadIdx.x] = T(expf(sum));
}
"""

WIDEN = "template <typename T> __device__ float widen(T value) { return float(value); }\n"

# 96 numbers live at once, for which 2 x 1024 threads have no registers.
SPILLING = """
template <int N> __global__ void __launch_bounds__(1024, 2) reverse(float* x, int n) {
    float v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = x[i * n + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) x[i * n + threadIdx.x] = v[i] * v[N - 1 - i];
}
"""

CALLING = """
__device__ __noinline__ float heavy(const float* x, int n) {
    float v[96], sum = 0;
#pragma unroll
    for (int i = 0; i < 96; ++i) v[i] = x[i * n];
    __threadfence();
#pragma unroll
    for (int i = 0; i < 96; ++i) sum += v[i] * v[95 - i];
    return sum;
}
__global__ void __launch_bounds__(1024, 2) calls(float* out, const float* x, int n) {
    out[threadIdx.x] = heavy(x + threadIdx.x, n);
}
"""

STACK = """
__global__ void scatter(float* x, const int* at, int n) {
    float v[16];
    for (int i = 0; i < 16; ++i) v[at[i] & 15] = x[i];
    x[n] = v[n & 15];
}
"""

# Sixteen loads before four stores of 16 bytes, and then one by one.
STAGING = """
struct alignas(16) Quad { float at[4]; };
extern __shared__ Quad tile[];
template <class T, int N> __global__ void tile_product(T* out, const T* x, int n, int stride) {
    int i = threadIdx.x;
#pragma unroll 1
    for (; i + (N - 1) * 128 < n; i += N * 128) {
        Quad quads[N];
#pragma unroll
        for (int a = 0; a < N; ++a)
#pragma unroll
            for (int j = 0; j < 4; ++j) quads[a].at[j] = __ldg(x + j * stride + i + a * 128);
#pragma unroll
        for (int a = 0; a < N; ++a) tile[i + a * 128] = quads[a];
    }
#pragma unroll 1
    for (; i < n; i += 128) tile[i].at[0] = __ldg(x + i);
    __syncthreads();
    T sum = 0;
#pragma unroll 1
    for (int j = 0; j < n; ++j) sum += tile[j].at[threadIdx.x % 4];
    out[threadIdx.x] = sum;
}
"""

PLAIN = "__global__ void plain(float* out, const float* x) { out[0] = x[0] * x[1]; }\n"

FLUSHING = PLAIN.replace(
    "out[0] = x[0] * x[1];", 'asm("mul.ftz.f32 %0, %1, %1;" : "=f"(*out) : "f"(*x));'
)

PRODUCTS = [Variant("good.cu", name) for name in ("product<float, 4>", "product<__half, 12>")]


def needs_compiler(test):
    """Skip from one place, which makes one line in pytest's summary."""

    @functools.wraps(test)
    def run(*arguments, **named):
        if REASON:
            pytest.skip(REASON)
        test(*arguments, **named)

    return run


def needs_disassembler(test):
    """Skip, too, where machine code cannot be read."""

    @functools.wraps(test)
    def run(*arguments, **named):
        if UNREADABLE:
            pytest.skip(UNREADABLE)
        test(*arguments, **named)

    return run


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes files into a new folder and returns the folder."""

    def write(**sources):
        here = tmp_path / str(len(list(tmp_path.iterdir())))
        here.mkdir()
        for name, source in sources.items():
            suffix = ".cuh" if name == "widen" else ".cu"
            (here / f"{name}{suffix}").write_text(source)
        return here

    return write


# --- what is read ----------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("jobs", [1, 2])
def test_every_variant_is_reported_for_every_architecture(folder, jobs):
    here = folder(good=GOOD, widen=WIDEN, plain=PLAIN)
    variants = [*PRODUCTS, Variant("plain.cu", "plain")]
    reports = compile_gate(here, iter(variants), [90, 75], jobs=jobs)
    assert [(report.variant, report.architecture) for report in reports] == [
        (PRODUCTS[0], 90),
        (PRODUCTS[1], 90),
        (PRODUCTS[0], 75),
        (PRODUCTS[1], 75),
        (variants[2], 90),
        (variants[2], 75),
    ]
    assert [report.shared_bytes for report in reports] == [512, 768, 512, 768, 0, 0]
    for report in reports:
        assert 4 <= report.registers <= 255
        assert report.binary_bytes > 100
        zeros = {"stack_bytes": 0, "spill_stores": 0, "spill_loads": 0, "flushing": 0}
        assert report == report._replace(**zeros)
    assert gate.spills(reports) == gate.flushes(reports) == []


@needs_compiler
def test_each_figure_is_the_variants_own(folder):
    here = folder(good=GOOD, widen=WIDEN, spilling=SPILLING)
    sizes = [Variant("spilling.cu", f"reverse<{n}>") for n in (1, 8, 96, 120)]
    together = compile_gate(here, [*PRODUCTS, *sizes], [90])
    alone = folder(good=GOOD, widen=WIDEN), folder(spilling=SPILLING)
    for report in together:
        here = alone[report.variant in sizes]
        assert compile_gate(here, [report.variant], [90]) == [report]
    assert len({report.registers for report in together}) > 2


@needs_compiler
def test_a_kernel_that_spills_is_reported(folder):
    here = folder(spilling=SPILLING)
    variants = [Variant("spilling.cu", f"reverse<{n}>") for n in (2, 96)]
    reports = compile_gate(here, variants, [75, 90])
    assert [(r.variant.name, r.architecture) for r in gate.spills(reports)] == [
        ("reverse<96>", 75),
        ("reverse<96>", 90),
    ]
    for report in gate.spills(reports):
        assert report.spill_stores >= 4 * 30
        assert report.spill_loads >= 4 * 30
        assert report.stack_bytes >= 4 * 30
        # 65536 registers for 2 x 1024 threads; sm_75 never holds more than 1024.
        assert report.registers == {75: 64, 90: 32}[report.architecture]


@needs_compiler
def test_an_option_that_limits_registers_makes_a_kernel_spill(folder):
    here = folder(spilling=SPILLING.replace("__launch_bounds__(1024, 2)", ""))
    variants = [Variant("spilling.cu", "reverse<96>")]
    assert gate.spills(compile_gate(here, variants, [90])) == []
    tight = compile_gate(here, variants, [90], options=(*COMPILER_OPTIONS, "--maxrregcount=64"))
    assert gate.spills(tight) == tight


@needs_compiler
def test_spills_of_a_function_that_is_called_are_the_kernels(folder):
    (report,) = compile_gate(folder(calling=CALLING), [Variant("calling.cu", "calls")], [90])
    assert gate.spills([report]) == [report]


@needs_compiler
def test_a_stack_without_spills_is_no_spill(folder):
    (report,) = compile_gate(folder(stack=STACK), [Variant("stack.cu", "scatter")], [90])
    assert report.stack_bytes == 64
    assert gate.spills([report]) == []


@needs_compiler
def test_flushing_of_subnormals_is_reported(folder):
    here = folder(good=GOOD, widen=WIDEN, calling=CALLING, stack=STACK)
    variants = [*PRODUCTS, Variant("calling.cu", "calls"), Variant("stack.cu", "scatter")]
    flushing = gate.flushes(compile_gate(here, variants, [90], options=RAW_MODULE))
    assert [report.variant for report in flushing] == variants[:-1]
    # expf is exact with approximations that flush: they do not count.
    assert gate.flushes(compile_gate(here, variants, [90])) == []
    fast = compile_gate(here, variants, [90], options=("--std=c++17", "--use_fast_math"))
    assert gate.flushes(fast) != []


@needs_disassembler
@pytest.mark.parametrize("architecture", [75, 90, 120])
def test_staging_is_read_from_the_machine_code(folder, architecture):
    here = folder(staging=STAGING, plain=PLAIN)
    names = ("tile_product<float, 4>", "tile_product<float, 1>")
    variants = [*(Variant("staging.cu", name) for name in names), Variant("plain.cu", "plain")]
    four, one, plain = compile_gate(here, variants, [architecture], disassemble=True)
    assert (four.staging.loads, one.staging.loads, plain.staging) == (16, 4, None)
    assert 5 < four.staging.instructions < one.staging.instructions < 60  # 4 loads and a store
    assert gate.slow_staging([four, one, plain]) == [one]
    unread = compile_gate(here, variants, [architecture])
    assert unread == [each._replace(staging=None) for each in (four, one, plain)]
    assert gate.slow_staging(unread) == unread[:2]


def test_the_innermost_loop_with_most_loads_is_the_staging_loop():
    """Bytes of 16 and 64 bits, a predicate, and jumps out of and into other loops."""
    listing = """
    .L_x_0:
            /*0000*/                   IADD3 R0, R0, 0x1, RZ ;
    .L_x_1:
            /*0010*/              @!P0 LDG.E.U16.CONSTANT R2, desc[UR4][R4.64] ;
            /*0020*/                   STS.U16 [R6], R2 ;
            /*0030*/               @P1 BRA `(.L_x_1) ;
    .L_x_2:
            /*0040*/                   LDG.E.64.CONSTANT R8, desc[UR4][R4.64] ;
            /*0050*/                   LDG.E.64.CONSTANT R10, [R4+0x8] ;
            /*0060*/                   BRA `(.L_x_3) ;
            /*0070*/                   STS.128 [R6], R8 ;
            /*0080*/         @!UP2 BRA `(.L_x_2) ;
    .L_x_3:
            /*0090*/              @!P0 BRA `(.L_x_0) ;
    """
    assert staging_of(listing) == Staging(5, 2)
    assert staging_of(listing.replace("STS", "STL")) is None


def test_tiles_of_double_have_no_limits_and_no_others_are_judged():
    slow = {"staging": Staging(80, 8)}
    names = ("tile_product<double, 1, double>", "stream_product<float, 1, Staged, float>")
    others = [report("a.cu", name, 90, **slow) for name in names]
    names = ("tile_product<float, 1, signed char>", "sum_products<__half>")
    judged = [report("a.cu", name, 90, **slow) for name in names]
    assert gate.slow_staging([*others, *judged]) == judged
    enough = [judged[0]._replace(staging=Staging(34, 16))]
    assert gate.slow_staging(enough) == []


# --- what is refused -------------------------------------------------------------------------


@needs_compiler
def test_a_syntax_error_is_raised_with_the_compilers_message(folder):
    here = folder(good=GOOD.replace("__syncthreads()", "__syncthreads("), widen=WIDEN, plain=PLAIN)
    with pytest.raises(GateError, match=r'good.cu\(\d+\): error: expected a "\)"') as raised:
        compile_gate(here, [*PRODUCTS, Variant("plain.cu", "plain")], [75, 90])
    for architecture in (75, 90):
        assert f"good.cu for sm_{architecture} does not compile" in str(raised.value)
    assert "plain.cu" not in str(raised.value)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("product<nothing, 4>", 'identifier "nothing" is undefined'),
        ("product<float>", "cannot determine which instance"),
        ("product<float, float>", "does not compile"),
        ("absent<float>", 'identifier "absent" is undefined'),
        ("widen<float>", "non-__global__"),
        ("table", r"variants \['table'\] were not compiled as kernels"),
    ],
)
def test_a_variant_that_is_no_kernel_of_the_file_is_refused(folder, name, message):
    with pytest.raises(GateError, match=message):
        compile_gate(folder(good=GOOD, widen=WIDEN), [*PRODUCTS, Variant("good.cu", name)], [90])


@needs_compiler
@pytest.mark.parametrize(
    "extra",
    [
        PLAIN,
        "template <typename T> __global__ void plain(T* out) { out[0] = T(1); }",
        'extern "C" __global__ void __launch_bounds__(int(32) * 2) plain(int* out) { out[0] = 1; }',
        "namespace deep { static __global__ void plain(int* out) { out[0] = 1; } }",
        "#define KERNEL(name) __global__ void name(int* out) { out[0] = 1; }\nKERNEL(plain)",
        "template __global__ void product<double, 4>(double*, const double*);",
    ],
)
def test_a_kernel_that_no_variant_names_is_refused(folder, extra):
    here = folder(good=f"{GOOD}\n{extra}\n", widen=WIDEN)
    with pytest.raises(GateError, match=r"good.cu.*: no variant names the kernels \['.*\b"):
        compile_gate(here, PRODUCTS, [90])


@needs_compiler
def test_a_kernel_in_a_header_that_no_variant_names_is_refused(folder):
    with pytest.raises(GateError, match=r"no variant names the kernels \['_Z5plain"):
        compile_gate(folder(good=GOOD, widen=WIDEN + PLAIN), PRODUCTS, [90])


@needs_compiler
def test_files_and_variants_belong_to_one_another(folder):
    here = folder(good=GOOD, widen=WIDEN, plain=PLAIN)
    with pytest.raises(GateError, match=r"\['good.cu'\], but .* holds \['good.cu', 'plain.cu'\]"):
        compile_gate(here, PRODUCTS, [90])
    (here / "plain.cu").unlink()
    with pytest.raises(GateError, match=r"\['good.cu', 'plain.cu'\], but .* holds \['good.cu'\]"):
        compile_gate(here, [*PRODUCTS, Variant("plain.cu", "plain")], [90])


@needs_compiler
def test_one_kernel_under_two_names_is_refused(folder):
    here = folder(good=GOOD, widen=WIDEN)
    with pytest.raises(GateError, match="variants given twice"):
        compile_gate(here, [*PRODUCTS, PRODUCTS[0]], [90])
    with pytest.raises(GateError, match=r"'product<float, 4>', 'product<float, 2\+2>'\] are one"):
        compile_gate(here, [*PRODUCTS, Variant("good.cu", "product<float, 2+2>")], [90])


def test_nothing_compiled_is_no_pass(folder):
    with pytest.raises(GateError, match="0 variants"):
        compile_gate(folder(), [], [90])
    with pytest.raises(GateError, match=r"for \[\]"):
        compile_gate(folder(plain=PLAIN), [Variant("plain.cu", "plain")], [])


@needs_compiler
def test_an_architecture_that_the_compiler_does_not_know_is_refused(folder):
    with pytest.raises(GateError, match=r"does not compile for \[20\], but for .*\b90\b"):
        compile_gate(folder(plain=PLAIN), [Variant("plain.cu", "plain")], [20, 90])


def test_a_log_that_cannot_be_read_is_no_pass():
    with pytest.raises(GateError, match="cannot read the compiler's log"):
        gate._resources("ptxas info    : Used many registers")


@pytest.mark.parametrize("package", ["cuda.bindings", "cuda.pathfinder"])
def test_missing_packages_are_named_with_what_to_install(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingCompilerError, match="pip install cuda-bindings nvidia-cuda-nvrtc"):
        compile_gate(folder(plain=PLAIN), [Variant("plain.cu", "plain")], [90])
    assert "pip install" in gate.missing_compiler()


@needs_compiler
def test_a_missing_library_and_missing_headers_are_named(folder, monkeypatch):
    from cuda import pathfinder
    from cuda.bindings import nvrtc

    def fail():
        raise RuntimeError("no libnvrtc")

    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "nvrtcVersion", fail)
        assert "no libnvrtc; pip install" in gate.missing_compiler()
    monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", lambda name: None)
    assert "headers of ['cudart', 'cccl']; pip install" in gate.missing_compiler()


@needs_compiler
def test_a_missing_disassembler_is_named_with_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(gate, "disassembler", lambda: None)
    with pytest.raises(MissingCompilerError, match="pip install nvidia-cuda-nvdisasm"):
        compile_gate(folder(plain=PLAIN), [Variant("plain.cu", "plain")], [90], disassemble=True)


# --- the table and the command ---------------------------------------------------------------


def report(file, name, architecture, **figures):
    need = dict.fromkeys(KernelReport._fields[2:-1], 0) | figures
    return KernelReport(Variant(file, name), architecture, **need)


def test_the_table_has_a_sorted_row_for_each_variant():
    spilled = {"registers": 64, "stack_bytes": 8, "spill_stores": 4, "spill_loads": 12}
    reports = [
        report("b.cu", "f<4>", 90, registers=32, shared_bytes=512),
        report("b.cu", "f<4>", 75, registers=40, shared_bytes=512),
        report("a.cu", "g", 90, registers=8),
        report("b.cu", "f<1>", 100, **spilled),
    ]
    assert gate.as_markdown(gate.as_rows(reports)).splitlines() == [
        "| file | kernel | sm_75 | sm_90 | sm_100 |",
        "| --- | --- | --: | --: | --: |",
        "| `a.cu` | `g` |  | 8 / 0 |  |",
        "| `b.cu` | `f<1>` |  |  | 64 / 0, stack 8, spilled 16 |",
        "| `b.cu` | `f<4>` | 40 / 512 | 32 / 512 |  |",
    ]


def test_the_page_has_a_table_of_staging():
    reports = [
        report("b.cu", "f<4>", 90, staging=Staging(33.75, 16)),
        report("b.cu", "f<4>", 75, staging=Staging(18, 2)),
        report("a.cu", "g", 90),
    ]
    page = gate.page({"nvrtc": "13.5", "kernels": gate.as_rows(reports)})
    assert page.split("## Staging\n")[1].splitlines()[3:] == [
        "| file | kernel | sm_75 | sm_90 |",
        "| --- | --- | --: | --: |",
        "| `b.cu` | `f<4>` | 18 / 2 | 33.75 / 16 |",
    ]


@pytest.fixture
def command(monkeypatch):
    """Return a function: run the command on a backend with these variants."""

    def run(folder, variants, *arguments):
        backend = SimpleNamespace(__file__=str(folder / "variants.py"), variants=lambda: variants)
        monkeypatch.setitem(sys.modules, "fake_backend", backend)
        monkeypatch.setattr(gate, "BACKEND", "fake_backend")
        return gate.main(["--arch", "90", "75", *arguments])

    return run


@needs_disassembler
def test_the_command_writes_what_the_page_is_made_of_and_passes(folder, command, tmp_path, capsys):
    here = folder(stack=STACK)
    results = tmp_path / "results.json"
    assert command(here, (Variant("stack.cu", "scatter"),), "--json", str(results)) == 0
    assert "2 kernels, 1 variants for 2 architectures" in capsys.readouterr().out
    page = gate.page(json.loads(results.read_text()))
    assert f"compiled by NVRTC {gate.compiler_version()}" in page
    assert "| `stack.cu` | `scatter` |" in page


@needs_disassembler
@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (STAGING, "tile_product<float, 2>", "2 kernels stage too slowly"),
        (SPILLING, "reverse<96>", "2 kernels spill registers"),
        (FLUSHING, "plain", "2 kernels flush subnormal numbers"),
        (PLAIN.replace("{", ""), "plain", "does not compile"),
    ],
)
def test_the_command_fails_with_the_reason(folder, command, capsys, source, name, message):
    assert command(folder(kernels=source), (Variant("kernels.cu", name),)) == 1
    assert message in capsys.readouterr().err


def test_the_command_fails_where_the_packages_are_missing(folder, command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert command(folder(plain=PLAIN), (Variant("plain.cu", "plain"),)) == 1
    assert "pip install cuda-bindings" in capsys.readouterr().err
