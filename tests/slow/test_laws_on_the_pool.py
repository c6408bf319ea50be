"""Every law on the Numba backend when its thread pool does all work, however little it is."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

from hypothesis import settings

from srigl_core import get_backend
from srigl_core.backends.numba_cpu import threads
from srigl_core.testing.laws import LAWS
from srigl_core.testing.verification import try_law

NUMBA = get_backend("numba")
OFFERED = [law for law in LAWS if law.operation in NUMBA.capabilities.operations]


@pytest.mark.parametrize("law", OFFERED, ids=lambda law: law.name)
def test_law_holds_when_the_pool_does_all_work(law, monkeypatch):
    monkeypatch.setattr(threads, "SMALLEST_PARALLEL_WORK", 0)
    result = try_law(NUMBA, law, max_examples=max(10, settings().max_examples // 4))
    assert result.status == "passed", str(result)


SIXTY_FOUR = """
from dataclasses import replace

from srigl_core import get_backend
from srigl_core.backends.numba_cpu import threads
from srigl_core.testing import LAWS, verify
from srigl_core.testing.kernel_capabilities import capabilities_of

threads.SMALLEST_PARALLEL_WORK = 0
numba = get_backend("numba")
able = capabilities_of(numba)
numba.capabilities = replace(able, value_dtypes={"float32"}, largest_problem=300_000)
names = ("same_", "a_used_plan", "threads_may")
laws = [
    law for law in LAWS if law.name.startswith(names) and law.operation in able.operations
]
assert len(laws) >= 8, laws
report = verify(numba, laws=laws, max_examples=20)
assert report.ok, str(report)
assert "more than one thread" not in report.summary
print("done")
"""


def test_laws_hold_with_sixty_four_threads():
    done = subprocess.run(
        [sys.executable, "-c", SIXTY_FOUR],
        env={**os.environ, "NUMBA_NUM_THREADS": "64", "OMP_NUM_THREADS": "64"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr
