"""Mask updates that the authors' released code computed, without ties or its known bugs."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_core._update import UpdateSettings
from srigl_core.testing.update_problems import UpdateProblem

__all__ = ["ReleasedUpdate", "released_updates"]


@dataclass(frozen=True, eq=False)
class ReleasedUpdate(UpdateProblem):
    """An update and its recorded result."""

    new_mask: NDArray[np.bool_]
    new_weight: NDArray[Any]
    recorded: Mapping[str, Any]  # the rest, such as the step, the schedule and the ablated rows


@functools.cache
def released_updates() -> tuple[ReleasedUpdate, ...]:
    """Return the 80 updates; their arrays are read-only."""
    path = resources.files("srigl_core.testing") / "data" / "srigl_released_updates.npz"
    with path.open("rb") as file, np.load(file) as arrays:
        return tuple(_unpacked(arrays, case) for case in json.loads(bytes(arrays["meta"])))


def _unpacked(arrays: Mapping[str, NDArray[Any]], case: dict[str, Any]) -> ReleasedUpdate:
    number, shape = case["case"], (case["n_out"], case["n_in"])

    def mask(name: str) -> NDArray[np.bool_]:
        bits = np.unpackbits(arrays[f"{name}{number}"], count=shape[0] * shape[1])
        return bits.astype(bool).reshape(shape)

    gamma_sal = case["gamma_sal"]
    settings = UpdateSettings(
        case["nnz_budget"], case["drop_fraction"], gamma_sal=gamma_sal, saliency_scope="all"
    )
    weight, grad, new_weight = (arrays[f"{name}{number}"] for name in ("w", "g", "wn"))
    old_mask, new_mask = mask("m"), mask("mask")
    for array in (weight, grad, old_mask):
        array.flags.writeable = False
    return ReleasedUpdate(weight, grad, old_mask, settings, new_mask, new_weight, case)
