"""The command line: what it prints, and how it ends."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from srigl_core import list_backends
from srigl_core.cli.app import app
from srigl_core.errors import BackendUnavailableError
from srigl_core.testing import laws
from srigl_core.testing.law import Law, LawViolation, NotApplicable
from srigl_core.testing.product_problems import matmul_problem

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, list(arguments))


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def law_that(name, holds):
    said = f"It {name}."
    return Law(name, said, "nothing", "no bound", "condensed_matmul", matmul_problem, holds)


def always(backend, problem):
    pass


def never(backend, problem):
    raise LawViolation("expected 1 [bold], got 2")


def nothing_to_check(backend, problem):
    raise NotApplicable("there is nothing to check")


def test_info_names_versions_and_every_backend():
    result = run("info")
    assert result.exit_code == 0, result.output
    for fact in ("python", "numpy", "scipy", "numba", "ml_dtypes", "safetensors", "cores"):
        assert fact in result.output
    for status in list_backends():
        assert status.name in result.output


def test_info_says_why_a_backend_cannot_run(monkeypatch):
    def unavailable(name):
        raise BackendUnavailableError("needs the package 'left'; pip install left")

    monkeypatch.setattr("srigl_core._registry._load", unavailable)
    result = run("info")
    assert result.exit_code == 0, result.output
    assert "pip install left" in result.output


def test_info_shows_what_a_backend_says_of_itself(monkeypatch):
    from srigl_core.reference.backend import ReferenceBackend

    monkeypatch.setattr(
        ReferenceBackend, "runtime_info", lambda self: {"mood": "[calm]"}, raising=False
    )
    assert "reference: mood" in run("info").output
    assert "[calm]" in run("info").output


def test_verify_passes_where_the_laws_hold(monkeypatch):
    monkeypatch.setattr(
        laws, "LAWS", [law_that("holds", always), law_that("is moot", nothing_to_check)]
    )
    result = run("verify", "reference", "--max-examples", "3")
    assert result.exit_code == 0, result.output
    assert "1 checks run on 3 examples: 1 passed, 1 not applicable" in result.output


def test_verify_fails_where_a_law_is_broken_and_shows_it_in_full(monkeypatch):
    monkeypatch.setattr(laws, "LAWS", [law_that("holds", always), law_that("breaks", never)])
    result = run("verify", "reference", "--max-examples", "2")
    assert result.exit_code == 1
    assert "expected 1 [bold], got 2" in result.output
    assert "1 passed, 1 failed" in result.output


def test_verify_fails_where_nothing_was_checked(monkeypatch):
    monkeypatch.setattr(laws, "LAWS", [law_that("is moot", nothing_to_check)])
    result = run("verify", "reference")
    assert result.exit_code == 1
    assert "nothing was checked" in result.output


def test_verify_runs_the_real_laws_on_the_backend_named():
    result = run("verify", "reference", "--max-examples", "1")
    assert result.exit_code == 0, result.output
    assert all(law.name in result.output for law in laws.LAWS)
    assert "backend scipy" not in result.output


def test_verify_takes_every_backend_that_can_run_by_default(monkeypatch):
    monkeypatch.setattr(laws, "LAWS", [law_that("holds", always)])
    result = run("verify", "--max-examples", "1")
    assert result.exit_code == 0, result.output
    for status in list_backends():
        assert (f"backend {status.name}" in result.output) == status.available


def test_an_unknown_backend_is_one_line_without_a_traceback():
    result = run("verify", "nonesuch")
    assert result.exit_code == 1
    assert result.output.startswith("error: no backend is called 'nonesuch'")
    assert len(result.output.strip().splitlines()) == 1


def test_a_backend_that_cannot_run_ends_verify_before_anything_is_tried(monkeypatch):
    from srigl_core import _registry as registry

    load = registry._load

    def scipy_is_missing(name):
        if name == "scipy":
            raise BackendUnavailableError("backend 'scipy' needs SciPy;\npip install scipy")
        return load(name)

    monkeypatch.setattr(registry, "_load", scipy_is_missing)
    result = run("verify", "reference", "scipy")
    assert result.exit_code == 1
    assert result.output == "error: backend 'scipy' needs SciPy; pip install scipy\n"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_the_command_prints_the_install_line(package):
    result = run_python(
        f"import sys; sys.modules[{package!r}] = None\nfrom srigl_core.cli import main\nmain()"
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "pip install typer rich" in result.stderr
    assert package in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_importing_the_package_loads_nothing_of_the_command_line():
    result = run_python(
        "import sys, srigl_core, srigl_core.cli\n"
        "print([n for n in ('typer', 'rich', 'sklearn', 'matplotlib') if n in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_the_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "srigl_core.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for command in ("info", "verify", "bench"):
        assert command in result.stdout
