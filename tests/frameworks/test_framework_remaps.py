"""The remaps of optimiser state in PyTorch and JAX obey the laws."""

import pytest

from srigl_core.testing import FunctionBackend, KernelCapabilities, check_kernel, verify

WITHOUT_BFLOAT16 = KernelCapabilities(value_dtypes={"float16", "float32"})


def test_torch_resets_state_as_the_laws_say():
    torch = pytest.importorskip("torch")
    from srigl_core.torch.masked_layers import _reset

    def reset(state, mask, new_mask, start):
        return _reset(~(mask & new_mask), state, start)

    options = {"asarray": torch.from_numpy, "capabilities": WITHOUT_BFLOAT16}
    report = check_kernel(reset, "remap_state", max_examples=4, **options)
    assert report.counts["passed"] == 6


def test_jax_remaps_state_as_the_laws_say():
    jnp = pytest.importorskip("jax.numpy")
    from srigl_core.jax import Connections, remap_state

    def dense(state, mask, new_mask):
        return remap_state(state, mask, new_mask)

    def condensed(state, weight, update):
        before, after = (
            Connections.of(w.indices, w.active, w.shape) for w in (weight, update.weight)
        )
        return remap_state(state, before, after)

    options = {"asarray": jnp.asarray, "capabilities": WITHOUT_BFLOAT16}
    for function, op in ((dense, "remap_state"), (condensed, "remap_condensed")):
        backend = FunctionBackend(function, op, **options)
        report = verify(backend, max_examples=4)
        assert report.ok, str(report)
