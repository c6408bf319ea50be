"""Version, platforms and public modules, as the files of the project state them."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import srigl_core
from srigl_core._install import _PACKAGES, INSTALL_CHECKOUT, install_command

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")


def page(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_version_is_said_once_and_the_changelog_begins_with_it():
    assert "version" not in PROJECT
    assert "version:" not in re.sub("cff-version:", "", page("CITATION.cff"))
    assert version("srigl-core") == srigl_core.__version__, "install again: pip install -e ."
    heading = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", page("CHANGELOG.md"), re.M)
    assert heading[1] == srigl_core.__version__


def test_classifiers_name_what_the_workflow_tests():
    systems = {"ubuntu": "Linux", "macos": "MacOS", "windows": "Windows"}
    tested = {systems[name] for name in re.findall(r"(\w+)-latest[,\]]", WORKFLOW)}
    pythons = re.search(r"python: \[(.*)\]", WORKFLOW)[1].replace('"', "").split(", ")
    classified = [classifier.split(" :: ") for classifier in PROJECT["classifiers"]]
    assert {parts[-1] for parts in classified if parts[0] == "Operating System"} == tested
    assert [parts[-1] for parts in classified if re.match(r"3\.", parts[-1])] == pythons
    assert PROJECT["requires-python"] == f">={pythons[0]}"


@pytest.mark.parametrize(
    ("system", "machine", "python", "is_installed"),
    [
        ("linux", "x86_64", "3.11", True),
        ("linux", "aarch64", "3.15", True),
        ("linux", "riscv64", "3.12", False),
        ("linux", "x86_64", "3.16", False),
        ("darwin", "arm64", "3.14", True),
        ("darwin", "x86_64", "3.13", True),
        ("darwin", "x86_64", "3.14", False),
        ("win32", "AMD64", "3.12", True),
        ("win32", "ARM64", "3.14", True),
        ("emscripten", "wasm32", "3.13", False),
    ],
)
def test_numba_is_installed_where_it_has_wheels(system, machine, python, is_installed):
    (line,) = (line for line in PROJECT["dependencies"] if line.startswith("numba"))
    place = {"sys_platform": system, "platform_machine": machine, "python_version": python}
    for interpreter, expected in (("CPython", is_installed), ("PyPy", False)):
        place["platform_python_implementation"] = interpreter
        assert Requirement(line).marker.evaluate(place) == expected


def test_every_public_module_has_a_page_and_its_row_of_promises():
    listed = re.findall(r"^\| \[([\w.]+)\]\((\w+\.md)\) \|", page("docs/api/index.md"), re.M)
    pages = {path.name for path in (ROOT / "docs" / "api").glob("*.md")} - {"index.md"}
    assert {file for _, file in listed} == pages
    for module, file in listed:
        assert page(f"docs/api/{file}").startswith(f"::: {module}\n")


def test_commands_in_messages_install_packages_of_the_extra_that_is_named():
    extras = PROJECT["optional-dependencies"]
    for extra, packages in _PACKAGES.items():
        own = {re.match(r"[\w-]+", line)[0] for line in extras[extra]}
        nested = {e for line in extras[extra] for e in re.findall(r"srigl-core\[(.*)\]", line)}
        listed = own.union(
            *({re.match(r"[\w-]+", p)[0] for p in extras[e]} for n in nested for e in n.split(","))
        )
        assert set(packages) <= listed, extra
        assert install_command(extra) == f"pip install {' '.join(packages)}"


def test_no_page_or_message_installs_this_package_from_an_index():
    """It is on none. Until it is, extras can be installed from a checkout or a wheel."""
    files = [*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.*")]
    for folder in ("srigl_core", "reference", "backends", "benchmarks", "docs", "examples"):
        for ending in ("py", "md", "json"):
            files += (ROOT / folder).rglob(f"*.{ending}")
    wrong = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in files
        if "docs/release.md" not in file.as_posix()
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install[^.`]*srigl[-_]core", line)
    ]
    assert not wrong
    assert "checkout" in INSTALL_CHECKOUT


def test_each_extra_that_a_page_installs_exists():
    named = [
        extra
        for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
        for extras in re.findall(r"pip install -e \"\S*\[([\w,]+)\]\"", path.read_text("utf-8"))
        for extra in extras.split(",")
    ]
    assert {"torch", "jax", "onnx", "cupy"} <= set(named) <= set(PROJECT["optional-dependencies"])
