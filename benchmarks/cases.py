"""The cases to measure: layers and, for each layer, operations and batch sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from srigl_core import CondensedWeight, load_condensed
from srigl_core.errors import SriglError

__all__ = ["HEADLINE", "Case", "Layer", "avx2_cases", "cpu_cases", "gpu_cases", "matching"]

HEADLINE = (3072, 768)
"""Inputs and outputs of the most measured layer: mlp.3 of ViT-B/16, as in the paper."""

_SPARSITIES = (0.9, 0.8, 0.95, 0.99)
_LEAST_LEARNED = 1 << 14
"""Fewest entries in the dense weight of a learned layer; smaller layers measure only overhead."""

_CPU_SHAPES = (HEADLINE, (768, 3072), (4096, 4096), (1024, 1024))
_CPU_BATCHES = (1, 2, 4, 8, 16, 64, 256, 2048)
_MOST_RESULTS = 1 << 26
"""Most numbers in a product: more would take half a gigabyte for each contender."""

_GPU_SHAPES = (HEADLINE, (768, 3072), (4096, 4096))
_GPU_BATCHES = (1, 8, 64, 256, 2048)
_LARGEST_COLD_BATCH = 256
"""Beyond this batch, inputs and results alone exceed the second-level cache of a GPU."""

_ACTIVE_SHARE = 0.6


@dataclass(frozen=True)
class Layer:
    """A sparse layer."""

    n_in: int
    n_out: int
    fan_in: int
    n_active: int
    mask: str = "random"  # or where the mask was learned
    weight: CondensedWeight | None = field(default=None, compare=False, repr=False)  # None: draw it

    @classmethod
    def random(cls, n_in: int, n_out: int, sparsity: float) -> Layer:
        """Return a layer of about this sparsity in which all neurons are active."""
        return cls(n_in, n_out, round(n_in * (1 - sparsity)), n_out)

    @property
    def name(self) -> str:
        """Inputs and outputs."""
        return f"{self.n_in}-{self.n_out}"

    @property
    def sparsity(self) -> float:
        """Inactive share of the dense weight, rounded to a percent."""
        return round(1 - self.nnz / (self.n_in * self.n_out), 2)

    @property
    def nnz(self) -> int:
        """Number of connections."""
        return self.n_active * self.fan_in

    @property
    def is_ablated(self) -> bool:
        """Whether some neurons are ablated."""
        return self.n_active < self.n_out


_TINY_LAYER = Layer(16, 16, 2, 16)
_OUTPUT_LAYER = Layer(768, 100_000, 32, 100_000)
_LABEL_LAYERS = [Layer(768, 670_000, fan_in, 670_000) for fan_in in (32, 77)]
"""The outputs are the labels of Amazon-670K."""


@dataclass(frozen=True)
class Case:
    """One operation on one layer, measured with every contender that computes it."""

    operation: str  # "forward", "backward" or "update"
    layer: Layer
    threads: int = 0  # 0 on a GPU
    batch: int = 0  # 0 for an update
    cold: bool = False  # weights come from memory and not from a cache; on a GPU inputs do, too
    dtype: str = "float32"
    narrow: bool = False  # our kernel is also measured with 16-bit values
    compiled: bool = False  # with contenders that compile for each shape, which takes seconds
    is_avx2: bool = False  # all libraries are held to AVX2

    @property
    def instructions(self) -> str:
        """What the libraries may use: "gpu", or of a CPU "native" or "avx2"."""
        if not self.threads:
            return "gpu"
        return "avx2" if self.is_avx2 else "native"

    @property
    def weights(self) -> str:
        """State of the caches: "cold", or "hot" on a CPU and "warm" on a GPU."""
        return "cold" if self.cold else "hot" if self.threads else "warm"

    @property
    def words(self) -> tuple[str, ...]:
        """The words that describe this case; ``--only`` is compared with them."""
        return (
            self.operation,
            self.layer.name,
            f"{self.layer.sparsity:.0%}",
            f"k={self.layer.fan_in}",
            *([f"batch={self.batch}"] if self.batch else []),
            *([f"threads={self.threads}"] if self.threads else []),
            self.weights,
            self.dtype,
            "random" if self.layer.mask == "random" else "learned",
            *(["ablated"] if self.layer.is_ablated else []),
            self.instructions,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The description of this case in the result file."""
        of_layer = ("n_in", "n_out", "sparsity", "fan_in", "n_active", "mask")
        of_case = ("batch", "dtype", "threads", "weights", "instructions")
        return {
            "operation": self.operation,
            **{name: getattr(self.layer, name) for name in of_layer},
            **{name: getattr(self, name) for name in of_case},
        }


def cpu_cases(*, quick: bool, threads: Sequence[int], masks: Path | None = None) -> list[Case]:
    """Return the cases of a run on the CPU, layer by layer; `quick` is a run of two minutes.

    If `masks` is a folder of files that `srigl_core.save_condensed` wrote, each of their layers is
    measured beside a random layer of the same size and sparsity.
    """
    cases = _quick_cpu_cases() if quick else _all_cpu_cases()
    for layer in [] if masks is None else _learned_layers(masks):
        cases += _forward(layer, (1, 8, 64, 256), threads=1)
    cases = [replace(case, threads=n) for case in cases for n in threads]
    # The sort is stable: within a layer, one-thread cases come before two-thread cases.
    order = {layer: i for i, layer in enumerate(dict.fromkeys(case.layer for case in cases))}
    return sorted(cases, key=lambda case: (order[case.layer], case.threads))


def avx2_cases(threads: Sequence[int]) -> list[Case]:
    """Return the cases that are also measured with AVX2 alone, in a separate process."""
    layer = Layer.random(*HEADLINE, 0.9)
    return [
        replace(case, threads=n, narrow=False, compiled=False, is_avx2=True)
        for n in threads
        for case in _forward(layer, _CPU_BATCHES[:-1], threads=1)
    ]


def gpu_cases(*, quick: bool) -> list[Case]:
    """Return the cases of a run on a GPU, layer by layer; `quick` is less than a minute."""
    if not quick:
        return _all_gpu_cases()
    headline = Layer.random(*HEADLINE, 0.9)
    others = [*(Layer.random(*HEADLINE, s) for s in (0.95, 0.99)), _ablated_layer(*HEADLINE, 0.9)]
    return [
        *(replace(c, compiled=False) for c in _forward(headline, (1, 8, 256, 2048), cold=(256,))),
        *_backward(headline, (256,)),
        Case("update", headline),
        *(case for layer in others for case in _forward(layer, (256,))),
    ]


def _ablated_layer(n_in: int, n_out: int, sparsity: float) -> Layer:
    """Return a layer of about this sparsity in which 40% of the neurons are ablated.

    The number of connections is that of the layer without ablation, so that the remaining neurons
    have a larger fan-in.
    """
    n_active = round(_ACTIVE_SHARE * n_out)
    return Layer(n_in, n_out, round(n_in * n_out * (1 - sparsity) / n_active), n_active)


def matching(cases: Iterable[Case], only: Sequence[str]) -> list[Case]:
    """Return the cases that match, for each of `only`, one of its comma-separated words."""
    wanted = [set(alternatives.split(",")) for alternatives in only]
    return [case for case in cases if all(words & set(case.words) for words in wanted)]


def _all_cpu_cases() -> list[Case]:
    cases = _forward(_TINY_LAYER, (1,), threads=1)
    for shape in _CPU_SHAPES:
        for sparsity in _SPARSITIES:
            layer = Layer.random(*shape, sparsity)
            cases += _forward(layer, _CPU_BATCHES, threads=1, cold=(1,))
            cases += _backward(layer, (8, 64, 256, 2048) if shape == HEADLINE else (64, 256), 1)
            if shape == HEADLINE or sparsity == 0.9:
                cases.append(Case("update", layer, 1))
    cases += _forward(_ablated_layer(*HEADLINE, 0.9), _CPU_BATCHES[:-1], threads=1)
    headline = Layer.random(*HEADLINE, 0.9)
    cases += [Case("forward", headline, 1, batch, dtype="float64") for batch in (1, 8, 256)]
    batches = [batch for batch in _CPU_BATCHES if batch * _OUTPUT_LAYER.n_out <= _MOST_RESULTS]
    cases += _forward(_OUTPUT_LAYER, batches, threads=1, cold=(1,))
    return cases + _forward(_LABEL_LAYERS[0], (1, 8), threads=1)


def _quick_cpu_cases() -> list[Case]:
    headline = Layer.random(*HEADLINE, 0.9)
    products = _forward(headline, (1, 8, 16, 64, 256), threads=1, cold=(1,))
    return [
        *_forward(_TINY_LAYER, (1,), threads=1),
        *(replace(case, compiled=False) for case in products),
        *_backward(headline, (256,), 1),
        Case("update", headline, 1),
        *_forward(Layer.random(*HEADLINE, 0.99), (1, 256), threads=1),
        *_forward(_ablated_layer(*HEADLINE, 0.9), (64,), threads=1),
    ]


def _all_gpu_cases() -> list[Case]:
    cold = [batch for batch in _GPU_BATCHES if batch <= _LARGEST_COLD_BATCH]
    cases = []
    for sparsity in _SPARSITIES:
        layer = Layer.random(*HEADLINE, sparsity)
        cases += [*_forward(layer, _GPU_BATCHES, cold=cold), *_backward(layer, (64, 256, 2048))]
        cases.append(Case("update", layer))
    for layer in _LABEL_LAYERS:
        cases += _forward(layer, _GPU_BATCHES, cold=(1, 8))
    for shape in _GPU_SHAPES[1:]:
        for sparsity in _SPARSITIES:
            layer = Layer.random(*shape, sparsity)
            cases += _forward(layer, _GPU_BATCHES, cold=cold)
            cases += _backward(layer, (256,)) if sparsity == 0.9 else []
    for shape in _GPU_SHAPES:
        cases += _forward(_ablated_layer(*shape, 0.9), _GPU_BATCHES)
    return cases


def _forward(
    layer: Layer, batches: Iterable[int], *, threads: int = 0, cold: Collection[int] = ()
) -> list[Case]:
    """Return products with each batch; for the batches in `cold` also with cold caches."""
    is_headline = (layer.n_in, layer.n_out) == HEADLINE and not layer.is_ablated
    compiled = (1, 8, 64) if threads else (1, 64, 256)
    is_large = layer.n_out >= _OUTPUT_LAYER.n_out
    narrow = (1, 8) if is_headline else (1,) if is_large else ()
    hot = [
        Case(
            "forward",
            layer,
            threads,
            batch,
            narrow=bool(threads) and batch in narrow,
            compiled=is_headline and layer.sparsity == 0.9 and batch in compiled,
        )
        for batch in batches
    ]
    return hot + [
        replace(case, cold=True, compiled=case.compiled and not threads)
        for case in hot
        if case.batch in cold
    ]


def _backward(layer: Layer, batches: Iterable[int], threads: int = 0) -> list[Case]:
    return [Case("backward", layer, threads, batch) for batch in batches]


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
                sizes = (n_in, n_out, weight.fan_in, weight.n_active)
                layers += [Layer(*sizes, f"learned: {file.stem} {name}", weight), Layer(*sizes)]
    if not layers:
        raise SriglError(
            f"masks={str(folder)!r} holds no float32 layer of at least {_LEAST_LEARNED} entries in "
            f"its {len(files)} .safetensors files; srigl_core.save_condensed writes such files"
        )
    return layers
