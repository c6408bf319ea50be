"""Replay failures, and shrink them with Hypothesis (extra ``test``)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
from hypothesis import Phase, strategies
from hypothesis.database import ExampleDatabase, choices_to_bytes

from srigl_core.testing.strategies import HypothesisSource

__all__ = ["replay_and_shrink"]

_SECONDS = 10
"""The longest time to shrink a failure for: a slow kernel may break many laws."""


class _StartingPoint(ExampleDatabase):
    """A database that always holds one problem; what is found goes to another database."""

    def __init__(self, drawn: Sequence[int], kept: ExampleDatabase | None) -> None:
        super().__init__()
        # Hypothesis takes a problem that uses all integers to be shrunk already: so one more.
        self._content, self._kept = choices_to_bytes([*drawn, 0]), kept

    def fetch(self, key: bytes) -> Iterator[bytes]:
        yield self._content

    def save(self, key: bytes, value: bytes) -> None:
        if self._kept is not None:
            self._kept.save(key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        if self._kept is not None:
            self._kept.delete(key, value)


def replay_and_shrink(
    attempt: Callable[[HypothesisSource], None],
    database: ExampleDatabase | None,
    drawn: Sequence[int] | None = None,
) -> None:
    """Attempt the problem of `drawn`, or those that `database` kept; shrink what fails.

    `attempt` builds a problem from a source, raises if it fails, and remembers the last one that
    did. Failures are kept in `database`.
    """
    end = time.monotonic() + _SECONDS

    @hypothesis.settings(
        database=database if drawn is None else _StartingPoint(drawn, database),
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
            attempt(HypothesisSource(data.draw))

    # The last failure is the smallest. Hypothesis raises it, or an error of its own if it is flaky.
    with contextlib.suppress(Exception):
        attempts()
