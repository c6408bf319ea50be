"""Check a JAX kernel under jit that has a known and declared fault: it flushes subnormals.

    python examples/kernels/jax_kernel.py [--quick]

**The kernel** gathers, multiplies and sums, in float32 or, where an input is float64, in float64,
and rounds once. JAX supports uint16 indices, bfloat16 arrays and the dtypes of `numpy.result_type`,
so the only conversion is `asarray=jnp.asarray`. Without `jax_enable_x64` it would silently convert
float64 to float32, and the law about the result's dtype would fail: then declare
``KernelCapabilities(value_dtypes={"float16", "bfloat16", "float32"})``.

**The fault.** XLA's CPU threads replace subnormal numbers by zero. SPEC 2 requires them to be
honoured, and some problems have them, so laws fail: the result is 0 instead of 4e-45 * 3, and NaN
instead of infinity for infinity times 4e-45. The kernel cannot fix that (`srigl_core.jax` calls
another kernel, which honours them). So the fault is declared: `xfails` names each law that breaks,
and why. These laws are still tried. The report says "expected failure", or "unexpected pass" if no
problem showed the fault: after few examples, or once XLA honours subnormals. Problems are random,
so `laws_broken_by_subnormals` tries one that breaks every law declared.

**Other faults.** An expected failure hides any other bug that breaks the same law. So a second
check, with no expected failures, tries the kernel on problems without subnormals:
`jax_matmul_of_larger_numbers` leaves the others to the reference.
"""

from __future__ import annotations

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from srigl_core import CondensedWeight, condensed_matmul
from srigl_core.testing import (
    ConformanceError,
    LawViolation,
    MatmulProblem,
    check_kernel,
    check_law,
    declare,
)

jax.config.update("jax_enable_x64", True)


@functools.partial(jax.jit, static_argnames="n_out")
def gather_multiply_sum(x, values, indices, active, n_out, bias):
    result = jnp.result_type(x.dtype, values.dtype)
    accumulator = jnp.promote_types(result, jnp.float32)
    sums = (x.astype(accumulator)[:, indices] * values.astype(accumulator)).sum(-1)
    z = jnp.zeros((len(x), n_out), accumulator).at[:, active].set(sums)
    return (z if bias is None else z + bias).astype(result)


REASON = "XLA's CPU threads flush subnormals to zero"
XFAILS = dict.fromkeys(
    (
        "product_is_within_the_error_bound",
        "product_agrees_with_other_oracles",
        "compact_output_is_the_active_columns",
        "ablated_neurons_output_the_activated_bias",
        "unconnected_inputs_do_not_contribute",
        "non_finite_inputs_reach_their_neurons_only",
        "non_finite_weights_and_biases_propagate",
        "subnormals_are_honoured_in_any_thread_mode",
        "earlier_calls_leave_no_trace",
    ),
    REASON,
)


@declare(asarray=jnp.asarray, xfails=XFAILS)
def jax_matmul(x, values, indices, active, n_out, bias=None):
    """Return x @ W.T + bias, (batch, n_out)."""
    return gather_multiply_sum(x, values, indices, active, n_out, bias)


@declare(asarray=jnp.asarray)
def jax_matmul_of_larger_numbers(x, weight: CondensedWeight, bias=None):
    """Return the same if no number is tiny, else the reference's product."""
    smallest = np.sqrt(np.finfo(np.float32).tiny)  # products of such numbers are not subnormal
    arrays = [np.abs(np.asarray(a, np.float64)) for a in (x, weight.values, bias) if a is not None]
    if any(((a > 0) & (a < smallest)).any() for a in arrays):
        return condensed_matmul(x, weight, bias, backend="reference")
    parts = (weight.values, weight.indices, weight.active, weight.shape[0])
    return jax_matmul(x, *parts, bias)


def laws_broken_by_subnormals() -> list[str]:
    """Return the declared laws that a subnormal times 3 breaks."""
    weight = CondensedWeight(np.full((2, 1), 3, np.float32), [[0], [0]], [0, 1], (3, 2))
    problem = MatmulProblem(
        weight,
        x=np.array([[9 * 2.0**-149, 1]], np.float32),
        grad=np.ones((1, 3), np.float32),
        bias=np.array([0, 0, 9 * 2.0**-149], np.float32),
        activation="none",
        out_dtype=np.dtype(np.float32),
    )
    broken = []
    for law in XFAILS:
        try:
            check_law(jax_matmul, law, problem)
        except LawViolation:
            broken.append(law)
    return broken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a JAX kernel.")
    parser.add_argument("--quick", action="store_true", help="10 examples a law instead of 100")
    max_examples = 10 if parser.parse_args(arguments).quick else 100
    try:
        for kernel in (jax_matmul, jax_matmul_of_larger_numbers):
            report = check_kernel(kernel, max_examples=max_examples)
            print(report, end="\n\n")
    except ConformanceError as error:
        print(error)
        return 1
    broken = laws_broken_by_subnormals()
    print(f"broken by a subnormal times 3: {len(broken)} of the {len(XFAILS)} laws declared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
