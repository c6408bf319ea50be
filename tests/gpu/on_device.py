"""Everything that needs a CUDA device, for ``make gpu``: laws, tests, memory checks, benchmark.

    python on_device.py [--examples N] [--out FOLDER] [--without STEP ...]

Every step runs, also after one that failed; ends with 1 if any did.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CHECKS = HERE / "check_kernels.py"
TESTS = HERE / "test_cupy.py", HERE.parent / "frameworks" / "test_cuda_arrays.py"
SANITIZER = "compute-sanitizer"
UNSUPPORTED = "Device not supported"
"""What the sanitizer says on a virtual machine that hides the device's debugger."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks", "results"))
    parser.add_argument("--without", nargs="*", default=[], help="steps to leave out")
    options = parser.parse_args(arguments)
    python = sys.executable
    check = [python, str(CHECKS), "--device"]
    exact = [*check, "--examples", "0", "--without-pool", "--only"]
    exact += ["products", "gradients", "updates", "not finite"]
    steps = {
        "laws": [*check, "--examples", str(options.examples)],
        "tests": [python, "-m", "pytest", "--import-mode=importlib", "-q", *map(str, TESTS)],
        "memcheck": [*_watched("memcheck"), *exact],
        "racecheck": [*_watched("racecheck"), *exact],
        "benchmark": [python, "-m", "srigl_core.benchmarks.gpu", "--out", str(options.out)],
    }
    failed = [name for name in steps if name not in options.without and not _run(name, steps[name])]
    print("all steps passed" if not failed else f"failed: {', '.join(failed)}")
    return int(bool(failed))


def _watched(tool: str) -> list[str]:
    return [SANITIZER, "--tool", tool, "--error-exitcode", "9"]


def _run(name: str, command: list[str]) -> bool:
    """Run a step and say what came of it; what cannot be had is no failure."""
    if command[0] == SANITIZER and shutil.which(SANITIZER) is None:
        print(f"== {name}: left out, {SANITIZER} is not installed", flush=True)
        return True
    print(f"== {name}", flush=True)
    started = time.monotonic()
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    watched = command[0] == SANITIZER
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE if watched else None,
        stderr=subprocess.STDOUT if watched else None,
        text=True,
        check=False,
    )
    if watched:
        print(done.stdout[-4000:])
        if UNSUPPORTED in done.stdout:
            print(f"== {name}: cannot be had, {UNSUPPORTED.lower()}", flush=True)
            return True
    verdict = "passed" if done.returncode == 0 else f"FAILED with code {done.returncode}"
    print(f"== {name}: {verdict} in {time.monotonic() - started:.0f} s", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
