"""Measure the cases: check every contender's result, then time all contenders in turns.

``python -m srigl_core.benchmarks.measure SETTINGS RESULT`` is the process that measures a CPU. It
is a separate process because libraries read their environment variables when they are loaded, and
because other work of an interpreter would affect the times.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srigl_core._machine import package_versions
from srigl_core.benchmarks.cases import Case, avx2_cases, cpu_cases, gpu_cases, matching
from srigl_core.benchmarks.contenders import external_kernel, load_contenders
from srigl_core.benchmarks.contenders.contender import Bind, Call, Contender
from srigl_core.benchmarks.devices import CpuDevice, Device, GpuDevice
from srigl_core.benchmarks.problems import FULL, Batch, Precision, Problem, WrongResultError
from srigl_core.benchmarks.results import Row, rounded
from srigl_core.benchmarks.roofline import Peaks, least_time, work_of
from srigl_core.errors import SriglError
from srigl_core.testing.targets import as_backend

__all__ = ["Bench", "Settings", "chosen", "measure", "open_bench"]

_LONGEST_MESSAGE = 300
_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")


@dataclass(frozen=True)
class Settings:
    """What to measure in one process. A GPU only uses the first three."""

    device: str = "cpu"  # or "gpu"
    quick: bool = False  # only a few cases
    only: tuple[str, ...] = ()  # see `srigl_core.benchmarks.cases.matching`
    threads: tuple[int, ...] = (1, 2)
    masks: str = ""  # folder of learned layers
    seconds: float = 0.6  # about how long each case is measured
    cliffs: bool = False  # measure each batch size, too
    instructions: str = "native"  # or "avx2"
    kernel: str = ""  # an external kernel, as ``module:attribute`` or a registered name


@dataclass(frozen=True)
class Bench:
    """A device with its contenders, the libraries that are absent, and its peaks by threads.

    The number of threads is 0 on a GPU.
    """

    device: Device
    contenders: Sequence[Contender]
    absent: Sequence[dict[str, str]]
    peaks: dict[int, Peaks]


def open_bench(settings: Settings) -> Bench:
    """Return the device of this machine with its contenders, and measure its peak rates."""
    is_gpu = settings.device == "gpu"
    device: Device = GpuDevice() if is_gpu else CpuDevice(settings.seconds)
    contenders, absent = load_contenders(settings.device)
    if settings.kernel:
        contenders += external_kernel.contenders(as_backend(settings.kernel))
    peaks = {n: device.peaks(n) for n in ((0,) if is_gpu else settings.threads)}
    return Bench(device, contenders, absent, peaks)


def chosen(settings: Settings) -> list[Case]:
    """Return the cases that `settings` selects."""
    if settings.device == "gpu":
        return matching(gpu_cases(quick=settings.quick), settings.only)
    if settings.instructions == "avx2":
        cases = avx2_cases(settings.threads)
    else:
        masks = Path(settings.masks) if settings.masks else None
        cases = cpu_cases(quick=settings.quick, threads=settings.threads, masks=masks)
    if settings.kernel:
        backend = as_backend(settings.kernel)
        cases = [case for case in cases if external_kernel.takes(backend, case)]
    return matching(cases, settings.only)


def measure(
    settings: Settings,
    bench: Bench,
    save: Callable[[dict[str, Any]], object] = lambda process: None,
) -> dict[str, Any]:
    """Measure everything that `settings` selects, and return this process's part of the file.

    `save` is called with the result so far before each layer and at the end, also after an error:
    the device may fail, for example after a fault in a kernel.
    """
    cases, device = chosen(settings), bench.device
    for library in bench.absent:
        print("not installed: {library}: {install} ({reason})".format(**library), flush=True)
    records: list[dict[str, Any]] = []
    process: dict[str, Any] = {
        "instructions": "gpu" if settings.device == "gpu" else settings.instructions,
        "versions": package_versions(*device.packages),
        "absent": list(bench.absent),
        "limits": [dataclasses.asdict(peaks) for peaks in bench.peaks.values()],
        "cases": records,
        "cliffs": [],
    }
    try:
        for _, group in itertools.groupby(cases, key=lambda case: (case.layer, case.dtype)):
            save(process)
            layer = None
            for case in group:
                layer = layer or _PreparedLayer(case, device)
                records.append(_measured(bench, layer, case))
                _show(Row(records[-1]), case, len(records), len(cases))
    finally:
        save(process)
    if settings.cliffs:
        from srigl_core.benchmarks.cliffs import measure_cliffs

        process["cliffs"] = [measure_cliffs(n) for n in settings.threads]
    return process | device.software()


def _show(row: Row, case: Case, number: int, n_cases: int) -> None:
    """Print a line of progress, and what went wrong."""
    print(f"[{number}/{n_cases}] {' '.join(case.words)}: {row.summary()}", flush=True)
    for why in ("wrong", "failed"):
        for name, reason in row.left_out(why).items():
            print(f"  {why}: {name}: {reason}", flush=True)


def _measured(bench: Bench, layer: _PreparedLayer, case: Case) -> dict[str, Any]:
    """Return the record of a case."""
    device, peaks = bench.device, bench.peaks[case.threads]
    contenders = {c.name: c for c in bench.contenders if c.operation == case.operation}
    unfit = {name: why for name, c in contenders.items() if (why := c.unfit(case))}
    wrong: dict[str, str] = {}
    failed: dict[str, str] = {}
    runs: dict[str, Any] = {}

    def fail(name: str, error: Exception) -> None:
        failed[name] = _message(error)
        _check_alive(device, name, failed[name])

    with device.limit(case.threads):
        batches = layer.batches(case)
        for name in (name for name in contenders if name not in unfit):
            try:
                runs[name] = layer.checked_run(contenders[name], case, batches)
            except WrongResultError as error:
                wrong[name] = str(error)
            except Exception as error:
                fail(name, error)
        timings, errors = device.time(runs, case.threads)
    for name, raised in errors.items():
        fail(name, raised)
    del runs, batches
    device.release()
    entries = {}
    for name, timing in timings.items():
        contender = contenders[name]
        bounds = _bounds(case, peaks, contender.precision) if contender.family == "ours" else {}
        entries[name] = {"family": contender.family, **timing, **bounds}
    least = _bounds(case, peaks)
    return {
        **case.facts,
        "least_us": least["least_us"],
        "limited_by": least["limited_by"],
        "contenders": entries,
        "unfit": unfit,
        "failed": failed,
        "wrong": wrong,
    }


def _bounds(case: Case, peaks: Peaks, precision: Precision = FULL) -> dict[str, Any]:
    """Return the bytes that a case moves at least, and its least time."""
    work = work_of(case, peaks, precision)
    seconds, resource = least_time(work, peaks, cold=case.cold)
    least = rounded(1e6 * seconds)
    return {"bytes": round(work.moved), "least_us": least, "limited_by": resource}


class _PreparedLayer:
    """A layer's problem, and what each contender made of its weight."""

    def __init__(self, case: Case, device: Device) -> None:
        problem = functools.partial(Problem, case.layer, device.arrays, case.dtype)
        whole = functools.cache(lambda seed: problem(seed=seed))
        self._device, self._whole = device, whole
        self._derived = functools.cache(lambda derive, seed: derive(whole(seed)))
        self._bound: dict[tuple[Contender, int], Bind | str] = {}

    def batches(self, case: Case) -> list[Batch]:
        """Return the copies of the inputs that calls take in turns."""
        size, threads = max(case.batch, 1), case.threads or None
        return [
            self._whole(0).batch(size, number, grad=case.operation == "backward", threads=threads)
            for number in range(self._device.copies)
        ]

    def checked_run(self, contender: Contender, case: Case, batches: Sequence[Batch]) -> Any:
        """Return the calls of a contender, after a check of its first and its last result."""
        calls = [self._call(contender, batch) for batch in batches]
        problem = self._problem(contender)
        for number in sorted({0, len(calls) - 1}):
            with contender.around():
                result = calls[number]()
            problem.check(contender.name, case.operation, result, batches[number])
        return self._device.run(
            calls,
            cold=case.cold,
            around=contender.around,
            other=lambda: self._call(contender, batches[0], seed=1),
        )

    def _problem(self, contender: Contender, seed: int = 0) -> Problem:
        """Return the problem that a contender solves; another seed is another weight."""
        problem: Problem = self._derived(contender.problem, seed)
        return problem.at(contender.precision)

    def _call(self, contender: Contender, batch: Batch, seed: int = 0) -> Call:
        """Return a contender's call; a preparation that failed is not tried again."""
        key = (contender, seed)
        if key not in self._bound:
            try:
                self._bound[key] = contender.bind(self._problem(contender, seed))
            except Exception as error:
                self._bound[key] = _message(error)  # a stored exception would hold arrays
        bind = self._bound[key]
        if isinstance(bind, str):
            raise _CannotPrepareError(bind)
        return bind(batch)


class _CannotPrepareError(Exception):
    """A contender cannot take this weight."""


def _message(error: Exception) -> str:
    """Return the message of an error in one line, without folders of this machine."""
    if isinstance(error, _CannotPrepareError):
        return str(error)
    lines = str(error).strip().splitlines()
    text = _FOLDERS.sub("", lines[0] if lines else "")
    return f"{type(error).__name__}: {text}"[:_LONGEST_MESSAGE].rstrip(": ")


def _check_alive(device: Device, name: str, why: str) -> None:
    """Raise SriglError if the device fails, for example after a fault in a kernel."""
    try:
        device.release()
    except Exception as error:
        raise SriglError(
            f"the device fails since {name} ran ({why}): {_message(error)}; leave that contender "
            f"out, and run again"
        ) from error


def main(settings_json: str, result_file: str) -> None:
    """Read the settings, measure, and write the result."""
    read: dict[str, Any] = json.loads(settings_json)
    settings = Settings(**read | {name: tuple(read[name]) for name in ("only", "threads")})
    try:
        result = measure(settings, open_bench(settings))
    except SriglError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
