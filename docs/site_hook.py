"""What the documentation site has beside the pages in this folder; mkdocs calls the functions here.

- Pages of the project that lie elsewhere, and those of the measurements, made from the JSON.
- Links between all of these, written as a git host needs them, lead to the same places in the site.
- Names of the API, "SPEC n" and "decision On" become links.
- The modules lie in four folders; the API pages are read from one tree of links to them.

What does not fit is a warning, and in strict mode an error.
"""

from __future__ import annotations

import ast
import json
import logging
import posixpath
import re
import tempfile
from pathlib import Path

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from srigl_core.benchmarks.on_gpu import report as gpu_report
from srigl_core.benchmarks.readme import block
from srigl_core.benchmarks.report import page as cpu_report
from srigl_core.benchmarks.results import load_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
FOLDERS = ("reference", "backends", "benchmarks")

PLACES = {
    "README.md": "first_steps.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "examples/kernels/c_kernel/README.md": "kernel_in_c.md",
    "benchmarks/README.md": "measured/method.md",
    f"{RESULTS}/README.md": "measured/index.md",
    f"{RESULTS}/cpu.md": "measured/cpu.md",
    f"{RESULTS}/gpu.md": "measured/gpu.md",
    f"{RESULTS}/frameworks.md": "measured/frameworks.md",
}
"""Pages that are not in this folder, and where the site has them."""

_ORIGINS = {place: path for path, place in PLACES.items()}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+(?=[)#])")
_REFERENCE = re.compile(
    r"<(?P<whole>a|autoref|h\d|pre|summary)\b.*?</(?P=whole)>"
    r"|<code>(?P<name>[\w.]+)</code>"
    r"|\bSPEC (?P<section>\d(?:\.\d)?)"
    r"|\b[Dd]ecision (?P<decision>[OSD])\d+",
    re.DOTALL,
)
_DECISIONS = {
    "O": "o-the-released-code",
    "S": "s-sparsimony",
    "D": "d-our-own-where-the-sources-are-silent",
}
_log = logging.getLogger("mkdocs.site")
_tree = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let the API pages read this checkout, whatever is installed."""
    package = Path(_tree.name, "srigl_core")
    if not package.exists():
        package.mkdir()
        for source in [*(ROOT / "srigl_core").iterdir(), *(ROOT / name for name in FOLDERS)]:
            (package / source.name).symlink_to(source)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_tree.name]
    if (ROOT / RESULTS / "gpu.json").exists():
        measured = next(entry["Measured"] for entry in config.nav if "Measured" in entry)
        measured.append({"GPU kernels": PLACES[f"{RESULTS}/gpu.md"]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere, and whatever else pages link to."""
    made = _measured()
    copied = [path for path in PLACES if path not in made and (ROOT / path).exists()]
    pages = made | {path: (ROOT / path).read_text(encoding="utf-8") for path in copied}
    for path, content in pages.items():
        files.append(File.generated(config, PLACES[path], content=content))
    for file in files.documentation_pages():
        for target in _LINK.findall(file.content_string):
            path = _path(file.src_uri, target)
            if files.get_file_from_path(_place(path)) is None and (ROOT / path).is_file():
                copy = File.generated(config, _place(path), abs_src_path=str(ROOT / path))
                files.append(copy)
    return files


def _measured() -> dict[str, str]:
    """Return the pages that are made from the JSON."""
    cpu = load_results(ROOT / RESULTS / "cpu.json")
    made = {f"{RESULTS}/cpu.md": cpu_report(cpu, "cpu.png")}
    on_gpu = "Not measured yet."
    if (ROOT / RESULTS / "gpu.json").exists():
        made[f"{RESULTS}/gpu.md"] = gpu_report.page(load_results(ROOT / RESULTS / "gpu.json"))
        on_gpu = "Every case and every contender: [GPU kernels](gpu.md)."
    found = json.loads((ROOT / RESULTS / "overhead.json").read_text(encoding="utf-8"))
    rows = "".join(f"| {call} | {time:.2f} |\n" for call, time in found["median_us"].items())
    calls = f"| call | µs |\n|-|-:|\n{rows}"
    if calls not in (ROOT / RESULTS / "frameworks.md").read_text(encoding="utf-8"):
        _log.warning("%s/frameworks.md: the times of calls are not overhead.json's", RESULTS)
    made[f"{RESULTS}/README.md"] = f"""\
# Measured

Numbers are those of the JSON in the project; [Benchmarks](../README.md) says how it is made.

## CPU

{block(cpu)}

Every case and every contender, and what the machine allows: [CPU kernels](cpu.md).

## GPU

{on_gpu}

## A call

{found["layer"]}; {found["machine"]["cpu"]}, {found["machine"]["cores"]} cores,
{found["started"][:10]}.

{calls}
Networks, convolutions and training in PyTorch: [Frameworks](frameworks.md).
"""
    return made


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into the site's; one that leads nowhere is left for mkdocs to report."""

    def in_site(link: re.Match[str]) -> str:
        place = _place(_path(page.file.src_uri, link[0]))
        if files.get_file_from_path(place) is None:
            return link[0]
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(in_site, markdown)


def _path(place: str, target: str) -> str:
    """Return which path of the project a link means in the page at `place` in the site."""
    page = _ORIGINS.get(place, f"docs/{place}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _place(path: str) -> str:
    return PLACES.get(path, path.removeprefix("docs/"))


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the names of the API, sections of the semantics, and decisions."""
    module = re.search(r"^::: (\S+)", page.markdown or "", re.MULTILINE)
    names, sections = _names(module[1] if module else "srigl_core"), _sections()

    def linked(found: re.Match[str]) -> str:
        name = found["name"] or ""
        owner, _, member = name.rpartition(".")
        if found["section"]:
            target = sections.get(found["section"], found[0])
        elif found["decision"]:
            target = _DECISIONS[found["decision"]]
        elif name in names:
            target = names[name]
        elif owner in names:
            return _reference(f"{names[owner]}.{member}", found[0], "optional")
        else:
            return found[0]
        return _reference(target, found[0])

    literal_block = "<p>::</p>\n"  # numpydoc's mark, which Markdown does not know
    return _REFERENCE.sub(linked, content.replace(literal_block, ""))


def _reference(target: str, text: str, attribute: str = "") -> str:
    return f'<autoref identifier="{target}" {attribute}>{text}</autoref>'


def _names(home: str = "srigl_core") -> dict[str, str]:
    """Map what a page may call a public name to its identifier.

    A class goes by its bare name, and so does a function of the module `home`, if that is no word.
    """
    names: dict[str, str] = {}
    for page in sorted(ROOT.glob("docs/api/*.md"), key=lambda page: page.stem == "srigl_core"):
        for module in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            names[module] = module
            for name in _public(module):
                names[f"{module}.{name}"] = _identifier(module, name)
                if name[0].isupper() or (module == home and "_" in name):
                    names[name] = _identifier(module, name)
    return names


def _identifier(module: str, name: str) -> str:
    """Return a public name's identifier; of a function called like its module, the longer one."""
    file = Path(_tree.name, *module.split("."), f"{name}.py")
    return f"{module}.{name}.{name}" if file.exists() else f"{module}.{name}"


def _public(module: str) -> list[str]:
    """Return the names in a module's ``__all__``, without importing it; none for an object."""
    path = Path(_tree.name, *module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.exists():
        return []
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(statement.value) if name[:2] != "__"]
    return []


def _sections() -> dict[str, str]:
    """Map the numbers of the semantics' sections to their anchors."""
    text = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    headings = re.findall(r"^##+ ((\d(?:\.\d)?) .*)$", text, re.MULTILINE)
    return {number: slugify(heading, "-") for heading, number in headings}


def on_env(env: object, *, config: MkDocsConfig, files: Files) -> None:
    """Warn of public names that no API page shows."""
    anchors = config.plugins["autorefs"]
    for name in sorted(set(_names().values())):
        try:
            anchors.get_item_url(name)
        except KeyError:
            _log.warning("%s is public, and on no API page: it may lack a docstring", name)
