"""Every law on the Numba backend when its thread pool does all work, however little it is."""

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
