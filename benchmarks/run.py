"""``srigl bench cpu`` and ``srigl bench gpu``: measure, and write the result file and its page."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srigl_core._install import install_command
from srigl_core._workers import END_WITH_STDIN, worker_stdin
from srigl_core.benchmarks.devices import CpuDevice
from srigl_core.benchmarks.devices.pools import check_threads, environment
from srigl_core.benchmarks.event_timing import CALLS
from srigl_core.benchmarks.measure import Bench, Settings, chosen, measure, open_bench
from srigl_core.benchmarks.plot import check_matplotlib
from srigl_core.benchmarks.report import write_report
from srigl_core.benchmarks.results import FORMAT, Results, save_results
from srigl_core.errors import BackendUnavailableError, SriglError
from srigl_core.testing.targets import as_backend

__all__ = ["run"]

_MEASURE = """
import sys
from srigl_core.benchmarks.measure import main
main(*sys.argv[1:])
"""

_BUSY = 0.5
"""Processes that wait for a core, on average over a minute, before this one starts."""


def run(
    settings: Settings,
    out: Path,
    *,
    name: str = "",
    opened: Callable[[Settings], Bench] = open_bench,
) -> list[Path]:
    """Measure, and write the JSON, the page and, for a CPU, the plot.

    A CPU is measured in a separate process, and once more with AVX2 alone if the machine has more
    and the run is not a quick one. A GPU is measured in this process, and the JSON is written after
    each layer, marked as incomplete until the end.

    Parameters
    ----------
    settings : Settings
    out : Path
        Folder of the files; created if it does not exist.
    name : str
        Name of the files without their suffix; "" is the name of the device.
    opened : callable
        Returns the GPU and what is measured on it.

    Returns
    -------
    list of Path
        The files, the JSON first. If it has no rows, as with cliffs alone, there is no page.

    Raises
    ------
    SriglError
        If no case is selected, or measuring failed; `BackendUnavailableError` if a device or a
        package is missing.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    is_cpu = settings.device == "cpu"
    if is_cpu:
        _check(settings)
    each = [one for one in _processes(settings) if one.cliffs or chosen(one)]
    if not each:
        raise SriglError(_why_nothing(settings))
    bench = None if is_cpu else opened(settings)
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
        if machine["load"] > _BUSY:
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
        files = [Path(folder, name) for name in ("settings.json", "result.json")]
        files[0].write_text(json.dumps(dataclasses.asdict(settings)), encoding="utf-8")
        command = [sys.executable, "-c", END_WITH_STDIN + _MEASURE, *map(str, files)]
        with worker_stdin() as stdin:
            done = subprocess.run(command, stdin=stdin, env=os.environ | variables, check=False)
        if done.returncode:
            raise SriglError(
                f"the process that measures ended with code {done.returncode}; its message is "
                f"above. Nothing was written"
            )
        process: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
        return process


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


def _check(settings: Settings) -> None:
    for threads in settings.threads:
        check_threads(threads)
    check_matplotlib()
    try:
        import threadpoolctl  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"the benchmark needs threadpoolctl, which cannot be imported ({error}); install it "
            f"with: {install_command('bench')}"
        ) from error


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
