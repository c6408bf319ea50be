"""Build the parts of the documentation site that are not pages in this folder.

mkdocs calls the functions here. They

- add pages from other folders, and pages that are generated from the laws and from JSON;
- convert links, which are written as a git host needs them, to links within the site;
- turn names of the API, "SPEC n" and "decision On" into links, and the first use of a term too;
- show mkdocstrings the package as one tree, since its modules are in four folders.

Problems are warnings, and errors in strict mode.
"""

from __future__ import annotations

import ast
import json
import logging
import posixpath
import re
import sys
import tempfile
from pathlib import Path

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from srigl_core.benchmarks.huggingface import page as huggingface_page
from srigl_core.benchmarks.int8_accuracy import page as int8_page
from srigl_core.benchmarks.readme import long_table
from srigl_core.benchmarks.report import page as measured_page
from srigl_core.benchmarks.reproduce.page import page as reproduce_page
from srigl_core.benchmarks.reproduce.results import read_results
from srigl_core.benchmarks.results import load_results
from srigl_core.benchmarks.verdict import verdict
from srigl_core.testing.laws import laws_page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
FOLDERS = ("reference", "backends", "benchmarks")

PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "examples/kernels/c_kernel/README.md": "kernel_in_c.md",
    "benchmarks/README.md": "measured/method.md",
    f"{RESULTS}/README.md": "measured/index.md",
    f"{RESULTS}/cpu.md": "measured/cpu.md",
    f"{RESULTS}/gpu.md": "measured/gpu.md",
    f"{RESULTS}/frameworks.md": "measured/frameworks.md",
    f"{RESULTS}/gpu_kernels.json": "gpu_kernels.md",
    f"{RESULTS}/huggingface.json": "huggingface.md",
    f"{RESULTS}/int8.json": "measured/int8.md",
    f"{RESULTS}/mutants.json": "mutants.md",
    f"{RESULTS}/reproduce.md": "measured/reproduce.md",
    "srigl_core/testing/laws.py": "laws.md",
}
"""Where pages of other folders go, by the file that they are or that they are made from."""

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
_GLOSSARY = "names.md"
_TERMS = {
    "Ablation": "ablat(?:ed|es|ion)",
    "budget": "budgets?",
    "Window": "windows?",
    "ERK": "ERK",
    "ITOP": "ITOP",
}
"""Terms that are linked where a page uses them first: as the glossary spells them, and patterns."""

_TEXT = r"<(?P<whole>a|autoref|code|h\d|pre)\b.*?</(?P=whole)>|<[^>]*>|\b(?P<term>%s)\b"
_UNWANTED = re.compile(
    r"<p>::</p>\n"  # numpydoc's mark, which Markdown does not know
    r'|\u2013\s*<div class="doc-md-description">\s*</div>'  # of a parameter without a description
)
_SENTENCE = 24  # letters
_log = logging.getLogger("mkdocs.site")
_tree = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let mkdocstrings read this checkout, not an installed package."""
    package = Path(_tree.name, "srigl_core")
    if not package.exists():
        package.mkdir()
        for source in [*(ROOT / "srigl_core").iterdir(), *(ROOT / name for name in FOLDERS)]:
            (package / source.name).symlink_to(source)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_tree.name]
    if (ROOT / RESULTS / "gpu.json").exists():
        measured = next(entry["Benchmarks"] for entry in config.nav if "Benchmarks" in entry)
        measured.append({"GPU kernels": PLACES[f"{RESULTS}/gpu.md"]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages from other folders, and the files that pages link to."""
    made = _measured() | _kernel_pages()
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
    """Return the pages that are generated from JSON."""
    cpu = load_results(ROOT / RESULTS / "cpu.json")
    made = {f"{RESULTS}/cpu.md": measured_page(cpu, "cpu.png")}
    on_gpu = "Nothing has been measured on a GPU yet."
    if (ROOT / RESULTS / "gpu.json").exists():
        made[f"{RESULTS}/gpu.md"] = measured_page(load_results(ROOT / RESULTS / "gpu.json"))
        on_gpu = "[GPU kernels](gpu.md) has a page of its own."
    overhead = json.loads((ROOT / RESULTS / "overhead.json").read_text(encoding="utf-8"))
    rows = "".join(f"| {call} | {time:.2f} |\n" for call, time in overhead["median_us"].items())
    calls = f"| call | µs |\n|-|-:|\n{rows}"
    if calls not in (ROOT / RESULTS / "frameworks.md").read_text(encoding="utf-8"):
        _log.warning("%s/frameworks.md: the times of calls are not overhead.json's", RESULTS)
    trained = read_results(ROOT / RESULTS / "reproduce.jsonl")
    made[f"{RESULTS}/reproduce.md"] = reproduce_page(trained, "reproduce.png")
    for name, page in (("huggingface", huggingface_page), ("int8", int8_page)):
        content = json.loads((ROOT / RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        made[f"{RESULTS}/{name}.json"] = page(content)
    made[f"{RESULTS}/README.md"] = f"""\
# Measured

![How long a sparse layer takes, by batch size](speedup.svg)

{verdict(cpu)}

Layers in PyTorch and JAX add the cost of a call; [Frameworks](frameworks.md) says where that
matters. {on_gpu}

The numbers come from JSON files in the project; [How they are run](../README.md) describes the
method.

## Selected layers

{long_table(cpu)}

[CPU kernels](cpu.md) has all cases and contenders, and the roofline of the machine.
"""
    return made


def _kernel_pages() -> dict[str, str]:
    """Return the pages of the laws, of the wrong kernels, and of what the GPU kernels need."""
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
    from compile_gate import page as gpu_kernels_page
    from mutants.table import page as mutants_page

    names = ("gpu_kernels", "mutants", "fuzz")
    paths = [ROOT / RESULTS / f"{name}.json" for name in names]
    kernels, mutants, fuzzed = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    return {
        f"{RESULTS}/gpu_kernels.json": gpu_kernels_page(kernels),
        f"{RESULTS}/mutants.json": mutants_page(mutants, fuzzed),
        "srigl_core/testing/laws.py": laws_page(),
    }


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert links to links within the site; mkdocs reports links without a target."""

    def in_site(link: re.Match[str]) -> str:
        place = _place(_path(page.file.src_uri, link[0]))
        if files.get_file_from_path(place) is None:
            return link[0]
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(in_site, markdown)


def _path(place: str, target: str) -> str:
    """Return the project path of a link's target, for a link in the site's page `place`."""
    page = _ORIGINS.get(place, f"docs/{place}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _place(path: str) -> str:
    return PLACES.get(path, path.removeprefix("docs/"))


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the names of the API, sections of the semantics, and decisions."""
    module = re.search(r"^::: (\S+)", page.markdown or "", re.MULTILINE)
    names, sections = _names(module[1] if module else "srigl_core"), _sections()

    def linked(match: re.Match[str]) -> str:
        name = match["name"] or ""
        owner, _, member = name.rpartition(".")
        if match["section"]:
            target = sections.get(match["section"], match[0])
        elif match["decision"]:
            target = _DECISIONS[match["decision"]]
        elif name in names:
            target = names[name]
        elif owner in names:
            return _reference(f"{names[owner]}.{member}", match[0], "optional")
        else:
            return match[0]
        return _reference(target, match[0])

    content = _REFERENCE.sub(linked, _UNWANTED.sub("", content))
    content = re.sub("<td(.*?)>(.*?)</td>", _cell, content, flags=re.DOTALL)
    if page.file.src_uri == _GLOSSARY:
        return _with_anchors(content)
    is_prose = page.file.src_uri not in _ORIGINS and not module
    return _with_terms(content, page) if is_prose else content


def _cell(match: re.Match[str]) -> str:
    """Let long names in a cell break after a mark, and give sentences room; site.css says how."""
    attributes, content = match.groups()
    if len(re.sub("<.*?>", "", content)) > _SENTENCE:
        attributes += ' class="sentence"'
    names = re.compile("<code>.*?</code>")
    content = names.sub(lambda name: re.sub(r"(?<!<)([_./])", r"\1<wbr>", name[0]), content)
    return f"<td{attributes}>{content}</td>"


def _with_anchors(content: str) -> str:
    """Make the terms of the glossary targets of links."""
    for term in _TERMS:
        anchor = rf'<\1 id="{term.lower()}">{term}</\1>'
        content, found = re.subn(f"<(strong|em)>{term}</\\1>", anchor, content, count=1)
        if not found:
            _log.warning("%s does not explain %s", _GLOSSARY, term)
    return content


def _with_terms(content: str, page: Page) -> str:
    """Link the first use of each term on a page to the glossary."""
    home = posixpath.relpath("names.html", posixpath.dirname(page.url) or ".")
    for term, pattern in _TERMS.items():
        for match in re.finditer(_TEXT % pattern, content, re.DOTALL):
            if match["term"]:
                link = f'<a href="{home}#{term.lower()}">{match["term"]}</a>'
                content = content[: match.start()] + link + content[match.end() :]
                break
    return content


def _reference(target: str, text: str, attribute: str = "") -> str:
    return f'<autoref identifier="{target}" {attribute}>{text}</autoref>'


def _names(home: str = "srigl_core") -> dict[str, str]:
    """Map the spellings of public names on a page to their identifiers.

    A class may be spelled without its module. So may a function of the module `home`, if its name
    has an underscore.
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
    """Return the identifier of a public name.

    If a function has the name of its module, the identifier contains the name twice.
    """
    file = Path(_tree.name, *module.split("."), f"{name}.py")
    return f"{module}.{name}.{name}" if file.exists() else f"{module}.{name}"


def _public(module: str) -> list[str]:
    """Return the names in a module's ``__all__`` without importing it; none if it is no module."""
    path = Path(_tree.name, *module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.exists():
        return []
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(statement.value) if name[:2] != "__"]
    return []


def _sections() -> dict[str, str]:
    """Map section numbers of the semantics to anchors."""
    text = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    headings = re.findall(r"^##+ ((\d(?:\.\d)?) .*)$", text, re.MULTILINE)
    return {number: slugify(heading, "-") for heading, number in headings}


def on_env(env: object, *, config: MkDocsConfig, files: Files) -> None:
    """Warn about public names that no API page shows."""
    anchors = config.plugins["autorefs"]
    for name in sorted(set(_names().values())):
        try:
            anchors.get_item_url(name)
        except KeyError:
            _log.warning("%s is public but on no API page; it may lack a docstring", name)
