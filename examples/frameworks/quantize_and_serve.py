"""Train a sparse network on digits, condense and quantise it, save it, and serve it.

The table has the test accuracy, the bytes of the weights, and the time of an answer on one thread
for each form of the network. With `--quick` it takes seconds.
"""

import argparse
import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import srigl_core
from srigl_core.benchmarks.timing import median_times
from srigl_core.reference import UpdateSchedule
from srigl_core.torch import SRigL, condense, freeze, load_model, quantize, save_model

SPARSITY, BATCH = 0.95, 64


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def trained(x: torch.Tensor, y: torch.Tensor, width: int, steps: int) -> tuple[nn.Module, SRigL]:
    torch.manual_seed(0)
    model = network(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = UpdateSchedule(t_end=int(0.75 * steps), delta_t=max(4, steps // 30))
    srigl = SRigL(model, optimizer, sparsity=SPARSITY, schedule=schedule)
    for _ in range(steps):
        some = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[some]), y[some]).backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    return model.eval(), srigl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small network and few steps")
    quick = parser.parse_args().quick
    width, steps, seconds = (256, 60, 0.2) if quick else (2048, 1500, 3.0)
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.astype(np.float32) / 16, labels, random_state=0)
    x, test_x, y, test_y = map(torch.from_numpy, parts)
    model, srigl = trained(x, y, width, steps)

    condensed = condense(copy.deepcopy(model), srigl)
    forms = {"dense": model, "condensed": condensed}
    for name, inputs in (("int8 weights", "float"), ("int8 weights and inputs", "int8")):
        forms[name] = quantize(copy.deepcopy(condensed), inputs=inputs)

    table = Table("form", "accuracy", "KiB", "1 image, us", f"{BATCH} images, us")
    calls, facts = {}, {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, form in forms.items():
            served = form
            if form is not model:  # what a service does: load, pack once, and answer
                path = Path(folder, "model.safetensors")
                save_model(form, path)
                served = freeze(load_model(path, network(width)).eval())
            accuracy = (served(test_x).argmax(1) == test_y).double().mean().item()
            size = sum(part.nbytes for part in [*served.parameters(), *served.buffers()])
            facts[name] = f"{accuracy:.1%}", f"{size / 1024:,.0f}"
            for n in (1, BATCH):
                calls[name, n] = functools.partial(served, test_x[:n].clone())
        times = median_times(calls, seconds)
    for name, cells in facts.items():
        table.add_row(name, *cells, *(f"{times[name, n]:.1f}" for n in (1, BATCH)))
    console = Console(width=100)
    console.print(table)
    console.print(
        f"64-{width}-{width}-10 at {SPARSITY:.0%} sparsity; medians on one thread, PyTorch "
        f"{torch.__version__}, backend {srigl_core.get_backend().name}"
    )


if __name__ == "__main__":
    main()
