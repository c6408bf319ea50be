"""What is measured on a GPU, as data; `--only` chooses among it as on the CPU."""

from __future__ import annotations

from srigl_core.benchmarks.cases import HEADLINE, Case, Layer

__all__ = ["BATCHES", "OUTPUT_LAYERS", "SPARSITIES", "ablated", "gpu_cases"]

BATCHES = (1, 8, 64, 256, 2048)
SPARSITIES = (0.9, 0.95, 0.99, 0.8)
OUTPUT_LAYERS = ((768, 670_000, 32), (768, 670_000, 77))
"""Inputs, outputs and fan-in: labels of Amazon-670K."""

_OTHER_SHAPES = ((768, 3072), (4096, 4096))
_LARGEST_COLD_BATCH = 256
"""Beyond, inputs and results alone are more than the second-level cache holds."""

_ACTIVE_SHARE = 0.6
_COMPILED_BATCHES = (1, 64, 256)


def gpu_cases(*, quick: bool) -> list[Case]:
    """Return the cases of a run, layer by layer; those with goals come first.

    Parameters
    ----------
    quick : bool
        A few of them, for less than a minute.
    """
    return _quick_cases() if quick else _all_cases()


def ablated(n_in: int, n_out: int, sparsity: float) -> Layer:
    """Return a layer of about that sparsity in which 40% of the neurons are ablated.

    The others have the more connections for it: the budget is the layer's.
    """
    n_active = round(_ACTIVE_SHARE * n_out)
    return Layer(n_in, n_out, round(n_in * n_out * (1 - sparsity) / n_active), n_active)


def _all_cases() -> list[Case]:
    cases = []
    for sparsity in SPARSITIES:
        layer = Layer.random(*HEADLINE, sparsity)
        cases += [*_forward(layer), *_backward(layer, (64, 256, 2048)), _update(layer)]
    for n_in, n_out, fan_in in OUTPUT_LAYERS:
        cases += _forward(Layer(n_in, n_out, fan_in, n_out), largest_cold_batch=8)
    for shape in _OTHER_SHAPES:
        for sparsity in SPARSITIES:
            layer = Layer.random(*shape, sparsity)
            cases += _forward(layer)
            if sparsity == 0.9:
                cases += _backward(layer, (256,))
    for shape in (HEADLINE, *_OTHER_SHAPES):
        cases += _forward(ablated(*shape, 0.9), largest_cold_batch=0)
    return cases


def _quick_cases() -> list[Case]:
    headline = Layer.random(*HEADLINE, 0.9)
    return [
        *(Case("forward", headline, 0, batch) for batch in (1, 8, 256, 2048)),
        Case("forward", headline, 0, 256, cold=True),
        *_backward(headline, (256,)),
        _update(headline),
        *(Case("forward", Layer.random(*HEADLINE, s), 0, 256) for s in (0.95, 0.99)),
        Case("forward", ablated(*HEADLINE, 0.9), 0, 256),
    ]


def _forward(layer: Layer, *, largest_cold_batch: int = _LARGEST_COLD_BATCH) -> list[Case]:
    is_compiled = layer == Layer.random(*HEADLINE, 0.9)
    return [
        Case(
            "forward",
            layer,
            0,
            batch,
            cold=cold,
            compiled=is_compiled and batch in _COMPILED_BATCHES,
        )
        for batch in BATCHES
        for cold in (False, True)
        if not cold or batch <= largest_cold_batch
    ]


def _backward(layer: Layer, batches: tuple[int, ...]) -> list[Case]:
    return [Case("backward", layer, 0, batch) for batch in batches]


def _update(layer: Layer) -> Case:
    return Case("update", layer, 0)
