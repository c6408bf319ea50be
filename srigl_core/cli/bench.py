"""``srigl bench``: measure the kernels beside the alternatives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from srigl_core.cli.output import make_console, one_line_errors
from srigl_core.errors import SriglError

if TYPE_CHECKING:
    from srigl_core.benchmarks.results import Results

__all__ = ["bench"]


class _WithKernels(TyperGroup):
    """Takes the name of a kernel for that of the command which measures one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first of `args` names, and its arguments."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            args = ["kernel", *args]
        return super().resolve_command(ctx, args)


bench = typer.Typer(
    cls=_WithKernels,
    help="Measure the kernels beside the alternatives; srigl bench KERNEL: somebody else's, too.",
    no_args_is_help=True,
)

_Results = Annotated[Path, typer.Argument(help="JSON that srigl bench wrote.")]


@bench.command()
@one_line_errors
def cpu(
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, in a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for cpu.json, cpu.md and cpu.png.")] = Path(
        "srigl-bench"
    ),
    threads: Annotated[
        str, typer.Option(help="Numbers of threads, such as 1,2; at most the cores there are.")
    ] = "",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only cases with one of these words, such as forward, 3072-768, 90%, batch=8, "
            "threads=1, cold, learned, avx2; comma means or, a second --only means and."
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder with .safetensors of the demo: their layers are measured too."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each case, about.")] = 0.6,
    cliffs: Annotated[
        bool, typer.Option("--cliffs", help="Only the batches 1 to 160 one by one, for jumps.")
    ] = False,
) -> None:
    """Time forward, backward and mask update against dense, CSR and gathers."""
    from srigl_core import get_backend

    get_backend("numba")
    from srigl_core.benchmarks.cpu import run_cpu
    from srigl_core.benchmarks.measure import Settings

    settings = Settings(
        quick=quick,
        threads=_threads(threads),
        only=("cliffs",) if cliffs else tuple(only or ()),
        masks="" if masks is None else str(masks),
        seconds=seconds,
        cliffs=cliffs or not (quick or only),
    )
    written = run_cpu(settings, out, name="cpu-cliffs" if cliffs else "cpu")
    _show_goals(written[0], measured_only=True)
    if cliffs:
        _show_cliffs(written[0])
    names = ", ".join(path.name for path in written)
    make_console().print(f"In {out}: {names}", soft_wrap=True)


@bench.command()
@one_line_errors
def kernel(
    target: Annotated[
        str,
        typer.Argument(metavar="KERNEL", help="A registered backend, or module:attribute."),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, in a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON, the page, the picture.")] = Path(
        "srigl-bench"
    ),
    threads: Annotated[str, typer.Option(help="Numbers of threads, such as 1,2.")] = "1",
    only: Annotated[list[str] | None, typer.Option(help="As in srigl bench cpu.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each case, about.")] = 0.6,
) -> None:
    """Time a kernel beside ours, dense, CSR and gathers; the same as srigl bench KERNEL."""
    from srigl_core import get_backend
    from srigl_core.testing.targets import as_backend

    get_backend("numba")
    name = as_backend(target).name
    from srigl_core.benchmarks.cpu import run_cpu
    from srigl_core.benchmarks.measure import Settings
    from srigl_core.benchmarks.results import load_results

    settings = Settings(
        quick=quick,
        threads=_threads(threads),
        only=("native", *(only or ())),
        seconds=seconds,
        cliffs=False,
        kernel=target,
    )
    written = run_cpu(settings, out, name="kernel")
    _show_beside_ours(load_results(written[0]), name)
    names = ", ".join(path.name for path in written)
    make_console().print(f"In {out}: {names}", soft_wrap=True)


@bench.command()
@one_line_errors
def gpu(
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, in a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md.")] = Path(
        "srigl-bench"
    ),
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only cases with one of these words, such as forward, 3072-768, 90%, batch=8, "
            "cold, ablated; comma means or, a second --only means and."
        ),
    ] = None,
) -> None:
    """Time the CUDA kernels against dense in all precisions, CSR and gathers."""
    from srigl_core.benchmarks.gpu import GpuSettings, run_gpu, wrong_results
    from srigl_core.benchmarks.results import load_results

    written = run_gpu(GpuSettings(quick, tuple(only or ())), out)
    _show_goals(written[0], measured_only=True)
    wrong = wrong_results(load_results(written[0]))
    for why in wrong:
        make_console(stderr=True).print(f"wrong: {why}", markup=False, soft_wrap=True)
    names = ", ".join(path.name for path in written)
    make_console().print(f"In {out}: {names}", soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


@bench.command()
@one_line_errors
def report(results: _Results) -> None:
    """Write the page, and of a CPU the picture, again, beside the JSON."""
    from srigl_core.benchmarks.report import write_report
    from srigl_core.benchmarks.results import load_results

    written = write_report(load_results(results), results.parent, results.stem)
    make_console().print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)


@bench.command()
@one_line_errors
def goals(results: _Results) -> None:
    """Hold the results against the goals."""
    _show_goals(results)


@bench.command()
@one_line_errors
def readme(results: _Results, page: Annotated[Path, typer.Argument(help="README.md")]) -> None:
    """Put the figures between the README's markers."""
    from srigl_core.benchmarks.readme import write_readme

    write_readme(results, page)


def _show_goals(path: Path, *, measured_only: bool = False) -> None:
    from srigl_core.benchmarks.goals import verdicts
    from srigl_core.benchmarks.results import load_results

    words = {True: "[green]yes[/]", False: "[bold red]no[/]", None: "[dim]not measured[/]"}
    table = Table("case", "goal", "reached", "met", box=None)
    for verdict in verdicts(load_results(path)):
        if measured_only and verdict.met is None:
            continue
        table.add_row(
            escape(verdict.name), escape(verdict.asked), escape(verdict.reached), words[verdict.met]
        )
    make_console().print(table)


def _show_beside_ours(results: Results, guest: str) -> None:
    table = Table("case", f"{guest}, us", "ours, us", "best dense, us", "best CSR, us", box=None)
    for row in results.rows:
        bests = (row.best(family) for family in ("dense", "csr"))
        times = (row.time(guest), row.ours, *(best and best[1] for best in bests))
        case = f"{row.operation} {row.layer} {row.sparsity:.0%} batch {row.batch} {row.weights}"
        table.add_row(case, *("" if time is None else f"{time:,.4g}" for time in times))
    make_console().print(table)


def _show_cliffs(path: Path) -> None:
    from srigl_core.benchmarks.results import load_results

    for found in load_results(path).native["cliffs"]:
        for place in found["found"]:
            make_console().print(f"threads {found['threads']}: {place}", soft_wrap=True)


def _threads(given: str) -> tuple[int, ...]:
    """Return the numbers in a list such as "1,2"; one and two, if there are cores, for ""."""
    from srigl_core._machine import n_cores

    if not given:
        return tuple(range(1, min(2, n_cores()) + 1))
    try:
        return tuple(sorted({int(number) for number in given.split(",")}))
    except ValueError:
        raise SriglError(f"threads={given!r} is no list of numbers such as 1,2") from None
