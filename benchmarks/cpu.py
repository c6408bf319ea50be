"""``srigl bench cpu``: start the processes that measure, and write down what they found."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srigl_core._machine import cpu_name, n_cores
from srigl_core.benchmarks.caches import cache_sizes
from srigl_core.benchmarks.measure import Settings, chosen
from srigl_core.benchmarks.plot import check_matplotlib
from srigl_core.benchmarks.pools import check_threads, environment
from srigl_core.benchmarks.report import write_report
from srigl_core.benchmarks.results import FORMAT, Results, save_results
from srigl_core.errors import BackendUnavailableError, SriglError
from srigl_core.testing.targets import as_backend

__all__ = ["run_cpu"]

_BUSY = 0.5
"""Processes that wait for a core, on average over a minute, before this one starts."""


def run_cpu(settings: Settings, out: Path, *, name: str = "cpu") -> list[Path]:
    """Measure, and write the JSON, the page and the picture.

    Parameters
    ----------
    settings : Settings
        Of the process that is held to nothing; one that is held to AVX2 follows where the machine
        has more, unless the run is a quick one.
    out : Path
        Folder of the files; made if need be.
    name : str
        Of the files, without their ending.

    Returns
    -------
    list of Path
        The files; without cases, as with cliffs alone, only the JSON.

    Raises
    ------
    SriglError
        If nothing is to be measured, or measuring failed; `BackendUnavailableError` if a package
        is missing.
    OSError
        If `out` cannot be written.
    """
    _check(settings)
    started, clock = datetime.now(UTC), time.perf_counter()
    each = [settings]
    if not settings.quick and _has_more_than_avx2():
        each.append(dataclasses.replace(settings, instructions="avx2", cliffs=False))
    each = [one for one in each if one.cliffs or chosen(one)]
    if not each:
        raise SriglError(_why_nothing(settings))
    out.mkdir(parents=True, exist_ok=True)
    load = round(os.getloadavg()[0], 2)
    if load > _BUSY:
        print(f"the machine is busy (load {load}): times, on all cores above all, will be off")
    content = {
        "format": FORMAT,
        "benchmark": "cpu",
        "started": started.isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_name(),
            "cores": n_cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "caches": cache_sizes(),
            "load": load,
        },
        "settings": {
            "quick": settings.quick,
            "threads": list(settings.threads),
            "only": list(settings.only),
            "learned masks": bool(settings.masks),
            "seconds for each case": settings.seconds,
        },
        "processes": [_measured(one) for one in each],
        "seconds": round(time.perf_counter() - clock, 1),
    }
    results = Results(content)
    written = out / f"{name}.json"
    save_results(written, results)
    return [written, *(write_report(results, out, name) if results.rows else [])]


def _why_nothing(settings: Settings) -> str:
    """Return why there is no case to measure."""
    why = f"only={settings.only!r} leaves no case to measure"
    if not settings.kernel:
        return why
    able = as_backend(settings.kernel).capabilities
    return (
        f"{why} of those that {settings.kernel} takes on: it declares "
        f"{', '.join(sorted(able.operations))} of {', '.join(sorted(able.value_dtypes))}, and the "
        f"cases are of float32, of float64 without --quick"
    )


def _check(settings: Settings) -> None:
    if not settings.threads:
        raise SriglError("threads=() names no number of threads; give one, such as 1")
    for threads in settings.threads:
        check_threads(threads)
    check_matplotlib()
    try:
        import threadpoolctl  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"the benchmark needs threadpoolctl, which cannot be imported ({error}); install it "
            f'with: pip install "srigl-core[bench]"'
        ) from error


def _has_more_than_avx2() -> bool:
    from srigl_core.backends.numba_cpu.processor import has_avx512

    return has_avx512()


def _measured(settings: Settings) -> dict[str, Any]:
    """Run one process and return what it found; its progress goes to this one's output."""
    variables = environment(max(settings.threads), settings.instructions)
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder, "settings.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(dataclasses.asdict(settings)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "srigl_core.benchmarks.measure", str(asked), str(found)],
            env=os.environ | variables,
            check=False,
        )
        if done.returncode:
            raise SriglError(
                f"the process that measures ended with code {done.returncode}; what it said is "
                f"above. Nothing was written"
            )
        result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
        return result
