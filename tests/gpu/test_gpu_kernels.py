"""The GPU kernels without a GPU: they compile, are right on the CPU, and wrong ones are caught."""

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

from srigl_core.backends.cupy_gpu.variants import variants

SCRIPT = Path(__file__).with_name("check_kernels.py")
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


@pytest.mark.skipif(
    compile_gate.missing_compiler() is not None, reason=str(compile_gate.missing_compiler())
)
@pytest.mark.timeout(600)
def test_every_kernel_compiles_without_spilling_or_flushing():
    reports = compile_gate.compile_gate(KERNELS, variants(), (75, 90), jobs=2)
    assert {report.variant for report in reports} == set(variants())
    assert compile_gate.spills(reports) == []
    assert compile_gate.flushes(reports) == []


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
