"""Dense arrays and masks as condensed weights: a checkpoint without its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._arrays.checks import as_float_array, as_mask
from srigl_core._arrays.float_mode import honour_subnormals
from srigl_core._format.weight import CondensedWeight
from srigl_core.errors import SriglError, ValueTypeError

__all__ = ["condense_arrays"]

_NONZERO = "nonzero"


def condense_arrays(
    arrays: Mapping[str, NDArray[Any]],
    masks: Mapping[str, NDArray[np.bool_]] | str,
    *,
    exclude: Iterable[str] = (),
) -> dict[str, CondensedWeight | NDArray[Any]]:
    """Condense the dense weights of a checkpoint, without the model.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        Weights, biases and others by name, such as ``fc1.weight`` and ``fc1.bias``. The neurons of
        a weight are its first axis; other axes are flattened.
    masks : mapping of str to ndarray of bool, or "nonzero"
        Constant fan-in masks by the name of the weight, with or without ``.weight``, in its shape.
        With "nonzero", each array of two or more axes that holds zeros is condensed, and its active
        weights are those that are not 0.0.
    exclude : iterable of str
        Names of weights to leave dense, or patterns such as ``head.*``, as in `fnmatch`.

    Returns
    -------
    dict of str to CondensedWeight or ndarray
        For `save_condensed`. The weight ``fc1.weight`` becomes the layer ``fc1``. A weight whose
        mask is True everywhere stays dense.

    Raises
    ------
    SriglError
        If a mask is not constant fan-in, names no weight or has another shape, an entry of
        `exclude` fits no name, or there is nothing to condense. The message names the weight.
    ValueTypeError
        If `masks` is neither a mapping nor a string, or a mask is not an array of bool.

    Notes
    -----
    Newly grown weights are active although they are 0.0, so "nonzero" is only for models without
    masks. `srigl_core.torch.condense` has the model, and knows layers whose neurons are another
    axis, such as GPT-2's ``Conv1D``.

    Examples
    --------
    >>> weight = np.array([[0.5, 0.0, 2.0], [0.0, -1.0, 1.0]])
    >>> condense_arrays({"fc1.weight": weight, "fc1.bias": np.ones(2)}, "nonzero")["fc1"].fan_in
    2
    """
    excluded = _excluded(arrays, list(exclude))
    if isinstance(masks, str):
        if masks != _NONZERO:
            raise SriglError(f"masks={masks!r} is unknown; give masks by name, or {_NONZERO!r}")
        given = _nonzero(arrays)
    elif isinstance(masks, Mapping):
        given = {_weight_named(name, arrays): mask for name, mask in masks.items()}
    else:
        raise ValueTypeError(
            f"masks must be a mapping of names to masks, or {_NONZERO!r}, got "
            f"{type(masks).__name__}"
        )
    condensed: dict[str, CondensedWeight | NDArray[Any]] = {}
    for name, array in arrays.items():
        layer = name
        stored: CondensedWeight | NDArray[Any] = array
        if name in given and name not in excluded:
            mask, dense = _checked(name, given[name], array)
            if not mask.all():
                layer, stored = name.removesuffix(".weight"), _packed(name, dense, mask)
        if layer in condensed or (layer != name and layer in arrays):
            raise SriglError(
                f"{name!r} would be the layer {layer!r}, which is another array's name; rename one"
            )
        condensed[layer] = stored
    if not any(isinstance(each, CondensedWeight) for each in condensed.values()):
        raise SriglError(
            "there is nothing to condense: every weight is excluded, or its mask is all True"
        )
    return condensed


def _excluded(arrays: Iterable[str], patterns: list[str]) -> set[str]:
    """Return the names that fit a pattern, with or without ``.weight``."""
    found: set[str] = set()
    for pattern in patterns:
        fits = {
            name
            for name in arrays
            if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
        }
        if not fits:
            raise SriglError(f"exclude has {pattern!r}, which is the name of no array")
        found |= fits
    return found


def _nonzero(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of the arrays of two or more axes that hold zeros, and other numbers."""
    with honour_subnormals():
        masks = {
            name: as_float_array(array, name) != 0
            for name, array in arrays.items()
            if array.ndim > 1 and (array.dtype.kind == "f" or array.dtype.name == "bfloat16")
        }
    return {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}


def _weight_named(name: str, arrays: Mapping[str, Any]) -> str:
    for candidate in (f"{name}.weight", name):
        if candidate in arrays:
            return candidate
    known = ", ".join(key for key, array in arrays.items() if array.ndim > 1)
    raise SriglError(f"masks names {name!r}, but the weights are {known}")


def _checked(name: str, mask: Any, array: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    dense = as_float_array(array, f"the weight {name!r}")
    return as_mask(mask, dense.shape, f"the mask of {name!r}"), dense


def _packed(name: str, dense: NDArray[Any], mask: NDArray[np.bool_]) -> CondensedWeight:
    try:
        return CondensedWeight.from_dense(dense, mask)
    except SriglError as error:
        raise type(error)(f"weight {name!r}: {error}; or exclude the weight") from error
