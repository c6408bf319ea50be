"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srigl_core import __version__
from srigl_core.cli.bench import bench
from srigl_core.cli.files import condense, export, quantize, show
from srigl_core.cli.output import Command, Json, echo_json, make_console, one_line_errors

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
for _command in (show, condense, quantize, export):
    app.command(cls=Command)(_command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"srigl-core {__version__}")
        raise typer.Exit


@app.callback()
def srigl(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Dynamic sparse training with structured sparsity (SRigL)."""


@app.command(cls=Command)
@one_line_errors
def info(
    timing: Annotated[
        bool, typer.Option("--timing", help="Also measure first results; takes a minute.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, backends and why one cannot run, threads and caches."""
    from srigl_core.cli.first_use import BATCHES, measure_first_use, show_first_use
    from srigl_core.cli.info import info_as_json, show_info

    if as_json:
        times = {f"batch {batch}": measure_first_use(batch) for batch in BATCHES if timing}
        echo_json(info_as_json() | ({"seconds": times} if timing else {}))
        return
    console = make_console()
    show_info(console)
    if timing:
        console.print()
        show_first_use(console)


@app.command(cls=Command)
@one_line_errors
def verify(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KERNEL",
            help="A registered backend, or the module:attribute of a class or a function. "
            "By default all backends that can run here.",
        ),
    ] = None,
    op: Annotated[
        str | None,
        typer.Option(
            metavar="OPERATION",
            help="Check only this operation. For a function: the one that it computes.",
        ),
    ] = None,
    max_examples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Problems for each law.")
    ] = 100,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the problems.")] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file to write the results to.")
    ] = None,
    xfails: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File of laws that are expected to fail: lines 'law: reason'."
        ),
    ] = None,
    list_laws: Annotated[
        bool, typer.Option("--list", help="Print the laws; check nothing.")
    ] = False,
    coverage: Annotated[
        bool,
        typer.Option("--coverage", help="Also print which sizes, types and layouts were drawn."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that kernels obey the laws: products, chains, mask updates, remapped state."""
    from srigl_core.cli.verify import read_xfails, verify_kernels
    from srigl_core.testing.laws import laws_page

    if list_laws:
        typer.echo(laws_page())
        return
    good = verify_kernels(
        targets or [],
        op=op,
        max_examples=max_examples,
        seed=seed,
        xfails={} if xfails is None else read_xfails(xfails),
        report=report,
        coverage=coverage,
        as_json=as_json,
        console=make_console(stderr=as_json),
    )
    if not good:
        raise typer.Exit(1)


@app.command(cls=Command)
@one_line_errors
def check_trace(
    trace: Annotated[Path, typer.Argument(metavar="FILE", help="What UpdateTrace.save wrote.")],
) -> None:
    """Check mask updates recorded during training against the definition."""
    from srigl_core.testing import check_trace

    verdicts, console = check_trace(trace), make_console()
    wrong = [verdict for verdict in verdicts if not verdict]
    for verdict in wrong:
        console.print(str(verdict), markup=False, soft_wrap=True)
    console.print(f"{len(verdicts)} updates, {len(wrong)} of them not the definition's")
    if wrong:
        raise typer.Exit(1)
