"""``srigl bench model``: the constants of the model of dense products, made from the JSON."""

from __future__ import annotations

import json
from pathlib import Path

from srigl_core.benchmarks.cases import HEADLINE
from srigl_core.benchmarks.results import Results, Row, load_results, rounded
from srigl_core.errors import FileFormatError

__all__ = ["dense_times", "write_dense_times"]

_KINDS = ("dense", "int8")
_MODULE = '''"""Times of dense products; ``srigl bench model`` makes this file of a JSON.

{n_in} inputs, {n_out} neurons, one thread, the fastest library of each kind: {cpu}, {date}.
"""

from __future__ import annotations

__all__ = ["BATCHES", "CALL_NANOSECONDS", "WEIGHT_NANOSECONDS"]

BATCHES = {batches}

CALL_NANOSECONDS = {calls}
"""Of a layer with hardly any weights."""

WEIGHT_NANOSECONDS = {{
{times}}}
"""Of each dense weight, at these batch sizes."""
'''


def dense_times(results: Results) -> str:
    """Return the module `srigl_core._dense_times` with the times of a run on a CPU.

    Raises
    ------
    FileFormatError
        If dense and dense int8 were not both measured, in a tiny layer and the headline layer.
    """
    n_in, n_out = HEADLINE
    case = {"operation": "forward", "threads": 1}
    calls = _bests(next(results.find(**case, n_in=16, n_out=16), None))
    rows = results.find(**case, n_in=n_in, n_out=n_out, sparsity=0.9)
    layer = {row.batch: bests for row in rows if (bests := _bests(row))}
    if not calls or not layer:
        raise FileFormatError(
            "the model needs dense and dense int8 products of 16→16 and 3072→768 at 90%, on one "
            "thread; install PyTorch or ONNX Runtime, and run srigl bench cpu"
        )
    batches = tuple(sorted(layer))
    times = {
        kind: tuple(rounded((layer[n][kind] - calls[kind]) / (n_in * n_out)) for n in batches)
        for kind in _KINDS
    }
    return _MODULE.format(
        n_in=n_in,
        n_out=n_out,
        cpu=results.content["machine"]["cpu"],
        date=results.content["started"][:10],
        batches=batches,
        calls=json.dumps({kind: rounded(time) for kind, time in calls.items()}),
        times="".join(f'    "{kind}": {numbers},\n' for kind, numbers in times.items()),
    )


def write_dense_times(results: Path, module: Path) -> None:
    """Write the constants of `results` to the file of the module."""
    module.write_text(dense_times(load_results(results)), encoding="utf-8")


def _bests(row: Row | None) -> dict[str, float]:
    """Return the shortest time of each kind in nanoseconds; empty if one was not measured."""
    bests = [None if row is None else row.best(kind) for kind in _KINDS]
    times = [1e3 * best[1] for best in bests if best is not None]
    return dict(zip(_KINDS, times, strict=True)) if len(times) == len(_KINDS) else {}
