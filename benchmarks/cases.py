"""What is measured: layers, and for each layer the cases, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from srigl_core import CondensedWeight, load_condensed
from srigl_core.errors import SriglError

__all__ = ["HEADLINE", "Case", "Layer", "avx2_cases", "chosen_cases", "matching"]

HEADLINE = (3072, 768)
"""Inputs and outputs of the layer that most is measured on: ViT-B/16's mlp.3, as in the paper."""

_SHAPES = (HEADLINE, (768, 3072), (4096, 4096), (1024, 1024))
_SPARSITIES = (0.9, 0.8, 0.95, 0.99)
_BATCHES = (1, 2, 4, 8, 16, 64, 256, 2048)
_OUTPUT_LAYER = (768, 100_000, 32)
_TINY_LAYER = (16, 16, 2)
_MOST_RESULTS = 1 << 26
"""Numbers in a product; larger ones would take half a gigabyte for each contender."""

_LEAST_LEARNED = 1 << 14
"""Places in the dense weight of a learned layer; smaller ones are all overhead."""


@dataclass(frozen=True)
class Layer:
    """A sparse layer.

    Parameters
    ----------
    n_in, n_out, fan_in, n_active : int
    mask : str
        "random", or where it was learned.
    weight : CondensedWeight or None
        None is to be drawn at random.
    """

    n_in: int
    n_out: int
    fan_in: int
    n_active: int
    mask: str = "random"
    weight: CondensedWeight | None = field(default=None, compare=False, repr=False)

    @classmethod
    def random(cls, n_in: int, n_out: int, sparsity: float) -> Layer:
        """Return a layer of about that sparsity, with all neurons active."""
        return cls(n_in, n_out, round(n_in * (1 - sparsity)), n_out)

    @property
    def name(self) -> str:
        """Inputs and outputs."""
        return f"{self.n_in}-{self.n_out}"

    @property
    def sparsity(self) -> float:
        """Share of the dense weight that is inactive, to the percent."""
        return round(1 - self.n_active * self.fan_in / (self.n_in * self.n_out), 2)


@dataclass(frozen=True)
class Case:
    """One thing to measure, with every contender there is for it.

    Parameters
    ----------
    operation : {"forward", "backward", "update"}
    layer : Layer
    threads : int
        0 on a GPU.
    batch : int
        0 for an update.
    cold : bool
        Whether the weights, on a GPU the inputs too, come from memory, not from the caches.
    dtype : {"float32", "float64"}
    narrow : bool
        Whether ours is measured with 16-bit values too.
    compiled : bool
        Whether contenders take part that are compiled for each shape, which takes seconds.
    """

    operation: str
    layer: Layer
    threads: int
    batch: int = 0
    cold: bool = False
    dtype: str = "float32"
    narrow: bool = False
    compiled: bool = False

    def words(self, instructions: str = "native") -> tuple[str, ...]:
        """Return what describes this case, and what ``--only`` is compared with."""
        return (
            self.operation,
            self.layer.name,
            f"{self.layer.sparsity:.0%}",
            f"k={self.layer.fan_in}",
            *([f"batch={self.batch}"] if self.batch else []),
            *([f"threads={self.threads}"] if self.threads else []),
            "cold" if self.cold else "hot" if self.threads else "warm",
            self.dtype,
            "random" if self.layer.mask == "random" else "learned",
            *(["ablated"] if self.layer.n_active < self.layer.n_out else []),
            instructions,
        )

    def facts(self) -> dict[str, Any]:
        """Return what the file says of a case on any machine."""
        layer = self.layer
        return {
            "operation": self.operation,
            "n_in": layer.n_in,
            "n_out": layer.n_out,
            "sparsity": layer.sparsity,
            "fan_in": layer.fan_in,
            "n_active": layer.n_active,
            "mask": layer.mask,
            "batch": self.batch,
            "dtype": self.dtype,
        }


def chosen_cases(*, quick: bool, threads: Sequence[int], masks: Path | None) -> list[Case]:
    """Return the cases of a run, layer by layer.

    Parameters
    ----------
    quick : bool
        A few of them, for a minute.
    threads : sequence of int
    masks : Path or None
        Folder with files of condensed weights, such as the demo writes; their layers are
        measured, each beside a random one of the same numbers.

    Raises
    ------
    SriglError
        If `masks` holds no layer that is large enough.
    """
    layers = [] if masks is None else _learned_layers(masks)
    cases = _quick_cases() if quick else _all_cases()
    cases += [case for layer in layers for case in _forward(layer, (1, 8, 64, 256))]
    each = [replace(case, threads=n) for case in cases for n in threads]
    # Stable: within a layer all cases of one thread come first, and then those of two.
    order = {layer: i for i, layer in enumerate(dict.fromkeys(case.layer for case in each))}
    return sorted(each, key=lambda case: (order[case.layer], case.threads))


def avx2_cases(threads: Sequence[int]) -> list[Case]:
    """Return the cases that are measured with AVX2 alone, in a process of their own."""
    layer = Layer.random(*HEADLINE, 0.9)
    return [
        replace(case, threads=n, narrow=False, compiled=False)
        for n in threads
        for case in _forward(layer, (1, 8, 64, 256))
    ]


def matching(cases: Iterable[Case], only: Sequence[str], instructions: str) -> list[Case]:
    """Return the cases that have, for each of `only`, one of its comma-separated words."""
    wanted = [set(alternatives.split(",")) for alternatives in only]
    return [
        case for case in cases if all(words & set(case.words(instructions)) for words in wanted)
    ]


def _all_cases() -> list[Case]:
    cases = _forward(Layer(*_TINY_LAYER, _TINY_LAYER[1]), (1,))
    for shape in _SHAPES:
        for sparsity in _SPARSITIES:
            layer = Layer.random(*shape, sparsity)
            cases += _forward(layer, _BATCHES)
            cases.append(Case("forward", layer, 1, 1, cold=True))
            cases += _backward(layer, (8, 64, 256, 2048) if shape == HEADLINE else (64, 256))
            if shape == HEADLINE or sparsity == 0.9:
                cases.append(Case("update", layer, 1))
    headline = Layer.random(*HEADLINE, 0.9)
    cases += [Case("forward", headline, 1, batch, dtype="float64") for batch in (1, 8, 256)]
    n_in, n_out, fan_in = _OUTPUT_LAYER
    output = Layer(n_in, n_out, fan_in, n_out)
    cases += _forward(output, [b for b in _BATCHES if b * n_out <= _MOST_RESULTS])
    cases.append(Case("forward", output, 1, 1, cold=True))
    return cases


def _quick_cases() -> list[Case]:
    headline = Layer.random(*HEADLINE, 0.9)
    return [
        *_forward(Layer(*_TINY_LAYER, _TINY_LAYER[1]), (1,)),
        *(replace(case, compiled=False) for case in _forward(headline, (1, 8, 64, 256))),
        Case("forward", headline, 1, 1, cold=True),
        *_backward(headline, (256,)),
        Case("update", headline, 1),
        *_forward(Layer.random(*HEADLINE, 0.99), (1, 256)),
    ]


def _forward(layer: Layer, batches: Iterable[int]) -> list[Case]:
    is_headline = (layer.n_in, layer.n_out) == HEADLINE
    return [
        Case(
            "forward",
            layer,
            1,
            batch,
            narrow=is_headline and batch in (1, 8),
            compiled=is_headline and layer.sparsity == 0.9 and batch in (1, 8, 64),
        )
        for batch in batches
    ]


def _backward(layer: Layer, batches: Iterable[int]) -> list[Case]:
    return [Case("backward", layer, 1, batch) for batch in batches]


def _learned_layers(folder: Path) -> list[Layer]:
    """Return the layers in the files of `folder`, each followed by its random counterpart."""
    files = sorted(folder.glob("*.safetensors"))
    layers = []
    for file in files:
        for name, weight in load_condensed(file).items():
            if isinstance(weight, CondensedWeight) and weight.dtype.name == "float32":
                n_out, n_in = weight.shape
                if n_out * n_in < _LEAST_LEARNED:
                    continue
                numbers = (n_in, n_out, weight.fan_in, weight.n_active)
                layers += [
                    Layer(*numbers, f"learned: {file.stem} {name}", weight),
                    Layer(*numbers),
                ]
    if not layers:
        raise SriglError(
            f"masks={str(folder)!r} holds no float32 layer of {_LEAST_LEARNED} places or more in "
            f"its {len(files)} .safetensors files; examples/demo writes such files"
        )
    return layers
