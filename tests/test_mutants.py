"""Each wrong kernel is rejected by the law that its diff names, and no law is idle.

`tests/slow/test_compiled_mutants.py` has the kernels that are compiled.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from mutant_corpus import COMPILED, MUTANTS, MutantError, apply_diff

from srigl_core.testing import LAWS

LAW = {law.name: law for law in LAWS}
SOURCE = "def f(x):\n    y = x + 1\n    return y\n"
DIFF = "@@ -1,3 +1,3 @@\n def f(x):\n-    y = x + 1\n+    y = x\n     return y\n"
NOT_COMPILED = [mutant for mutant in MUTANTS if mutant.kernel not in COMPILED]
ONLY_COMPILED = [mutant for mutant in MUTANTS if mutant.kernel in COMPILED]


@pytest.mark.parametrize("mutant", NOT_COMPILED, ids=str)
def test_each_mutant_is_rejected_by_its_law(mutant):
    assert mutant.rejected(), f"{mutant.law} does not reject {mutant}: {mutant.bug}"


def test_each_law_is_named_by_a_mutant():
    assert {mutant.law for mutant in MUTANTS} == LAW.keys()


@pytest.mark.parametrize("mutant", ONLY_COMPILED, ids=str)
def test_each_diff_of_a_compiled_kernel_applies(mutant):
    (folder,) = find_spec("srigl_core.backends").submodule_search_locations
    file = Path(folder, Path(mutant.file).relative_to("backends"))
    assert apply_diff(mutant.diff, file.read_text(), mutant.file) != file.read_text()


def test_a_bug_is_a_few_lines():
    changed = {str(mutant): mutant.changed_lines for mutant in MUTANTS}
    assert {name: n for name, n in changed.items() if not 1 <= n <= 5} == {}


def test_mutants_leave_the_installed_modules_as_they_are():
    before = dict(sys.modules)
    NOT_COMPILED[-1].load()
    assert {name: sys.modules[name] for name in before} == before


@pytest.mark.parametrize("text", [SOURCE.replace("x + 1", "1 + x"), SOURCE + SOURCE, ""])
def test_a_diff_that_no_longer_applies_is_an_error(text):
    assert apply_diff(DIFF, SOURCE, "f.py") == SOURCE.replace("x + 1", "x")
    with pytest.raises(MutantError, match=r"does not apply to f\.py, which has these lines \d"):
        apply_diff(DIFF, text, "f.py")
