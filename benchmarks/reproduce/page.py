"""The results as a page in Markdown: the verdicts, the paper's numbers beside ours, all tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any

from srigl_core.benchmarks.reproduce.comparison import (
    CLAIMS,
    Cell,
    Claim,
    Difference,
    Verdict,
    cells_of,
    difference,
    verdict,
)
from srigl_core.benchmarks.reproduce.grid import STEPS_BETWEEN, THRESHOLDS
from srigl_core.benchmarks.reproduce.optimizers import GROWN_STATES
from srigl_core.benchmarks.reproduce.settings import (
    ADAMW,
    DATA_TITLES,
    METHODS,
    NETWORK_TITLES,
    RECIPES,
    Recipe,
    RunSpec,
)
from srigl_core.benchmarks.reproduce.training import RunResult
from srigl_core.benchmarks.tables import plural, table

__all__ = ["page", "panels"]

Cells = Mapping[tuple[str, float], Cell]

PAPER = (
    (
        "ResNet-18, CIFAR-10, 99%",
        {"rigl": 92.88, "srigl-no-ablation": 91.47, "srigl": 92.79},
    ),
    (
        "ViT-B/16, ImageNet, 90%",
        {"dense": 78.35, "rigl": 76.4, "srigl-no-ablation": 71.3, "srigl": 76.0},
    ),
)
"""Test accuracy in percent (Lasby et al. 2024, sec. 4)."""

_ANY_RECIPE = RECIPES["mnist-5k", "mlp"]

EVERY_CLAIM = """\
A difference is the mean of those of runs with equal data, initial seed and order of examples, in
percentage points, ± its standard error. A claim holds if the 95% confidence interval of the
difference (Student's t) is above zero, does not hold if it is below, and is undecided otherwise.
The limit of "as accurate" is 0.5 points below zero. Folds share training examples, so the intervals
are somewhat too narrow; and of so many intervals, a few miss by chance."""

GROWN_STATE = """\
Where a weight grows, AdamW's moments are set to zero (SPEC 4.8); or kept as they were when the
weight was pruned, after which they decayed; or set to zero together with a count of the weight's
own steps, so that the bias correction starts again, too."""

NOT_RUN = """\
CIFAR-10, ImageNet and the paper's networks (ResNet-18, ResNet-50, Wide ResNet-22, MobileNet-V3,
ViT-B/16) were not run: the data must be downloaded, and a run takes hours on a GPU. The ConvNet and
the transformer were run on MNIST-5k only, at 90 and 98% sparsity, with three folds. The sweeps of
`gamma_sal`, of the number of updates and of AdamW's state were run with the MLP, and not on
MNIST-1D."""

HOW = """\
All sparse methods have the same number of weights in each layer: ERK's, rounded down to whole rows.
Runs that are compared start from the same seed and see the same batches. The learning rate decays
along half a cosine. Learning rate and weight decay were chosen once, for all methods together, on a
validation part of the training data: those with the best mean accuracy of dense, static, RigL and
SRigL at 90 and 98%. The numbers of epochs, the steps between updates and the drop fraction were set
beforehand."""


def panels(results: Iterable[RunResult]) -> dict[str, Cells]:
    """Return the cells of each dataset and network, trained by its recipe, by title."""
    chosen: dict[str, list[RunResult]] = {}
    for result in results:
        spec = result.spec
        if spec.recipe == RECIPES.get((spec.data, spec.network)) and not spec.validation:
            chosen.setdefault(_title(spec), []).append(result)
    return {title: cells_of(group) for title, group in sorted(chosen.items())}


def page(results: Sequence[RunResult], picture: str) -> str:
    """Return the page of a set of results.

    Parameters
    ----------
    results : sequence of RunResult
    picture : str
        File of the picture that `plots.save_accuracies` wrote.
    """
    groups = panels(results)
    verdicts = {title: _verdicts(cells) for title, cells in groups.items()}
    parts = [
        "# The paper's claims, on small data",
        f"![Test accuracy over sparsity]({picture})",
        _summary(verdicts),
        "## The paper's numbers beside ours",
        _beside_the_paper(groups),
        *(_accuracies(title, cells) for title, cells in groups.items()),
        "## Every claim",
        EVERY_CLAIM,
        _claims(verdicts),
        *_sweeps(results),
        "## What was not run",
        NOT_RUN,
        "## How",
        _method(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(spec: RunSpec) -> str:
    return f"{DATA_TITLES[spec.data]}, {NETWORK_TITLES[spec.network]}"


def _verdicts(cells: Cells) -> list[Verdict]:
    sparsities = sorted({sparsity for _, sparsity in cells if sparsity})
    decided = [verdict(claim, sparsity, cells) for claim in CLAIMS for sparsity in sparsities]
    return [each for each in decided if each is not None]


def _summary(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """Say of each claim how often it holds, and where it does not."""
    lines = []
    for claim in CLAIMS:
        found = [(t, v) for t, group in verdicts.items() for v in group if v.claim == claim]
        if not found:
            continue
        counts = Counter(v.outcome for _, v in found)
        parts = [f"holds in {counts['holds']} of {plural(len(found), 'case')}"]
        if counts["undecided"]:
            parts.append(f"is undecided in {counts['undecided']}")
        if counts["does not hold"]:
            parts.append(f"does not hold in {counts['does not hold']}")
        text = f"- **{_sentence(claim)}**: {', '.join(parts)}."
        against = [
            f"{t}, {v.sparsity:.0%} ({v.difference})"
            for t, v in found
            if v.outcome == "does not hold"
        ]
        lines.append(text + (f" Against it: {'; '.join(against)}." if against else ""))
    return "\n".join(lines)


def _sentence(claim: Claim) -> str:
    return claim.text[0].upper() + claim.text[1:]


def _beside_the_paper(groups: Mapping[str, Cells]) -> str:
    pairs = (("srigl", "rigl"), ("srigl-no-ablation", "rigl"), ("srigl", "srigl-no-ablation"))
    head = ["", *(f"{METHODS[a].label} minus {METHODS[b].label}" for a, b in pairs)]
    rows = [
        [f"paper: {name}", *(f"{numbers[a] - numbers[b]:+.1f}" for a, b in pairs)]
        for name, numbers in PAPER
    ]
    for title, cells in groups.items():
        for sparsity in sorted({s for _, s in cells if s >= 0.9}):
            found = [_difference(cells, a, b, sparsity) for a, b in pairs]
            if any(found):
                rows.append([f"{title}, {sparsity:.0%}", *(str(each or "") for each in found)])
    return table(head, rows)


def _difference(cells: Cells, first: str, second: str, sparsity: float) -> Difference | None:
    keys = ((first, sparsity), (second, sparsity))
    return difference(*(cells[key] for key in keys)) if all(key in cells for key in keys) else None


def _accuracies(title: str, cells: Cells) -> str:
    sparsities = sorted({sparsity for _, sparsity in cells if sparsity})
    rows = []
    for method, of_method in METHODS.items():
        shown = [cells.get((method, 0.0 if method == "dense" else s)) for s in sparsities]
        if any(shown):
            rows.append([of_method.label, *(_accuracy(cell) for cell in shown)])
    n_runs = max(len(cell.runs) for cell in cells.values())
    return (
        f"## {title}\n\nTest accuracy in percent, mean ± standard error of "
        f"{plural(n_runs, 'run')}.\n\n"
        + table(["method", *(f"{sparsity:.0%}" for sparsity in sparsities)], rows)
    )


def _accuracy(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.accuracy:.1f} ± {cell.error:.1f}"


def _claims(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    rows = [
        [
            title,
            _sentence(v.claim),
            f"{v.sparsity:.0%}",
            str(v.difference),
            str(v.difference.n_pairs),
            v.outcome,
        ]
        for title, group in verdicts.items()
        for v in group
    ]
    return table(["data, network", "claim", "sparsity", "difference", "pairs", "verdict"], rows)


def _sweeps(results: Sequence[RunResult]) -> list[str]:
    """Return a section for each setting that was changed alone."""
    small = ("digits-noise", "mnist-5k")
    thresholds: dict[str, dict[str, Any]] = {"auto, 0.9": {}}
    thresholds |= {f"{value:g}": {"gamma_sal": value} for value in THRESHOLDS}
    steps: dict[str, dict[str, Any]] = {f"every {_ANY_RECIPE.delta_t} steps": {}}
    steps |= {f"every {value}": {"delta_t": value} for value in STEPS_BETWEEN}
    states = {state: {"grown_state": state} for state in GROWN_STATES}
    moving = list(product(("rigl", "srigl"), (0.9, 0.98)))
    sections = (
        (
            "The ablation threshold, gamma_sal",
            "A neuron is ablated if a smaller share of its fan-in is salient.",
            _changes(results, thresholds, product(small, product(("srigl",), (0.9, 0.98, 0.99)))),
        ),
        (
            "The number of mask updates",
            "Masks are updated until three quarters of the steps are done.",
            _changes(results, steps, product(small, moving)),
        ),
        (
            "AdamW's state at grown weights",
            GROWN_STATE,
            _changes(results, states, product(small, moving), ADAMW),
        ),
    )
    return [f"## {title}\n\n{text}\n\n{rows}" for title, text, rows in sections if rows]


def _changes(
    results: Sequence[RunResult],
    rows: Mapping[str, Mapping[str, Any]],
    columns: Iterable[tuple[str, tuple[str, float]]],
    common: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> str:
    """Return accuracies of the first row, and the differences of the others from it."""
    by_recipe: dict[tuple[str, Recipe], list[RunResult]] = {}
    for result in results:
        if result.spec.network == "mlp" and not result.spec.validation:
            by_recipe.setdefault((result.spec.data, result.spec.recipe), []).append(result)
    cells = {key: cells_of(group) for key, group in by_recipe.items()}
    columns = list(columns)
    lines: dict[str, list[str]] = {label: [label] for label in rows}
    for data, key in columns:
        found = []
        for changes in rows.values():
            recipe = replace(RECIPES[data, "mlp"], **{**common.get(data, {}), **changes})
            found.append(cells.get((data, recipe), {}).get(key))
        first = found[0]
        texts = [str(difference(cell, first)) if cell and first else "" for cell in found]
        for line, text in zip(lines.values(), [_accuracy(first), *texts[1:]], strict=True):
            line.append(text)
    shown = [line for line in lines.values() if any(line[1:])]
    head = [
        f"{DATA_TITLES[data]}, {METHODS[method].label}, {sparsity:.0%}"
        for data, (method, sparsity) in columns
    ]
    return table(["", *head], shown) if len(shown) > 1 else ""


def _method(results: Sequence[RunResult]) -> str:
    shown = {_title(result.spec): result.spec for result in results}
    rows = [
        [
            title,
            f"{recipe.epochs}",
            f"{recipe.batch_size}",
            recipe.optimizer,
            f"{recipe.learning_rate:g}",
            f"{recipe.weight_decay:g}",
        ]
        for title, spec in shown.items()
        for recipe in [RECIPES[spec.data, spec.network]]
    ]
    seconds = sum(result.seconds for result in results)
    columns = ["data, network", "epochs", "batch", "optimiser", "learning rate", "weight decay"]
    return (
        f"{HOW}\n\n{table(columns, rows)}\n\n"
        f"{plural(len(results), 'run')}, {seconds / 60:.0f} minutes of processor time on "
        f"{' and '.join(sorted({result.cpu for result in results}))}."
    )
