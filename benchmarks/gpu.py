"""``python -m srigl_core.benchmarks.gpu``, for machines without the packages of ``srigl``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from srigl_core.benchmarks.measure import Settings
from srigl_core.benchmarks.predict import printed
from srigl_core.benchmarks.results import load_results
from srigl_core.benchmarks.run import run
from srigl_core.errors import SriglError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 after an error or a wrong result."""
    parser = argparse.ArgumentParser(
        prog="python -m srigl_core.benchmarks.gpu",
        description="Measure the CUDA kernels beside the alternatives.",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, in a minute")
    parser.add_argument(
        "--out", type=Path, default=Path("srigl-bench"), help="folder for gpu.json and gpu.md"
    )
    parser.add_argument("--only", action="append", default=[], help="as in srigl bench gpu")
    parser.add_argument(
        "--predict", action="store_true", help="print predicted times; needs no GPU"
    )
    options = parser.parse_args(arguments)
    if options.predict:
        print(printed(options.only), end="")
        return 0
    try:
        written = run(Settings("gpu", options.quick, tuple(options.only)), options.out)
        wrong = load_results(written[0]).wrong
    except (SriglError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for why in wrong:
        print(f"wrong: {why}", file=sys.stderr)
    print(f"In {options.out}: {', '.join(path.name for path in written)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
