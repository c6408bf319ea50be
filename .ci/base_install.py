"""The library without its optional halves: the reference works, numba is reported missing."""

import numpy as np

import srigl_core
from srigl_core.testing.bounds import first_violation
from srigl_core.testing.oracles import expected_product

statuses = {status.name: status for status in srigl_core.list_backends()}
assert statuses["reference"].available, statuses["reference"]
assert statuses["scipy"].available, statuses["scipy"]
assert not statuses["numba"].available, statuses["numba"]
assert "pip install" in statuses["numba"].reason, statuses["numba"].reason

weight = srigl_core.CondensedWeight.random((16, 32), fan_in=4, dtype="bfloat16", rng=0)
x = np.arange(64, dtype=np.float32).reshape(2, 32)
product = srigl_core.condensed_matmul(x, weight, backend="reference")
assert first_violation(product, expected_product(weight, x, None, "none")) is None
print("without numba:", statuses["numba"].reason)
