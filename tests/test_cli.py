"""The command line: what it prints, and how it ends."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import srigl_core
from srigl_core import CondensedWeight, list_backends, load_condensed, save_condensed
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


# ---------------------------------------------------------------- version, help and JSON


def test_the_version_is_printed():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"srigl-core {srigl_core.__version__}\n"


COMMANDS = ["show", "condense", "quantize", "export", "info", "verify", "check-trace"]
COMMANDS += [f"bench {n}" for n in ("cpu", "gpu", "kernel", "compare", "report", "readme", "model")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_arguments_in_plain_words(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0, result.output
    for word in ("TEXT", "PATH", "INTEGER", "FLOAT", "list[", "<", "None"):
        assert word not in result.output, result.output


def test_info_is_printed_as_json():
    content = json.loads(run("info", "--json").stdout)
    assert content["versions"]["numpy"] == np.__version__
    assert content["machine"]["cores"] >= 1
    assert content["backends"].keys() == {status.name for status in list_backends()}
    assert "condensed_matmul" in content["backends"]["reference"]["operations"]


def test_verify_prints_its_reports_as_json(monkeypatch):
    monkeypatch.setattr(laws, "LAWS", [law_that("holds", always), law_that("breaks", never)])
    result = run("verify", "reference", "--max-examples", "2", "--json")
    assert result.exit_code == 1
    (report,) = json.loads(result.stdout)
    assert (report["kernel"], report["ok"]) == ("reference", False)
    assert [law["status"] for law in report["laws"]] == ["passed", "failed"]


# ---------------------------------------------------------------- files of layers


def packed():
    return CondensedWeight.random((6, 8), fan_in=3, n_active=4, rng=0)


@pytest.fixture
def files(tmp_path):
    """Return a folder with layers, the same dense, and their masks."""
    save_condensed(tmp_path / "net.safetensors", {"fc1": packed(), "fc1.bias": np.ones(6)})
    dense = {"fc1.weight": packed().to_dense(), "head.weight": np.eye(2)}
    save_file(dense, tmp_path / "dense.safetensors")
    save_file({"fc1": packed().to_mask()}, tmp_path / "masks.safetensors")
    with zipfile.ZipFile(tmp_path / "dense.pt", "w") as archive:
        archive.writestr("data.pkl", b"")
    return tmp_path


def test_what_the_outputs_encoding_lacks_is_printed_as_an_escape(tmp_path):
    file = tmp_path / "a→b"
    save_condensed(file, {"größe→": packed()})
    for command in (["show", file], ["export", file, "--c", "-o", tmp_path / "→"]):
        result = subprocess.run(
            [sys.executable, "-m", "srigl_core.cli", *command],
            capture_output=True,
            timeout=120,
            env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        )
        assert result.returncode == 0, result.stderr
        assert ("größe" if command[0] == "show" else "wrote").encode("cp1252") in result.stdout
        assert rb"\u2192" in result.stdout


def test_show_prints_the_layers_of_a_file(files):
    result = run("show", str(files / "net.safetensors"))
    assert result.exit_code == 0, result.output
    assert result.output == f"{srigl_core.report_file(files / 'net.safetensors')}\n"
    assert "4 of 6" in result.output
    content = json.loads(run("show", str(files / "net.safetensors"), "--json").stdout)
    assert content["layers"][0]["fan_in"] == 3
    options = ["--backend", "reference", "--json"]  # which has no model of its speed
    (layer,) = json.loads(run("show", str(files / "net.safetensors"), *options).stdout)["layers"]
    assert layer["speed_ups"] == [None, None]
    shown = run("show", str(files / "net.safetensors"), *options, "--measure").stdout
    assert all(each > 0 for each in json.loads(shown)["layers"][0]["speed_ups"])


def test_condense_writes_the_layers_of_a_checkpoint(files):
    out, dense = files / "out.safetensors", str(files / "dense.safetensors")
    result = run("condense", dense, "--masks", str(files / "masks.safetensors"), "-o", str(out))
    assert result.exit_code == 0, result.output
    assert result.output == f"wrote {out}\n"
    tensors = load_condensed(out)
    assert tensors["fc1"] == packed()
    np.testing.assert_array_equal(tensors["head.weight"], np.eye(2))
    options = ["--masks", "nonzero", "--exclude", "head", "-o", str(out)]
    assert run("condense", dense, *options).exit_code == 0
    assert load_condensed(out)["fc1"] == packed()


def test_quantize_writes_quantised_layers(files):
    out = files / "int8.safetensors"
    result = run("quantize", str(files / "net.safetensors"), "-o", str(out))
    assert result.exit_code == 0, result.output
    assert load_condensed(out)["fc1"] == packed().quantize()


def exported(files, *options, file="net.safetensors"):
    result = run("export", str(files / file), "--c", "-o", str(files / "c"), *options)
    assert result.exit_code == 0, result.output
    return (files / "c" / file.replace(".safetensors", ".c")).read_text()


def test_export_writes_c_source_with_what_is_asked_for(files):
    assert "relu" not in exported(files)
    assert {path.name for path in (files / "c").iterdir()} == {"net.c", "net.h"}
    for option in ("relu", "fc1=relu"):
        assert "relu" in exported(files, "--activation", option)
    tensors = {"a": packed(), "b": packed().quantize(), "c=d": packed().quantize()}
    save_condensed(files / "mixed.safetensors", tensors)
    calls = "quantize_row(x, scratch"
    assert exported(files, "--inputs", "int8", file="mixed.safetensors").count(calls) == 2
    assert exported(files, "--inputs", "c=d=int8", file="mixed.safetensors").count(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "missing"], "missing"),
        (["show", "dense.safetensors"], "no srigl_core.format_version"),
        (["show", "dense.pt"], "it is a zip archive, as torch.save writes"),
        (["condense", "dense.safetensors", "--masks", "missing.safetensors"], "missing"),
        (["condense", "dense.safetensors", "--masks", "dense.safetensors"], "array of bool"),
        (["condense", "dense.safetensors", "--masks", "nonzero", "--exclude", "no"], "'no'"),
        (["quantize", "net.safetensors", "--inputs", "int4"], "inputs='int4'"),
        (["quantize", "dense.safetensors"], "no srigl_core.format_version"),
        (["export", "net.safetensors"], "--c for C source"),
        (["export", "net.safetensors", "--c", "--activation", "swish"], "'swish'"),
        (["export", "net.safetensors", "--c", "--activation", "fc9=relu"], "no layer 'fc9'"),
        (["export", "net.safetensors", "--c", "--inputs", "int8"], "run srigl quantize first"),
        (["export", "net.safetensors", "--c", "--inputs", "fc1=int8"], "layer 'fc1' has float"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    before = sorted(path.name for path in files.iterdir())
    result = run(*arguments, *(["-o", "new"] if arguments[0] != "show" else []))
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert sorted(path.name for path in files.iterdir()) == before
