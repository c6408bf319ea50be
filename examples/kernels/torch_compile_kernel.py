"""Check a PyTorch kernel under torch.compile: gather, multiply, sum.

    python examples/kernels/torch_compile_kernel.py [--quick]

**The kernel** is the obvious line, ``(x[:, indices] * values).sum(-1)``. PyTorch compiles it to one
C++ loop, which does not store the gathered numbers. It is not documented how that loop rounds, in
which order it adds, and how it treats NaN and subnormals; so it is checked.

**Conversion.** `asarray` converts the arguments. It is `torch.from_numpy`, except for bfloat16:
PyTorch does not accept the dtype of ml_dtypes, so `as_tensor` passes the bits. Results need no
conversion. The tensors are in C order, so no problem has other strides.

**Indices.** uint16 saves memory, but PyTorch indexes with int32 or int64 only ("tensors used as
indices must be long, int, byte or bool tensors"), so `index_dtype="int32"` casts them. int32 is
enough for less than 2**31 columns.

**Types.** float16 and bfloat16 are summed in float32 and rounded once. Uncompiled, the line above
rounds each product to float16, and `product_is_within_the_error_bound` fails within a few
examples. The conversion is outside the compiled function, which gets two dtypes, not twelve pairs.

**What is checked?** torch.compile compiles again for other dtypes, and for the sizes 0 and 1. By
default, after eight times it continues uncompiled, without an error: the laws would then test
something else. So the limit is raised here, and reaching it is an error.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
import torch._dynamo

from srigl_core.testing import ConformanceError, check_kernel, declare

torch._dynamo.config.recompile_limit = 100
torch._dynamo.config.fail_on_recompile_limit_hit = True


@torch.compile(dynamic=True)
def gather_multiply_sum(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    return (x[:, indices] * values).sum(-1)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor that shares the memory of an array."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@declare(asarray=as_tensor, index_dtype="int32")
def torch_matmul(x, values, indices, active, n_out, bias=None):
    """Return x @ W.T + bias, (batch, n_out)."""
    result = torch.promote_types(x.dtype, values.dtype)
    accumulator = torch.promote_types(result, torch.float32)
    sums = gather_multiply_sum(x.to(accumulator), values.to(accumulator), indices)
    z = torch.zeros(len(x), n_out, dtype=accumulator)
    z[:, active] = sums
    return (z if bias is None else z + bias).to(result)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a torch.compile kernel.")
    parser.add_argument("--quick", action="store_true", help="5 examples a law instead of 100")
    max_examples = 5 if parser.parse_args(arguments).quick else 100
    try:
        report = check_kernel(torch_matmul, max_examples=max_examples)
    except ConformanceError as error:
        print(error)
        return 1
    print(report)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"compiled {compiled} times, for different dtypes and sizes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
