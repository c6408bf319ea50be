"""Measure the cases of a layer: check every contender's result, then time all in turns."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from srigl_core.benchmarks.cases import Case, Layer
from srigl_core.benchmarks.contenders import Absent
from srigl_core.benchmarks.on_gpu.contenders.contender import Bind, DeviceContender
from srigl_core.benchmarks.on_gpu.device import Device
from srigl_core.benchmarks.on_gpu.limits import GpuLimits, least_seconds, needs
from srigl_core.benchmarks.on_gpu.timing import DeviceRun, DeviceTiming, interleaved_on_device
from srigl_core.benchmarks.problems import Batch, WrongResultError
from srigl_core.benchmarks.results import OURS_ON_GPU, Row, microseconds, rounded
from srigl_core.errors import SriglError

__all__ = ["Bench", "measure_layer"]

_MICRO = 1e6
_MOST_SAID = 300
_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Bench:
    """A device and all that is measured on it.

    Parameters
    ----------
    device : Device
    contenders : sequence of DeviceContender
    absent : sequence of Absent
    limits : GpuLimits
    problem_of : callable of Layer
        Returns its `DeviceProblem`.
    """

    device: Device
    contenders: Sequence[DeviceContender]
    absent: Sequence[Absent]
    limits: GpuLimits
    problem_of: Callable[[Layer], Any]


def measure_layer(
    bench: Bench, cases: Sequence[Case], records: list[dict[str, Any]], n_cases: int
) -> None:
    """Measure the cases of one layer, and add a record of each to `records`.

    Parameters
    ----------
    bench : Bench
    cases : sequence of Case
    records : list of dict
        What the file says of the cases measured so far.
    n_cases : int
        Of the whole run.

    Raises
    ------
    SriglError
        If the device can do no more: one that was given a faulty kernel takes no others.
    """
    layer = _PreparedLayer(bench.problem_of(cases[0].layer))
    for case in cases:
        record = _measured(bench, layer, case)
        records.append(record)
        said = Row(record, OURS_ON_GPU).summary("dense", "tf32", "fp16", "csr")
        print(f"[{len(records)}/{n_cases}] {' '.join(case.words('gpu'))}: {said}", flush=True)
        for what in ("wrong", "failed"):
            for name, why in record[what].items():
                print(f"  {what}: {name}: {why}", flush=True)


def _measured(bench: Bench, layer: _PreparedLayer, case: Case) -> dict[str, Any]:
    """Return the record of a case."""
    started = time.perf_counter()
    contenders = {c.name: c for c in bench.contenders if c.operation == case.operation}
    unfit = {name: why for name, c in contenders.items() if (why := c.unfit(case))}
    batches = layer.problem.batches(max(case.batch, 1), grads=case.operation == "backward")
    runs: dict[str, DeviceRun] = {}
    wrong, failed = {}, {}
    for name, contender in contenders.items():
        if name in unfit:
            continue
        try:
            runs[name] = _checked_run(bench.device, layer, contender, case, batches)
        except WrongResultError as error:
            wrong[name] = _said(error)
        except Exception as error:
            failed[name] = _said(error)
            _check_alive(bench.device, name, failed[name])
    times, errors = interleaved_on_device(runs)
    for name, raised in errors.items():
        failed[name] = _said(raised)
        _check_alive(bench.device, name, failed[name])
    del runs, batches
    bench.device.release()
    seconds, resource = least_seconds(_needs(case, "float32"), bench.limits)
    return {
        **case.facts(),
        "l2": "cold" if case.cold else "warm",
        "ablated": case.layer.n_out - case.layer.n_active,
        "least_us": rounded(seconds * _MICRO),
        "limited_by": resource,
        "contenders": {
            name: _entry(contenders[name], case, timing, bench.limits)
            for name, timing in times.items()
        },
        "unfit": unfit,
        "failed": failed,
        "wrong": wrong,
        "seconds": rounded(time.perf_counter() - started),
    }


class _PreparedLayer:
    """A layer's problem, those made of it, and what each contender made of them."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem
        self._problems: dict[Any, Any] = {}
        self._bound: dict[DeviceContender, Bind | str] = {}

    def problem_of(self, contender: DeviceContender) -> Any:
        """Return the problem that a contender solves."""
        made = contender.problem
        if made not in self._problems:
            self._problems[made] = made(self.problem)
        return self._problems[made]

    def bind(self, contender: DeviceContender) -> Bind:
        """Return what makes a contender's call; what failed once is not tried again."""
        if contender not in self._bound:
            try:
                self._bound[contender] = contender.prepare(self.problem_of(contender))
            except Exception as error:
                self._bound[contender] = _said(error)
        bound = self._bound[contender]
        if isinstance(bound, str):
            raise _CannotPrepareError(bound)
        return bound


class _CannotPrepareError(Exception):
    """A contender cannot take this weight."""


def _checked_run(
    device: Device,
    layer: _PreparedLayer,
    contender: DeviceContender,
    case: Case,
    batches: Sequence[Batch],
) -> DeviceRun:
    """Return the calls of a contender whose first and last results are right."""
    bind = layer.bind(contender)
    calls = [bind(batch) for batch in batches]
    problem = layer.problem_of(contender)
    for nth in (0, -1):
        with contender.around():
            got = contender.read(calls[nth]())
        problem.check(contender.name, case.operation, got, batches[nth], contender.precision)
    return DeviceRun(calls, device, cold=case.cold, around=contender.around)


def _entry(
    contender: DeviceContender, case: Case, timing: DeviceTiming, limits: GpuLimits
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "family": contender.family,
        **microseconds(timing.timing),
        "runs": timing.runs,
        "host_us": rounded(timing.host * _MICRO),
        "clock": timing.clock,
    }
    if timing.dry:
        entry["dry"] = timing.dry
    if contender.family == "ours":
        need = _needs(case, contender.precision.dtype)
        seconds, resource = least_seconds(need, limits)
        entry |= {
            "bytes": int(need.moved),
            "least_us": rounded(seconds * _MICRO),
            "limited_by": resource,
        }
    return entry


def _needs(case: Case, dtype: str) -> Any:
    return needs(case.operation, case.layer, case.batch, _ITEM_BYTES[dtype])


def _said(error: Exception) -> str:
    """Return what an error says in one line, without folders of this machine."""
    if isinstance(error, (_CannotPrepareError, WrongResultError)):
        return str(error)
    lines = str(error).strip().splitlines()
    text = _FOLDERS.sub("", lines[0] if lines else "")
    return f"{type(error).__name__}: {text}"[:_MOST_SAID].rstrip(": ")


def _check_alive(device: Device, name: str, why: str) -> None:
    """Raise SriglError if the device takes no more work, as after a fault in a kernel."""
    try:
        device.wait()
        device.release()
    except Exception as error:
        raise SriglError(
            f"the device takes no more work since {name} ({why}): {_said(error)}; leave that "
            f"contender out, and run again"
        ) from error
