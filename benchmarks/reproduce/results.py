"""Results of runs as lines of JSON, in a file that grows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from srigl_core import __version__
from srigl_core.benchmarks.reproduce.training import RunResult
from srigl_core.errors import FileFormatError

__all__ = ["appended", "read_results"]


def read_results(path: Path) -> list[RunResult]:
    """Return the results in a file, and none if there is no file.

    Raises
    ------
    FileFormatError
        If a line, other than an unfinished last one, is not a result, or a run is there twice.
    """
    if not path.exists():
        return []
    text = path.read_bytes()[: _whole_lines(path)].decode()
    results: dict[str, RunResult] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            del entry["version"]
            result = RunResult.from_entry(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path}, line {number} is not the result of a run") from error
        if result.spec.key in results:
            raise FileFormatError(f"{path}, line {number} has a run that an earlier line has, too")
        results[result.spec.key] = result
    return list(results.values())


@contextmanager
def appended(path: Path) -> Iterator[Callable[[RunResult], None]]:
    """Yield a function that adds a result to a file, and returns when it is on the disk.

    A last line that a killed process has not written to its end is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(_whole_lines(path))

        def append(result: RunResult) -> None:
            entry = {"version": __version__, **result.entry()}
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def _whole_lines(path: Path) -> int:
    """Return the length of a file up to the end of its last complete line."""
    return path.read_bytes().rfind(b"\n") + 1
