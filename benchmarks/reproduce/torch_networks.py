"""The networks in PyTorch: two that are trained through `srigl_core.torch`, and the MLP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from srigl_core.benchmarks.reproduce.datasets import Dataset
from srigl_core.benchmarks.reproduce.mlp import Mlp
from srigl_core.benchmarks.reproduce.settings import RunSpec
from srigl_core.benchmarks.reproduce.training import (
    batches,
    learning_rate,
    schedule_of,
    training_config,
)
from srigl_core.torch import SRigL

__all__ = ["NETWORKS", "mlp_in_torch", "one_quick_thread", "train_torch"]

SIDE = 28


class _Vit(nn.Module):  # type: ignore[misc] # PyTorch's types are not followed
    """A vision transformer with 16 patches of 7 x 7 pixels and two blocks."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x.view(-1, 1, SIDE, SIDE)).flatten(2).transpose(1, 2)
        return self.output(self.norm(self.blocks(patches + self.places).mean(1)))


def _convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


NETWORKS = {"convnet": (_convnet, ("1",)), "vit": (_Vit, ("patches",))}
"""What builds each network, and its layers that stay dense: the paper's first layers do."""


def mlp_in_torch(network: Mlp) -> nn.Sequential:
    """Return a trained MLP as a PyTorch model in evaluation mode; layer ``i`` is ``2 * i``."""
    layers: list[Any] = []
    for name, weight in network.weights.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data = torch.from_numpy(weight)
        layer.bias.data = torch.from_numpy(network.biases[name])
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


@contextmanager
def one_quick_thread() -> Iterator[None]:
    """Compute on one thread, and without subnormal numbers: decayed weights would slow it down."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(n_threads)


@one_quick_thread()
def train_torch(spec: RunSpec, data: Dataset) -> tuple[float, nn.Module, SRigL]:
    """Train a network of `NETWORKS`, and return its test accuracy, the model, and its masks."""
    recipe = spec.recipe
    build, exclude = NETWORKS[spec.network]
    n_steps = recipe.epochs * (data.train_y.size // recipe.batch_size)
    common: dict[str, Any] = {
        "sparsity": spec.sparsity,
        "schedule": schedule_of(spec, n_steps),
        "exclude": exclude,
        "init": "kaiming_normal",
    }
    torch.manual_seed(spec.seed)
    model = build()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    with torch.random.fork_rng():
        sized = build()
        sizing = SRigL(sized, torch.optim.SGD(sized.parameters()), gamma_sal=None, **common)
    srigl = SRigL(model, optimizer, config=training_config(spec, sizing.trainer.nnz), **common)
    x, y, test_x = (torch.from_numpy(part) for part in (data.train_x, data.train_y, data.test_x))
    for step, rows in enumerate(batches(len(y), recipe, np.random.default_rng([spec.seed, 1]))):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, n_steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    model.eval()
    with torch.no_grad():
        predicted = model(test_x).argmax(1).numpy()
    return float(np.mean(predicted == data.test_y)), model, srigl
