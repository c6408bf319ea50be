"""Make a problem that fails as small as it gets, by Hypothesis (extra ``test``)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
from hypothesis import Phase, strategies
from hypothesis.database import ExampleDatabase, choices_to_bytes

from srigl_core.testing.strategies import DrawnChooser

__all__ = ["kept_failures", "shrunk"]

Attempt = Callable[[DrawnChooser], None]

_SECONDS = 10
"""After which the smallest problem so far has to do: a kernel may break many laws, slowly."""


def shrunk(attempt: Attempt, choices: Sequence[int], database: ExampleDatabase | None) -> None:
    """Try smaller and smaller problems, from the one of these choices on, that fail as well.

    Parameters
    ----------
    attempt : callable of a chooser
        Raises where a problem fails.
    choices : sequence of int
    database : ExampleDatabase or None
        Where to keep what is found.
    """
    _attempt(attempt, _Given(choices, database))


def kept_failures(attempt: Attempt, database: ExampleDatabase) -> None:
    """Try what failed earlier."""
    _attempt(attempt, database)


class _Given(ExampleDatabase):
    """A database that has the choices of one problem, whatever is asked for."""

    def __init__(self, choices: Sequence[int], kept: ExampleDatabase | None) -> None:
        super().__init__()
        # With one choice too many: what it knows to the end Hypothesis takes to be shrunk already.
        self._choices, self._kept = choices_to_bytes([*choices, 0]), kept

    def fetch(self, key: bytes) -> Iterator[bytes]:
        yield self._choices

    def save(self, key: bytes, value: bytes) -> None:
        if self._kept is not None:
            self._kept.save(key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        if self._kept is not None:
            self._kept.delete(key, value)


def _attempt(attempt: Attempt, database: ExampleDatabase) -> None:
    end = time.monotonic() + _SECONDS

    @hypothesis.settings(
        database=database,
        deadline=None,
        derandomize=False,
        phases=(Phase.reuse, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
        print_blob=False,
    )
    @hypothesis.seed(0)
    @hypothesis.given(strategies.data())
    def attempts(data: Any) -> None:
        if time.monotonic() < end:
            attempt(DrawnChooser(data.draw))

    # The last failure is the smallest, and the attempt's to keep; of one that comes and goes
    # Hypothesis raises an error of its own.
    with contextlib.suppress(Exception):
        attempts()
