"""The scripts of `examples` run, print something and leave no file."""

from pathlib import Path

import pytest
from scripts import run_script

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_examples_run(script, tmp_path):
    assert run_script(script, folder=tmp_path, options=["-W", "error"]).strip()
    assert not list(tmp_path.iterdir())
