"""Small Hugging Face models in sparse training: which work, and which layers are left dense.

``python -m srigl_core.benchmarks.huggingface OUT.json``. Models are made from configurations;
nothing is downloaded. Each is attached with default settings, trained for three steps with one mask
update, evaluated, saved and loaded, in both modes.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srigl_core._machine import package_versions
from srigl_core.reference import UpdateSchedule

__all__ = ["FAMILIES", "check", "main", "page"]

SPARSITY = 0.8
MODES = ("masked", "condensed")
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_IMAGES = {"image_size": 32, "patch_size": 8}
_LLAMA = {"vocab_size": 99, "num_key_value_heads": 1, **_SIZES}
_T5 = {
    **{"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    **{"vocab_size": 99, "decoder_start_token_id": 0, "pad_token_id": 0},
}
_WHISPER = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64},
    **{"decoder_ffn_dim": 64, "max_source_positions": 16, "max_target_positions": 16},
    **{"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
}
_WAV2VEC2 = {
    **{"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3)},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "layerdrop": 0.0},
    **{"num_conv_pos_embedding_groups": 2, "vocab_size": 9, "mask_time_prob": 0.0, **_SIZES},
}


@dataclass(frozen=True)
class Family:
    """A small model of a family.

    Parameters
    ----------
    config, model : str
        Names of classes in ``transformers``.
    inputs : tuple of str
        What the model takes; each is a name in `_inputs`.
    settings : mapping
        Arguments of the configuration.
    """

    config: str
    model: str
    inputs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


_TEXT, _PICTURES = ("input_ids", "labels"), ("pixel_values", "classes")
FAMILIES = {
    "BERT": Family("BertConfig", "BertForMaskedLM", _TEXT, {"vocab_size": 99, **_SIZES}),
    "RoBERTa": Family("RobertaConfig", "RobertaForMaskedLM", _TEXT, {"vocab_size": 99, **_SIZES}),
    "DistilBERT": Family(
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        _TEXT,
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    ),
    "ModernBERT": Family(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        _TEXT,
        {"vocab_size": 99, "pad_token_id": 0, "local_attention": 8, **_SIZES},
    ),
    "GPT-2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        _TEXT,
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    "OPT": Family(
        "OPTConfig",
        "OPTForCausalLM",
        _TEXT,
        {"vocab_size": 99, "ffn_dim": 64, "word_embed_proj_dim": 16, **_SIZES},
    ),
    "Llama": Family("LlamaConfig", "LlamaForCausalLM", _TEXT, _LLAMA),
    "Qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", _TEXT, _LLAMA),
    "GPT-NeoX": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", _TEXT, {"vocab_size": 99, **_SIZES}),
    "T5": Family("T5Config", "T5ForConditionalGeneration", _TEXT, _T5),
    "ViT": Family("ViTConfig", "ViTForImageClassification", _PICTURES, {**_IMAGES, **_SIZES}),
    "DeiT": Family("DeiTConfig", "DeiTForImageClassification", _PICTURES, {**_IMAGES, **_SIZES}),
    "CLIP": Family(
        "CLIPConfig",
        "CLIPModel",
        ("input_ids", "pixel_values", "return_loss"),
        {
            "text_config": {"vocab_size": 99, "eos_token_id": 2, **_SIZES},
            "vision_config": {**_IMAGES, **_SIZES},
            "projection_dim": 16,
        },
    ),
    "Swin": Family(
        "SwinConfig",
        "SwinForImageClassification",
        _PICTURES,
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
        | {"window_size": 4},
    ),
    "ConvNeXt": Family(
        "ConvNextConfig",
        "ConvNextForImageClassification",
        _PICTURES,
        {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    ),
    "Wav2Vec2": Family("Wav2Vec2Config", "Wav2Vec2ForCTC", ("sounds", "letters"), _WAV2VEC2),
    "Whisper": Family(
        "WhisperConfig", "WhisperForConditionalGeneration", ("spectra", "labels"), _WHISPER
    ),
}


def build(family: Family) -> Any:
    """Return a new model of a family, with weights of a fixed seed."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.settings)
    return getattr(transformers, family.model)(config).float()


def _inputs(family: Family, step: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, 90, (2, 8), generator=generator)
    made: dict[str, tuple[str, Callable[[], Any]]] = {
        "input_ids": ("input_ids", lambda: tokens),
        "labels": ("labels", lambda: tokens),
        "pixel_values": ("pixel_values", lambda: torch.randn(2, 3, 32, 32, generator=generator)),
        "classes": ("labels", lambda: torch.tensor([0, 1])),
        "sounds": ("input_values", lambda: torch.randn(2, 400, generator=generator)),
        "letters": ("labels", lambda: torch.randint(1, 8, (2, 4), generator=generator)),
        "spectra": ("input_features", lambda: torch.randn(2, 8, 32, generator=generator)),
        "return_loss": ("return_loss", lambda: True),
    }
    return {made[name][0]: made[name][1]() for name in family.inputs}


def check(family: Family, mode: str) -> dict[str, Any]:
    """Attach, train, evaluate, save and load a model of a family.

    Returns
    -------
    dict
        The numbers of sparse layers and of layers that were left dense with their reasons, and
        the sparsity of the sparse layers and of all matrices.

    Raises
    ------
    AssertionError
        If a loaded model computes something else than the saved one, or no layer was trained.
    """
    import torch

    from srigl_core.torch import SRigL, load_model, save_model

    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = UpdateSchedule(t_end=100, delta_t=2)
    srigl = SRigL(model, optimizer, sparsity=SPARSITY, schedule=schedule, mode=mode)
    masks = {name: srigl.mask(name) for name in srigl.trainer.sparse_layers}
    for step in range(3):
        optimizer.zero_grad()
        model(**_inputs(family, step)).loss.backward()
        srigl.after_backward()
        optimizer.step()
        srigl.step()
    assert any(not torch.equal(masks[name], srigl.mask(name)) for name in masks), "no mask moved"
    model.eval()
    expected = _evaluated(model, family)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_model(model, path)
        loaded = load_model(path, build(family).eval())
    assert torch.equal(_evaluated(loaded, family), expected), "load_model gives another model"
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(_evaluated(fresh, family), expected), "the state gives another model"
    return {
        "sparse": len(masks),
        "sparsity": srigl.trainer.sparsity,
        "sparsity_of_all": srigl.total_sparsity,
        "left": srigl.left_dense,
    }


def _evaluated(model: Any, family: Family) -> Any:
    import torch

    with torch.no_grad():
        result = model(**_inputs(family, 7))
    return result.loss if "return_loss" in family.inputs else result.logits


def page(results: Mapping[str, Any]) -> str:
    """Return the page of a file of results, in Markdown."""
    rows = []
    for name, modes in results["families"].items():
        cells = []
        for mode in MODES:
            found = modes[mode]
            if "error" in found:
                cells += [found["error"], ""]
            else:
                cells += [f"{found['sparse']}", f"{found['sparsity_of_all']:.1%}"]
        reasons: dict[str, int] = {}
        for reason in modes["condensed"].get("left", {}).values():
            kind = _kind(reason)
            reasons[kind] = reasons.get(kind, 0) + 1
        left = ", ".join(f"{kind} ({n})" for kind, n in reasons.items())
        rows.append(f"| {name} | {' | '.join(cells)} | {left} |")
    table = "\n".join(rows)
    packages = {name: results["packages"][name] for name in ("torch", "transformers")}
    versions = " and ".join(f"{name} {number}" for name, number in packages.items())
    return f"""\
# Hugging Face models

Small models of {len(results["families"])} families, made from configurations. Each was attached to
`SRigL` with default settings at {results["sparsity"]:.0%} sparsity, trained for three steps with
one mask update, evaluated, saved and loaded, by `save_model` and by its state. In both modes the
loaded models give the same numbers. Made on {results["started"][:10]} with {versions}, by
`python -m srigl_core.benchmarks.huggingface`; a test does the same.

"Sparse" is the number of layers that are trained sparse. "All" is the sparsity of all matrices,
embeddings included, which weigh much in models as small as these.

| family | masked: sparse | all | condensed: sparse | all | left dense in condensed mode |
|-|-:|-:|-:|-:|-|
{table}
"""


def _kind(reason: str) -> str:
    """Return the words of a reason that are the same for all layers."""
    kinds = {
        "shares its weight": "tied weights",
        "table of embeddings": "tables of embeddings",
        "groups=": "grouped convolutions",
        "computes its weight": "parametrised layers",
        "no layer of a known type": "parameters of unknown layers",
        "one by one": "scales",
        "frozen": "frozen layers",
    }
    return next((kind for words, kind in kinds.items() if words in reason), reason)


def main(path: str) -> None:
    """Check all families, and write the results."""
    families: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        families[name] = {}
        for mode in MODES:
            try:
                families[name][mode] = check(family, mode)
            except Exception as error:  # a model may raise anything
                families[name][mode] = {"error": f"{type(error).__name__}: {error}"}
            print(name, mode, families[name][mode].get("error", "works"), flush=True)
    results = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": package_versions("torch", "transformers"),
        "sparsity": SPARSITY,
        "families": families,
    }
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
