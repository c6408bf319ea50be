"""Files of models and checkpoints: damaged ones are refused, and where writers may write."""

import copy
import io
import json
import os
import pickle
import random
import stat
import struct
import sys
import zipfile
from contextlib import suppress

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from srigl_core import FileFormatError, SriglError, ValueTypeError  # noqa: E402
from srigl_core.torch import (  # noqa: E402
    condense,
    export_onnx,
    load_model,
    load_released_checkpoint,
    save_model,
)

HUGE = 10**18


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def mask():
    rows = np.zeros((8, 16), bool)
    for row in rows:
        row[:4] = True
    return torch.from_numpy(rows)


def checkpoint(**changed):
    state = model().state_dict()
    state["0.weight"] = state["0.weight"] * mask()
    return {"model": state, "pruner": {"backward_masks": [mask(), None]}, **changed}


def with_mask(other):
    return checkpoint(pruner={"backward_masks": [other, None]})


def with_weight(other):
    return checkpoint(model=checkpoint()["model"] | {"0.weight": other})


def refused(source, match=None):
    fresh = model()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(FileFormatError, match=match) as caught:
        load_released_checkpoint(source, fresh)
    assert all(torch.equal(before[name], t) for name, t in fresh.state_dict().items())
    assert str(caught.value).encode()


def peak_kilobytes():
    resource = pytest.importorskip("resource")  # which Windows lacks
    unit = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint(), path)
    assert list(load_released_checkpoint(path, model())) == ["0"]
    return path


def quantised():
    return torch.quantize_per_tensor(torch.zeros(8, 16), 1.0, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*prototype", "ignore:.*quantize")
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("change", [with_mask, with_weight], ids=["mask", "weight"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: mask().float().to_sparse(),
        lambda: mask().float().to_sparse_csr(),
        lambda: torch.zeros(8, 16, device="meta"),
        quantised,
        lambda: torch.zeros(8, 16, dtype=torch.complex64),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: [1.0, 2.0],
        lambda: "text",
    ],
    ids=["sparse", "csr", "meta", "quantised", "complex", "nested", "a list", "text"],
)
def test_weights_and_masks_are_dense_tensors_of_numbers(tmp_path, make, change, saved):
    source = change(make())
    if saved:
        torch.save(source, tmp_path / "a")
        source = tmp_path / "a"
    refused(source)


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"model": {}},
        checkpoint(pruner=None),
        checkpoint(pruner={"backward_masks": mask()}),
        checkpoint(model={1: torch.zeros(2)}),
        checkpoint(model={b"a": torch.zeros(2), "b": torch.zeros(2)}),
        checkpoint(model={None: None}),
        checkpoint(model=[mask()]),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused(source):
    refused(source)


@pytest.mark.parametrize("source", [None, 3, b"a\0", ["a"]])
def test_what_is_no_path_and_no_mapping_is_an_error(source):
    with pytest.raises(SriglError):
        load_released_checkpoint(source, model())


def test_names_with_a_thousand_prefixes_are_no_recursion():
    state = {f"{'module.' * 5000}{name}": t for name, t in checkpoint()["model"].items()}
    assert list(load_released_checkpoint(checkpoint(model=state), model())) == ["0"]


def rewritten(path, name, change):
    """Change an entry of a zip file, which stays stored and whole."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for info, data in entries:
            archive.writestr(info.filename, change(data) if info.filename.endswith(name) else data)
    path.write_bytes(content.getvalue())


def test_a_tensor_that_claims_more_than_its_entry_is_refused(path):
    """PyTorch would read beyond the entry."""
    rewritten(path, "data/0", lambda data: data[:-64])
    refused(path, "claims more or less")
    rewritten(path, "data/0", lambda data: data + bytes(6400))
    refused(path, "claims more or less")
    rewritten(path, "data/0", lambda data: b"")
    refused(path, "claims more or less")


@pytest.mark.parametrize("number", [HUGE, 2**40, 2**31 - 1, 127])
def test_a_tensor_that_claims_many_numbers_costs_no_memory(path, number):
    """128 numbers are BININT1 in the pickle: K\\x80; a number of 8 bytes is LONG1."""
    claimed = b"\x8a\x09" + number.to_bytes(9, "little")
    rewritten(path, "data.pkl", lambda data: data.replace(b"K\x80", claimed))
    before = peak_kilobytes()
    refused(path)
    assert peak_kilobytes() - before < 100_000


def directory(path, place, value):
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + place : at + place + len(value)] = value
        at = content.find(b"PK\x01\x02", at + 4)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (10, struct.pack("<H", 99)),
        (10, struct.pack("<H", 12)),
        (8, struct.pack("<H", 1)),
        (20, struct.pack("<I", 2**31)),
        (24, struct.pack("<I", 2**31)),
        (42, struct.pack("<I", 2**31)),
    ],
    ids=["method", "bzip2", "encrypted", "compressed size", "size", "offset"],
)
def test_an_archive_that_says_odd_things_of_itself_is_refused(path, place, value):
    directory(path, place, value)
    refused(path)


def test_an_entry_that_is_there_twice_is_refused(path):
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"again")
    refused(path, "several entries")


def nested(depth):
    """A pickle of lists in lists, which pickle itself cannot write."""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\x80\x02",
        pickle.dumps({"model": {}}),
        nested(100_000),
        b"\x80\x02X\xff\xff\xff\xff",
        b"\x80\x02\x8b\xff\xff\xff\x7f",
        b"\x80\x02]r\xff\xff\xff\xff.",
        b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.",
    ],
)
def test_another_pickle_is_refused_in_the_archive_and_by_itself(path, content):
    rewritten(path, "data.pkl", lambda data: content)
    refused(path)
    path.write_bytes(content)
    refused(path)


def test_the_format_of_old_versions_of_pytorch_is_refused_by_its_name(tmp_path):
    """It cannot be checked before memory is asked for."""
    torch.save(checkpoint(), tmp_path / "a", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a", "zip file.*save it again")


def test_other_bytes_give_masks_or_an_error(path):
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(bytes(changed[: rng.choice((len(changed), rng.randrange(2000)))]))
        with suppress(SriglError):  # a FileFormatError, or weights and masks that do not fit
            load_released_checkpoint(path, model())


# ---------------------------------------------------------------- files of save_model


def condensed():
    return condense(model(), {"0": mask()})


def saved_with(path, change):
    """Save a model, and change the descriptions of its modules and layers."""
    save_model(condensed(), path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    described = header["__metadata__"]
    modules, layers = (json.loads(described[f"srigl_core.{n}"]) for n in ("modules", "layers"))
    change(modules["0"], layers["0"])
    described["srigl_core.modules"] = json.dumps(modules)
    described["srigl_core.layers"] = json.dumps(layers)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda module, layer: module.update(nnz_budget=2**40),
        lambda module, layer: module.update(nnz_budget=HUGE),
        lambda module, layer: module.update(nnz_budget=-1),
        lambda module, layer: layer.update(shape=[2**31 - 1, 16]),
        lambda module, layer: layer.update(shape=[2**40, 16]),
        lambda module, layer: (
            layer.update(shape=[2**20, 2**16]),
            module.update(nnz_budget=2**36),
        ),
        lambda module, layer: module.update(convolution={"kernel_size": [HUGE, HUGE]}),
        lambda module, layer: module.update(convolution=7),
    ],
)
def test_a_model_file_that_claims_more_than_the_model_costs_no_memory(tmp_path, change):
    path, fresh = tmp_path / "a", model()
    saved_with(path, change)
    assert path.stat().st_size < 4000
    before = peak_kilobytes()
    with pytest.raises(SriglError, match="layer '0'"):
        load_model(path, fresh)
    assert peak_kilobytes() - before < 100_000
    assert type(fresh[0]) is nn.Linear


# ---------------------------------------------------------------- writers

WRITERS = {
    "save_model": lambda path: save_model(condensed(), path),
    "export_onnx": lambda path: export_onnx(model(), path, torch.zeros(2, 16)),
}


@pytest.mark.skipif(os.name != "posix", reason="Windows has no modes of files")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("writer", WRITERS)
def test_writers_follow_links_keep_modes_and_refuse_devices(tmp_path, writer):
    if writer == "export_onnx":
        pytest.importorskip("onnxscript")
    write, target = WRITERS[writer], tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o600)
    (tmp_path / "link").symlink_to(target)
    write(os.fsencode(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert target.stat().st_size > 100
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    os.mkfifo(tmp_path / "fifo")
    for special in (tmp_path, tmp_path / "fifo", "/dev/null"):
        with pytest.raises(SriglError, match="not a regular file"):
            write(special)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(ValueTypeError, match="path must be a path"):
        write(None)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link", "target"]
