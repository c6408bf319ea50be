"""``pytest --srigl-backend=NAME``: adds the laws for a backend to a test run."""

from __future__ import annotations

from typing import Any

import pytest

__all__: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("srigl", "laws of sparse kernels")
    group.addoption(
        "--srigl-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="try every law on a backend: a registered name, or module:attribute; may be repeated",
    )
    group.addoption(
        "--srigl-max-examples", type=int, default=100, help="problems for each law (100)"
    )


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    from srigl_core.errors import SriglError
    from srigl_core.testing.laws import LAWS
    from srigl_core.testing.targets import as_backend

    if session.config.getoption("--srigl-max-examples") < 1:
        raise pytest.UsageError("--srigl-max-examples must be at least 1")
    for backend in session.config.getoption("--srigl-backend"):
        try:
            as_backend(backend)
        except SriglError as error:
            raise pytest.UsageError(f"--srigl-backend={backend}: {error}") from error
        for law in (None, *LAWS):
            name = f"{backend}::{law.name if law else 'some_law_can_be_checked'}"
            items.append(_LawItem.from_parent(session, name=name, backend=backend, law=law))


class _LawItem(pytest.Item):
    """A law, tried on a backend; without one, whether there is any to try."""

    def __init__(self, *, backend: str, law: Any, **options: Any) -> None:
        super().__init__(**options)
        self._backend, self._law = backend, law

    def runtest(self) -> None:
        from srigl_core.testing.conformance import report_to_pytest
        from srigl_core.testing.verification import verify

        if self._law is None:
            one = verify(self._backend, max_examples=1, shrink=False)
            assert one.n_run, one.summary
            return
        examples = self.config.getoption("--srigl-max-examples")
        report = verify(self._backend, laws=[self._law], max_examples=examples)
        report_to_pytest(report.results[0])

    def reportinfo(self) -> tuple[str, None, str]:
        return "srigl", None, self.name
