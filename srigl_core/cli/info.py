"""``srigl info``: what is installed, what can run, and if not, why."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from srigl_core import BackendStatus, list_backends
from srigl_core._machine import backend_facts, machine_facts, package_versions

__all__ = ["show_info"]


def show_info(console: Console) -> None:
    """Print versions, machine and backends."""
    facts = Table("", "", box=None, show_header=False, padding=(0, 2))
    known: dict[str, object] = {**package_versions(), **machine_facts()}
    for backend, said in backend_facts().items():
        known.update({f"{backend}: {name}": value for name, value in said.items()})
    for name, value in known.items():
        facts.add_row(name, escape(str(value)))
    console.print(facts)
    console.print()
    console.print(_backend_table(list_backends()))


def _backend_table(statuses: list[BackendStatus]) -> Table:
    table = Table("backend", "can run here", "device", "operations, or what is missing", box=None)
    for status in statuses:
        able = status.capabilities
        if able is None:
            table.add_row(status.name, "no", "", escape(status.reason))
        else:
            table.add_row(status.name, "yes", able.device, ", ".join(sorted(able.operations)))
    return table
