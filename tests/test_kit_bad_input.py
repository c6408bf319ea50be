"""What the kit says about kernels, names and files that it cannot use."""

import functools
import sys

import pytest
from typer.testing import CliRunner

from srigl_core import SriglError
from srigl_core.cli.app import app
from srigl_core.reference.backend import ReferenceBackend
from srigl_core.testing import LAWS, FunctionBackend, KernelCapabilities, declare, verify
from srigl_core.testing.targets import as_backend

PRODUCT_LAW = LAWS[0]


def product(x, values, indices):
    raise NotImplementedError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "quits.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


class Sized(ReferenceBackend):
    def __init__(self, size, depth=1):
        self.size = size


def test_what_makes_a_backend_may_be_a_partial_or_have_defaults():
    assert as_backend(functools.partial(Sized, size=3)).size == 3
    assert as_backend(lambda depth=2: Sized(7, depth)).size == 7
    with pytest.raises(SriglError, match=r"cannot be made .* such as functools\.partial\("):
        as_backend(Sized)


def test_a_class_is_not_declared():
    with pytest.raises(SriglError, match="Sized is a class; give it the attributes"):
        declare(xfails={PRODUCT_LAW.name: "a guess"})(Sized)


def test_what_a_partial_calls_keeps_its_declaration():
    @declare(capabilities=KernelCapabilities(value_dtypes={"float64"}))
    def kernel(x, values, indices, depth):
        return product(x, values, indices)

    backend = FunctionBackend(functools.partial(kernel, depth=2))
    assert backend.capabilities.value_dtypes == {"float64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1 .* at least 0"),
        ({"max_examples": 0}, "max_examples=0 .* at least 1"),
        ({"xfails": [PRODUCT_LAW.name]}, "must map names of laws to reasons"),
        ({"op": "update_mask"}, "is a function for condensed_matmul, not for update_mask"),
    ],
)
def test_arguments_that_are_not_valid_are_refused(options, message):
    with pytest.raises(SriglError, match=message):
        verify(FunctionBackend(product), **options)


def refused(*arguments):
    result = CliRunner().invoke(app, ["verify", *arguments])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("quits:product", "SystemExit: 0"),
        ("breaks:product", "ZeroDivisionError"),
        (":product", "names no module"),
        (".quits:product", "names no module"),
        ("no_such:product", "cannot be imported"),
        ("test_kit_bad_input:no_such", "no attribute 'no_such'"),
        ("test_kit_bad_input:Sized", "cannot be made"),
    ],
)
def test_a_target_that_cannot_be_used_is_an_error_in_a_line(folder, target, message):
    output = refused(target)
    assert message in output
    assert repr(target) in output


def test_options_that_are_not_valid_are_refused_before_anything_is_tried(folder):
    assert "condensed_matmul_backward" in refused("reference", "--op", "nonsense")
    for report in ("no_such/report.json", "."):
        assert "must name a file in an existing folder" in refused("--report", report)
    xfails = folder / "xfails.txt"
    for content, message in (
        (b"\xff\xfe", "no text in UTF-8"),
        (b"# none\nno reason", "line 2: 'no reason' is not 'law: reason'"),
    ):
        xfails.write_bytes(content)
        assert message in refused("reference", "--xfails", "xfails.txt")


def test_what_is_edited_goes_before_what_is_installed(folder, monkeypatch):
    installed = folder / "installed"
    installed.mkdir()
    (installed / "shadowed_kernel.py").write_text("product = None\n")
    (folder / "shadowed_kernel.py").write_text("def product(x): pass\n")
    monkeypatch.syspath_prepend(str(installed))
    assert as_backend("shadowed_kernel:product").name == "product"
