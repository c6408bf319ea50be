"""Check a JAX kernel under jit, with a fault that is known and declared: it flushes subnormals.

    python examples/kernels/jax_kernel.py [--quick]

**The kernel** gathers, multiplies and sums, in float32 or, where an input is float64, in float64,
and rounds once. JAX knows uint16 indices, bfloat16 arrays and `numpy.result_type`'s types, so
`asarray=jnp.asarray` is all the conversion there is. Without `jax_enable_x64` it would make float32
of float64 silently, and the law of the result's dtype would say so: then declare
``KernelCapabilities(value_dtypes={"float16", "bfloat16", "float32"})``.

**The fault.** XLA's threads on the CPU replace subnormal numbers by zero. SPEC 2 wants them
honoured, and the problems have some, so laws fail: 0 comes out where 4e-45 * 3 should, and NaN
where infinity times 4e-45 should be infinity. The kernel cannot mend that (`srigl_core.jax` calls
back to another one, which honours them). So it is declared: `xfails` names each law that breaks,
and why. They are tried all the same; the report says "expected failure", or "unexpected pass" where
no problem showed it: after few examples, or on the day that XLA honours subnormals. Chance decides
which problems come, so `laws_broken_by_subnormals` tries one that breaks every law declared.

**What is behind it?** An expected failure hides any other mistake that breaks the same law. So a
second check puts the kernel to the problems that have no subnormals, with nothing expected to fail:
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
    """Return the same where no number is tiny, and the reference's product elsewhere."""
    smallest = np.sqrt(np.finfo(np.float32).tiny)  # so that a product of two is no subnormal
    given = [np.abs(np.asarray(a, np.float64)) for a in (x, weight.values, bias) if a is not None]
    if any(((a > 0) & (a < smallest)).any() for a in given):
        return condensed_matmul(x, weight, bias, backend="reference")
    parts = (weight.values, weight.indices, weight.active, weight.shape[0])
    return jax_matmul(x, *parts, bias)


def laws_broken_by_subnormals() -> list[str]:
    """Return which of the laws declared are broken by a subnormal times 3."""
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
    parser = argparse.ArgumentParser(description="Check a kernel of JAX.")
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
