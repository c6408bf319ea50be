"""Measure what it takes to reject each wrong kernel; a page of the site is made of the results.

    PYTHONPATH=tests:tests/gpu python tests/mutants/table.py [--only NAME]

Takes ten minutes for all, and writes benchmarks/results/mutants.json. Every law of a mutant's
operation is tried on it; on kernels that are compiled, only the law that its diff names.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from mutant_corpus import MUTANTS, Mutant

from srigl_core._workers import worker_pool
from srigl_core.testing import LAWS, verify

MAX_EXAMPLES = 100
SEED = 0
SMALL = 3
NOT_COMPILED = ("reference", "scipy_csr")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "mutants.json"
FUZZED = RESULTS.with_name("fuzz.json")
"""Written by `tests/fuzz/backends.py --json`."""

PAGE = """# Wrong kernels, and what rejects them

Each wrong kernel is a kernel of this project with a bug of at most five lines, kept as a diff in
`tests/mutants/`. The law that the diff names must reject it within {max_examples} problems, with
seed {seed} (`tests/test_mutants.py`, `tests/slow/test_compiled_mutants.py`). *laws* is how many
laws of the operation reject it, where all were tried; *problems*, how many the named law takes;
*shrunk to*, how many neurons and inputs the smallest example has.

- {n_rejected} of {n} are rejected. {n_naming} of {n_laws} laws reject a mutant that names them.
- The named law takes {median:g} problems in the median, {most} at most.
- {n_small} of {n_rejected}, {percent}%, are shrunk to {small} x {small} or smaller.

{fuzzed}

Measured {date} with `PYTHONPATH=tests:tests/gpu python tests/mutants/table.py`.
"""


def measured(mutant: Mutant) -> dict[str, Any]:
    """Try the laws of the operation on a mutant, and shrink the failure of the named law."""
    (named,) = (law for law in LAWS if law.name == mutant.law)
    options = {"max_examples": MAX_EXAMPLES, "seed": SEED}
    backend, result = mutant.load(), {"mutant": str(mutant)}
    if mutant.kernel in NOT_COMPILED:
        tried = [law for law in LAWS if law.operation == named.operation]
        report = verify(backend, laws=tried, shrink=False, **options)
        result["laws"] = f"{len(report.failures)} of {len(tried)}"
    failure = verify(backend, laws=[named], **options).results[0].failure
    if failure is not None:
        result |= {"problems": failure.examples, "shape": failure.shape}
    return result


def page(content: dict[str, Any], fuzzed: dict[str, Any]) -> str:
    """Return the page, from the content of `RESULTS` and `FUZZED`."""
    results = {result["mutant"]: result for result in content["mutants"]}
    rejected = {name: result for name, result in results.items() if "shape" in result}
    n_small = sum(max(result["shape"]) <= SMALL for result in rejected.values())
    summary = PAGE.format(
        n=len(results),
        n_rejected=len(rejected),
        n_naming=len({mutant.law for mutant in MUTANTS if str(mutant) in rejected}),
        n_laws=len(LAWS),
        median=median(result["problems"] for result in rejected.values()),
        most=max(result["problems"] for result in rejected.values()),
        n_small=n_small,
        percent=round(100 * n_small / len(rejected)),
        small=SMALL,
        max_examples=MAX_EXAMPLES,
        seed=SEED,
        fuzzed=_right_kernels(fuzzed["laws"]),
        date=content["date"],
    )
    kernels = dict.fromkeys(mutant.kernel for mutant in MUTANTS)
    return "\n".join([summary, *(_table(kernel, results) for kernel in kernels)])


def _right_kernels(rows: list[dict[str, Any]]) -> str:
    backends = ", ".join(dict.fromkeys(row["backend"] for row in rows))
    examples = [row["examples"] for row in rows]
    return (
        f"Right kernels pass: `make fuzz` tried the laws on {backends}, with {min(examples):,} "
        f"problems or more for each law and {sum(examples):,} in all, and "
        f"{sum(row['failures'] for row in rows)} failed ([its results](fuzz.json))."
    )


def _table(kernel: str, results: dict[str, Any]) -> str:
    mutants = [mutant for mutant in MUTANTS if mutant.kernel == kernel and str(mutant) in results]
    lines = [
        f"## {kernel}: {len(mutants)}\n",
        "| mutant | file | bug | rejected by | laws | problems | shrunk to |",
        "|-|-|-|-|-:|-:|-:|",
    ]
    for mutant in mutants:
        result = results[str(mutant)]
        law = mutant.law if "shape" in result else f"not by {mutant.law}"
        numbers = (result.get("laws", ""), result.get("problems", ""))
        size = " x ".join(map(str, result.get("shape", ())))
        cells = (f"`{mutant.name}`", f"`{Path(mutant.file).name}`", mutant.bug, law, *numbers, size)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try mutants, and write their results; those of others stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="mutants with this in their name")
    options = parser.parse_args()
    results = {result["mutant"]: result for result in json.loads(RESULTS.read_text())["mutants"]}
    mutants = [mutant for mutant in MUTANTS if options.only in str(mutant)]
    with worker_pool(options.processes) as pool:
        results |= {result["mutant"]: result for result in pool.map(measured, mutants)}
    rows = [json.dumps(results[str(mutant)]) for mutant in MUTANTS if str(mutant) in results]
    date, lines = f"{datetime.now(UTC):%Y-%m-%d}", ",\n".join(rows)
    RESULTS.write_text(f'{{"date": "{date}", "mutants": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
