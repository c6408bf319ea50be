"""``srigl bench cpu`` and ``srigl bench gpu``: measure, and write the result file and its page."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srigl_core._workers import END_WITH_STDIN, worker_stdin
from srigl_core.benchmarks.devices import CpuDevice
from srigl_core.benchmarks.devices.pools import check_threads, environment
from srigl_core.benchmarks.event_timing import CALLS
from srigl_core.benchmarks.measure import Settings, chosen, measure, open_bench
from srigl_core.benchmarks.plot import check_package
from srigl_core.benchmarks.report import write_report
from srigl_core.benchmarks.results import FORMAT, Results, save_results
from srigl_core.errors import SriglError
from srigl_core.testing.targets import as_backend

__all__ = ["run"]

_MEASURE = """
import sys
from srigl_core.benchmarks.measure import main
main(*sys.argv[1:])
"""

_BUSY = 0.5
"""Processes that wait for a core, on average over a minute, before this one starts."""


def run(settings: Settings, out: Path, *, name: str = "") -> list[Path]:
    """Measure, and write the JSON, the page and, for a CPU, the plot; return their paths.

    A CPU is measured in a separate process, and once more with AVX2 alone if the machine has more
    and the run is not a quick one. A GPU is measured in this process, and the JSON is written after
    each layer, marked as incomplete until the end. `name` is that of the files without their
    suffix, if it is not the device's. Without rows, as with cliffs alone, there is no page.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    is_cpu = settings.device == "cpu"
    if is_cpu:
        for threads in settings.threads:
            check_threads(threads)
        check_package("matplotlib")
        check_package("threadpoolctl", "the benchmark")
    each = [one for one in _processes(settings) if one.cliffs or chosen(one)]
    if not each:
        raise SriglError(_why_nothing(settings))
    bench = None if is_cpu else open_bench(settings)
    machine = (CpuDevice(0) if bench is None else bench.device).facts()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name or settings.device}.json"

    def save(*processes: dict[str, Any], complete: bool = False) -> Results:
        results = Results(
            {
                "format": FORMAT,
                "benchmark": settings.device,
                "started": started.isoformat(timespec="seconds"),
                "incomplete": not complete,
                "machine": machine,
                "settings": _described(settings),
                "processes": list(processes),
                "seconds": round(time.perf_counter() - clock, 1),
            }
        )
        save_results(path, results)
        return results

    if bench is None:
        if machine.get("load", 0.0) > _BUSY:
            print(f"the machine is busy (load {machine['load']}): the times will be unreliable")
        processes = [_in_own_process(one) for one in each]
    else:
        processes = [measure(settings, bench, save)]
    results = save(*processes, complete=True)
    return [path, *(write_report(results, out, path.stem) if results.rows else [])]


def _in_own_process(settings: Settings) -> dict[str, Any]:
    """Measure in another process, whose progress appears in the output of this one."""
    variables = environment(max(settings.threads), settings.instructions)
    with tempfile.TemporaryDirectory() as folder:
        file, described = Path(folder, "result.json"), json.dumps(dataclasses.asdict(settings))
        command = [sys.executable, "-c", END_WITH_STDIN + _MEASURE, described, str(file)]
        with worker_stdin() as stdin:
            done = subprocess.run(command, stdin=stdin, env=variables, check=False)
        if done.returncode:
            raise SriglError(
                f"the process that measures ended with code {done.returncode}; its message is "
                f"above. Nothing was written"
            )
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _processes(settings: Settings) -> list[Settings]:
    """Return the settings of each process that measures."""
    if settings.device == "gpu" or settings.quick:
        return [settings]
    from srigl_core.backends.numba_cpu.processor import has_avx512

    avx2 = dataclasses.replace(settings, instructions="avx2", cliffs=False)
    return [settings, avx2] if has_avx512() else [settings]


def _why_nothing(settings: Settings) -> str:
    """Return why no case is selected."""
    why = f"only={settings.only!r} leaves no case to measure"
    if settings.kernel:
        declared = as_backend(settings.kernel).capabilities
        operations, dtypes = (sorted(d) for d in (declared.operations, declared.value_dtypes))
        why += (
            f" that {settings.kernel} computes: it declares {', '.join(operations)} of "
            f"{', '.join(dtypes)}, and the cases are float32, without --quick also float64"
        )
    return why


def _described(settings: Settings) -> dict[str, Any]:
    """Return the settings as the file records them."""
    described = {"quick": settings.quick, "only": list(settings.only)}
    if settings.device == "gpu":
        return described | {"runs": CALLS}
    return described | {
        "threads": list(settings.threads),
        "learned masks": bool(settings.masks),
        "seconds for each case": settings.seconds,
    }
