"""Read from kernels' machine code how they stage inputs: instructions, and loads in flight.

NVIDIA's disassembler lists the code. The staging loop of a kernel is the innermost loop that loads
numbers from global memory and stores them to shared memory, and that has the most loads: a second
such loop stages the last rows one by one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["Staging", "disassembled", "disassembler", "staging_of"]

QUAD_BYTES = 16

_KERNEL = re.compile(r"^\.text\.(\w+):$", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):$")
_INSTRUCTION = re.compile(r"^/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_BYTES = re.compile(r"\.[US]?(8|16|64|128)\b")


class Staging(NamedTuple):
    """The staging loop of a kernel.

    Attributes
    ----------
    instructions : float
        For each quad, that is for 16 bytes of x.
    loads : int
        Loads of a thread that are in flight: of a trip through the loop, before the first store.
    """

    instructions: float
    loads: int


def disassembler() -> Path | None:
    """Return the path of NVIDIA's disassembler, on the search path or of a package, if any."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            from cuda.pathfinder import find_nvidia_binary_utility
        except ImportError:
            return None
        found = find_nvidia_binary_utility("nvdisasm")
    return None if found is None else Path(found)


def disassembled(cubin: bytes, program: Path) -> dict[str, str]:
    """Return the listing of each kernel, by its symbol."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--print-code", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = _KERNEL.split(listing)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def staging_of(listing: str) -> Staging | None:
    """Return the staging loop of a kernel, or None if it has none."""
    loops = [loop for loop in _innermost_loops(listing) if _stages(loop)]
    if not loops:
        return None
    loop = max(loops, key=lambda loop: len(_loads(loop)))
    first_store = next(at for at, name in enumerate(loop) if name.startswith("STS"))
    quads = sum(map(_bytes, _loads(loop))) / QUAD_BYTES
    return Staging(len(loop) / quads, len(_loads(loop[:first_store])))


def _innermost_loops(listing: str) -> list[list[str]]:
    """Return the instructions of each loop without loops in it: each ends with a jump back."""
    names: list[str] = []
    labels: dict[str, int] = {}
    spans = []
    for line in map(str.strip, listing.splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := _INSTRUCTION.match(line):
            target = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            if target and target[0] in labels:
                spans.append((labels[target[0]], len(names)))
            names.append(found[1])
    return [
        names[begin : end + 1]
        for begin, end in spans
        if not any(begin <= b and e <= end for b, e in spans if (b, e) != (begin, end))
    ]


def _stages(loop: list[str]) -> bool:
    return bool(_loads(loop)) and any(name.startswith("STS") for name in loop)


def _loads(loop: list[str]) -> list[str]:
    return [name for name in loop if name.startswith("LDG")]


def _bytes(load: str) -> int:
    size = _BYTES.search(load)
    return int(size[1]) // 8 if size else 4
