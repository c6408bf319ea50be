"""Measure what it takes to reject each wrong kernel; a page of the site is made of the results.

    PYTHONPATH=tests:tests/gpu python tests/mutants/table.py [--only NAME ...] [--quick]

Writes benchmarks/results/mutants.json. The law that a mutant's diff names is tried with ten seeds,
and its failure with the first one is shrunk. Each mutant has a process of its own: one that crashes
is reported at the end, and its old results stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from mutant_corpus import MUTANTS, Mutant

from srigl_core._workers import worker_pool
from srigl_core.testing import LAWS, verify

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_EXAMPLES = 100
FEW_EXAMPLES = 50
"""The budget of `make test`."""

SEED = 0
N_SEEDS = 10
SMALL = 3
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "mutants.json"
FUZZED = RESULTS.with_name("fuzz.json")
"""Written by `tests/fuzz/backends.py --json`."""

PAGE = """# Wrong kernels, and what rejects them

Each wrong kernel is a kernel of this project with a bug of at most five lines, kept as a diff in
`tests/mutants/`. The law that the diff names must reject it within {max_examples} problems, with
seed {seed}. `tests/test_mutants.py` tries all that are not compiled, and
`tests/slow/test_compiled_mutants.py` a sample of the others. *problems* is how many the named law
takes; *at most*, how many it takes with the worst of {n_seeds} seeds; *shrunk to*, how many neurons
and inputs the smallest example has.

- {n_rejected} of {n} are rejected. {n_naming} of {n_laws} laws reject a mutant that names them.
- The named law takes {median:g} problems in the median, {most} at most.
- {n_small} of {n_shrunk}, {percent}%, are shrunk to {small} x {small} or smaller.

{fuzzed}

{by_class}

Measured {date} with `PYTHONPATH=tests:tests/gpu python tests/mutants/table.py`.
"""

BY_CLASS = """## Bugs that few problems show

These mutants were written before the problems in the table's classes were drawn, and without
knowledge of how they would be. A cell has how many are rejected with each of {n_seeds} seeds:
within {few} problems, which `make test` tries, and within {max_examples}. *before* is the kit that
the mutants were written against.

| problems that show it | mutants | before: {few} | {max_examples} | now: {few} | {max_examples} |
|-|-:|-:|-:|-:|-:|
{rows}"""


def measured(mutant: Mutant, *, quick: bool) -> dict[str, Any]:
    """Try the named law on a mutant, and shrink its failure; with `quick` only with one seed."""
    (named,) = (law for law in LAWS if law.name == mutant.law)
    options = {"max_examples": MAX_EXAMPLES, "seed": SEED}
    backend, result = mutant.load(), {"mutant": str(mutant)}
    failure = verify(backend, laws=[named], **options).results[0].failure
    if failure is not None:
        result |= {"problems": failure.examples, "shape": failure.shape, "number": failure.number}
    return result if quick else result | {"seeds": deaths(mutant, backend)}


def deaths(mutant: Mutant, backend: Any) -> list[int | None]:
    """Return how many problems the named law takes with each seed; None if it does not reject."""
    (named,) = (law for law in LAWS if law.name == mutant.law)
    options = {"laws": [named], "max_examples": MAX_EXAMPLES, "shrink": False}
    failures = [verify(backend, seed=n, **options).results[0].failure for n in range(N_SEEDS)]
    return [failure and failure.examples for failure in failures]


def each_in_a_process(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Call `function` with each item, in a process that ends with it; yield those that are done."""
    remaining = list(reversed(items))
    running: dict[Future[Result], tuple[Item, ExitStack]] = {}
    with ExitStack() as all_pools:  # an exception, such as that of Ctrl-C, ends them at once
        while remaining or running:
            while remaining and len(running) < processes:
                pool, item = all_pools.enter_context(ExitStack()), remaining.pop()
                future = pool.enter_context(worker_pool(1)).submit(function, item)
                running[future] = item, pool
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                item, pool = running.pop(future)
                pool.close()
                yield item, future


def page(content: dict[str, Any], fuzzed: dict[str, Any]) -> str:
    """Return the page, from the content of `RESULTS` and `FUZZED`."""
    results = {result["mutant"]: result for result in content["mutants"]}
    rejected = {name: result for name, result in results.items() if "problems" in result}
    shapes = [result["shape"] for result in rejected.values() if "shape" in result]
    n_small = sum(max(shape) <= SMALL for shape in shapes)
    summary = PAGE.format(
        n=len(results),
        n_rejected=len(rejected),
        n_naming=len({mutant.law for mutant in MUTANTS if str(mutant) in rejected}),
        n_laws=len(LAWS),
        median=median(result["problems"] for result in rejected.values()),
        most=max(result["problems"] for result in rejected.values()),
        n_small=n_small,
        n_shrunk=len(shapes),
        percent=round(100 * n_small / len(shapes)),
        small=SMALL,
        max_examples=MAX_EXAMPLES,
        seed=SEED,
        n_seeds=N_SEEDS,
        by_class=_by_class(results),
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


def _by_class(results: dict[str, Any]) -> str:
    """Return the table of the mutants whose diff names the problems that show the bug."""
    classes: dict[str, list[Any]] = {}
    for mutant in MUTANTS:
        if mutant.problems and str(mutant) in results:
            classes.setdefault(mutant.problems, []).append(results[str(mutant)])
    classes["all"] = [result for members in classes.values() for result in members]

    def within(members: list[Any], key: str, limit: int) -> int:
        seeds = [member.get(key, [None]) for member in members]
        return sum(None not in each and max(each) <= limit for each in seeds)

    limits = (FEW_EXAMPLES, MAX_EXAMPLES)
    columns = [(key, limit) for key in ("before", "seeds") for limit in limits]
    rows = [
        f"| {name} | {len(members)} | "
        + " | ".join(str(within(members, *column)) for column in columns)
        + " |"
        for name, members in classes.items()
    ]
    return BY_CLASS.format(
        n_seeds=N_SEEDS, few=FEW_EXAMPLES, max_examples=MAX_EXAMPLES, rows="\n".join(rows)
    )


def _table(kernel: str, results: dict[str, Any]) -> str:
    mutants = [mutant for mutant in MUTANTS if mutant.kernel == kernel and str(mutant) in results]
    lines = [
        f"## {kernel}: {len(mutants)}\n",
        "| mutant | file | bug | rejected by | problems | at most | shrunk to |",
        "|-|-|-|-|-:|-:|-:|",
    ]
    for mutant in mutants:
        result = results[str(mutant)]
        law = mutant.law if "problems" in result else f"not by {mutant.law}"
        seeds = result.get("seeds", [])
        most = "" if not seeds else "none" if None in seeds else max(seeds)
        numbers = (result.get("problems", ""), most)
        size = " x ".join(map(str, result.get("shape", ())))
        cells = (f"`{mutant.name}`", f"`{Path(mutant.file).name}`", mutant.bug, law, *numbers, size)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try mutants, and write their results; those of others stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="mutants with one of these in their name or law"
    )
    parser.add_argument("--quick", action="store_true", help="only the named law, with one seed")
    options = parser.parse_args()
    results = {result["mutant"]: result for result in json.loads(RESULTS.read_text())["mutants"]}
    names = {mutant: f"{mutant} {mutant.law}" for mutant in MUTANTS}
    mutants = [each for each in MUTANTS if any(part in names[each] for part in options.only)]
    crashes = []
    function = partial(measured, quick=options.quick)
    for mutant, future in each_in_a_process(function, mutants, options.processes):
        name, error = str(mutant), future.exception()
        if error is None:
            kept = ("before", "seeds") if options.quick else ("before",)
            before = {key: part for key, part in results.get(name, {}).items() if key in kept}
            results[name] = future.result() | before
            print(json.dumps(results[name]), flush=True)
        else:
            crashes.append(f"{name} crashed: {error!r}")
            print(crashes[-1], flush=True)
    rows = [json.dumps(results[str(mutant)]) for mutant in MUTANTS if str(mutant) in results]
    date, lines = f"{datetime.now(UTC):%Y-%m-%d}", ",\n".join(rows)
    RESULTS.write_text(f'{{"date": "{date}", "mutants": [\n{lines}\n]}}\n')
    if crashes:
        sys.exit("\n".join(crashes))


if __name__ == "__main__":
    main()
