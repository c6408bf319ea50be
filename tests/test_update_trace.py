"""Recorded updates are checked against the definition, and what is no trace is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from srigl_core import SriglError
from srigl_core.cli.app import app
from srigl_core.errors import FileFormatError
from srigl_core.reference.mask_update import UpdateSettings, srigl_update
from srigl_core.testing import UpdateTrace, check_trace

OPTIONS = {"nnz_budget": 12, "drop_fraction": 0.3}


def recorded(path, spoil=lambda mask: mask, dtype=np.float32):
    rng = np.random.default_rng(0)
    trace = UpdateTrace()
    for layer in ("fc1", "fc2"):
        weight, grad = rng.standard_normal((2, 4, 6)).astype(dtype)
        mask = np.tile(np.arange(6) < 3, (4, 1))
        weight *= mask
        after = srigl_update(weight, grad, mask, UpdateSettings(**OPTIONS)).mask
        trace.add(layer, weight, grad, mask, spoil(after) if layer == "fc2" else after, **OPTIONS)
    trace.save(path)
    return trace


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.npz"


def verdicts(path):
    return [bool(verdict) for verdict in check_trace(path)]


def srigl_check_trace(path, exit_code):
    result = CliRunner().invoke(app, ["check-trace", str(path)])
    assert result.exit_code == exit_code
    return result.output


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_right_trace_passes(path, dtype):
    recorded(path, dtype=dtype)
    assert verdicts(path) == [True, True]
    assert "2 updates, 0 of them not the definition's" in srigl_check_trace(path, 0)


def test_a_wrong_trace_is_explained(path):
    recorded(path, spoil=lambda mask: mask[::-1])
    assert verdicts(path) == [True, False]
    output = srigl_check_trace(path, 1)
    assert "update 1, layer 'fc2': first difference at stage" in output
    assert "2 updates, 1 of them not" in output


def test_a_convolution_and_numbers_of_numpy_can_be_traced(path):
    trace, mask = UpdateTrace(), np.ones((2, 3, 1, 1), bool)
    numbers = np.ones(mask.shape)
    for budget in (np.int64(6), np.array(6)[()], 6):
        settings = {"nnz_budget": budget, "drop_fraction": np.float32(1.0)}
        trace.add("conv", numbers, numbers, mask, mask, **settings)
    trace.save(path)
    assert verdicts(path) == [True] * 3


def test_an_update_that_cannot_be_is_a_verdict(path):
    recorded(path)
    arrays = dict(np.load(path))
    arrays["1.settings"] = json.dumps({"layer": "fc2", "nnz_budget": 500, "drop_fraction": 0.3})
    np.savez(path, **arrays)
    right, wrong = check_trace(path)
    assert right
    assert "nnz_budget=500 exceeds" in str(wrong)


def test_an_update_that_does_not_fit_is_not_recorded(path):
    ones, mask = np.ones((2, 2)), np.ones((2, 2), bool)
    trace = UpdateTrace()
    for arrays, changed, message in (
        ((ones, ones[:1], mask, mask), {}, "grad has shape"),
        ((ones, ones, mask, mask[:1]), {}, "shape"),
        ((ones, "none", mask, mask), {}, "grad"),
        ((ones, ones, mask, mask), {"drop_fraction": 2}, "drop_fraction=2"),
        ((ones, ones, mask, mask), {"zeta": 1}, "zeta are unknown or missing"),
    ):
        with pytest.raises(SriglError, match=message):
            trace.add("fc", *arrays, **OPTIONS | {"nnz_budget": 2} | changed)
    with pytest.raises(SriglError, match="drop_fraction are unknown or missing"):
        trace.add("fc", ones, ones, mask, mask, nnz_budget=1)
    trace.save(path)
    with pytest.raises(FileFormatError, match="holds no update"):
        check_trace(path)


def test_what_is_no_trace_is_refused(path):
    with pytest.raises(FileNotFoundError):
        check_trace(path)
    recorded(path)
    content = path.read_bytes()
    for damaged in (content[:-30], content[:100] + bytes(60) + content[160:], b"", b"PK", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="is no trace"):
            check_trace(path)
    assert srigl_check_trace(path, 1).startswith("error: ")
    np.savez(path, **{"0.weight": np.ones(2)})
    with pytest.raises(FileFormatError, match="update 0 lacks grad, mask_before"):
        check_trace(path)


def test_a_trace_that_cannot_be_written_leaves_the_last_one(path, monkeypatch):
    trace = recorded(path)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        trace.save(path)
    assert verdicts(path) == [True, True]
    assert [file.name for file in path.parent.iterdir()] == ["trace.npz"]
