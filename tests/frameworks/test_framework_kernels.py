"""The kernels of examples/kernels that PyTorch and JAX compile pass the laws."""

import re
from pathlib import Path

import pytest
from scripts import run_script

KERNELS = Path(__file__).resolve().parents[2] / "examples" / "kernels"


def test_the_torch_compile_kernel_obeys_the_laws(tmp_path):
    pytest.importorskip("torch")
    printed = run_script(KERNELS / "torch_compile_kernel.py", "--quick", folder=tmp_path)
    assert re.search(r"^torch_matmul: 1\d checks run .* 1\d passed", printed, re.MULTILINE)
    assert "failed" not in printed
    assert re.search(r"^compiled [1-9]\d* times", printed, re.MULTILINE)


def test_the_jax_kernel_obeys_the_laws_but_for_those_it_declares(tmp_path):
    pytest.importorskip("jax")
    printed = run_script(KERNELS / "jax_kernel.py", "--quick", folder=tmp_path)
    declared, of_larger_numbers = printed.split("\n\njax_matmul: ")
    assert set(re.findall(r"  (failed|passed|expected failure|unexpected pass)\b", declared)) <= {
        "passed",
        "expected failure",
        "unexpected pass",
    }
    assert "jax_matmul_of_larger_numbers: 18 checks run" in of_larger_numbers
    assert "18 passed" in of_larger_numbers
    assert "broken by a subnormal times 3: 9 of the 9 laws declared" in of_larger_numbers
