"""Pack a masked weight, multiply by it on every backend, save it and load it again."""

import tempfile
from pathlib import Path

import numpy as np

import srigl_core
from srigl_core.reference import random_mask


def main() -> None:
    rng = np.random.default_rng(0)
    mask = random_mask((256, 512), fan_in=51, rng=rng)
    mask[::4] = False  # every fourth neuron is ablated
    dense = rng.standard_normal(mask.shape, dtype=np.float32) * mask
    bias = rng.standard_normal(256, dtype=np.float32)
    x = rng.standard_normal((8, 512), dtype=np.float32)

    weight = srigl_core.CondensedWeight.from_dense(dense, mask)
    print(weight)
    print(weight.memory_report())

    expected = np.maximum(x @ dense.T + bias, 0)
    for status in srigl_core.list_backends():
        if not status.available:
            print(f"{status.name:<10} not available: {status.reason}")
            continue
        plan = srigl_core.prepare(weight, backend=status.name)
        error = np.abs(plan(x, bias, activation="relu") - expected).max()
        print(f"{status.name:<10} largest difference from the dense product {error:.1e}")
        assert error < 1e-4

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        srigl_core.save_condensed(path, {"fc1": weight, "fc1.bias": bias})
        loaded = srigl_core.load_condensed(path)
    assert loaded["fc1"] == weight
    print("saved and loaded: the bits are the same")


if __name__ == "__main__":
    main()
