"""Try the laws on the backends for an hour, with other problems each time.

    python tests/fuzz/backends.py [--minutes 60] [--examples 10000] [--backends NAME,...]
                                  [--laws NAME,...] [--seed N] [--keep FOLDER] [--json FILE]

Every law has its turn on every backend, with other problems each time, until the time is over or
all have had their examples. Where a law fails, the problem is made small, reported at the end, and
the law is not tried there again. The failure is kept in a folder, and the next run starts with it.
With --seed the problems are those of the last run with that seed; Hypothesis then keeps nothing.
Exits 1 on a failure, 2 if nothing could be checked.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

from srigl_core import Backend, SriglError
from srigl_core.testing import LAWS, Law, LawResult
from srigl_core.testing.targets import as_backend
from srigl_core.testing.verification import law_named, try_law

BACKENDS = "reference,numba,scipy"
TURN = 500  # examples


@dataclass
class Tally:
    """What became of a law on a backend so far.

    Parameters
    ----------
    backend : Backend
    law : Law
    tried, examples : int
        Problems that it was tried on, and those of them that left it something to check.
    seconds : float
    failure : LawResult or None
    """

    backend: Backend
    law: Law
    tried: int = 0
    examples: int = 0
    seconds: float = 0.0
    failure: LawResult | None = None

    @property
    def is_offered(self) -> bool:
        """Whether the backend has the operation that the law is about."""
        return self.law.operation in self.backend.capabilities.operations

    def is_open(self, examples: int) -> bool:
        """Whether it is to have another turn."""
        found = self.failure is not None or self.examples >= examples
        return self.is_offered and not found and self.tried < 10 * examples

    def turn(self, examples: int, seed: int | None, keep: Path) -> None:
        """Try the law on new problems, and on those that failed in an earlier run."""
        database = DirectoryBasedExampleDatabase(keep / self.backend.name / self.law.name)
        start = time.perf_counter()
        result = try_law(
            self.backend, self.law, max_examples=examples, seed=seed, database=database
        )
        self.seconds += time.perf_counter() - start
        self.tried += examples
        self.examples += result.examples
        self.failure = result if result.status == "failed" else None


def fuzz(
    tallies: list[Tally], *, minutes: float, examples: int, seed: int | None, keep: Path
) -> None:
    """Give every law its turns, until the time is over or all have had their examples."""
    seeds = random.Random(seed)
    end = time.monotonic() + 60 * minutes
    for tally in _in_turns(tallies, examples):
        if time.monotonic() >= end:
            return
        tally.turn(min(TURN, examples), seed and seeds.randrange(2**32), keep)


def _in_turns(tallies: list[Tally], examples: int) -> Iterator[Tally]:
    while remaining := [tally for tally in tallies if tally.is_open(examples)]:
        yield from remaining


def table(tallies: list[Tally]) -> str:
    """Return a line for each law and backend, and the failures below."""
    width = max(len(tally.law.name) for tally in tallies)
    lines = [f"{'law':<{width}}  {'backend':<10}{'examples':>10}{'failures':>10}{'seconds':>9}"]
    for t in tallies:
        counts = f"{t.examples:>10,}{int(t.failure is not None):>10}{t.seconds:>9.0f}"
        told = counts if t.is_offered else f"{'not offered':>29}"
        lines.append(f"{t.law.name:<{width}}  {t.backend.name:<10}{told}")
    n_failures = sum(t.failure is not None for t in tallies)
    total = f"{sum(t.examples for t in tallies):,} examples, {n_failures} failures"
    reports = [f"{t.backend.name}: {t.failure}" for t in tallies if t.failure is not None]
    return "\n\n".join(["\n".join(lines), total, *reports])


def as_json(tallies: list[Tally], *, seed: int | None, seconds: float) -> str:
    """Return the table as JSON."""
    rows = [
        {
            "law": t.law.name,
            "backend": t.backend.name,
            "examples": t.examples,
            "failures": int(t.failure is not None),
            "seconds": round(t.seconds, 1),
            "report": None if t.failure is None else str(t.failure),
        }
        for t in tallies
        if t.is_offered
    ]
    return json.dumps({"seed": seed, "seconds": round(seconds, 1), "laws": rows}, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--examples", type=int, default=10_000, help="of a law on a backend")
    parser.add_argument("--backends", default=BACKENDS, help="names, or module:attribute")
    parser.add_argument("--laws", default="", help="only these")
    parser.add_argument("--seed", type=int, default=None, help="1 or more: the same problems again")
    parser.add_argument("--keep", type=Path, default=Path(".hypothesis/fuzz/backends"))
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    chosen = parser.parse_args(arguments)
    try:
        laws = [law_named(name) for name in chosen.laws.split(",") if name] or LAWS
        backends = [as_backend(name) for name in chosen.backends.split(",")]
    except SriglError as error:
        parser.error(str(error))
    # Where CI is set Hypothesis would try the same problems each time, and keep no failure.
    settings.register_profile("fuzz", settings.get_profile("default"), derandomize=False)
    settings.load_profile("fuzz")
    tallies = [Tally(backend, law) for backend in backends for law in laws]
    start = time.perf_counter()
    interrupted = False
    try:
        fuzz(
            tallies,
            minutes=chosen.minutes,
            examples=chosen.examples,
            seed=chosen.seed,
            keep=chosen.keep,
        )
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start
    print(table(tallies), f"in {seconds:.0f} s{', interrupted' if interrupted else ''}")
    if chosen.json is not None:
        chosen.json.write_text(as_json(tallies, seed=chosen.seed, seconds=seconds))
    if any(tally.failure is not None for tally in tallies):
        return 1
    return 0 if any(tally.examples for tally in tallies) else 2


if __name__ == "__main__":
    sys.exit(main())
