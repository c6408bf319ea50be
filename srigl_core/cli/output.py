"""How the commands write: one console, and errors of this library as one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer
from rich.console import Console

from srigl_core.errors import SriglError

__all__ = ["make_console", "one_line_errors"]

Arguments = ParamSpec("Arguments")

_WIDTH_OF_FILES = 110
"""Columns where the output is no terminal, which has no width of its own."""


def make_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout, or on stderr; wide enough for tables where that is a file."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_OF_FILES)
    return console


def one_line_errors(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Wrap a command: what the user can put right is one line on stderr, and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (SriglError, OSError) as error:
            message = " ".join(str(error).split())
            make_console(stderr=True).print(f"error: {message}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None

    return wrapped
