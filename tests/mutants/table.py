"""Write docs/mutants.md: what it takes to reject each wrong kernel.

    PYTHONPATH=tests:tests/gpu python tests/mutants/table.py docs/mutants.md

Takes some minutes. Every law of a mutant's operation is tried on it, but for kernels that are
compiled, where it is the named law alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from mutant_corpus import COMPILED, MUTANTS, Mutant

from srigl_core.testing import LAWS, verify

MAX_EXAMPLES = 100
SEED = 0
SMALL = 3
FUZZED = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.json"
"""What `tests/fuzz/backends.py --json` wrote."""

PAGE = """# Wrong kernels, and what rejects them

Each is a kernel of this project with a bug of at most five lines, a diff in `tests/mutants/`. The
law that its diff names must reject it within {max_examples} problems, with seed {seed}
(`tests/test_mutants.py`, `tests/slow/test_compiled_mutants.py`). *Laws* says how many laws do, of
those of the operation, where that was tried; *problems*, how many the named law takes; *shrunk to*,
how many neurons and inputs the example has that it shows then.

- {n_rejected} of {n} are rejected. {n_naming} of {n_laws} laws reject a mutant that names them.
- The named law takes {median:g} problems in the median, {most} at most.
- {n_small} of {n_rejected}, {percent}%, are shrunk to {small} x {small} or smaller.

{fuzzed}

{date}, by `PYTHONPATH=tests:tests/gpu python tests/mutants/table.py docs/mutants.md`.

{tables}
"""


@dataclass(frozen=True)
class Rejection:
    """What became of a mutant; the last two are None where its law does not reject it."""

    mutant: Mutant
    laws: str
    examples: int | None
    shape: tuple[int, int] | None


def rejection(mutant: Mutant) -> Rejection:
    """Try the laws of the operation, and shrink what the named one finds."""
    (named,) = (law for law in LAWS if law.name == mutant.law)
    options = {"max_examples": MAX_EXAMPLES, "seed": SEED}
    backend, laws = mutant.load(), ""
    if mutant.kernel not in COMPILED:
        tried = [law for law in LAWS if law.operation == named.operation]
        results = verify(backend, laws=tried, shrink=False, **options).results
        laws = f"{sum(each.status == 'failed' for each in results)} of {len(tried)}"
    failure = verify(backend, laws=[named], **options).results[0].failure
    if failure is None:
        return Rejection(mutant, laws, None, None)
    return Rejection(mutant, laws, failure.examples, failure.shape)


def page(rejections: list[Rejection], date: str) -> str:
    """Return the text of the page."""
    rejected = [each for each in rejections if each.shape is not None]
    n_small = sum(max(each.shape or ()) <= SMALL for each in rejected)
    kernels = dict.fromkeys(each.mutant.kernel for each in rejections)
    return PAGE.format(
        n=len(rejections),
        n_rejected=len(rejected),
        n_naming=len({each.mutant.law for each in rejected}),
        n_laws=len(LAWS),
        median=median(each.examples or 0 for each in rejected),
        most=max(each.examples or 0 for each in rejected),
        n_small=n_small,
        percent=round(100 * n_small / len(rejected)),
        small=SMALL,
        max_examples=MAX_EXAMPLES,
        seed=SEED,
        fuzzed=_fuzzed(json.loads(FUZZED.read_text())) if FUZZED.exists() else "",
        date=date,
        tables="\n".join(_table(kernel, rejections) for kernel in kernels).rstrip(),
    )


def _fuzzed(content: dict[str, Any]) -> str:
    """Return what became of the right kernels."""
    rows = content["laws"]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    examples = [row["examples"] for row in rows]
    n_failures = sum(row["failures"] for row in rows)
    return (
        f"Right kernels pass: `make thorough` tried the laws of what each offers on "
        f"{', '.join(backends)}, {min(examples):,} problems or more a law and {sum(examples):,} in "
        f"all, and {n_failures} failed ([its table](../benchmarks/results/fuzz.json))."
    )


def _table(kernel: str, rejections: list[Rejection]) -> str:
    rows = [each for each in rejections if each.mutant.kernel == kernel]
    lines = [
        f"## {kernel}: {len(rows)}\n",
        "| mutant | of | bug | rejected by | laws | problems | shrunk to |",
        "|-|-|-|-|-:|-:|-:|",
    ]
    for each in rows:
        mutant, shape = each.mutant, each.shape
        law = mutant.law if shape else f"not by {mutant.law}"
        size = f"{shape[0]} x {shape[1]}" if shape else ""
        file = Path(mutant.file).name
        lines.append(
            f"| `{mutant.name}` | `{file}` | {mutant.bug} | {law} | {each.laws} "
            f"| {each.examples or ''} | {size} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try all mutants, and write the page; exit 1 if a mutant is not rejected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="mutants with this in their name")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in str(mutant)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        rejections = list(pool.map(rejection, mutants))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(page(rejections, f"{datetime.now(UTC):%Y-%m-%d}"))
    accepted = [str(each.mutant) for each in rejections if each.shape is None]
    if accepted:
        sys.exit(f"not rejected by the law that it names: {', '.join(accepted)}")


if __name__ == "__main__":
    main()
