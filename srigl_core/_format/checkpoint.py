"""The arrays of a checkpoint, whatever wrote it."""

from __future__ import annotations

import os
from typing import Any

from numpy.typing import NDArray

from srigl_core._files import regular_file
from srigl_core._format.file import read_whole

__all__ = ["load_arrays"]


def load_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read the arrays of a checkpoint, without running code in it.

    Parameters
    ----------
    path : path-like
        A safetensors file, or a zip archive that `torch.save` wrote, for which PyTorch must be
        installed. Of a mapping with an entry ``model`` or ``state_dict``, that entry is read. The
        prefixes ``module.`` and ``_orig_mod.`` of wrappers are left out of its names.

    Returns
    -------
    dict of str to ndarray

    Raises
    ------
    FileFormatError
        If the file is damaged, cannot be read without running code in it, or holds no arrays by
        name.
    BackendUnavailableError
        If PyTorch is needed and not installed.
    OSError
        If the file cannot be read.
    """
    with regular_file(path).open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if not is_archive:
        return read_whole(path, "np")[0]
    # Imported here, since it needs PyTorch.
    from srigl_core.torch.checkpoint_file import read_arrays

    return read_arrays(path)
