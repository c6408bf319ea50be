"""``srigl verify``: try the laws on kernels, without pytest."""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from srigl_core import SriglError, list_backends
from srigl_core.cli.output import echo_json

if TYPE_CHECKING:
    from srigl_core.testing import Law, Report

__all__ = ["read_xfails", "verify_kernels"]

_STYLES = {
    "passed": "green",
    "failed": "bold red",
    "not applicable": "dim",
    "expected failure": "yellow",
    "unexpected pass": "bold yellow",
}


def verify_kernels(
    targets: Sequence[str],
    *,
    op: str | None,
    report: Path | None,
    coverage: bool,
    as_json: bool,
    console: Console,
    **options: Any,
) -> bool:
    """Try the laws on each kernel, print the results, and write them to `report` as JSON.

    Without targets, all backends that can run here are tried. With `coverage`, what their problems
    had is printed too. With `as_json`, JSON alone is printed, and the console shows the progress.
    `op` and `options` are arguments of `srigl_core.testing.verify`. Returns whether every report
    is `ok`.

    Raises
    ------
    SriglError
        If a name is unknown; `BackendUnavailableError` if a kernel cannot run here. Nothing is
        tried.
    """
    from srigl_core.testing import verify
    from srigl_core.testing.targets import as_backend

    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise SriglError(f"--report {report}: it must name a file in an existing folder")
    names = targets or [status.name for status in list_backends() if status.available]
    if not names:
        raise SriglError("no backend can run here, so nothing can be verified; see srigl info")
    for name in names:
        as_backend(name, op)
    # A kernel that crashes takes this process with it; then the stack shows where.
    if sys.__stderr__ and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    reports: list[Report] = []
    for name in names:
        with console.status("") as status:

            def progress(law: Law, name: str = name, update: Any = status.update) -> None:
                update(f"{escape(name)}: {law.name}")

            reports.append(verify(name, op=op, progress=progress, **options))
        if not as_json:
            _show(reports[-1], console, coverage=coverage)
        if report is not None:  # now, since the next kernel may crash
            content = json.dumps([each.as_json() for each in reports], indent=1)
            report.write_text(content + "\n", encoding="utf-8")
    if as_json:
        echo_json([each.as_json() for each in reports])
    return all(each.ok for each in reports)


def read_xfails(path: Path) -> dict[str, str]:
    """Return the laws in a file of lines ``law: reason``.

    A comment begins with ``#`` at the start of a line, or with ``#`` between spaces.

    Raises
    ------
    SriglError
        If a line has another form, or the file is not text.
    OSError
        If it cannot be read.
    """
    xfails = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SriglError(f"{path} is no text in UTF-8 ({error})") from error
    for number, line in enumerate(text.splitlines(), 1):
        content = "" if line.lstrip().startswith("#") else line.partition(" # ")[0].strip()
        law, colon, reason = (part.strip() for part in content.partition(":"))
        if content and not (law and colon and reason):
            raise SriglError(f"{path}, line {number}: {line!r} is not 'law: reason'")
        if content:
            xfails[law] = reason
    return xfails


def _show(report: Report, console: Console, *, coverage: bool) -> None:
    def show(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    show(f"backend {report.kernel}", "italic")
    for result, line in zip(report.results, report.table, strict=True):
        show(line, _STYLES[result.status])
    for failure in report.failures_shown():
        show(f"\n{failure}", "red")
    if coverage:
        show(f"\n{report.coverage}")
    show(f"\n{report.summary}\n", None if report.n_run else "bold red")
