"""The table of wrong kernels: a process for each, and the classes of problems that show them."""

import json
import re
from concurrent.futures.process import BrokenProcessPool

from mutant_corpus import MUTANTS
from mutants.table import FUZZED, RESULTS, each_in_a_process, page

FUZZ = json.loads(FUZZED.read_text())


def test_a_process_that_crashes_takes_no_other_with_it():
    items = ["1 + 1", "__import__('os')._exit(3)", "1 / 0", "2 + 2"]
    tried = dict(each_in_a_process(eval, items, 2))
    errors = {item: type(future.exception()) for item, future in tried.items()}
    assert errors == dict(
        zip(items, (type(None), BrokenProcessPool, ZeroDivisionError, type(None)), strict=True)
    )
    assert tried["2 + 2"].result() == 4


def test_the_page_counts_what_is_rejected_with_every_seed():
    few, slow, never = [1] * 9 + [50], [1] * 9 + [51], [1] * 9 + [None]
    shown = [mutant for mutant in MUTANTS if mutant.problems == "k beyond 2,048"][:4]
    results = [
        {"mutant": str(mutant), "before": never, "seeds": seeds, "problems": 1, "shape": [1, 1]}
        for mutant, seeds in zip(shown, (few, few, slow, never), strict=True)
    ]
    made = page({"date": "2026-01-01", "mutants": results}, FUZZ)
    assert "| k beyond 2,048 | 4 | 0 | 0 | 2 | 3 |" in made
    assert "| all | 4 | 0 | 0 | 2 | 3 |" in made
    assert [row.split(" | ")[5] for row in made.splitlines() if row.startswith("| `")] == [
        *("50", "50", "51", "none")
    ]


def test_the_page_has_every_mutant_that_was_measured():
    content = json.loads(RESULTS.read_text())
    names = re.findall(r"^\| `(\w+)` \|", page(content, FUZZ), re.MULTILINE)
    measured = {result["mutant"].partition("/")[2] for result in content["mutants"]}
    assert set(names) == measured & {mutant.name for mutant in MUTANTS}
