"""What the pages and docstrings say of PyTorch and JAX is true: examples and doctests run."""

import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from scripts import run_script
from snippets import frameworks, run_samples
from typer.testing import CliRunner

import srigl_core
from srigl_core import UpdateSettings
from srigl_core.cli.app import app
from srigl_core.reference import random_mask, update_mask
from srigl_core.testing import UpdateTrace

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if frameworks(page)
)
EXAMPLES = sorted(ROOT.glob("examples/frameworks/*.py"))
WITH_DOCTESTS = sorted(
    f"srigl_core.{framework}.{file.stem}"
    for framework in ("torch", "jax")
    for file in Path(srigl_core.__path__[0], framework).glob("*.py")
    if ">>>" in file.read_text()
)


@pytest.mark.parametrize("name", WITH_DOCTESTS)
def test_doctests_of_frameworks_pass(name):
    pytest.importorskip(name.split(".")[1])
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_samples_of_frameworks_run(page, tmp_path, monkeypatch, capsys):
    for framework in frameworks(page):
        pytest.importorskip(framework)
    run_samples(page, tmp_path, monkeypatch)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_examples_of_frameworks_run(script, tmp_path):
    known = "accelerate|equinox|flax|jax|lightning|optax|orbax|torch|transformers"
    packages = rf"^(?:import|from) ({known})\b"
    for package in sorted(set(re.findall(packages, script.read_text(), re.M))):
        pytest.importorskip(package)
    takes_quick = "--quick" in script.read_text()
    printed = run_script(script, *["--quick"] * takes_quick, folder=tmp_path)
    assert re.search("┃|^layer  ", printed, re.MULTILINE)  # a table


INTEGRATIONS = {
    "hugging_face_trainer.py": "srigl_core.integrations.transformers",
    "lightning_callback.py": "srigl_core.integrations.lightning",
    "accelerate_loop.py": "accelerator.register_for_checkpointing(srigl)",
    "prune_and_condense.py": "prune_to_constant_fan_in",
    "train_equinox.py": "srigl_core.integrations.equinox",
    "train_flax_linen.py": "srigl_core.integrations.flax_linen",
    "train_flax_nnx.py": "srigl_core.integrations.flax_nnx",
    "train_optax.py": "from srigl_core.jax import SRigL",
}


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_a_program_shows_each_integration_in_at_most_40_lines(name):
    program = (ROOT / "examples" / "frameworks" / name).read_text()
    assert INTEGRATIONS[name] in program
    assert len(program.splitlines()) <= 40
    assert not re.search(r"\b_\w+\.|\._[a-z]", program)  # nothing private


@pytest.mark.parametrize("framework", ["PyTorch", "JAX"])
def test_a_trace_is_recorded_in_frameworks(framework, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "write-a-kernel.md").read_text()
    name = f"in_{framework.lower()}.py"
    (recording,) = re.findall(rf'^```python title="{name}"\n([^`]*)```', page, re.MULTILINE)
    rng = np.random.default_rng(0)
    before = random_mask((8, 16), fan_in=4, rng=rng)
    numbers, grad = rng.standard_normal((2, 8, 16), np.float32)
    settings = {"nnz_budget": 32, "drop_fraction": 0.3}
    after = update_mask(numbers * before, grad, before, UpdateSettings(**settings)).mask
    if framework == "PyTorch":
        torch = pytest.importorskip("torch")
        mask, weight = torch.tensor(before), torch.tensor(numbers * before, requires_grad=True)
        weight.grad = torch.tensor(grad)

        def your_update(weight, mask):
            mask.copy_(torch.tensor(after))
            weight.data *= mask
    else:
        array = pytest.importorskip("jax.numpy").asarray
        weight, grad, mask = array(numbers * before), array(grad), array(before)

        def your_update(weight, grad, mask):
            return weight * after, array(after)

    monkeypatch.chdir(tmp_path)
    exec(recording, {**locals(), "UpdateTrace": UpdateTrace, "budget": 32, "zeta": 0.3})
    (command,) = re.findall(r"^srigl (check-trace .*)", page, re.MULTILINE)
    assert "1 updates, 0 of them not" in CliRunner().invoke(app, command.split()).output
    with np.load("trace.npz") as recorded:
        np.testing.assert_array_equal(recorded["0.mask_before"], before)
        np.testing.assert_array_equal(recorded["0.weight"], numbers * before)
        np.testing.assert_array_equal(recorded["0.mask_after"], after)
    assert (before != after).any()
