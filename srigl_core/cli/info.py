"""``srigl info``: the versions, the machine, and which backends can run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from srigl_core import BackendStatus, list_backends
from srigl_core._machine import backend_facts, machine_facts, package_versions

__all__ = ["info_as_json", "show_info"]


def show_info(console: Console) -> None:
    """Print versions, machine and backends."""
    table = Table("", "", box=None, show_header=False, padding=(0, 2))
    rows: dict[str, object] = {**package_versions(), **machine_facts()}
    for backend, runtime_info in backend_facts().items():
        rows.update({f"{backend}: {name}": value for name, value in runtime_info.items()})
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    console.print(table)
    console.print()
    console.print(_backend_table(list_backends()))


def info_as_json() -> dict[str, Any]:
    """Return the same as JSON types."""
    facts = backend_facts()
    backends = {}
    for status in list_backends():
        able, found = status.capabilities, {"can run here": status.available}
        about: dict[str, object] = {"reason": status.reason}
        if able is not None:
            about = {"device": able.device, "operations": sorted(able.operations)}
        backends[status.name] = {**found, **about, **facts.get(status.name, {})}
    return {"versions": package_versions(), "machine": machine_facts(), "backends": backends}


def _backend_table(statuses: list[BackendStatus]) -> Table:
    table = Table("backend", "can run here", "device", "operations, or what is missing", box=None)
    for status in statuses:
        capabilities = status.capabilities
        if capabilities is None:
            table.add_row(status.name, "no", "", escape(status.reason))
        else:
            operations = ", ".join(sorted(capabilities.operations))
            table.add_row(status.name, "yes", capabilities.device, operations)
    return table
