"""Checkpoints that `torch.save` wrote, read without running code in them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from srigl_core._files import check_archive, file_errors, regular_file
from srigl_core.errors import FileFormatError
from srigl_core.torch.tensors import as_numpy

__all__ = ["check_dense", "model_state", "read_arrays", "read_checkpoint"]

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that data-parallel training and compilation add to names."""

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Return the tensors of the state of a model in a file; errors as in `read_checkpoint`."""
    state = model_state(read_checkpoint(path, "save its state of the model alone"))
    for name, tensor in state.items():
        check_dense(f"{os.fspath(path)!r}: {name!r}", tensor)
    return {name: as_numpy(tensor) for name, tensor in state.items()}


def model_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state of the model in a checkpoint, without the prefixes of wrappers.

    It is the entry ``model`` or ``state_dict``, or the checkpoint itself if it holds tensors only.

    Raises
    ------
    FileFormatError
        If there is none, or a name in it is not a string.
    """
    found = [checkpoint[key] for key in ("model", "state_dict") if key in checkpoint]
    states = [state for state in found if isinstance(state, Mapping)]
    if checkpoint and all(isinstance(tensor, torch.Tensor) for tensor in checkpoint.values()):
        states.append(checkpoint)
    if not states:
        raise FileFormatError(
            f"the checkpoint has {', '.join(map(str, checkpoint))}, but no state of a model as "
            f"'model' or 'state_dict'"
        )
    for name in states[0]:
        if not isinstance(name, str):
            raise FileFormatError(f"the state of the model has the name {name!r}")
    return _unwrapped(states[0])


def _unwrapped(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    while weights:
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) for name in weights):
                weights = {name.removeprefix(prefix): t for name, t in weights.items()}
                break
        else:
            break
    return weights


def read_checkpoint(path: str | os.PathLike[str], plain_copy: str) -> Mapping[str, Any]:
    """Return the mapping in a file of `torch.save`, without running code in it.

    Parameters
    ----------
    path : path-like
    plain_copy : str
        What to do with a file that holds more than tensors and plain containers, once it is loaded
        by somebody who trusts it.

    Raises
    ------
    FileFormatError
        If the file is damaged, cannot be read without running code in it, or holds no mapping.
    OSError
        If it cannot be read.
    """
    path = regular_file(path)
    hint = "save it again with torch.save"
    try:
        with (
            path.open("rb") as file,
            file_errors(path, "not a complete PyTorch checkpoint", hint),
            zipfile.ZipFile(file) as archive,
        ):
            check_archive(archive, os.fstat(file.fileno()).st_size)
            # Mapped: PyTorch would ask for the memory that a tensor claims, and read beyond its
            # entry. Of a mapped file it takes no more than there is.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            _check_storages(checkpoint, archive)
    except FileFormatError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        reason = error.__cause__
        raise FileFormatError(
            f"{os.fspath(path)!r} holds more than tensors and plain containers, such as the "
            f"configuration in the released code's files. If you trust it, load it with "
            f"checkpoint = torch.load(path, weights_only=False) and {plain_copy} "
            f"({str(reason).splitlines()[0]})"
        ) from reason
    if not isinstance(checkpoint, Mapping):
        raise FileFormatError(
            f"{os.fspath(path)!r} holds a {type(checkpoint).__name__}, not a mapping"
        )
    return checkpoint


def _check_storages(checkpoint: Any, archive: zipfile.ZipFile) -> None:
    """Check that each tensor's memory is as long as an entry of the archive."""
    entries = Counter(entry.file_size for entry in archive.infolist())
    sizes = {
        storage.data_ptr(): storage.nbytes()
        for tensor in _dense_tensors(checkpoint)
        if (storage := tensor.untyped_storage()).nbytes()
    }
    if Counter(sizes.values()) - entries:
        raise ValueError("a tensor claims more or less memory than the file holds for it")


def _dense_tensors(tree: Any) -> Iterator[Any]:
    """Yield the tensors of nested containers that have a memory of their own."""
    remaining, seen = [tree], set()
    while remaining:
        part = remaining.pop()
        if isinstance(part, torch.Tensor):
            if part.layout is torch.strided and not part.is_meta:
                yield part
        elif isinstance(part, Mapping | list | tuple | set) and id(part) not in seen:
            seen.add(id(part))
            remaining += part.values() if isinstance(part, Mapping) else part


def check_dense(name: str, tensor: Any, expected: str = "a tensor") -> None:
    """Raise FileFormatError unless `tensor` is a dense tensor that holds real numbers."""
    if not isinstance(tensor, torch.Tensor):
        raise FileFormatError(f"{name} must be {expected}, got {type(tensor).__name__}")
    is_number = tensor.dtype.is_floating_point or tensor.dtype in _INTEGERS
    is_plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
    if tensor.is_quantized or not is_plain or not is_number:
        kind = "meta" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
        raise FileFormatError(
            f"{name} is a tensor of kind {kind}; it must be a dense tensor of real numbers"
        )
