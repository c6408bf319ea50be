"""Try the laws on the backends for an hour, with other problems each time.

    python tests/fuzz/backends.py [--minutes 60] [--examples 10000] [--backends NAME,...]
                                  [--laws NAME,...] [--processes 2] [--seed N] [--keep FOLDER]
                                  [--json FILE]

Every law has its turn on every backend, with other problems each time, until the time is over or
all have had their examples. Where a law fails, the problem is made small, reported at the end, and
the law is not tried there again. The failure is kept in a folder, and the next run starts with it.
The last lines say how many laws and backends had all of their examples.
With --seed the problems are those of the last run with that seed, and no failure is kept.
Exits 1 on a failure, 2 if nothing could be checked.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

from srigl_core import Backend, SriglError
from srigl_core._machine import machine_facts, package_versions
from srigl_core._workers import worker_pool
from srigl_core.testing import LAWS, Law, LawResult
from srigl_core.testing.kernel_capabilities import capabilities_of
from srigl_core.testing.targets import as_backend
from srigl_core.testing.verification import law_named, try_law

BACKENDS = "reference,numba,scipy"
TURN = 500  # examples


@dataclass
class Tally:
    """What became of a law on a backend so far."""

    target: str  # as in `as_backend`
    backend: Backend
    law: Law
    tried: int = 0  # problems
    examples: int = 0  # problems that left it something to check
    seconds: float = 0.0
    failure: LawResult | None = None

    @property
    def is_offered(self) -> bool:
        """Whether the backend has what the law is about."""
        return not self.law.not_offered(capabilities_of(self.backend))

    def is_open(self, examples: int) -> bool:
        """Whether it is to have another turn."""
        found = self.failure is not None or self.examples >= examples
        return self.is_offered and not found and self.tried < 10 * examples

    def add(self, tried: int, result: LawResult, seconds: float) -> None:
        """Count what a turn came to."""
        self.tried += tried
        self.examples += result.examples
        self.seconds += seconds
        self.failure = result if result.status == "failed" else None


@dataclass(frozen=True)
class Turns:
    """What processes of their own do: have a law tried on a backend, until the time is over."""

    examples: int  # of a turn
    end: float  # by `time.time`
    keep: Path

    def __call__(
        self, target: str, law_name: str, seed: int | None
    ) -> tuple[LawResult, float] | None:
        """Try a law on new problems, and on those that failed in an earlier run."""
        start = time.time()
        if start >= self.end:
            return None
        backend, law = _backend(target), law_named(law_name)
        kept = self.keep / backend.name / law_name
        database = DirectoryBasedExampleDatabase(kept) if seed is None else None
        result = try_law(backend, law, max_examples=self.examples, seed=seed, database=database)
        return result, time.time() - start


_backend = functools.cache(as_backend)


def _start_process() -> None:
    # Where CI is set Hypothesis would try the same problems each time, and keep no failure.
    settings.register_profile("fuzz", settings.get_profile("default"), derandomize=False)
    settings.load_profile("fuzz")


def fuzz(
    tallies: list[Tally],
    *,
    minutes: float,
    examples: int,
    processes: int,
    seed: int | None,
    keep: Path,
) -> None:
    """Give every law its turns, until the time is over or all have had their examples."""
    seeds = random.Random(seed)
    turns = Turns(min(TURN, examples), time.time() + 60 * minutes, keep)
    with worker_pool(processes, _start_process) as pool:
        while time.time() < turns.end:
            remaining = [tally for tally in tallies if tally.is_open(examples)]
            if not remaining:
                return
            targets = [tally.target for tally in remaining]
            names = [tally.law.name for tally in remaining]
            chosen = [None if seed is None else seeds.randrange(2**32) for _ in remaining]
            results = pool.map(turns, targets, names, chosen)
            for tally, result in zip(remaining, results, strict=True):
                if result is not None:
                    tally.add(turns.examples, *result)


def table(tallies: list[Tally], examples: int) -> str:
    """Return a line for each law and backend, and below who had all examples, and the failures."""
    width = max(len(tally.law.name) for tally in tallies)
    lines = [f"{'law':<{width}}  {'backend':<10}{'examples':>10}{'failures':>10}{'seconds':>9}"]
    for t in tallies:
        counts = f"{t.examples:>10,}{int(t.failure is not None):>10}{t.seconds:>9.0f}"
        told = counts if t.is_offered else f"{'not offered':>29}"
        lines.append(f"{t.law.name:<{width}}  {t.backend.name:<10}{told}")
    n_failures = sum(t.failure is not None for t in tallies)
    offered = [t for t in tallies if t.is_offered]
    n_full = sum(t.examples >= examples for t in offered)
    reached = f"{n_full} of {len(offered)} laws and backends had {examples:,} examples or more"
    total = f"{sum(t.examples for t in tallies):,} examples, {n_failures} failures"
    reports = [f"{t.backend.name}: {t.failure}" for t in tallies if t.failure is not None]
    return "\n\n".join(["\n".join(lines), *reports, f"{reached}\n{total}"])


def as_json(tallies: list[Tally], *, seed: int | None, seconds: float) -> str:
    """Return the table as JSON, with what it was run on."""
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
    content = {
        "machine": machine_facts(),
        "versions": package_versions(),
        "seed": seed,
        "seconds": round(seconds, 1),
        "laws": rows,
    }
    return json.dumps(content, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--examples", type=int, default=10_000, help="of a law on a backend")
    parser.add_argument("--backends", default=BACKENDS, help="names, or module:attribute")
    parser.add_argument("--laws", default="", help="only these")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None, help="the same problems again")
    parser.add_argument("--keep", type=Path, default=Path(".hypothesis/fuzz/backends"))
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    chosen = parser.parse_args(arguments)
    try:
        laws = [law_named(name) for name in chosen.laws.split(",") if name] or LAWS
        backends = {name: as_backend(name) for name in chosen.backends.split(",")}
    except SriglError as error:
        parser.error(str(error))
    tallies = [Tally(name, backend, law) for name, backend in backends.items() for law in laws]
    start = time.perf_counter()
    ended = ""
    try:
        fuzz(
            tallies,
            minutes=chosen.minutes,
            examples=chosen.examples,
            processes=chosen.processes,
            seed=chosen.seed,
            keep=chosen.keep,
        )
    except KeyboardInterrupt:
        ended = ", interrupted"
    except BrokenProcessPool:
        ended = ", when a kernel took its process down: try the laws one at a time, with --laws"
    seconds = time.perf_counter() - start
    print(table(tallies, chosen.examples), f"in {seconds:.0f} s{ended}")
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(as_json(tallies, seed=chosen.seed, seconds=seconds))
    if "kernel" in ended or any(tally.failure is not None for tally in tallies):
        return 1
    return 0 if any(tally.examples for tally in tallies) else 2


if __name__ == "__main__":
    sys.exit(main())
