"""What the kernels are meant to reach, as data, and what a run says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from srigl_core.benchmarks.cases import HEADLINE
from srigl_core.benchmarks.results import OURS, OURS_ON_GPU, Results, Row

__all__ = ["GOALS", "GPU_GOALS", "Goal", "Verdict", "forwards", "verdicts"]


@dataclass(frozen=True)
class Goal:
    """Ratios to reach, or a time to stay under, in one case.

    Parameters
    ----------
    name : str
    case : mapping
        What tells the case from others; the headline layer, hot, float32, if it says no more.
    dense, csr, fp16 : float or None
        How many times as long as ours the best of the family must take, at least.
    most_ms : float or None
        Milliseconds that ours may take.
    copy_share : float or None
        Bytes a second that ours moves, at least, as a share of what a copy does.
    most_forwards : float or None
        How many times as long as its forward pass ours may take.
    contender : str
    """

    name: str
    case: Mapping[str, Any]
    dense: float | None = None
    csr: float | None = None
    most_ms: float | None = None
    fp16: float | None = None
    copy_share: float | None = None
    most_forwards: float | None = None
    contender: str = OURS


@dataclass(frozen=True)
class Verdict:
    """What became of one goal.

    Parameters
    ----------
    name : str
    asked, reached : str
        "not measured" where the run lacks the case.
    met : bool or None
        None if it was not measured.
    """

    name: str
    asked: str
    reached: str
    met: bool | None = field(default=None)


def _forward(sparsity: float, batch: int, threads: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "operation": "forward",
        "sparsity": sparsity,
        "batch": batch,
        "threads": threads,
        **more,
    }


GOALS = (
    Goal("90%, batch 1", _forward(0.9, 1), 5.5, 4.8),
    Goal(
        "90%, batch 1, bfloat16 values",
        _forward(0.9, 1),
        7.5,
        contender=f"{OURS}, bfloat16 values",
    ),
    Goal("90%, batch 1, two threads", _forward(0.9, 1, 2), 5.5, 5.0),
    Goal("90%, batch 1, weights cold", _forward(0.9, 1, weights="cold"), 5.0, 3.0),
    Goal("80%, batch 1", _forward(0.8, 1), 3.2, 5.5),
    Goal("99%, batch 1", _forward(0.99, 1), 18.0, 2.4),
    Goal("90%, batch 8", _forward(0.9, 8), 5.5, 2.5),
    Goal("90%, batch 64", _forward(0.9, 64), 7.0, 5.0),
    Goal("90%, batch 256", _forward(0.9, 256), 5.5, 5.0),
    Goal("90%, batch 2048", _forward(0.9, 2048), 5.0, 5.0),
    Goal("99%, batch 256", _forward(0.99, 256), 18.0, 3.0),
    Goal("90%, batch 1, AVX2 only", _forward(0.9, 1, instructions="avx2"), 2.3, 2.0),
    Goal(
        "backward (dx and dvalues), 90%, batch 256",
        {"operation": "backward", "sparsity": 0.9, "batch": 256, "threads": 1},
        4.0,
        5.0,
    ),
    Goal(
        "mask update, two threads",
        {"operation": "update", "sparsity": 0.9, "threads": 2},
        most_ms=10.0,
    ),
)
"""All are of the layer 3072 to 768 in float32, on one thread, if they say no more."""


def _on_gpu(sparsity: float, batch: int, l2: str = "warm") -> dict[str, Any]:
    return {"operation": "forward", "sparsity": sparsity, "batch": batch, "l2": l2}


_BATCH_256 = {0.9: (2.5, 20.0), 0.95: (4.0, None), 0.99: (8.0, None)}
_COLD = {"warm": "", "cold": ", L2 cold"}

GPU_GOALS = (
    *(
        Goal(
            f"{sparsity:.0%}, batch 256{words}",
            _on_gpu(sparsity, 256, l2),
            dense,
            csr,
            contender=OURS_ON_GPU,
        )
        for sparsity, (dense, csr) in _BATCH_256.items()
        for l2, words in _COLD.items()
    ),
    Goal("90%, batch 2048", _on_gpu(0.9, 2048), 1.5, contender=OURS_ON_GPU),
    Goal(
        "768→670000, k = 32, batch 1, float16, L2 cold",
        {
            "operation": "forward",
            "n_in": 768,
            "n_out": 670_000,
            "fan_in": 32,
            "batch": 1,
            "l2": "cold",
        },
        fp16=8.0,
        copy_share=0.8,
        contender=f"{OURS_ON_GPU} float16",
    ),
    Goal(
        "mask update",
        {"operation": "update", "sparsity": 0.9},
        most_ms=1.0,
        contender=OURS_ON_GPU,
    ),
    *(
        Goal(
            f"backward (dx and dvalues), {sparsity:.0%}, batch 256",
            {"operation": "backward", "sparsity": sparsity, "batch": 256},
            most_forwards=3.0,
            contender=OURS_ON_GPU,
        )
        for sparsity in (0.9, 0.95, 0.99)
    ),
)
"""All are of the layer 3072 to 768 in float32, transposes included, if they say no more."""


def verdicts(results: Results) -> list[Verdict]:
    """Return what became of each goal, and of the rule that no batch is a cliff."""
    found = []
    n_in, n_out = HEADLINE
    headline = {"n_in": n_in, "n_out": n_out}
    if results.benchmark == "gpu":
        for goal in GPU_GOALS:
            row = next(results.find(**{**headline, **goal.case}), None)
            found += [*_of_goal(goal, row), *_of_goal_on_gpu(goal, row, results)]
        return found
    for goal in GOALS:
        row = next(results.find(**{**headline, **goal.case}), None)
        found += _of_goal(goal, row)
    for process in results.processes:
        for cliffs in process["cliffs"]:
            found.append(_of_cliffs(cliffs))
    return found


def _of_goal(goal: Goal, row: Row | None) -> list[Verdict]:
    found = []
    if goal.most_ms is not None:
        time = None if row is None else row.time(goal.contender)
        asked = f"under {goal.most_ms:g} ms"
        if time is None:
            found.append(Verdict(goal.name, asked, "not measured"))
        else:
            reached = f"{time / 1000:.2f} ms"
            found.append(Verdict(goal.name, asked, reached, time < 1000 * goal.most_ms))
    for family, label, least in (
        ("dense", "the best dense", goal.dense),
        ("csr", "the best CSR", goal.csr),
        ("fp16", "the best dense float16", goal.fp16),
    ):
        if least is None:
            continue
        asked = f"{least:g} times {label}"
        ratio = None if row is None else row.ratio(family, goal.contender)
        best = None if row is None else row.best(family)
        if ratio is None or best is None:
            found.append(Verdict(goal.name, asked, "not measured"))
        else:
            found.append(Verdict(goal.name, asked, f"{ratio:.2f} ({best[0]})", ratio >= least))
    return found


def _of_goal_on_gpu(goal: Goal, row: Row | None, results: Results) -> list[Verdict]:
    found = []
    if goal.copy_share is not None:
        asked = f"{goal.copy_share:.0%} of the copy bandwidth"
        moved = None if row is None else row.bandwidth(goal.contender)
        if moved is None:
            found.append(Verdict(goal.name, asked, "not measured"))
        else:
            share = moved / results.native["limits"][0]["copy_bandwidth"]
            found.append(Verdict(goal.name, asked, f"{share:.0%}", share >= goal.copy_share))
    if goal.most_forwards is not None:
        asked = f"at most {goal.most_forwards:g} times the forward pass"
        times = forwards(row, results, goal.contender)
        if times is None:
            found.append(Verdict(goal.name, asked, "not measured"))
        else:
            found.append(Verdict(goal.name, asked, f"{times:.2f}", times <= goal.most_forwards))
    return found


def forwards(row: Row | None, results: Results, contender: str) -> float | None:
    """Return how many times as long as its forward pass a contender's backward pass takes."""
    if row is None:
        return None
    same = ("n_in", "n_out", "fan_in", "n_active", "batch")
    case = {name: row.case[name] for name in same}
    forward = next(results.find(operation="forward", ablated=row.ablated, **case), None)
    ours, other = row.time(contender), None if forward is None else forward.time(contender)
    return None if ours is None or other is None else ours / other


def _of_cliffs(cliffs: Mapping[str, Any]) -> Verdict:
    places = cliffs["found"]
    n = cliffs["threads"]
    reached = "none" if not places else f"{len(places)}, the first: {places[0]}"
    return Verdict(
        f"no cliffs, batch 1 to {cliffs['batches'][-1]}, {n} thread{'s' * (n > 1)}",
        "no jump between batches 16 apart",
        reached,
        not places,
    )
