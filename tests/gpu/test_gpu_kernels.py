"""The GPU kernels without a GPU: they compile, are right on the CPU, and wrong ones are caught."""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compile_gate
import host_device
import pytest
from kernel_mutants import CHECKS, MUTANTS
from simulated import KERNELS, SETTINGS

from srigl_core.backends.cupy_gpu.launch_model import LOADS_AHEAD
from srigl_core.backends.cupy_gpu.variants import TILE_LANES, variants

SCRIPT = Path(__file__).with_name("check_kernels.py")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_kernels.json"
ITS_MODULES = {"PYTHONPATH": str(SCRIPT.parent)}

needs_compiler = pytest.mark.skipif(
    host_device.unavailable() is not None, reason=str(host_device.unavailable())
)


def checked(done):
    """Return what `check_kernels.py` found; a sanitizer's report fails the test."""
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@needs_compiler
@pytest.mark.timeout(900)
def test_every_kernel_obeys_every_law_on_the_cpu():
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(
                host_device.run_sanitized,
                [str(SCRIPT), "--setting", name, "--seed", str(seed)],
                env=ITS_MODULES,
            )
            for seed, name in enumerate(SETTINGS)
        ]
        found = [checked(run.result()) for run in runs]
    assert [failure for each in found for failure in each["failures"]] == []
    launched = {kernel for each in found for kernel in each["launched"]}
    assert launched == {f"{variant.file} {variant.name}" for variant in variants()}


@functools.cache
def compiled():
    return compile_gate.compile_gate(
        KERNELS, variants(), (75, 90), jobs=2, disassemble=not compile_gate.missing_disassembler()
    )


needs_nvrtc = pytest.mark.skipif(
    compile_gate.missing_compiler() is not None, reason=str(compile_gate.missing_compiler())
)


@needs_nvrtc
@pytest.mark.timeout(600)
def test_every_kernel_compiles_without_spilling_or_flushing():
    assert {report.variant for report in compiled()} == set(variants())
    assert compile_gate.spills(compiled()) == []
    assert compile_gate.flushes(compiled()) == []


@needs_nvrtc
@pytest.mark.skipif(
    compile_gate.missing_disassembler() is not None, reason=str(compile_gate.missing_disassembler())
)
@pytest.mark.timeout(600)
def test_every_tile_is_staged_within_the_limits():
    assert compile_gate.slow_staging(compiled()) == []


def test_the_measured_kernels_are_all_and_within_the_limits():
    rows = json.loads(RESULTS.read_text())["kernels"]
    assert {(row["file"], row["kernel"]) for row in rows} == {(v.file, v.name) for v in variants()}
    assert [row for row in rows for numbers in row["needs"].values() if numbers[-1]] == []
    limited = [(row, compile_gate.staging_limits(row["kernel"])) for row in rows]
    limited = [(row, limits) for row, limits in limited if limits is not None]
    assert {limits.loads for _, limits in limited} == {LOADS_AHEAD}
    assert len(limited) == 3 * (2 * len(TILE_LANES) + 1)
    for row, limits in limited:
        assert row["staging"].keys() == row["needs"].keys()
        for instructions, loads in row["staging"].values():
            assert (instructions <= limits.instructions, loads >= limits.loads) == (True, True), row


def test_a_plan_cannot_choose_more_kernels_than_can_be_compiled_ahead():
    assert len(set(variants())) == len(variants()) <= 200


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_kernel_is_caught(mutant, tmp_path):
    for file in KERNELS.glob("*.cu*"):
        source = file.read_text()
        if file.name == mutant.file:
            assert source.count(mutant.right) >= 1, f"{mutant.right!r} is not in {file.name}"
            source = source.replace(mutant.right, mutant.wrong, 1)
        (tmp_path / file.name).write_text(source)
    options = [str(SCRIPT), "--kernels", str(tmp_path), "--one-by-one", "--exitfirst"]
    options += ["--examples", "0", "--setting", *mutant.settings, "--only", *CHECKS[mutant.file]]
    if mutant.needs_sanitizer:
        done = host_device.run_sanitized(options, env=ITS_MODULES)
        assert done.returncode != 0, done.stdout
        assert "AddressSanitizer" in done.stderr or "runtime error" in done.stderr, done.stderr
    else:
        done = subprocess.run(
            [sys.executable, *options],
            env=os.environ | ITS_MODULES,
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked(done)["failures"] != []
