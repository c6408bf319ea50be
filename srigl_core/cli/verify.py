"""``srigl verify``: try the laws on backends, without pytest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from srigl_core import Backend, SriglError, get_backend, list_backends

if TYPE_CHECKING:
    from srigl_core.testing.laws import LawResult

__all__ = ["verify_backends"]

STATUSES = ("passed", "failed", "not applicable")
_STYLES = {"passed": "green", "failed": "bold red", "not applicable": "dim"}


def verify_backends(
    names: Sequence[str], *, max_examples: int, seed: int, console: Console
) -> bool:
    """Try every law on every backend named, and print what became of them.

    Parameters
    ----------
    names : sequence of str
        Backends; none means all that can run here.
    max_examples : int
        Problems for each law.
    seed : int
        Of the problems.
    console : Console

    Returns
    -------
    bool
        Whether every backend had a law checked, and no law failed.

    Raises
    ------
    SriglError
        If a name is unknown; `BackendUnavailableError` if one cannot run here. Nothing is tried.
    """
    chosen = [get_backend(name) for name in names or _available()]
    good = True
    for backend in chosen:
        results = _tried(backend, max_examples, seed, console)
        console.print(_table(backend, results))
        for result in results:
            if result.status == "failed":
                console.print(f"\n{result.law.name} failed:", style="bold red")
                console.print(result.detail, markup=False, soft_wrap=True)
        good &= _counted(backend, results, console)
    return good


def _available() -> list[str]:
    names = [status.name for status in list_backends() if status.available]
    if not names:
        raise SriglError("no backend can run here, so nothing can be verified; see srigl info")
    return names


def _tried(backend: Backend, max_examples: int, seed: int, console: Console) -> list[LawResult]:
    from srigl_core.testing import laws

    results = []
    with console.status("") as status:
        for law in laws.LAWS:
            status.update(f"{backend.name}: {escape(law.name)}")
            results += laws.verify(backend, laws=[law], max_examples=max_examples, seed=seed)
    return results


def _table(backend: Backend, results: Sequence[LawResult]) -> Table:
    title = f"backend {backend.name}"
    table = Table("law", "outcome", title=title, title_justify="left", box=None)
    table.add_column("examples", justify="right")
    for result in results:
        style = _STYLES[result.status]
        outcome = f"[{style}]{result.status}[/]"
        if result.status == "not applicable" and result.detail:
            outcome += f"[dim]: {escape(result.detail)}[/]"
        table.add_row(escape(result.law.name), outcome, f"{result.examples:,}")
    return table


def _counted(backend: Backend, results: Sequence[LawResult], console: Console) -> bool:
    """Print the counts; return whether something was checked and nothing failed."""
    counts = {status: sum(r.status == status for r in results) for status in STATUSES}
    n_run = counts["passed"] + counts["failed"]
    tally = ", ".join(f"{count} {status}" for status, count in counts.items())
    examples = sum(result.examples for result in results)
    console.print(f"\n{backend.name}: {n_run} checks run on {examples:,} examples: {tally}")
    if not n_run:
        console.print(f"{backend.name}: nothing was checked", style="bold red")
    console.print()
    return n_run > 0 and not counts["failed"]
