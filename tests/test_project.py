"""Version, platforms and public modules, as the files of the project state them."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import srigl_core

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


def test_every_public_module_has_a_page_and_its_row_of_promises():
    listed = re.findall(r"^\| \[([\w.]+)\]\((\w+\.md)\) \|", page("docs/api/index.md"), re.M)
    pages = {path.name for path in (ROOT / "docs" / "api").glob("*.md")} - {"index.md"}
    assert {file for _, file in listed} == pages
    for module, file in listed:
        assert page(f"docs/api/{file}").startswith(f"::: {module}\n")
