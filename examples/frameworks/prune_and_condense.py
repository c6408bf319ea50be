"""Prune a trained network in one shot, condense and quantise it; pad one that others pruned."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune

from srigl_core.torch import condense, prune_to_constant_fan_in, quantize, report

images, labels = load_digits(return_X_y=True)
X, Y = torch.tensor(images / 16).float(), torch.tensor(labels)
TRAIN, TEST = slice(0, 1400), slice(1400, None)


def accuracy(model: nn.Module) -> str:
    with torch.no_grad():
        return f"{(model(X[TEST]).argmax(1) == Y[TEST]).float().mean():.1%}"


torch.manual_seed(0)
dense = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(dense(X[TRAIN]), Y[TRAIN]).backward()
    optimizer.step()

pruned, other = copy.deepcopy(dense), copy.deepcopy(dense)
wanda = {"method": "wanda", "calibration": X[TRAIN]}
masks = prune_to_constant_fan_in(pruned, 0.8, exclude="2", **wanda)
print("dense", accuracy(dense), "- pruned", accuracy(pruned), end=" - ")
print("int8", accuracy(quantize(condense(pruned, masks))))
print(report(pruned))

prune.l1_unstructured(other[0], "weight", amount=0.8)  # rows differ in length
prune.remove(other[0], "weight")
print("padded", accuracy(condense(other, "nonzero", pad=True)))  # a warning says what that costs
print(report(other))
