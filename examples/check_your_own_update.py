"""Compare your own mask update with the definition: the first step that differs, and where."""

import numpy as np

from srigl_core import UpdateSettings
from srigl_core.reference import explain_update, random_mask, update_mask


def my_update(
    weight: np.ndarray, grad: np.ndarray, mask: np.ndarray, settings: UpdateSettings
) -> np.ndarray:
    """Prune and grow row by row: a plausible mistake, since weights compete across all rows."""
    fan_in = settings.nnz_budget // len(mask)
    new_mask = np.zeros_like(mask)
    for row in range(len(mask)):
        n_keep = fan_in - int(fan_in * settings.drop_fraction)
        magnitude = np.where(mask[row], np.abs(weight[row]), -1)
        new_mask[row, np.argsort(-magnitude, kind="stable")[:n_keep]] = True
        slope = np.where(new_mask[row], -1, np.abs(grad[row]))
        new_mask[row, np.argsort(-slope, kind="stable")[: fan_in - n_keep]] = True
    return new_mask


def main() -> None:
    rng = np.random.default_rng(0)
    mask = random_mask((16, 64), fan_in=8, rng=rng)
    weight = rng.standard_normal(mask.shape) * mask
    grad = rng.standard_normal(mask.shape)
    settings = UpdateSettings(nnz_budget=16 * 8, drop_fraction=0.3)

    right = update_mask(weight, grad, mask, settings).mask
    print("the definition's own mask:", explain_update(weight, grad, mask, right, settings))

    wrong = my_update(weight, grad, mask, settings)
    print("my update:", explain_update(weight, grad, mask, wrong, settings))

    truncated = UpdateSettings(nnz_budget=16 * 8 - 1, drop_fraction=0.3)
    mask_of_127 = update_mask(weight, grad, mask, truncated).mask
    print("with a truncated budget:", explain_update(weight, grad, mask, mask_of_127, settings))


if __name__ == "__main__":
    main()
