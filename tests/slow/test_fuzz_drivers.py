"""The fuzzers themselves, on a handful of examples: what takes an hour must not fail at its end."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "fuzz"
FAULTY = """
from srigl_core.backends.scipy_csr import ScipyBackend

class Doubling(ScipyBackend):
    name = "doubling"

    def prepare(self, weight):
        return super().prepare(weight.with_values(weight.values * 2))
"""


@pytest.fixture(scope="module")
def condensed_file():
    """The module that fuzzes the file format, without atheris."""
    spec = importlib.util.spec_from_file_location(
        "fuzz_condensed_file", FOLDER / "condensed_file.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    tracemalloc.stop()


def run_driver(*arguments, folder):
    return subprocess.run(
        [sys.executable, str(FOLDER / "backends.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_driver_tries_the_laws_and_says_how_often(tmp_path):
    laws = "product_is_within_the_error_bound,updated_mask_keeps_the_invariants"
    done = run_driver(
        *("--backends", "reference,scipy", "--laws", laws, "--examples", "4"),
        *("--seed", "1", "--json", "found.json"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["laws"]
    assert [(row["backend"], row["law"]) for row in rows] == [
        ("reference", "product_is_within_the_error_bound"),
        ("reference", "updated_mask_keeps_the_invariants"),
        ("scipy", "product_is_within_the_error_bound"),
    ]
    assert all(row["examples"] >= 4 and row["failures"] == 0 for row in rows)
    assert "not offered" in done.stdout


def test_the_driver_reports_a_failure_and_the_next_run_starts_with_it(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    law = "product_is_within_the_error_bound"
    arguments = ["--backends", "faulty:Doubling", "--laws", law, "--json", "found.json"]
    found = []
    for _ in range(2):
        done = run_driver(*arguments, "--examples", "40", folder=tmp_path)
        assert done.returncode == 1, done.stderr
        assert f"doubling: {law}: " in done.stdout
        found += json.loads((tmp_path / "found.json").read_text())["laws"]
    first, second = found
    assert first["failures"] == second["failures"] == 1
    assert second["examples"] == 1
    assert second["report"] == first["report"]


def test_the_driver_ends_when_the_time_is_over(tmp_path):
    done = run_driver("--minutes", "0", "--backends", "reference", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "\n0 examples, 0 failures" in done.stdout


def test_an_unknown_backend_or_law_is_an_error(tmp_path):
    for arguments in (("--backends", "no-such"), ("--laws", "no_such_law")):
        done = run_driver(*arguments, folder=tmp_path)
        assert done.returncode == 2
        assert "error: " in done.stderr


def test_mutated_files_are_refused_or_give_valid_weights(condensed_file, tmp_path):
    rng, outcomes = random.Random(0), Counter()
    seeds = condensed_file.seed_files(tmp_path)
    for content in seeds:
        assert condensed_file.check_bytes(content, tmp_path / "file") == "loaded"
    for _ in range(300):
        content = rng.choice(seeds)
        for _ in range(rng.randint(1, 3)):
            content = condensed_file.mutated(content, rng)
        outcomes[condensed_file.check_bytes(content, tmp_path / "file")] += 1
    assert outcomes["loaded"] >= 5
    assert outcomes["refused"] >= 200


@pytest.mark.parametrize("fault", ["exception", "panic", "memory", "message", "weight"])
def test_what_no_file_may_bring_about_is_a_find(condensed_file, tmp_path, monkeypatch, fault):
    content = condensed_file.seed_files(tmp_path)[0]
    right = condensed_file.load_condensed

    def faulty(path):
        if fault == "exception":
            raise KeyError("values")
        if fault == "panic":
            raise BaseException("a panic")
        if fault == "message":
            raise condensed_file.FileFormatError("\ud800")
        tensors = right(path)
        if fault == "memory":
            np.empty(50_000_000, np.uint8)
        if fault == "weight":
            indices = tensors["weight"].indices.copy()
            indices[0, 0] = 6
            object.__setattr__(tensors["weight"], "indices", indices)
        return tensors

    monkeypatch.setattr(condensed_file, "load_condensed", faulty)
    with pytest.raises(condensed_file.Find):
        condensed_file.check_bytes(content, tmp_path / "file")


def test_a_find_is_tried_again(condensed_file, tmp_path, capsys):
    content = condensed_file.seed_files(tmp_path)[0]
    (tmp_path / "cut").write_bytes(content[:-1])
    assert condensed_file.main([str(tmp_path / "cut"), str(tmp_path / "seed")]) == 0
    assert capsys.readouterr().out.count("cut: refused") == 1
