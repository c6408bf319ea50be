"""Kernels from elsewhere, in examples/kernels: each passes the laws, and a bug in one is found."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from srigl_core.testing import ConformanceError, check_kernel, verify

KERNELS = Path(__file__).resolve().parents[2] / "examples" / "kernels"
C_SCRIPT = KERNELS / "c_kernel" / "c_kernel.py"


def run_script(path, *arguments, expected=0, folder):
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def c_kernel():
    """The module of the C kernel, where there is a compiler."""
    spec = importlib.util.spec_from_file_location("c_kernel", C_SCRIPT)
    module = sys.modules["c_kernel"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.find_compiler()
    except module.BackendUnavailableError as error:
        pytest.skip(str(error))
    yield module
    del sys.modules["c_kernel"]


def test_the_c_kernel_obeys_the_laws_as_a_function(c_kernel):
    report = check_kernel(c_kernel.c_matmul, max_examples=30)
    assert report.ok
    assert report.n_run >= 14


def test_the_c_kernel_obeys_the_laws_as_a_backend(c_kernel):
    report = verify("c_kernel:CBackend", max_examples=30)
    assert report.ok, report
    operations = {result.law.operation for result in report.results if result.examples}
    assert operations == {"condensed_matmul", "condensed_matmul_backward"}


def test_the_bug_in_c_is_reported_with_the_law_and_a_small_example(c_kernel):
    with pytest.raises(ConformanceError, match="product_is_within_the_error_bound"):
        check_kernel(c_kernel.c_matmul_with_a_bug, max_examples=30)
    report = verify("c_kernel:c_matmul_with_a_bug", max_examples=30)
    failed = {result.law.name: result for result in report.failures}
    assert "product_is_within_the_error_bound" in failed
    assert "same_inputs_give_the_same_bits" not in failed
    assert all(max(result.failure.shape) <= 3 for result in failed.values())
    assert "expected" in failed["product_is_within_the_error_bound"].failure.message


def test_the_page_of_the_c_kernel_shows_what_its_script_prints(c_kernel, tmp_path):
    page = (KERNELS / "c_kernel" / "README.md").read_text()
    shown = re.search(r"report:begin -->\n```text\n(.*?)```", page, re.DOTALL)[1]
    printed = run_script(C_SCRIPT, "--quick", "--buggy", expected=1, folder=tmp_path)

    def outcomes(text):
        return re.findall(r"^(\w+) +\d+  (passed|failed|not applicable)\b", text, re.MULTILINE)

    assert outcomes(shown) == outcomes(printed)
    law, message = re.search(
        r"^(\w+): .*\nCompared .*\n\n    (.*), which", shown, re.MULTILINE
    ).groups()
    assert f"\n{law}: " in printed
    assert re.sub(r"-?\d+\.\d+", "#", message) in re.sub(r"-?\d+\.\d+", "#", printed)


def test_the_script_of_the_c_kernel_runs(c_kernel, tmp_path):
    printed = run_script(C_SCRIPT, "--quick", folder=tmp_path)
    assert "c_matmul: 18 checks run" in printed
    assert re.search(r"^c: \d+ checks run", printed, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} <= {".hypothesis"}


def test_without_a_compiler_the_error_says_what_to_install(c_kernel, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(c_kernel.sysconfig, "get_config_var", lambda name: None)
    with pytest.raises(c_kernel.BackendUnavailableError, match=r"no C compiler.*install"):
        c_kernel.CBackend()


def test_a_source_that_does_not_compile_is_an_error_with_the_compilers_words(
    c_kernel, monkeypatch, tmp_path
):
    (tmp_path / "wrong.c").write_text("this is not C")
    monkeypatch.setattr(c_kernel, "SOURCE", tmp_path / "wrong.c")
    c_kernel.compiled.cache_clear()
    with pytest.raises(c_kernel.BackendUnavailableError, match=r"(?s)-O3.* failed:.*error"):
        c_kernel.compiled("float32", "uint16")
    c_kernel.compiled.cache_clear()


def test_the_torch_compile_kernel_obeys_the_laws(tmp_path):
    pytest.importorskip("torch")
    printed = run_script(KERNELS / "torch_compile_kernel.py", "--quick", folder=tmp_path)
    assert re.search(r"^torch_matmul: 1\d checks run .* 1\d passed", printed, re.MULTILINE)
    assert "failed" not in printed
    assert re.search(r"^compiled [1-9]\d* times", printed, re.MULTILINE)


def test_the_jax_kernel_obeys_the_laws_but_for_those_it_declares(tmp_path):
    pytest.importorskip("jax")
    printed = run_script(KERNELS / "jax_kernel.py", "--quick", folder=tmp_path)
    declared, of_larger_numbers = printed.split("\n\njax_matmul: ")
    assert set(re.findall(r"  (failed|passed|expected failure|unexpected pass)\b", declared)) <= {
        "passed",
        "expected failure",
        "unexpected pass",
    }
    assert "jax_matmul_of_larger_numbers: 17 checks run" in of_larger_numbers
    assert "17 passed" in of_larger_numbers
    assert "broken by a subnormal times 3: 9 of the 9 laws declared" in of_larger_numbers
