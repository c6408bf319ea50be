"""The kernel in C of examples/kernels: it passes the laws, and the bug in its twin is found."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from scripts import run_script

KERNELS = Path(__file__).resolve().parents[2] / "examples" / "kernels"
C_SCRIPT = KERNELS / "c_kernel" / "c_kernel.py"


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
    assert "c_matmul: 19 checks run" in printed
    assert "\nc: 35 checks run" in printed  # all laws of products and gradients
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
