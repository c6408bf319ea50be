"""The settings of a training run, and what they were chosen from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

__all__ = [
    "ADAMW",
    "DATA_TITLES",
    "METHODS",
    "NETWORK_TITLES",
    "RECIPES",
    "WIDTHS",
    "Method",
    "Recipe",
    "RunSpec",
]


class Method(NamedTuple):
    """A training method; its masks are updated if it moves."""

    label: str
    trainer_method: str
    ablate: bool = False
    moves: bool = True


METHODS = {
    "dense": Method("dense", "static", moves=False),
    "static": Method("static", "static", moves=False),
    "static-fan-in": Method("static, constant fan-in", "srigl", moves=False),
    "set": Method("SET", "set"),
    "rigl": Method("RigL", "rigl"),
    "srigl-no-ablation": Method("SRigL w/o ablation", "srigl"),
    "srigl": Method("SRigL", "srigl", ablate=True),
}


@dataclass(frozen=True)
class Recipe:
    """Settings that all methods share.

    The learning rate decays to 0 along half a cosine. Masks are updated every `delta_t` steps, but
    not in the last quarter of training. `alpha` is the share of the weights that the first update
    prunes. `gamma_sal` is SRigL's ablation threshold; None means "auto" (SPEC 4.4). `grown_state`
    is one of `optimizers.GROWN_STATES`.
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    optimizer: str = "sgd"
    batch_size: int = 32
    momentum: float = 0.9
    delta_t: int = 10
    alpha: float = 0.5
    gamma_sal: float | None = None
    grown_state: str = "zeroed"


@dataclass(frozen=True)
class RunSpec:
    """A training run: data, network, method, and all that decides its numbers.

    `fold` is the part of the data that is tested on, and `seed` determines the initial network and
    the order of the examples. With `validation`, the test part is left out, and a part of the
    training data is tested on.
    """

    data: str
    network: str
    method: str
    sparsity: float
    fold: int
    seed: int
    recipe: Recipe
    validation: bool = False

    @property
    def key(self) -> str:
        """The run as one line of JSON, by which results are found again."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def cost(self) -> float:
        """About how long the run takes, in seconds of a core."""
        per_epoch = {"mlp": 0.05, "convnet": 0.9, "vit": 0.7}[self.network]
        return per_epoch * self.recipe.epochs

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> RunSpec:
        """Return the run that `asdict` gave."""
        return cls(**{**entry, "recipe": Recipe(**entry["recipe"])})

    def changed(self, **changes: Any) -> RunSpec:
        """Return a run with other settings, which may be those of the recipe."""
        names = {field.name for field in fields(Recipe)}
        recipe = {name: changes.pop(name) for name in names & set(changes)}
        return replace(self, recipe=replace(self.recipe, **recipe), **changes)


WIDTHS = {
    "digits-noise": (512, 256, 128, 10),
    "mnist-5k": (784, 300, 100, 10),
    "mnist-1d": (40, 256, 256, 10),
}
"""Widths of the network "mlp", by dataset."""

RECIPES = {
    ("digits-noise", "mlp"): Recipe(epochs=40, learning_rate=0.05, weight_decay=1e-2),
    ("mnist-5k", "mlp"): Recipe(epochs=20, learning_rate=0.05, weight_decay=3e-3),
    ("mnist-1d", "mlp"): Recipe(epochs=40, learning_rate=0.1, weight_decay=1e-3),
    ("mnist-5k", "convnet"): Recipe(12, 0.1, 0.05, "adamw", batch_size=64),
    ("mnist-5k", "vit"): Recipe(24, 1e-2, 0.05, "adamw", batch_size=64),
}
"""The recipe of each dataset and network."""

ADAMW = {
    "digits-noise": {"optimizer": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1},
    "mnist-5k": {"optimizer": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1},
}
"""What changes in the recipe of the network "mlp" when it is trained with AdamW, by dataset."""

DATA_TITLES = {
    "digits-noise": "digits with noise",
    "mnist-5k": "MNIST-5k",
    "mnist-1d": "MNIST-1D",
}
NETWORK_TITLES = {"mlp": "MLP", "convnet": "ConvNet", "vit": "ViT"}
