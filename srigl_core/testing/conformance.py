"""The laws as a pytest class to inherit from (extra ``test``)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from srigl_core.testing.law import Law
from srigl_core.testing.laws import LAWS
from srigl_core.testing.verification import verify

__all__ = ["BackendConformance"]


class BackendConformance:
    """Every law as a test of a backend.

    ::

        class TestMine(BackendConformance):
            backend = MyBackend

    Attributes
    ----------
    backend : str, Backend, class or function
        As in `as_backend`.
    op : str or None
        Only the laws of this operation. For a function, the operation that it computes.
    max_examples, seed : int
        As in `verify`.
    xfails : mapping of str to str
        The laws that are expected to fail, each with a reason.
    """

    backend: ClassVar[Any] = None
    op: ClassVar[str | None] = None
    max_examples: ClassVar[int] = 100
    seed: ClassVar[int] = 0
    xfails: ClassVar[Mapping[str, str]] = {}

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
    def test_law(self, law: Law) -> None:
        """The backend obeys a law."""
        if self.op not in (None, law.operation):
            pytest.skip(f"only {self.op} is under test")
        options: dict[str, Any] = {"max_examples": self.max_examples, "xfails": self.xfails}
        (result,) = verify(
            self._kernel(), laws=[law], seed=self.seed, op=self.op, **options
        ).results
        if result.status == "not applicable":
            pytest.skip(result.detail)
        if result.status == "expected failure":
            pytest.xfail(result.detail)
        if result.status == "failed":
            pytest.fail(str(result), pytrace=False)
        if result.status == "unexpected pass":
            warnings.warn(
                f"{law.name} passes, and was expected to fail ({result.detail}); take it out of "
                f"the xfails",
                stacklevel=2,
            )

    def test_some_law_can_be_checked(self) -> None:
        """At least one law can be checked."""
        one = verify(self._kernel(), op=self.op, max_examples=1, seed=self.seed, shrink=False)
        assert one.n_run, one.summary

    def _kernel(self) -> Any:
        """Return the backend; a function itself, instead of a bound method."""
        kernel = inspect.getattr_static(type(self), "backend")
        return kernel.__func__ if isinstance(kernel, staticmethod) else kernel
