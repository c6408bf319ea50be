"""``srigl bench gpu``, and ``python -m srigl_core.benchmarks.gpu``: measure the CUDA kernels.

The latter needs none of the command's packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srigl_core.benchmarks.cases import Case, matching
from srigl_core.benchmarks.goals import verdicts
from srigl_core.benchmarks.on_gpu.cases import gpu_cases
from srigl_core.benchmarks.on_gpu.device import CudaDevice
from srigl_core.benchmarks.on_gpu.limits import measure_limits
from srigl_core.benchmarks.on_gpu.measure import Bench, measure_layer
from srigl_core.benchmarks.on_gpu.timing import RUNS
from srigl_core.benchmarks.report import write_report
from srigl_core.benchmarks.results import FORMAT, Results, load_results, save_results
from srigl_core.benchmarks.versions import versions
from srigl_core.errors import SriglError

__all__ = ["GpuSettings", "main", "open_bench", "run_gpu", "wrong_results"]

_OTHER_PACKAGES = (
    *("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cublas", "nvidia-cusparse"),
    *("nvidia-cusparselt-cu13", "nvidia-cuda-nvrtc"),
)


@dataclass(frozen=True)
class GpuSettings:
    """What to measure.

    Parameters
    ----------
    quick : bool
    only : tuple of str
        See `srigl_core.benchmarks.cases.matching`.
    """

    quick: bool = False
    only: tuple[str, ...] = ()


def open_bench() -> Bench:
    """Return this machine's device, with all contenders, once its limits are measured.

    Raises
    ------
    BackendUnavailableError
        If CuPy or PyTorch is missing, or there is no device.
    """
    device = CudaDevice()
    # They import PyTorch.
    from srigl_core.benchmarks.on_gpu.contenders import load_device_contenders
    from srigl_core.benchmarks.on_gpu.problems import DeviceProblem

    contenders, absent = load_device_contenders(device.name)
    limits = measure_limits(device)
    device.release()
    return Bench(
        device, contenders, absent, limits, lambda layer: DeviceProblem(layer, device.name)
    )


def run_gpu(
    settings: GpuSettings,
    out: Path,
    *,
    name: str = "gpu",
    opened: Callable[[], Bench] = open_bench,
) -> list[Path]:
    """Measure, and write the JSON after each layer, and the page at the end.

    Parameters
    ----------
    settings : GpuSettings
    out : Path
        Folder of the files; made if need be.
    name : str
        Of the files, without their ending.
    opened : callable
        Returns what is measured, and on what.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    SriglError
        If nothing is to be measured, or the device failed; `BackendUnavailableError` if it or a
        package is missing. What was measured until then is in the JSON, marked incomplete; so it
        is when the run is interrupted.
    OSError
        If `out` cannot be written.
    """
    cases = matching(gpu_cases(quick=settings.quick), settings.only, "gpu")
    if not cases:
        raise SriglError(f"only={settings.only!r} leaves no case to measure")
    started, clock = datetime.now(UTC), time.perf_counter()
    bench = opened()
    out.mkdir(parents=True, exist_ok=True)
    written = out / f"{name}.json"
    records: list[dict[str, Any]] = []
    content = _content(settings, bench, started, records)

    def save(*, complete: bool = False) -> Results:
        content["incomplete"] = not complete
        content["seconds"] = round(time.perf_counter() - clock, 1)
        results = Results(content)
        save_results(written, results)
        return results

    try:
        for group in _by_layer(cases):
            measure_layer(bench, group, records, len(cases))
            save()
    except BaseException:
        save()
        raise
    results = save(complete=True)
    return [written, *write_report(results, out, name)]


def wrong_results(results: Results) -> list[str]:
    """Return a line for each result that was not what it should be."""
    return [why for row in results.rows for why in row.wrong.values()]


def _by_layer(cases: Sequence[Case]) -> list[list[Case]]:
    return [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.layer)]


def _content(
    settings: GpuSettings, bench: Bench, started: datetime, records: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "benchmark": "gpu",
        "started": started.isoformat(timespec="seconds"),
        "incomplete": True,
        "machine": bench.device.facts(),
        "settings": {"quick": settings.quick, "only": list(settings.only), "runs": RUNS},
        "processes": [
            {
                "instructions": "gpu",
                "versions": versions(*_OTHER_PACKAGES),
                "absent": [dataclasses.asdict(library) for library in bench.absent],
                "limits": [dataclasses.asdict(bench.limits)],
                "cases": records,
            }
        ],
        "seconds": 0.0,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 if that cannot be, or a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m srigl_core.benchmarks.gpu",
        description="Measure the CUDA kernels beside the alternatives.",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, in a minute")
    parser.add_argument(
        "--out", type=Path, default=Path("srigl-bench"), help="folder for gpu.json and gpu.md"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="only cases with one of these words, such as forward, 3072-768, 90%%, batch=8, cold, "
        "ablated; comma means or, a second --only means and",
    )
    given = parser.parse_args(arguments)
    try:
        written = run_gpu(GpuSettings(given.quick, tuple(given.only)), given.out)
        results = load_results(written[0])
    except (SriglError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    words = {True: "yes", False: "NO", None: "not measured"}
    for verdict in verdicts(results):
        if verdict.met is not None:
            print(f"{verdict.name}: {verdict.asked}: {verdict.reached}: {words[verdict.met]}")
    wrong = wrong_results(results)
    for why in wrong:
        print(f"wrong: {why}", file=sys.stderr)
    print(f"In {given.out}: {', '.join(path.name for path in written)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
