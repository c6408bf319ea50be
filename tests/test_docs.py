"""What the pages say is true: snippets and doctests run, the worked example is right.

`tests/slow/test_examples.py` runs the scripts of `examples`, `tests/frameworks` what needs PyTorch
or JAX.
"""

import doctest
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from snippets import frameworks, run_samples, shown

import srigl_core
import srigl_core.backends
import srigl_core.reference
from srigl_core import UpdateSettings
from srigl_core.reference import explain_update, update_mask
from srigl_core.reference.mask_update import (
    ablation_threshold,
    grow,
    largest_salient,
    new_fan_in,
    prune,
    prune_counts,
)
from srigl_core.reference.ranking import largest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
KERNELS = [ROOT / "docs" / "write-a-kernel.md", *sorted(ROOT.glob("examples/kernels/**/*.py"))]
README = (ROOT / "README.md").read_text()
SEMANTICS = (ROOT / "docs" / "semantics.md").read_text()
DECISIONS = (ROOT / "docs" / "decisions.md").read_text()


def package_sources():
    """Map the name of every module of the package, wherever it is installed, to its file."""
    sources = {}
    for package in (srigl_core, srigl_core.reference, srigl_core.backends):
        folder = Path(package.__path__[0])
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join([package.__name__, *parts]).removesuffix(".__init__")
            sources[name] = file
    return dict(sorted(sources.items()))


MODULES = package_sources()
WITH_DOCTESTS = [
    name
    for name, file in MODULES.items()
    if ">>>" in file.read_text() and not name.startswith(("srigl_core.torch", "srigl_core.jax"))
]


def named(paths):
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


@pytest.mark.parametrize("name", WITH_DOCTESTS)
def test_doctests_pass(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_doctests_are_found_under_every_folder():
    assert {"srigl_core._format.weight", "srigl_core.reference.mask_update"} <= set(WITH_DOCTESTS)
    assert "srigl_core.backends.scipy_csr" in MODULES


@pytest.mark.parametrize("page", named(p for p in PAGES if shown(p) and not frameworks(p)))
def test_snippets_run(page, tmp_path, monkeypatch, capsys):
    run_samples(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", named(PAGES))
def test_python_is_run_or_marked(page):
    for words in re.findall(r"^```text\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        assert not re.search(r"^(?:import|from) \w+", words, re.MULTILINE), words
    for title in re.findall(r"^```\w+ title=\"(.*)\"$", page.read_text(), re.MULTILINE):
        assert title == "not run" or re.fullmatch(r"\w+\.\w+", title)


def test_the_readme_shows_ten_lines_of_pytorch():
    (sample,) = shown(ROOT / "README.md")
    assert len([line for line in sample.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("path", named(KERNELS))
def test_kernels_use_public_names_only(path):
    pages = "".join(page.read_text() for page in ROOT.glob("docs/api/*.md"))
    documented = re.findall(r"^::: (srigl_core(?:\.[a-z]\w*)*)$", pages, re.MULTILINE)
    imports = re.findall(r"from (srigl_core\S*) import (\([^)]*\)|.*)", path.read_text())
    assert imports
    for module, names in imports:
        assert module in documented
        assert set(re.findall(r"\w+", names)) <= set(importlib.import_module(module).__all__)
    assert not re.search(r"srigl_core[\w.]*\._", path.read_text())


def test_readme_and_make_run_the_same_tests():
    command = re.search(r"^(SRIGL_TEST_BACKENDS=\S+) python (-m pytest .*)$", README, re.MULTILINE)
    assert command, "the README shows no test command"
    assert f"{command[1]} $(python) {command[2]}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            path = (page.parent / target).resolve()
            package, *rest = path.relative_to(ROOT).parts or (".",)
            if package == "srigl_core":  # CI runs the tests beside an installed wheel
                path = Path(srigl_core.__file__).parent.joinpath(*rest)
            assert path.exists(), target


def test_no_page_or_script_holds_a_path_of_somebodys_machine():
    home = re.compile("/(?:" + "|".join(["home", "root", "Users", "tmp", "work", "mnt"]) + r")/\w")
    files = [
        *PAGES,
        *ROOT.glob("examples/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]
    found = {
        file.name: match[0]
        for file in [*files, *MODULES.values(), *(ROOT / ".ci").iterdir()]
        if (match := home.search(file.read_text()))
    }
    assert not found


def test_every_spec_number_in_the_code_is_a_section_of_the_semantics():
    sections = set(re.findall(r"^##+ (\d(?:\.\d)?) ", SEMANTICS, re.MULTILINE))
    assert sections == {*"1234567", *(f"4.{n}" for n in range(1, 10))}
    for name, file in MODULES.items():
        for number in re.findall(r"SPEC (\d(?:\.\d)?)", file.read_text()):
            assert number in sections, f"{name} names SPEC {number}"


def decision_rows():
    """Map the id of each decision to the cells of its row."""
    cells = (line.strip("| ").split(" | ") for line in DECISIONS.splitlines())
    return {row[0]: row[1:] for row in cells if re.fullmatch(r"[OSD]\d+", row[0])}


def test_decisions_are_numbered_without_gaps_and_each_has_its_row():
    rows = decision_rows()
    assert len(re.findall(r"^\| [OSD]\d+ \|", DECISIONS, re.MULTILINE)) == len(rows)
    for letter, least in (("O", 32), ("S", 12), ("D", 13)):
        numbers = sorted(int(key[1:]) for key in rows if key[0] == letter)
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= least
    for name, file in MODULES.items():
        for key in re.findall(r"decision ([OSD]\d+)", file.read_text()):
            assert key in rows, f"{name} names decision {key}"


def test_decisions_name_only_tests_that_exist():
    sources = [file.read_text() for file in ROOT.glob("tests/**/*.py")]
    exist = {name for text in sources for name in re.findall(r"def (test_\w+)\(", text)}
    for key, (*_, pinned) in decision_rows().items():
        tests = re.findall(r"`(test_\w+)`", pinned)
        assert tests or pinned == "not offered", f"decision {key} names no test"
        assert set(tests) <= exist, f"decision {key}: {sorted(set(tests) - exist)}"


@pytest.fixture(scope="module")
def worked():
    return json.loads((ROOT / "tests" / "data" / "worked_example.json").read_text())


def arrays_of(worked):
    mask = np.array(worked["mask"], bool)
    return np.array(worked["weight"]), np.array(worked["grad"]), mask


def test_worked_example_is_what_the_reference_computes_step_by_step(worked):
    weight, grad, mask = arrays_of(worked)
    steps, given = worked["steps"], UpdateSettings(**worked["settings"])
    n_out, n_in = mask.shape

    assert (steps["n_weights"], steps["n_nonzero"]) == (mask.sum(), (mask & (weight != 0)).sum())
    n_keep, n_prune = prune_counts(weight, mask, given.drop_fraction)
    assert (n_keep, n_prune) == (steps["n_keep"], steps["n_prune"])
    by_magnitude = largest(weight, mask, n_keep)
    by_gradient = largest_salient(grad, mask, n_prune, given.saliency_scope)
    np.testing.assert_array_equal(by_magnitude, steps["largest_weights"])
    np.testing.assert_array_equal(by_gradient, steps["largest_gradients"])
    counts = np.count_nonzero(by_magnitude | by_gradient, axis=1)
    np.testing.assert_array_equal(counts, steps["salient_counts"])

    assert steps["fan_in_unablated"] == given.nnz_budget // n_out
    assert steps["threshold_asked"] == int(given.gamma_sal * steps["fan_in_unablated"])
    assert steps["fewest_rows"] == given.nnz_budget // n_in
    assert steps["clamp"] == sorted(counts, reverse=True)[steps["fewest_rows"]]
    threshold = ablation_threshold(counts, given, n_in)
    assert threshold == steps["threshold"] == min(steps["threshold_asked"], steps["clamp"])
    survives = counts >= threshold
    np.testing.assert_array_equal(survives, steps["survives"])
    fan_in = new_fan_in(counts, threshold, given, n_in)
    assert fan_in == steps["fan_in"]
    kept = prune(weight, mask, survives, n_keep, fan_in)
    np.testing.assert_array_equal(kept, steps["kept"])
    np.testing.assert_array_equal(grow(grad, kept, survives, fan_in), worked["result"]["mask"])


def test_worked_example_is_what_every_backend_gives(worked, update_backend):
    update = srigl_core.update_mask(
        *arrays_of(worked), **worked["settings"], backend=update_backend
    )
    for name, expected in worked["result"].items():
        np.testing.assert_array_equal(getattr(update, name), expected, err_msg=name)
    assert update.fan_in == worked["steps"]["fan_in"]
    assert update.threshold == worked["steps"]["threshold"]


def test_worked_example_shows_what_the_page_says_of_it(worked):
    weight, grad, mask = arrays_of(worked)
    everywhere = largest_salient(grad, mask, worked["steps"]["n_prune"], "all")
    assert everywhere[2, 0]
    assert not everywhere[0, 2]
    default = {name: value for name, value in worked["settings"].items() if name != "gamma_sal"}
    assert 3 not in update_mask(weight, grad, mask, UpdateSettings(**default)).ablated
    assert mask[3, 2]
    assert weight[3, 2] == 0
    assert abs(weight[0, 3]) == abs(weight[2, 0])
    new_mask = np.array(worked["result"]["mask"], bool)
    assert explain_update(weight, grad, mask, new_mask, UpdateSettings(**worked["settings"]))


def table(title, cells, counts=None):
    """Lay out one array of the worked example as semantics.md shows it."""
    columns = "".join(f"{column:>6}" for column in range(len(cells[0])))
    lines = [f"{title:<5}{columns}" + ("   count" if counts else "")]
    for row, texts in enumerate(cells):
        tail = f"   {counts[row]}" if counts else ""
        lines.append(f"row {row}" + "".join(f"{text:>6}" for text in texts) + tail)
    return "\n".join(lines)


def numbers(array, mask):
    return [
        [str(number) if active else "." for number, active in zip(*rows, strict=True)]
        for rows in zip(array, mask, strict=True)
    ]


def letters(**sets):
    """Put the letter of the first set that holds a position, or a dot."""
    arrays = {letter: np.array(members, bool) for letter, members in sets.items()}
    n_out, n_in = next(iter(arrays.values())).shape
    return [
        [next((s for s, members in arrays.items() if members[r, c]), ".") for c in range(n_in)]
        for r in range(n_out)
    ]


def test_semantics_shows_the_numbers_of_the_worked_example(worked):
    steps, result = worked["steps"], worked["result"]
    mask, new_mask = np.array(worked["mask"], bool), np.array(result["mask"], bool)
    for block in (
        table("W", numbers(worked["weight"], mask)),
        table("G", numbers(worked["grad"], np.ones_like(mask))),
        table(
            "K, R",
            letters(K=steps["largest_weights"], R=steps["largest_gradients"]),
            steps["salient_counts"],
        ),
        table("new M", letters(k=steps["kept"], r=mask & new_mask, g=new_mask)),
        table("new W", numbers(result["weight"], new_mask)),
    ):
        assert f"```text\n{block}\n```" in SEMANTICS, block
    for row in (
        f"| 4.2 | `n`, number of non-zero weights | {steps['n_weights']}, {steps['n_nonzero']} |",
        f"| 4.2 | `n_keep`, `n_prune` | {steps['n_keep']}, {steps['n_prune']} |",
        f"| 4.4 | `k0 = B // n_out` | {steps['fan_in_unablated']} |",
        f"| 4.4 | `t = max(1, floor(gamma_sal * k0))` | {steps['threshold_asked']} |",
        f"| 4.4 | `lo = B // n_in`, the `(lo+1)`-th largest count "
        f"| {steps['fewest_rows']}, {steps['clamp']} |",
        f"| 4.4 | `t` after the clamp | {steps['threshold']} |",
        f"| 4.5 | `k = B // n_active` | {steps['fan_in']} |",
    ):
        assert row in SEMANTICS, row
    given = worked["settings"]
    assert f"`B = {given['nnz_budget']}`, `zeta = {given['drop_fraction']}`" in SEMANTICS
    assert f"`gamma_sal = {given['gamma_sal']}`" in SEMANTICS
    assert f"{result['n_pruned']} were\npruned" in SEMANTICS
    assert f"{result['n_grown']} grown" in SEMANTICS
