"""Train an MLP and a small ConvNet on digits with SRigL: masks, time and memory of both modes.

Each run has its own process, so that its memory can be measured. With `--quick` it takes seconds.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from srigl_core._workers import END_WITH_STDIN, worker_stdin
from srigl_core.reference import UpdateSchedule
from srigl_core.torch import SRigL

try:
    import resource
except ImportError:  # Windows
    resource = None

WORKER = f"""{END_WITH_STDIN}
import runpy, sys
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""

NETWORKS = {
    "MLP": lambda width: nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    ),
    "ConvNet": lambda width: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 128, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 10),
    ),
}
MODES = ("dense", "masked", "condensed")
BATCH, SPARSITY = 64, 0.9


def digits() -> list[torch.Tensor]:
    """Return images to train on and to test on, standardised, and their labels."""
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1.0)
    x, test_x = (((part - mean) / scale).astype(np.float32) for part in (x, test_x))
    return [torch.from_numpy(part) for part in (x, test_x, y, test_y)]


def train(network: str, mode: str, steps: int, width: int) -> dict[str, object]:
    """Return the accuracy, time, memory and connections of one run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, test_x, y, test_y = digits()
    model = NETWORKS[network](width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    srigl = None
    if mode != "dense":
        srigl = SRigL(
            model,
            optimizer,
            mode=mode,
            sparsity=SPARSITY,
            schedule=UpdateSchedule(t_end=int(0.75 * steps), delta_t=max(4, steps // 30)),
            exclude=["1"] if network == "ConvNet" else [],
            init="kaiming_normal",
        )
    draw = torch.Generator().manual_seed(0)
    model(x[:BATCH]).sum().backward()  # compiles the kernels, if they are not in the cache
    before = peak_bytes()
    started = time.perf_counter()
    for _ in range(steps):
        some = torch.randint(len(x), (BATCH,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[some]), y[some]).backward()
        if srigl:
            srigl.after_backward()
        optimizer.step()
        if srigl:
            srigl.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        predicted = model(test_x).argmax(1)
    masks = [srigl.mask(name) for name in srigl.trainer.budgets] if srigl else []
    return {
        "accuracy": float((predicted == test_y).double().mean()),
        "milliseconds": 1e3 * seconds / steps,
        "tensors": tensor_bytes(model, optimizer, masks if mode == "masked" else []),
        "growth": peak_bytes() - before,
        "connections": [mask.flatten().nonzero().flatten().tolist() for mask in masks],
    }


def shared(some: list[list[int]], others: list[list[int]]) -> str:
    """Return the share of equal connections; rounding may decide near ties differently."""
    same = sum(len(set(a) & set(b)) for a, b in zip(some, others, strict=True))
    return f"{same / sum(map(len, some)):.2%}"


def tensor_bytes(model, optimizer, masks) -> int:
    """Return the bytes of weights, gradients, optimiser state, indices and masks."""
    held = [*model.parameters(), *model.buffers(), *masks]
    held += [parameter.grad for parameter in model.parameters()]
    held += [part for state in optimizer.state.values() for part in state.values()]
    return sum(part.nbytes for part in held if torch.is_tensor(part))


def peak_bytes() -> int:
    """Return the largest memory of this process so far; 0 where the system does not tell."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--run", nargs=2, metavar=("NETWORK", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps, width = (12, 256) if options.quick else (options.steps, 2048)
    if options.run:
        print(json.dumps(train(*options.run, steps, width)))
        return
    columns = (
        "network",
        "training",
        "accuracy",
        "ms a step",
        "tensors",
        "peak",
        "same connections",
    )
    table = Table(*columns)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=len(NETWORKS) * len(MODES))
        for network in NETWORKS:
            masked: list[list[int]] = []
            for mode in MODES:
                size = ["--quick"] if options.quick else ["--steps", str(steps)]
                command = [sys.executable, "-c", WORKER, __file__, *size, "--run", network, mode]
                with worker_stdin() as stdin:  # the process ends with this one
                    done = subprocess.run(command, stdin=stdin, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                result = json.loads(done.stdout)
                if mode == "masked":
                    masked = result["connections"]
                table.add_row(
                    network,
                    mode,
                    f"{result['accuracy']:.1%}",
                    f"{result['milliseconds']:.2f}",
                    f"{result['tensors'] / 2**20:.1f} MiB",
                    f"{result['growth'] / 2**20:+.0f} MiB",
                    shared(masked, result["connections"]) if mode == "condensed" else "",
                )
                progress.advance(task)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
