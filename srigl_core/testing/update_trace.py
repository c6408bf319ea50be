"""Record mask updates during training, and check them against the definition."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.operations import HOST_ARRAYS
from srigl_core._format.file import write_whole
from srigl_core._update import UpdateSettings
from srigl_core.errors import FileFormatError, SriglError
from srigl_core.reference.explain import UpdateExplanation, explain_update

__all__ = ["TraceVerdict", "UpdateTrace", "check_trace"]

_ARRAYS = ("weight", "grad", "mask_before", "mask_after")
_DAMAGED = (ValueError, EOFError, KeyError, TypeError, AttributeError, BadZipFile, zlib.error)
_SETTINGS = tuple(part.name for part in fields(UpdateSettings))


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
        unknown = set(settings) - set(_SETTINGS)
        missing = {"nnz_budget", "drop_fraction"} - set(settings)
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
        write_whole(Path(path), content.getvalue())


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
    try:
        with Path(path).open("rb") as file, np.load(file) as arrays:
            verdicts = list(_verdicts(dict(arrays)))
    except FileFormatError:
        raise
    except _DAMAGED as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} is no trace ({error}); record one with "
            f"srigl_core.testing.UpdateTrace"
        ) from error
    if not verdicts:
        raise FileFormatError(f"{os.fspath(path)!r} holds no update")
    return verdicts


def _verdicts(arrays: dict[str, NDArray[Any]]) -> Iterator[TraceVerdict]:
    numbers = sorted({int(name.partition(".")[0]) for name in arrays})
    for number in numbers:
        missing = [n for n in (*_ARRAYS, "settings") if f"{number}.{n}" not in arrays]
        if missing:
            raise FileFormatError(f"update {number} lacks {', '.join(missing)}")
        settings = json.loads(str(arrays[f"{number}.settings"]))
        layer = settings.pop("layer", str(number))
        weight, grad, before, after = (arrays[f"{number}.{name}"] for name in _ARRAYS)
        unknown = set(settings) - set(_SETTINGS)
        if unknown:
            raise FileFormatError(f"update {number} has settings {', '.join(sorted(unknown))}")
        try:
            explanation = explain_update(weight, grad, before, after, UpdateSettings(**settings))
        except SriglError as error:
            yield TraceVerdict(number, layer, None, str(error))
        else:
            yield TraceVerdict(number, layer, explanation)
