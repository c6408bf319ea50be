"""Damaged files: each is a `FileFormatError`, and none costs memory that the file does not hold.

`tests/frameworks/test_damaged_checkpoints.py` has the files that PyTorch is needed for.
"""

import io
import json
import random
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from srigl_core import (
    CondensedWeight,
    FileFormatError,
    UpdateSettings,
    load_condensed,
    save_condensed,
)
from srigl_core.reference import update_mask
from srigl_core.testing import UpdateTrace, check_trace

HUGE = 10**18
ALLOWED_BYTES = 8 << 20


def zipped(entries, *, compression=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in entries:
            archive.writestr(name, data)
    return content.getvalue()


@pytest.fixture(scope="module")
def trace_entries(tmp_path_factory):
    """The entries of a trace of two updates, by name."""
    rng = np.random.default_rng(0)
    weight, grad = rng.standard_normal((2, 4, 6)).astype(np.float32)
    mask = CondensedWeight.random((4, 6), fan_in=2, rng=0).to_mask()
    trace = UpdateTrace()
    settings = {"nnz_budget": 8, "drop_fraction": 0.3}
    for name in ("fc1", "fc2"):
        update = update_mask(weight * mask, grad, mask, UpdateSettings(**settings))
        trace.add(name, weight * mask, grad, mask, update.mask, **settings)
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    trace.save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npy(array, **changed):
    """Return an array as ``.npy``, with another header."""
    content = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(content, {**header, "shape": array.shape, **changed})
    return content.getvalue() + array.tobytes()


def settings_of(text):
    return npy(np.array(text))


def replaced(name, content):
    return lambda entries: zipped({**entries, name: content(entries[name])}.items())


def patched(place, value):
    """Return a change of each central directory entry and local header."""

    def change(entries):
        content = bytearray(zipped(entries.items()))
        for signature, offset in ((b"PK\x01\x02", place), (b"PK\x03\x04", place - 2)):
            at = content.find(signature)
            while at >= 0:
                content[at + offset : at + offset + len(value)] = value
                at = content.find(signature, at + 4)
        return bytes(content)

    return change


def claims(shape, **more):
    return replaced("0.weight.npy", lambda _: npy(np.zeros(3, np.float32), shape=shape, **more))


def other(array):
    return replaced("0.weight.npy", lambda _: npy(array))


def text(settings):
    return replaced("0.settings.npy", lambda _: settings_of(settings))


WITH_OBJECTS = io.BytesIO()
np.save(WITH_OBJECTS, np.array([[None]]), allow_pickle=True)

DAMAGED_TRACES = {
    "empty": lambda entries: b"",
    "no zip": lambda entries: b"PK\x03\x04" + b"\0" * 100,
    "cut off": lambda entries: zipped(entries.items())[:-30],
    "no end": lambda entries: zipped(entries.items())[:200],
    "no entries": lambda entries: zipped({}.items()),
    "unknown method": patched(10, struct.pack("<H", 99)),
    "bzip2, which NumPy does not write": lambda e: zipped(e.items(), compression=zipfile.ZIP_BZIP2),
    "lzma": lambda entries: zipped(entries.items(), compression=zipfile.ZIP_LZMA),
    "says deflated but is stored": patched(10, struct.pack("<H", 8)),
    "encrypted": patched(8, struct.pack("<H", 1)),
    "patched data": patched(8, struct.pack("<H", 0x20)),
    "a later version of zip": patched(6, struct.pack("<H", 99)),
    "compressed size": patched(20, struct.pack("<I", 2**32 - 2)),
    "size": patched(24, struct.pack("<I", 2**32 - 2)),
    "size of zip64 without it": patched(24, struct.pack("<I", 2**32 - 1)),
    "another sum": patched(16, b"\1\2\3\4"),
    "entries over each other": lambda entries: overlapping(entries),
    "an entry twice": lambda entries: zipped([*entries.items(), *list(entries.items())[:1]]),
    "no array": lambda entries: zipped({**entries, "readme.txt": b"hello"}.items()),
    "a folder": lambda entries: zipped({**entries, "folder/": b""}.items()),
    "no number": lambda entries: zipped({**entries, "x.weight.npy": npy(np.ones(2))}.items()),
    "a long number": lambda entries: zipped({**entries, "9" * 5000 + ".w.npy": b""}.items()),
    "an update alone": lambda e: zipped({**e, "7.weight.npy": npy(np.ones(2))}.items()),
    "10^18 numbers": claims((HUGE,)),
    "10^18 rows": claims((HUGE, HUGE)),
    "4 TiB": claims((2**40,)),
    "4 TiB of rows of nothing": claims((2**40, 0)),
    "too few": claims((2,)),
    "negative": claims((-1, -3)),
    "negative length": claims((-3,)),
    "not numbers": claims(("a",)),
    "halves": claims((1.5, 2)),
    "a shape that is no tuple": claims([3]),
    "10^18 texts of no length": claims((HUGE,), descr="<U0"),
    "long texts": claims((), descr=f"<U{10**9}"),
    "a type of arrays": claims((1,), descr=("<f4", (10**9, 10**9))),
    "a type with fields": claims((1,), descr=[("a", "<f4"), ("b", "<f8")]),
    "an unknown type": claims((3,), descr="<q9"),
    "objects": replaced("0.weight.npy", lambda _: WITH_OBJECTS.getvalue()),
    "objects by the header": claims((3,), descr="|O"),
    "times": other(np.zeros((4, 6), "M8[s]")),
    "complex numbers": other(np.zeros((4, 6), complex)),
    "integers": other(np.zeros((4, 6), np.int64)),
    "no npy": replaced("0.weight.npy", lambda _: b"hello"),
    "nothing": replaced("0.weight.npy", lambda _: b""),
    "a header without end": replaced("0.weight.npy", lambda data: data[:20]),
    "a header of 2^32 bytes": replaced(
        "0.weight.npy", lambda _: b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"
    ),
    "a later version of npy": replaced("0.weight.npy", lambda data: data[:6] + rb"\9" + data[7:]),
    "a header that nests": replaced(
        "0.weight.npy", lambda _: b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000
    ),
    "a header with code": replaced(
        "0.weight.npy",
        lambda _: b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"__import__('os')   \n",
    ),
    "JSON that nests": text("[" * 100_000),
    "JSON that nests in names": text('{"a":' * 50_000),
    "no JSON": text("{"),
    "a list": text("[1]"),
    "a number": text("3"),
    "a number of 5000 digits": text("9" * 5000),
    "settings twice": text('{"nnz_budget": 8, "nnz_budget": 9, "drop_fraction": 0.3}'),
    "a setting is missing": text('{"nnz_budget": 8}'),
    "a setting is unknown": text('{"nnz_budget": 8, "drop_fraction": 0.3, "\\ud800": 1}'),
    "settings that are no text": replaced("0.settings.npy", lambda _: npy(np.ones(2))),
    "settings of many texts": replaced("0.settings.npy", lambda _: npy(np.array(["{}", "{}"]))),
}


def overlapping(entries):
    """Let the directory list the same bytes a hundred times."""
    content = zipped([("0.weight.npy", b"\0" * 10_000)])
    start, end = content.find(b"PK\x01\x02"), content.find(b"PK\x05\x06")
    listed = content[start:end]
    names = [f"{i:02}weight.npy".encode() for i in range(100)]
    directory = b"".join(listed.replace(b"0.weight.npy", name) for name in names)
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 100, 100, len(directory), start, 0)
    return content[:start] + directory + tail


def refused(load, path):
    """Check that a file is refused, with its name, and within the memory that it may take."""
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert path.name in message
    assert message.encode()
    assert "\n" not in message
    assert peak < ALLOWED_BYTES + 64 * path.stat().st_size
    return message


@pytest.mark.parametrize("damage", DAMAGED_TRACES)
def test_a_damaged_trace_is_refused(tmp_path, trace_entries, damage):
    path = tmp_path / "trace.npz"
    path.write_bytes(zipped(trace_entries.items()))
    assert all(check_trace(path))
    path.write_bytes(DAMAGED_TRACES[damage](trace_entries))
    if damage in ("times", "complex numbers", "integers"):
        assert "dtype" in refused(check_trace, path)
    else:
        refused(check_trace, path)


def test_settings_that_fit_no_update_are_a_verdict_with_the_reason(tmp_path, trace_entries):
    path = tmp_path / "trace.npz"
    odd = [None, [], {}, "x", True, -1, float("nan"), float("inf"), 1e400, 2**80, [[1]], "\ud800"]
    right = {"nnz_budget": 8, "drop_fraction": 0.3, "gamma_sal": 0.3, "layer": "fc"}
    right |= {"saliency_scope": "inactive", "grown_init": 0.0, "min_salient": 1}
    for name in right:
        for value in odd:
            described = json.dumps(right | {name: value})
            path.write_bytes(text(described)(trace_entries))
            for verdict in check_trace(path):
                assert str(verdict).encode()


def test_other_bytes_in_a_trace_give_verdicts_or_an_error(tmp_path, trace_entries):
    path, rng = tmp_path / "trace.npz", random.Random(0)
    outcomes = set()
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        content = zipped(trace_entries.items(), compression=compression)
        for _ in range(300):
            changed = bytearray(content)
            for _ in range(rng.randint(1, 3)):
                changed[rng.randrange(len(changed))] = rng.choice((0, 1, 255, rng.randrange(256)))
            path.write_bytes(bytes(changed[: rng.choice((len(changed), rng.randrange(900)))]))
            try:
                outcomes.add(all(check_trace(path)))
            except FileFormatError:
                outcomes.add("refused")
    assert outcomes >= {"refused", True}


# ---------------------------------------------------------------- condensed files


@pytest.fixture(scope="module", params=["float32", "int8"])
def condensed(tmp_path_factory, request):
    """Header and body of a file with one weight."""
    path = tmp_path_factory.mktemp("condensed") / "a"
    weight = CondensedWeight.random((4, 6), fan_in=2, rng=0)
    save_condensed(path, weight if request.param == "float32" else weight.quantize())
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors(header, body, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(**changed):
    def change(header, body):
        header["weight.values"] |= changed
        return safetensors(header, body)

    return change


def layers(change):
    def changed(header, body):
        described = header["__metadata__"]
        described["srigl_core.layers"] = change(described["srigl_core.layers"])
        return safetensors(header, body)

    return changed


def tensor_twice(header, body):
    again = json.dumps({"weight.values": header["weight.values"]})[1:-1]
    return safetensors((json.dumps(header)[:-1] + ", " + again + "}").encode(), body)


DAMAGED_CONDENSED = {
    "empty": lambda header, body: b"",
    "seven bytes": lambda header, body: b"\0" * 7,
    "a header of 10^18 bytes": lambda header, body: safetensors(header, body, HUGE),
    "a header of 2^64-1 bytes": lambda header, body: safetensors(header, body, 2**64 - 1),
    "10^18 numbers": entry(shape=[HUGE]),
    "10^18 rows of nothing": entry(shape=[HUGE, 0]),
    "4 TiB": entry(shape=[2**20, 2**20], data_offsets=[0, 2**42]),
    "negative": entry(shape=[-4, -2]),
    "negative place": entry(data_offsets=[-32, 0]),
    "an unknown type": entry(dtype="F128"),
    "a tensor twice": tensor_twice,
    "a layer twice": layers(lambda text: text[:-1] + ", " + text[1:]),
    "a setting twice": layers(lambda text: text.replace('"dtype"', '"shape": [1, 1], "dtype"')),
    "nested": layers(lambda text: "[" * 100_000),
    "a dense shape of 10^18 columns": layers(lambda text: text.replace("6]", f"{HUGE}]")),
    "a dense shape of more columns than indices can name": layers(
        lambda text: text.replace("6]", f"{2**32}]")
    ),
    "a negative dense shape": layers(lambda text: text.replace("[4", "[-4")),
    "a dense shape of 2^64 rows": layers(lambda text: text.replace("[4", f"[{2**64}")),
}


@pytest.mark.parametrize("damage", DAMAGED_CONDENSED)
def test_a_damaged_condensed_file_is_refused(tmp_path, condensed, damage):
    header, body = json.loads(json.dumps(condensed[0])), condensed[1]
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(header, body))
    assert load_condensed(path)
    path.write_bytes(DAMAGED_CONDENSED[damage](header, body))
    refused(load_condensed, path)
