"""Output of the commands: a console, JSON, and this library's errors as one line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from typer.core import TyperArgument, TyperCommand

from srigl_core.errors import SriglError

__all__ = ["Command", "Json", "echo_json", "make_console", "one_line_errors"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]

Arguments = ParamSpec("Arguments")

_WIDTH_OF_FILES = 110
"""Columns of output that is not a terminal and has no width of its own."""


class Command(TyperCommand):
    """A command whose help names arguments by their metavars, without the types of Python."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            if isinstance(param, TyperArgument):
                vars(param)["display_type_rich"] = lambda ctx: None


def make_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr; on a file it is wide enough for tables."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_OF_FILES)
    return console


def echo_json(content: Any) -> None:
    """Print what `content` describes, as JSON."""
    typer.echo(json.dumps(content, indent=1))


def one_line_errors(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Wrap a command so that an error that the user can fix is one line on stderr, exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (SriglError, OSError) as error:
            message = " ".join(str(error).split())
            make_console(stderr=True).print(f"error: {message}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None

    return wrapped
