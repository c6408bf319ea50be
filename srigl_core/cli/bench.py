"""``srigl bench``: measure the kernels beside the alternatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from srigl_core.cli.output import Command, make_console, one_line_errors
from srigl_core.errors import SriglError

if TYPE_CHECKING:
    from srigl_core.benchmarks.results import Results, Row

__all__ = ["bench"]


class _WithKernels(TyperGroup):
    """Takes an unknown command for the name of a kernel to measure."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first of `args` names, and its arguments."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            args = ["kernel", *args]
        return super().resolve_command(ctx, args)


bench = typer.Typer(
    cls=_WithKernels,
    help="Measure the kernels beside the alternatives; srigl bench KERNEL: an external one, too.",
    no_args_is_help=True,
)

_Quick = Annotated[bool, typer.Option("--quick", help="A few cases, in two minutes.")]
_Out = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="For the JSON, the page and, for a CPU, the plot."),
]
_Threads = Annotated[
    str,
    typer.Option(
        metavar="N,...", help="Numbers of threads, such as 1,2; at most the number of cores."
    ),
]
_Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORD,...",
        help="Only cases with one of these words, such as forward, 3072-768, 90%, batch=8, "
        "threads=1, cold, learned, avx2, and ablated on a GPU; comma means or, a second --only "
        "means and.",
    ),
]
_Seconds = Annotated[float, typer.Option(metavar="N", min=0.0, help="For each case, about.")]
_Results = Annotated[Path, typer.Argument(metavar="FILE", help="JSON that srigl bench wrote.")]
_Runs = Annotated[
    Path, typer.Argument(metavar="FILE", help="JSON that srigl bench wrote, or a folder of them.")
]
_OUT = Path("srigl-bench")
_MOST_SHOWN = 24
"""Of more rows than these, only the headline layer's are printed."""


@bench.command(cls=Command)
@one_line_errors
def cpu(
    quick: _Quick = False,
    out: _Out = _OUT,
    threads: _Threads = "",
    only: _Only = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Of .safetensors of save_condensed: measure these layers, too.",
        ),
    ] = None,
    seconds: _Seconds = 0.6,
    cliffs: Annotated[
        bool, typer.Option("--cliffs", help="Only the batches 1 to 160 one by one, for jumps.")
    ] = False,
) -> None:
    """Time forward, backward and mask update against dense, dense int8, CSR and gathers."""
    from srigl_core import get_backend

    get_backend("numba")
    results = _measured(
        out,
        name="cpu-cliffs" if cliffs else "",
        quick=quick,
        threads=_threads(threads),
        only=("cliffs",) if cliffs else tuple(only or ()),
        masks="" if masks is None else str(masks),
        seconds=seconds,
        cliffs=cliffs or not (quick or only),
    )
    for measured in results.native["cliffs"] if cliffs else []:
        for place in measured["found"]:
            _print(f"threads {measured['threads']}: {place}")
    _summarize(results)
    _exit_code(results)


@bench.command(cls=Command)
@one_line_errors
def kernel(
    target: Annotated[
        str,
        typer.Argument(metavar="KERNEL", help="A registered backend, or module:attribute."),
    ],
    quick: _Quick = False,
    out: _Out = _OUT,
    threads: _Threads = "1",
    only: _Only = None,
    seconds: _Seconds = 0.6,
) -> None:
    """Time a kernel beside srigl, dense, CSR and gathers; the same as srigl bench KERNEL."""
    from srigl_core import get_backend
    from srigl_core.testing.targets import as_backend

    get_backend("numba")
    name = as_backend(target).name
    results = _measured(
        out,
        name="kernel",
        quick=quick,
        threads=_threads(threads),
        only=("native", *(only or ())),
        seconds=seconds,
        kernel=target,
    )
    _show_times(results.rows, name)
    _exit_code(results, name)


@bench.command(cls=Command)
@one_line_errors
def gpu(
    quick: _Quick = False,
    out: _Out = _OUT,
    only: _Only = None,
    predict: Annotated[
        bool,
        typer.Option("--predict", help="Only print predicted times for known GPUs; needs none."),
    ] = False,
) -> None:
    """Time the CUDA kernels against dense in all precisions, CSR and gathers."""
    from srigl_core.benchmarks.gpu import main

    words = [argument for word in only or () for argument in ("--only", word)]
    flags = [*(["--quick"] if quick else []), *(["--predict"] if predict else [])]
    raise typer.Exit(main(["--out", str(out), *words, *flags]))


@bench.command(cls=Command)
@one_line_errors
def report(results: _Results) -> None:
    """Write the page and, for a CPU, the plot again, beside the JSON."""
    from srigl_core.benchmarks.report import write_report
    from srigl_core.benchmarks.results import load_results

    written = write_report(load_results(results), results.parent, results.stem)
    _print(f"wrote {', '.join(map(str, written))}")


@bench.command(cls=Command)
@one_line_errors
def compare(old: _Runs, new: _Runs) -> None:
    """Show what got slower or faster beyond the spread; exit with 1 if something got slower."""
    from srigl_core.benchmarks.compare import compare as compare_runs
    from srigl_core.benchmarks.compare import load_runs

    comparison = compare_runs(load_runs(old), load_runs(new))
    for warning in comparison.warnings:
        _print(f"warning: {warning}", to_stderr=True)
    for word, changes in (("slower", comparison.slower), ("faster", comparison.faster)):
        _print(f"{len(changes)} of {comparison.n_times} times are {word} beyond the spread")
        for change in changes:
            _print(f"  {change}")
    if comparison.others is not None:
        _print(f"the other contenders take {comparison.others:.2f} times as long (median)")
    if comparison.slower:
        raise typer.Exit(1)


@bench.command(cls=Command)
@one_line_errors
def readme(
    results: _Results, page: Annotated[Path, typer.Argument(metavar="PAGE", help="README.md")]
) -> None:
    """Write the table between the README's markers, and the picture beside the JSON."""
    from srigl_core.benchmarks.readme import write_readme

    write_readme(results, page)


@bench.command(cls=Command)
@one_line_errors
def model(
    results: _Results,
    module: Annotated[Path, typer.Argument(metavar="MODULE", help="srigl_core/_dense_times.py")],
) -> None:
    """Write the times of dense products that recommend and print(plan) estimate with."""
    from srigl_core.benchmarks.dense_times import write_dense_times

    write_dense_times(results, module)


def _measured(out: Path, *, name: str = "", **settings: Any) -> Results:
    """Measure, print the names of the files, and return their content."""
    from srigl_core.benchmarks.measure import Settings
    from srigl_core.benchmarks.results import load_results
    from srigl_core.benchmarks.run import run

    written = run(Settings(**settings), out, name=name)
    _print(f"In {out}: {', '.join(path.name for path in written)}")
    return load_results(written[0])


def _summarize(results: Results) -> None:
    """Print what the machine measured: times of the headline layer, and who wins how often."""
    from srigl_core.benchmarks.cases import HEADLINE
    from srigl_core.benchmarks.verdict import counts

    forward = [row for row in results.rows if row.operation == "forward" and not row.is_empty]
    if len(forward) > _MOST_SHOWN:
        n_in, n_out = HEADLINE
        threads = min(row.threads for row in forward)
        forward = list(results.find(operation="forward", n_in=n_in, n_out=n_out, threads=threads))
    for library in results.native["absent"]:
        _print("not installed: {library}: {install}".format(**library))
    _show_times(forward)
    bests = Counter(best[0] for row in forward if (best := row.best("int8")))
    if bests:
        _print("best dense int8: " + ", ".join(f"{name} in {n}" for name, n in bests.items()))
    for sentence in counts(results):
        _print(sentence)


def _show_times(rows: Iterable[Row], kernel: str = "") -> None:
    """Print a table of our times and the best ones of each family, after those of `kernel`."""
    from srigl_core.benchmarks.results import FAMILIES

    rows = list(rows)
    families = [family for family in FAMILIES if any(row.best(family) for row in rows)]
    ours = [f"{kernel}, us"] if kernel else []
    table = Table("case", *ours, "srigl, us", *(f"{FAMILIES[f]}, us" for f in families), box=None)
    for row in rows:
        times = [row.time(kernel)] if kernel else []
        times += [row.ours, *((row.best(family) or ("", None))[1] for family in families)]
        table.add_row(row.label, *("" if time is None else f"{time:,.4g}" for time in times))
    if rows:
        make_console().print(table)


def _exit_code(results: Results, kernel: str = "") -> None:
    """Exit with 1 if a result was wrong, or `kernel` failed, after printing why."""
    errors = [f"wrong: {why}" for why in results.wrong]
    errors += [
        f"failed: {name}: {why}"
        for row in results.rows
        for name, why in row.left_out("failed").items()
        if name == kernel
    ]
    for error in dict.fromkeys(errors):
        _print(error, to_stderr=True)
    if errors:
        raise typer.Exit(1)


def _print(text: str, *, to_stderr: bool = False) -> None:
    make_console(stderr=to_stderr).print(text, markup=False, soft_wrap=True)


def _threads(text: str) -> tuple[int, ...]:
    """Return the numbers in a list such as "1,2"; for "" one and two, if there are two cores."""
    from srigl_core._machine import n_cores

    if not text:
        return tuple(range(1, min(2, n_cores()) + 1))
    try:
        return tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        raise SriglError(f"threads={text!r} is not a list of numbers such as 1,2") from None
