"""Make each mistake that ends the process, in a process of its own, and print what was reported.

Run by `host_device.run_sanitized`, since a start with the sanitizers takes longer than a fork.
"""

import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from host_device import HostModule, tight, tight_empty

FOLDER = Path(__file__).parent
KERNELS = (
    *("copy", "write_before", "reverse_in_shared", "reverse_in_array<float>", "load_four"),
    "load_row",
)
module = HostModule(FOLDER, "faulty_kernels.cu", KERNELS, sanitize=True)


def floats(size):
    return tight(np.arange(size, dtype=np.float32))


def run(name, block, *args, shared_mem=0):
    module.kernel(name)((1,), (block,), args, shared_mem=shared_mem)


FAULTS = {
    "nothing": lambda: run("copy", 128, floats(100), floats(100), np.int32(100)),
    "read past the end": lambda: run("copy", 128, floats(99), floats(100), np.int32(100)),
    "write past the end": lambda: run("copy", 128, floats(100), floats(99), np.int32(100)),
    "write before the start": lambda: run("write_before", 1, floats(100)),
    "read of a freed array": lambda: run("copy", 4, freed(), floats(4), np.int32(4)),
    "dynamic shared memory": lambda: run("reverse_in_shared", 32, floats(32), shared_mem=31 * 4),
    "no dynamic shared memory": lambda: run("reverse_in_shared", 32, floats(32)),
    "static shared memory": lambda: run("reverse_in_array<float>", 65, floats(65)),
    "16 bytes at a multiple of 8": lambda: run("load_four", 1, floats(6)[2:], tight_empty(1, "f4")),
    "int32 product": lambda: run("load_row", 1, floats(2), floats(1), np.int32(3), np.int32(2**30)),
}


def freed():
    """Return an array whose memory has been given back."""
    array = floats(4)
    address = array.ctypes.data
    del array
    return np.ctypeslib.as_array((ctypes.c_float * 4).from_address(address))


def provoked(fault):
    """Return how a child process ended, and what it wrote."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            fault()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return {"status": os.waitstatus_to_exitcode(status), "output": output.read()}


if __name__ == "__main__":
    json.dump({name: provoked(fault) for name, fault in FAULTS.items()}, sys.stdout)
