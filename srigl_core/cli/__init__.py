"""The command ``srigl``. Needs the extra ``cli``, and says so where that is missing."""

from __future__ import annotations

import io
import sys

from srigl_core._install import install_command

__all__ = ["main"]


def main() -> None:
    """Run the command line; the entry point of ``srigl``."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(
            f"the command srigl needs the package {error.name!r}, which is not installed; "
            f"install it with: {install_command('cli')}",
            file=sys.stderr,
        )
        sys.exit(1)
    from srigl_core.cli.app import app

    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr: in Windows' code pages, not every name of a layer or a file can be printed.
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="srigl")
