"""The library where numba has no wheel: all of it works, and one warning says why it is slow."""

import json
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

import srigl_core
from srigl_core.reference import random_mask
from srigl_core.testing.bounds import first_violation
from srigl_core.testing.oracles import expected_product

statuses = {status.name: status for status in srigl_core.list_backends()}
assert statuses["reference"].available, statuses["reference"]
assert statuses["scipy"].available, statuses["scipy"]
assert not statuses["numba"].available, statuses["numba"]
reason = statuses["numba"].reason
assert "pip install numba" in reason, reason


def assert_right(product, weight, x, activation="none"):
    """Compare a product with the exact one, by the bound of SPEC 2."""
    expected = expected_product(weight, x, None, activation)
    assert first_violation(product, expected) is None


rng = np.random.default_rng(0)
mask = random_mask((16, 32), fan_in=4, rng=rng)
dense = rng.standard_normal(mask.shape, dtype=np.float32) * mask
x = rng.standard_normal((2, 32), dtype=np.float32)
with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
    warnings.simplefilter("always")
    weight = srigl_core.CondensedWeight.from_dense(dense, mask)
    plan = srigl_core.prepare(weight)
    assert "backend=scipy" in str(plan), plan
    assert_right(plan(x), weight, x)
    assert_right(srigl_core.chain([(weight, None, "relu")])(x), weight, x, "relu")
    bfloat16 = srigl_core.CondensedWeight.random((16, 32), fan_in=4, dtype="bfloat16", rng=0)
    assert_right(srigl_core.condensed_matmul(x, bfloat16), bfloat16, x)
    gradients = srigl_core.condensed_matmul_backward(np.ones((2, 16), np.float32), x, weight)
    np.testing.assert_allclose(gradients.x, np.ones((2, 16)) @ dense, rtol=1e-4, atol=1e-4)
    for inputs, backend in (("float", "scipy"), ("int8", "reference")):
        plan = srigl_core.prepare(weight.quantize(), inputs=inputs)
        assert f"backend={backend}" in str(plan), plan
        np.testing.assert_allclose(plan(x), x @ dense.T, atol=0.2)
    assert srigl_core.recommend(weight, batch=2, measure=True).measured
    runpy.run_path(str(Path("examples", "train_numpy.py")), run_name="__main__")
    srigl_core.save_condensed(Path(folder, "dense.safetensors"), {"fc": dense})

    def shell(*arguments):
        """Run a command, and return what it prints; warnings are on stderr."""
        command = [sys.executable, "-m", "srigl_core.cli", *arguments]
        return subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    shell("condense", "dense.safetensors", "--masks", "nonzero", "-o", "net.safetensors")
    assert srigl_core.load_condensed(Path(folder, "net.safetensors"))["fc"] == weight
    shell("quantize", "net.safetensors", "-o", "int8.safetensors")
    assert "int8" in shell("show", "int8.safetensors", "--measure")
    shell("export", "int8.safetensors", "--c", "-o", "c")
    assert json.loads(shell("info", "--json"))["backends"]["numba"]["reason"] == reason
    shell("verify", "--max-examples", "1")
assert [reason in str(each.message) for each in caught] == [True], [str(w) for w in caught]
print("without numba:", caught[0].message)
