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
from rich.table import Table

from srigl_core import SriglError, list_backends

if TYPE_CHECKING:
    from rich.status import Status

    from srigl_core.testing import Law, Report

__all__ = ["laws_page", "read_xfails", "verify_kernels"]

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
    max_examples: int,
    seed: int,
    xfails: dict[str, str],
    report: Path | None,
    console: Console,
) -> bool:
    """Try every law on every kernel named, and print what became of them.

    Parameters
    ----------
    targets : sequence of str
        Registered backends, or ``module:attribute``; none means all backends that can run here.
    op : str or None
        Only the laws of this operation; what a function computes.
    max_examples : int
        Problems for each law.
    seed : int
        Of the problems.
    xfails : dict of str to str
        Laws that are expected to fail, and why.
    report : Path or None
        Where to write a list of all reports, as JSON.
    console : Console

    Returns
    -------
    bool
        Whether of every kernel a law was checked, and no law failed that was not expected to.

    Raises
    ------
    SriglError
        If a name is unknown; `BackendUnavailableError` if a kernel cannot run here. Nothing is
        tried.
    """
    from srigl_core.testing import verify
    from srigl_core.testing.targets import as_backend

    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise SriglError(f"--report {report}: it must name a file in a folder that is there")
    names = targets or _available()
    for name in names:
        as_backend(name, op)
    # A kernel that crashes takes this process with it; then at least it is said where.
    if sys.__stderr__ and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    reports: list[Report] = []
    for name in names:
        with console.status("") as status:

            def progress(law: Law, status: Status = status, name: str = name) -> None:
                status.update(f"{escape(name)}: {law.name}")

            found = verify(
                name,
                op=op,
                max_examples=max_examples,
                seed=seed,
                xfails=xfails,
                progress=progress,
            )
        reports.append(found)
        _show(found, console)
        if report is not None:  # now: the next kernel may take this process with it
            content: list[dict[str, Any]] = [each.as_json() for each in reports]
            report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return all(found.ok for found in reports)


def laws_page() -> str:
    """Return all laws, as the page docs/laws.md."""
    from srigl_core.testing import LAWS

    lines = [
        "# Laws",
        "",
        "What `srigl verify` tries on a kernel. `srigl verify --list` wrote this.",
    ]
    for operation in dict.fromkeys(law.operation for law in LAWS):
        lines += ["", f"## {operation}", ""]
        lines += [
            f"- `{law.name}`: {law.statement} Compared with {law.against}, within {law.within}."
            for law in LAWS
            if law.operation == operation
        ]
    return "\n".join(lines)


def read_xfails(path: Path) -> dict[str, str]:
    """Return the laws in a file of lines ``law: reason``; ``#`` begins a comment.

    Raises
    ------
    SriglError
        If a line says something else, or it is no text.
    OSError
        If it cannot be read.
    """
    found = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SriglError(f"{path} is no text in UTF-8 ({error})") from error
    for number, line in enumerate(text.splitlines(), 1):
        said = line.partition("#")[0].strip()
        law, colon, reason = (part.strip() for part in said.partition(":"))
        if said and not (law and colon and reason):
            raise SriglError(f"{path}, line {number}: {line!r} is not 'law: reason'")
        if said:
            found[law] = reason
    return found


def _available() -> list[str]:
    names = [status.name for status in list_backends() if status.available]
    if not names:
        raise SriglError("no backend can run here, so nothing can be verified; see srigl info")
    return names


def _show(report: Report, console: Console) -> None:
    title = f"backend {escape(report.kernel)}"
    table = Table("law", "outcome", title=title, title_justify="left", box=None)
    table.add_column("examples", justify="right")
    for result in report.results:
        outcome = f"[{_STYLES[result.status]}]{result.status}[/]"
        if result.detail:
            outcome += f"[dim]: {escape(result.detail)}[/]"
        table.add_row(escape(result.law.name), outcome, f"{result.examples:,}")
    console.print(table)
    for failure in report.failures_shown():
        console.print(f"\n{failure}", style="red", markup=False, soft_wrap=True)
    style = None if report.n_run else "bold red"
    console.print(f"\n{report.summary}\n", style=style, markup=False, soft_wrap=True)
