"""Compare the time of condensed and dense convolutions, for several windows and sparsities.

A 1x1 convolution is a product over the channels; a larger window is unfolded first, which copies
the input. Weights are random. With `--quick` there are few calls.
"""

import argparse
import functools
import statistics
import time

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import srigl_core
from srigl_core.torch import CondensedConv2d, CondensedLinear

LAYERS = ((256, 256, 1), (1024, 256, 1), (256, 256, 3), (64, 64, 3))
SPARSITIES, IMAGES, SIDE = (0.9, 0.99), 4, 14


def median_milliseconds(calls, seconds):
    """Return the median time of each call; the calls take turns."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(samples) for name, samples in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    srigl_core.get_backend("numba")
    names = [f"condensed {sparsity:.0%}" for sparsity in SPARSITIES]
    columns = ("channels", "window", "dense ms", *(f"{name} ms" for name in names))
    table = Table(*columns, *(f"faster at {sparsity:.0%}" for sparsity in SPARSITIES))
    with torch.no_grad(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(LAYERS))
        for n_in, n_out, window in LAYERS:
            x = torch.randn(IMAGES, n_in, SIDE, SIDE)
            dense = nn.Conv2d(n_in, n_out, window, padding=window // 2)
            calls = {"dense": functools.partial(dense, x)}
            for name, sparsity in zip(names, SPARSITIES, strict=True):
                linear = CondensedLinear(n_in * window**2, n_out, sparsity=sparsity, rng=0)
                calls[name] = functools.partial(CondensedConv2d.like(dense, linear), x)
            times = median_milliseconds(calls, 0.2 if options.quick else 5.0)
            table.add_row(
                f"{n_in} to {n_out}",
                f"{window}x{window}",
                *(f"{times[name]:.2f}" for name in ("dense", *names)),
                *(f"{times['dense'] / times[name]:.2f}" for name in names),
            )
            progress.advance(task)
    console = Console(width=110)
    console.print(table)
    console.print(f"medians; {IMAGES} images of {SIDE}x{SIDE}, {options.threads} threads, float32")


if __name__ == "__main__":
    main()
