"""Each wrong kernel is rejected by the law that its diff names, and no law is idle."""

import sys

import host_device
import pytest
from mutant_corpus import MUTANTS, MutantError, apply_diff, load_backend

from srigl_core.testing import LAWS, verify

LAW = {law.name: law for law in LAWS}
FILES = sorted({(mutant.kernel, mutant.file) for mutant in MUTANTS})
SOURCE = "def f(x):\n    y = x + 1\n    return y\n"
DIFF = "@@ -1,3 +1,3 @@\n def f(x):\n-    y = x + 1\n+    y = x\n     return y\n"

needs_compiler = pytest.mark.skipif(
    host_device.unavailable() is not None, reason=str(host_device.unavailable())
)


def cases(values, kernel_of):
    return [
        pytest.param(value, marks=[needs_compiler] if kernel_of(value) == "cupy_gpu" else [])
        for value in values
    ]


@pytest.mark.parametrize("mutant", cases(MUTANTS, lambda mutant: mutant.kernel), ids=str)
def test_each_mutant_is_rejected_by_its_law(mutant):
    (result,) = verify(mutant.load(), laws=[LAW[mutant.law]], shrink=False).results
    assert result.status == "failed", f"{mutant.law} does not reject {mutant}: {mutant.bug}"


@pytest.mark.parametrize("law", LAW)
def test_each_law_is_named_by_a_mutant(law):
    assert [str(mutant) for mutant in MUTANTS if mutant.law == law] != []


@pytest.mark.parametrize("where", cases(FILES, lambda where: where[0]), ids="-".join)
def test_what_is_loaded_unchanged_is_right(where):
    backend = load_backend(*where, lambda text: text)
    names = {mutant.law for mutant in MUTANTS if (mutant.kernel, mutant.file) == where}
    report = verify(backend, laws=[LAW[name] for name in sorted(names)], max_examples=5)
    assert report.ok, str(report)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_bug_is_a_few_lines(mutant):
    assert 1 <= mutant.changed_lines <= 5


def test_mutants_leave_the_installed_modules_as_they_are():
    before = dict(sys.modules)
    MUTANTS[-1].load()
    assert {name: sys.modules[name] for name in before} == before


@pytest.mark.parametrize("text", [SOURCE.replace("x + 1", "1 + x"), SOURCE + SOURCE, ""])
def test_a_diff_that_no_longer_applies_is_an_error(text):
    assert apply_diff(DIFF, SOURCE, "f.py") == SOURCE.replace("x + 1", "x")
    with pytest.raises(MutantError, match=r"does not apply to f\.py, which has these lines \d"):
        apply_diff(DIFF, text, "f.py")
