"""A sample of the wrong kernels that are compiled: each is rejected by the law that it names."""

import host_device
import pytest
from mutant_corpus import COMPILED, MUTANTS, load_backend

from srigl_core.testing import LAWS, verify

LAW = {law.name: law for law in LAWS}
FILES = sorted({(mutant.kernel, mutant.file) for mutant in MUTANTS})

needs_compiler = pytest.mark.skipif(
    host_device.unavailable() is not None, reason=str(host_device.unavailable())
)


def cases(values, kernel_of):
    return [
        pytest.param(value, marks=[needs_compiler] if kernel_of(value) == "cupy_gpu" else [])
        for value in values
    ]


SAMPLE = [mutant for mutant in MUTANTS if mutant.kernel in COMPILED][::16]
"""Each takes seconds to compile; `mutants/table.py` tries them all."""


@pytest.mark.parametrize("mutant", cases(SAMPLE, lambda mutant: mutant.kernel), ids=str)
def test_each_compiled_mutant_is_rejected_by_its_law(mutant):
    assert mutant.rejected(), f"{mutant.law} does not reject {mutant}: {mutant.bug}"


UNCHANGED = FILES[::3]
"""A file of kernels takes up to half a minute to compile, and the loader is the same for all."""


@pytest.mark.parametrize("where", cases(UNCHANGED, lambda where: where[0]), ids="-".join)
def test_what_is_loaded_unchanged_is_right(where):
    backend = load_backend(*where, lambda text: text)
    names = {mutant.law for mutant in MUTANTS if (mutant.kernel, mutant.file) == where}
    report = verify(backend, laws=[LAW[name] for name in sorted(names)], max_examples=5)
    assert report.ok, str(report)
