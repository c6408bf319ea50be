"""Fuzz load_condensed: any bytes give weights that pass validation, or FileFormatError or OSError.

    python tests/fuzz/condensed_file.py [--minutes 10] [--seed N] [--keep FOLDER] [FILE ...]

Runs atheris (extra ``fuzz``) on `srigl_core.load_condensed`, in a process of its own with little
memory. The seeds are files of `save_condensed`; three of four mutations change what a file says of
itself (lengths, offsets, dtypes, names, the JSON inside the JSON), one is atheris's own on bytes.
With FILEs only those are tried: so a find is tried again. Exits 1 on a find, and says its file.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import ml_dtypes  # noqa: F401 - all that is imported here is not instrumented
import numpy as np
import safetensors.numpy  # noqa: F401

try:
    import atheris
except ImportError:
    atheris = None

with atheris.instrument_imports(include=["srigl_core"]) if atheris else nullcontext():
    from srigl_core import (
        CondensedWeight,
        FileFormatError,
        QuantizedWeight,
        load_condensed,
        save_condensed,
    )

ALLOWED_BYTES = 4 << 20  # of Python's and NumPy's memory, on top of 64 times the file
MOST_MEMORY_MB = 1500
NUMBERS = (0, 1, 2, 3, 4, 8, 255, 65535, 65536, 2**31, 2**32, 2**40, 2**53, 10**18, 2**63 - 1)
NUMBERS += (2**64 - 1, 2**80, -1, -(2**40))
DTYPES = (
    "F16",
    "BF16",
    "F32",
    "F64",
    "U8",
    "U16",
    "U32",
    "I8",
    "I16",
    "I64",
    "BOOL",
    "F8_E4M3",
    "C64",
)
ODD = (None, True, -1, 0.5, float("nan"), float("inf"), "", "34", "\ud800", [], [[]], {}, "float32")


class Find(Exception):  # noqa: N818 - what libFuzzer reports
    """Something that no file may bring about."""


def check_bytes(content: bytes, path: Path) -> str:
    """Write `content` to `path`, load it, and return "loaded" or "refused".

    Raises
    ------
    Find
        If anything else comes of it.
    """
    path.write_bytes(content)
    if not tracemalloc.is_tracing():  # once: each start costs memory that stop does not give back
        tracemalloc.start()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        tensors = load_condensed(path)
        outcome = "loaded"
    except (FileFormatError, OSError) as error:
        tensors, outcome = {}, "refused"
        message = str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Find(f"{type(error).__name__}: {error}") from error
    peak = tracemalloc.get_traced_memory()[1] - held
    if peak > ALLOWED_BYTES + 64 * len(content):
        raise Find(f"loading {len(content)} bytes took {peak:,} bytes of memory")
    if outcome == "refused" and message.encode(errors="replace").decode() != message:
        raise Find(f"the message cannot be printed: {message!r}")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    return outcome


def _check_tensor(name: str, tensor: object) -> None:
    if isinstance(tensor, np.ndarray):
        return
    if not isinstance(tensor, CondensedWeight | QuantizedWeight):
        raise Find(f"{name!r} is a {type(tensor).__name__}")
    try:
        arrays = tensor.value_arrays
        again = type(tensor)(*arrays.values(), tensor.indices, tensor.active, tensor.shape)
    except ValueError as error:
        raise Find(f"the weight {name!r} does not pass validation: {error}") from error
    if again != tensor or any(array.flags.writeable for array in arrays.values()):
        raise Find(f"the weight {name!r} is not what validation makes of it")


def seed_files(folder: Path) -> list[bytes]:
    """Return files as users have them: each dtype, wide and narrow, with other arrays or not."""
    contents = []
    for number, dtype in enumerate(("float16", "bfloat16", "float32", "float64")):
        weight = CondensedWeight.random((4, 6), fan_in=2, n_active=3, dtype=dtype, rng=number)
        wide = CondensedWeight.random((2, 70_000), fan_in=1, dtype=dtype, rng=number)
        for tensors in (
            weight,
            {"a": weight, "b": wide, "a.bias": np.arange(4.0)},
            {"": weight, "n": np.array(3), "seen": np.array([True]), "none": np.zeros((0, 3))},
            {"a": weight.quantize(), "b": wide},
        ):
            save_condensed(folder / "seed", tensors)
            contents.append((folder / "seed").read_bytes())
    return contents


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return a file that says something else of itself, or its arrays' numbers changed."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change = rng.choice((_other_entry, _other_layers, _other_text, _other_numbers, _twice))
        text, body = change(header, bytearray(content[8 + length :]), rng)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        RecursionError,
        struct.error,
    ):
        return _other_bytes(bytearray(content), rng)
    lengths = (0, 1, 2**40, 10**18, 2**63, len(text) + 1)
    length = rng.choice(lengths) if rng.random() < 0.02 else len(text)
    return struct.pack("<Q", length) + text + bytes(body)


def _dumped(header: object, *, ascii_only: bool = True) -> bytes:
    return json.dumps(header, ensure_ascii=ascii_only).encode(errors="surrogatepass")


def _other_entry(header: dict, body: bytearray, rng: random.Random) -> tuple[bytes, bytearray]:
    """Change one tensor's name, dtype, shape or place."""
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    change = rng.choice(("dtype", "shape", "axis", "offsets", "name", "drop", "copy", "resize"))
    if change == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif change == "shape":
        entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]
    elif change == "axis":
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NUMBERS)
    elif change == "offsets":
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-8, -1, 1, 8, 2**63))
    elif change == "name":
        header[rng.choice(("w.values", "a", "a.active", "\x00", "é", "x" * 300))] = header.pop(name)
    elif change == "drop":
        del header[name]
    elif change == "copy":
        header[rng.choice(list(header))] = dict(entry)
    else:  # as many bytes again, so that shape and place agree
        size = rng.choice((0, 1, 2, 3, 4, 6))
        begin, end = entry["data_offsets"]
        grown = size * max(1, end - begin)
        body[begin:end] = rng.randbytes(min(grown, 4096))
        shift = min(grown, 4096) - (end - begin)
        for other in (value for key, value in header.items() if key != "__metadata__"):
            other["data_offsets"] = [o + shift * (o >= end) for o in other["data_offsets"]]
        entry["data_offsets"] = [begin, end + shift]
        entry["shape"] = [size, *entry["shape"]] if rng.random() < 0.5 else entry["shape"]
    return _dumped(header), body


def _other_layers(header: dict, body: bytearray, rng: random.Random) -> tuple[bytes, bytearray]:
    """Change the metadata: the JSON inside the JSON, or the text that it is."""
    metadata = header["__metadata__"]
    if rng.random() < 0.15:
        key = rng.choice(list(metadata))
        metadata[key] = rng.choice(
            ("", "1", "2", "3", "[", "[" * 3000, "9" * 5000, "null", "NaN", "{}", key)
        )
        return _dumped(header), body
    layers = json.loads(metadata["srigl_core.layers"])
    name = rng.choice(list(layers))
    change = rng.choice(("odd", "shape", "axis", "dtype", "name", "copy", "add"))
    if change == "odd":
        layers[name][rng.choice(("shape", "dtype"))] = rng.choice(ODD)
    elif change == "shape":
        layers[name]["shape"] = [rng.choice((*NUMBERS, *ODD)) for _ in range(rng.randrange(4))]
    elif change == "axis":
        layers[name]["shape"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif change == "dtype":
        layers[name]["dtype"] = rng.choice(("float16", "bfloat16", "float32", "float64", "int8"))
    elif change == "name":
        layers[rng.choice(("", "a", "b", "\ud800", "a.values", "__metadata__"))] = layers.pop(name)
    elif change == "copy":
        layers[rng.choice(("b", "c", ""))] = layers[name]
    else:
        layers[name]["more"] = rng.choice(ODD)
    metadata["srigl_core.layers"] = json.dumps(layers)
    return _dumped(header), body


def _twice(header: dict, body: bytearray, rng: random.Random) -> tuple[bytes, bytearray]:
    """Name a tensor, a layer or a setting twice."""
    metadata = header["__metadata__"]
    if rng.random() < 0.5:
        name = rng.choice(list(header))
        text = _dumped(header)[:-1] + b", " + _dumped({name: header[name]})[1:]
        return text, body
    layers = json.loads(metadata["srigl_core.layers"])
    name = rng.choice(list(layers))
    again = {name: {"shape": [rng.choice(NUMBERS), rng.choice(NUMBERS)], "dtype": "float32"}}
    metadata["srigl_core.layers"] = f"{json.dumps(layers)[:-1]}, {json.dumps(again)[1:]}"
    return _dumped(header), body


def _other_text(header: dict, body: bytearray, rng: random.Random) -> tuple[bytes, bytearray]:
    """Change the header's text."""
    text = bytearray(_dumped(header, ascii_only=rng.random() < 0.5))
    return _other_bytes(text, rng), body


def _other_numbers(header: dict, body: bytearray, rng: random.Random) -> tuple[bytes, bytearray]:
    """Change the arrays."""
    return _dumped(header), bytearray(_other_bytes(body, rng))


def _other_bytes(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(content) + 1)
        change = rng.randrange(4)
        if change == 0:
            del content[place : place + rng.randint(1, 8)]
        elif change == 1:
            content[place:place] = rng.randbytes(rng.randint(1, 8))
        elif change == 2 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        else:
            content[place : place + 1] = bytes([rng.choice(b'\x00\xff{}[]",:019-eE.\\u')])
    return bytes(content)


def fuzz(minutes: float, seed: int, keep: Path) -> None:
    """Run atheris; it ends the process."""
    if atheris is None:
        sys.exit('atheris is not installed; pip install -e ".[fuzz]" (Linux, CPython 3.11 to 3.13)')
    work = Path(tempfile.mkdtemp(prefix="srigl-fuzz-"))
    corpus = keep / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seed_files(work)):
        (corpus / f"seed-{number}").write_bytes(content)

    def mutator(content: bytes, most: int, number: int) -> bytes:
        if number % 4 == 0:
            return atheris.Mutate(content, most)
        return mutated(content, random.Random(number))[:most]

    arguments = [
        sys.argv[0],
        f"-max_total_time={round(minutes * 60)}",
        f"-seed={seed}",
        f"-artifact_prefix={keep}/find-",
        f"-rss_limit_mb={MOST_MEMORY_MB}",
        "-max_len=16384",
        "-timeout=20",
        "-print_final_stats=1",
        str(corpus),
    ]
    atheris.Setup(
        arguments, lambda content: check_bytes(content, work / "file"), custom_mutator=mutator
    )
    atheris.Fuzz()


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, or try files again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1, 2**31))
    parser.add_argument("--keep", type=Path, default=Path(".hypothesis/fuzz/condensed_file"))
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    if not chosen.files:
        fuzz(chosen.minutes, chosen.seed, chosen.keep)
        return 0
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        for file in chosen.files:
            try:
                print(f"{file}: {check_bytes(file.read_bytes(), Path(folder) / 'file')}")
            except Find as find:
                print(f"{file}: {find}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
