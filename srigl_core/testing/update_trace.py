"""Record mask updates during training, and check them against the definition."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.operations import HOST_ARRAYS
from srigl_core._files import check_archive, file_errors, parse_json, regular_file, write_whole
from srigl_core._update import UpdateSettings
from srigl_core.errors import FileFormatError, SriglError, ValueTypeError
from srigl_core.reference.explain import UpdateExplanation, explain_update

__all__ = ["TraceVerdict", "UpdateTrace", "check_trace"]

_ARRAYS = ("weight", "grad", "mask_before", "mask_after")
_SETTINGS = tuple(part.name for part in fields(UpdateSettings))
_REQUIRED = ("nnz_budget", "drop_fraction")
_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class UpdateTrace:
    """Mask updates, recorded to be checked later.

    The file has, for update number i, the arrays ``i.weight``, ``i.grad``, ``i.mask_before`` and
    ``i.mask_after``, (n_out, n_in) or a convolution's shape, and ``i.settings``: JSON with the
    layer's name as "layer" and the arguments of `UpdateSettings`.

    Examples
    --------
    >>> trace = UpdateTrace()
    >>> weight, grad = np.array([[0.5, 0.0]]), np.array([[0.0, 2.0]])
    >>> before, after = weight != 0, np.array([[False, True]])
    >>> trace.add("fc1", weight, grad, before, after, nnz_budget=1, drop_fraction=1.0)
    >>> trace.save("trace.npz")  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}
        self._n_updates = 0

    def add(
        self, layer: str, weight: Any, grad: Any, mask_before: Any, mask_after: Any, **settings: Any
    ) -> None:
        """Record an update; arrays are copied.

        Parameters
        ----------
        layer : str
            A name for the report.
        weight, grad : array, (n_out, n_in) or a convolution's shape
            The weight after the optimiser's step and before the update, and the dense gradient
            that the update used; arrays of NumPy, PyTorch or JAX, on the CPU.
        mask_before, mask_after : array of bool, same shape
        **settings
            The arguments of `UpdateSettings`.

        Raises
        ------
        SriglError
            If an array or a setting is missing or does not fit; nothing is recorded.
        """
        if not isinstance(layer, str):
            raise ValueTypeError(f"layer must be a name, got {type(layer).__name__}")
        unknown = set(settings) - set(_SETTINGS)
        missing = set(_REQUIRED) - set(settings)
        if unknown or missing:
            raise SriglError(
                f"settings {', '.join(sorted(unknown | missing))} are unknown or missing; give "
                f"nnz_budget, drop_fraction, and others of UpdateSettings"
            )
        checked = asdict(UpdateSettings(**settings))
        arrays = {"weight": weight, "grad": grad}
        numbers = [HOST_ARRAYS.as_float_array(array, name) for name, array in arrays.items()]
        masks = [HOST_ARRAYS.as_mask(mask, numbers[0].shape) for mask in (mask_before, mask_after)]
        if numbers[1].shape != numbers[0].shape:
            raise SriglError(
                f"grad has shape {numbers[1].shape}, but weight {numbers[0].shape}; pass the dense "
                f"gradient"
            )
        # NumPy's files have no bfloat16. Wider numbers have the same order, so the same mask.
        numbers = [part.astype(np.float32) if part.itemsize == 2 else part for part in numbers]
        parts: dict[str, Any] = dict(zip(_ARRAYS, (*numbers, *masks), strict=True))
        parts["settings"] = json.dumps(
            {"layer": layer, **{name: checked[name] for name in settings}},
            default=lambda number: number.item(),  # of NumPy or another library
        )
        number = self._n_updates
        self._arrays |= {f"{number}.{name}": np.array(part) for name, part in parts.items()}
        self._n_updates += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recorded updates to an ``.npz``.

        Raises
        ------
        OSError
            If it cannot be written; an earlier file stays.
        """
        content = io.BytesIO()
        np.savez_compressed(content, **self._arrays)  # type: ignore[arg-type] # an option's
        write_whole(path, content.getvalue())


@dataclass(frozen=True)
class TraceVerdict:
    """The comparison of one recorded update with the definition; true if the masks are equal."""

    number: int  # of the update, in the trace
    layer: str
    explanation: UpdateExplanation | None  # None if the update could not be computed
    error: str = ""  # why it could not

    def __bool__(self) -> bool:
        return bool(self.explanation)

    def __str__(self) -> str:
        result = self.error if self.explanation is None else self.explanation
        return f"update {self.number}, layer {self.layer!r}: {result}"


def check_trace(path: str | os.PathLike[str]) -> list[TraceVerdict]:
    """Check recorded updates against the definition (SPEC 4).

    Parameters
    ----------
    path : path
        An ``.npz`` of the format of `UpdateTrace`.

    Returns
    -------
    list of TraceVerdict
        One for each update, true if the mask is the definition's.

    Raises
    ------
    FileFormatError
        If the file has another format, or no update; the message says what is missing.
    OSError
        If it cannot be read.
    """
    path = regular_file(path)
    hint = "record one with srigl_core.testing.UpdateTrace"
    with path.open("rb") as file, file_errors(path, "no trace", hint):
        updates = list(_updates(_arrays(file)))
    if not updates:
        raise FileFormatError(f"{os.fspath(path)!r} holds no update")
    return [_verdict(*update) for update in updates]


def _arrays(file: Any) -> dict[str, NDArray[Any]]:
    """Return the arrays of an ``.npz`` by their names."""
    with zipfile.ZipFile(file) as archive:
        check_archive(archive, os.fstat(file.fileno()).st_size)
        return {
            name.removesuffix(".npy"): _array(archive.read(name), name)
            for name in archive.namelist()
        }


def _array(content: bytes, name: str) -> NDArray[Any]:
    """Return the array of an ``.npy``, whose size is checked before memory is asked for."""
    if not name.endswith(".npy"):
        raise ValueError(f"entry {name!r} is no array")
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in _READ_HEADER:
        raise ValueError(f"array {name!r} has format version {version}")
    shape, _, dtype = _READ_HEADER[version](stream)
    if dtype.kind not in "fbU" or not dtype.itemsize:
        raise ValueError(f"array {name!r} has dtype {dtype}")
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed != len(content) - stream.tell():
        raise ValueError(f"array {name!r} claims shape {shape} of {dtype}, which it does not hold")
    stream.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _updates(
    arrays: dict[str, NDArray[Any]],
) -> Iterator[tuple[int, str, list[NDArray[Any]], dict[str, Any]]]:
    """Yield number, layer, arrays and settings of each update."""
    numbers = sorted({int(name.partition(".")[0]) for name in arrays})
    for number in numbers:
        missing = [n for n in (*_ARRAYS, "settings") if f"{number}.{n}" not in arrays]
        if missing:
            raise ValueError(f"update {number} lacks {', '.join(missing)}")
        settings = parse_json(str(arrays[f"{number}.settings"][()]))
        if not isinstance(settings, dict):
            raise ValueError(f"the settings of update {number} are no mapping")
        layer = settings.pop("layer", str(number))
        unknown = set(settings) - set(_SETTINGS)
        missing = [name for name in _REQUIRED if name not in settings]
        if unknown or missing:
            named = ", ".join(map(repr, sorted(unknown) + missing))
            raise ValueError(f"update {number} has unknown settings, or lacks some: {named}")
        yield number, str(layer), [arrays[f"{number}.{name}"] for name in _ARRAYS], settings


def _verdict(
    number: int, layer: str, arrays: list[NDArray[Any]], settings: dict[str, Any]
) -> TraceVerdict:
    try:
        weight, grad, before, after = arrays
        explanation = explain_update(weight, grad, before, after, UpdateSettings(**settings))
    except SriglError as error:
        return TraceVerdict(number, layer, None, str(error))
    return TraceVerdict(number, layer, explanation)
