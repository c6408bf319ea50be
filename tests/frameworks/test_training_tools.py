"""Hugging Face's Trainer and accelerate, and Lightning, train sparse and resume exactly."""

import copy
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from srigl_core import SriglError, ValueTypeError
from srigl_core.reference import UpdateSchedule

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning.pytorch")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from torch import nn  # noqa: E402

from srigl_core.integrations import lightning as for_lightning  # noqa: E402
from srigl_core.integrations import transformers as for_transformers  # noqa: E402
from srigl_core.torch import (  # noqa: E402
    CondensedLinear,
    SRigL,
    condense,
    load_model,
    prune_to_constant_fan_in,
    quantize,
    save_model,
    to_masked_dense,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # what the tools say of themselves

# An update is due at steps 3, 6 and 9; step 5, where runs are resumed, is within a window.
OPTIONS = {
    "sparsity": 0.7,
    "schedule": UpdateSchedule(t_end=1000, delta_t=3, alpha=0.5),
    "grad_window": 2,
    "seed": 1,
}
N_STEPS, N_BEFORE, N_PARTS = 10, 5, 2
MAX_NORM = 0.02  # so low that each step is clipped


# ---------------------------------------------------------------- the tools


def bert(dropout=0.1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config).double()


def sentences():
    rng = np.random.default_rng(0)
    words, labels = rng.integers(0, 50, (80, 6)), rng.integers(0, 2, 80)
    return [{"input_ids": w, "labels": label} for w, label in zip(words, labels, strict=True)]


def make_trainer(folder, mode, *, exclude=(), **settings):
    """Return a Trainer and its callback, or None if `mode` is None."""
    arguments = {
        "max_steps": N_STEPS,
        "save_steps": N_BEFORE,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": N_PARTS,
        "per_device_train_batch_size": 4,
        "max_grad_norm": MAX_NORM,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    trainer = transformers.Trainer(
        settings.pop("model", None) or bert(),
        transformers.TrainingArguments(str(folder), **arguments | settings),
        train_dataset=sentences(),
        eval_dataset=sentences()[:8],
    )
    options = {"mode": mode, "exclude": exclude, **OPTIONS}
    return trainer, mode and for_transformers.SRigLCallback(trainer, **options)


def layers():
    torch.manual_seed(0)
    hidden = [nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(16, 3)).double()


def dataset():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (40,), generator=generator))


class Network(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = layers()

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.layers(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder, mode, resume=None, network=None, n_steps=N_STEPS):
    """Return a trained network and its callback.

    An epoch ends at the checkpoint, since Lightning resumes at the first batch of a data loader.
    """
    checkpoints = lightning.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=N_BEFORE, save_top_k=-1
    )
    callbacks = [checkpoints]
    callback = None
    if mode is not None:
        callback = for_lightning.SRigLCallback(mode=mode, **OPTIONS)
        callbacks.append(callback)
    network = Network() if network is None else network
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=n_steps,
        accumulate_grad_batches=N_PARTS,
        gradient_clip_val=MAX_NORM,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(dataset(), batch_size=4, shuffle=True)
    trainer.fit(network, data, ckpt_path=resume)
    return network, callback


@pytest.fixture(params=["masked", "condensed"])
def mode(request):
    return request.param


def masks(srigl):
    return {name: srigl.mask(name) for name in srigl.trainer.budgets}


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# ---------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function of the mode: a run of all steps, with a checkpoint, made once."""
    runs = {}

    def run(mode):
        if mode not in runs:
            folder = tmp_path_factory.mktemp(mode)
            trainer, callback = make_trainer(folder, mode)
            trainer.train()
            runs[mode] = folder, trainer.model, callback
        return runs[mode]

    return run


def test_a_trainer_resumes_to_the_same_bits(trained, mode):
    folder, model, callback = trained(mode)
    again, other = make_trainer(folder, mode)
    first = masks(other.srigl)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-{N_BEFORE}")
    assert_equal(again.model.state_dict(), model.state_dict())
    assert_equal(masks(other.srigl), masks(callback.srigl))
    assert other.srigl.trainer.step_count == N_STEPS
    assert other.srigl.trainer.n_updates == callback.srigl.trainer.n_updates == 3
    assert any(not torch.equal(mask, first[name]) for name, mask in masks(other.srigl).items())


def test_a_trainer_clips_the_masked_gradients_in_both_modes(tmp_path):
    found = {}
    for mode in ("masked", "condensed"):
        # Where neurons of a key are ablated, gradients of the query are rounding errors.
        settings = {"exclude": ["*.query", "*.key"], "save_strategy": "no"}
        trainer, callback = make_trainer(tmp_path, mode, model=bert(0), **settings)
        trainer.train()
        decay = [group["weight_decay"] for group in callback.srigl._optimizer.param_groups]
        assert decay == [0.1, 0.0]
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        kept = {names[id(p)] for p in callback.srigl._optimizer.param_groups[0]["params"]}
        assert ("bert.pooler.dense.values" in kept) is (mode == "condensed")
        found[mode] = masks(callback.srigl), to_masked_dense(trainer.model).state_dict()
    assert_equal(found["masked"][0], found["condensed"][0])
    torch.testing.assert_close(found["masked"][1], found["condensed"][1], rtol=1e-9, atol=1e-12)


def resumed_on_this_rank(mode, folder):
    """Train on all processes, resume, and print a line if all is equal; see the test below."""
    trainer, callback = make_trainer(folder, mode, ddp_backend="gloo")
    trainer.train()
    again, other = make_trainer(folder, mode, ddp_backend="gloo")
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-{N_BEFORE}")
    assert type(again.model_wrapped).__name__ == "DistributedDataParallel"
    assert_equal(again.model.state_dict(), trainer.model.state_dict())
    assert_equal(masks(other.srigl), masks(callback.srigl))
    assert other.srigl.trainer.n_updates == 3
    Path(folder, f"rank {again.args.process_index} is exact").touch()


def test_a_trainer_on_two_processes_resumes_to_the_same_bits(mode, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = [sys.executable, *launcher, __file__, mode, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    exact = [path.name for path in tmp_path.glob("rank * is exact")]
    assert sorted(exact) == ["rank 0 is exact", "rank 1 is exact"]


def train_scaled(monkeypatch, trainer, callback, **options):
    """Train as with fp16, for which accelerate would ask for a GPU, but without autocast."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **options)

    def begin(*_, **__):  # the model is prepared by now
        trainer.accelerator.native_amp = True
        monkeypatch.setattr(accelerate.Accelerator, "mixed_precision", "fp16")

    callback.on_train_begin = begin
    trainer.train()


def test_a_trainer_trains_with_a_gradient_scaler(trained, mode, tmp_path, monkeypatch):
    _, model, callback = trained(mode)
    trainer, other = make_trainer(tmp_path, mode, save_strategy="no")
    train_scaled(monkeypatch, trainer, other, init_scale=2.0**10)  # powers of two round nothing
    assert_equal(masks(other.srigl), masks(callback.srigl))
    assert_equal(trainer.model.state_dict(), model.state_dict())


def test_a_trainer_does_not_count_a_step_that_the_scaler_skips(mode, tmp_path, monkeypatch):
    trainer, callback = make_trainer(tmp_path, mode, save_strategy="no")
    factors = iter([float("inf")])  # of the first gradient
    embedding = trainer.model.bert.embeddings.word_embeddings.weight
    embedding.register_hook(lambda grad: grad * next(factors, 1.0))
    train_scaled(monkeypatch, trainer, callback)
    assert callback.srigl.trainer.step_count == N_STEPS - 1


def test_a_trainer_does_not_resume_without_the_state_of_srigl(trained, mode, tmp_path):
    folder, _, _ = trained(mode)
    place = f"checkpoint-{N_BEFORE}"
    shutil.copytree(folder / place, tmp_path / place)
    (tmp_path / place / "srigl.pt").unlink()
    trainer, callback = make_trainer(tmp_path, mode)
    with pytest.raises(SriglError, match=r"no state of SRigL: there is no file.*srigl\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / place))
    # A callback that does not even look for it.
    trainer, callback = make_trainer(tmp_path, mode)
    callback.on_train_begin = lambda *_, **__: None
    with pytest.raises(SriglError, match=r"layer 'bert.*srigl\.load_state_dict"):
        trainer.train(resume_from_checkpoint=str(tmp_path / place))


def test_a_trainer_resumes_from_a_folder_that_is_not_its_own(trained, mode, tmp_path):
    folder, model, other = trained(mode)
    place = tmp_path / "elsewhere" / f"checkpoint-{N_BEFORE}"
    shutil.copytree(folder / place.name, place)
    own, _ = make_trainer(tmp_path, mode, learning_rate=0.5)
    own.train()  # so that its folder has a checkpoint of the same number, of another run
    again, callback = make_trainer(tmp_path, mode)
    again.train(resume_from_checkpoint=str(place))
    assert_equal(again.model.state_dict(), model.state_dict())
    assert_equal(masks(callback.srigl), masks(other.srigl))


def test_a_trainer_names_the_file_whose_state_does_not_fit(trained, mode, tmp_path):
    folder, _, _ = trained(mode)
    place = tmp_path / f"checkpoint-{N_BEFORE}"
    shutil.copytree(folder / place.name, place)
    state = torch.load(place / "srigl.pt", weights_only=True)
    del state["mode"]
    torch.save(state, place / "srigl.pt")
    trainer, _ = make_trainer(tmp_path, mode)
    with pytest.raises(SriglError, match=rf"checkpoint-{N_BEFORE}.srigl\.pt': "):
        trainer.train(resume_from_checkpoint=True)  # the last one of its folder


def test_a_trainer_logs_the_numbers_of_srigl_and_keeps_its_arguments(tmp_path):
    settings = {"logging_strategy": "steps", "logging_steps": 4, "save_strategy": "no"}
    trainer, callback = make_trainer(tmp_path, "masked", **settings)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    other = transformers.Trainer(bert(), arguments, train_dataset=sentences())
    for_transformers.SRigLCallback(other, **OPTIONS)
    assert (arguments.max_grad_norm, other.args.max_grad_norm) == (1.0, 0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "srigl/updates" in entry]
    assert [(entry["step"], entry["srigl/updates"]) for entry in logs] == [(4, 1), (8, 2)]
    assert callback.srigl.log_dict().keys() <= logs[-1].keys()
    assert logs[0]["srigl/itop_rate"] < logs[-1]["srigl/itop_rate"] <= 1
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [4, 8]


def test_a_trainer_that_loads_its_best_model_has_the_masks_of_it(tmp_path, mode):
    settings = {"eval_strategy": "steps", "eval_steps": N_BEFORE, "load_best_model_at_end": True}
    # The greater loss counts as the better one, so that the first of the two checkpoints is best.
    settings |= {"learning_rate": 3.0, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer, callback = make_trainer(tmp_path, mode, **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{N_BEFORE}")
    assert callback.srigl.trainer.step_count == N_BEFORE
    for name, mask in masks(callback.srigl).items():
        layer = trainer.model.get_submodule(name)
        assert not layer.weight.detach()[~mask].any()


def test_a_trainer_that_makes_its_model_itself_is_refused(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(
        args=arguments, model_init=lambda: bert(), train_dataset=sentences()
    )
    with pytest.raises(SriglError, match="model_init, which makes another model"):
        for_transformers.SRigLCallback(trainer, **OPTIONS)


def test_a_dense_model_does_not_take_the_checkpoint_of_a_condensed_one(trained):
    folder, model, _ = trained("condensed")
    checkpoint = f"{folder}/checkpoint-{N_BEFORE}"
    trainer, _ = make_trainer(folder, None)
    with pytest.raises(RuntimeError, match=r"size mismatch for bert.*shape torch\.Size\(\[1\]\)"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(checkpoint)
    model.bert.save_pretrained(folder / "part")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model.bert).from_pretrained(folder / "part")


def test_from_pretrained_takes_masked_and_dense_models(trained, tmp_path):
    _, model, _ = trained("masked")
    model.save_pretrained(tmp_path)
    assert_equal(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())
    dense = to_masked_dense(copy.deepcopy(trained("condensed")[1]))
    dense.save_pretrained(tmp_path)
    assert_equal(type(dense).from_pretrained(tmp_path).state_dict(), dense.state_dict())


class CondensedBert(transformers.BertForSequenceClassification):
    """A model whose class makes a condensed layer."""

    def __init__(self, config):
        super().__init__(config)
        self.bert.pooler.dense = CondensedLinear(16, 16, fan_in=4, rng=1)


def test_from_pretrained_takes_classes_that_make_condensed_layers(tmp_path):
    model = CondensedBert(bert().config).eval()
    model.save_pretrained(tmp_path)
    words = {"input_ids": torch.arange(6)[None]}
    again = CondensedBert.from_pretrained(tmp_path)
    assert_equal(again.state_dict(), model.state_dict())
    assert torch.equal(again(**words).logits, model(**words).logits)


def condensed_bert(dtype=torch.float32):
    model = bert().to(dtype)
    return condense(model, prune_to_constant_fan_in(model, 0.7)).eval()


PREPARED = {
    "condensed": condensed_bert,
    "condensed, 16-bit": lambda: condensed_bert(torch.bfloat16),
    "int8": lambda: quantize(condensed_bert()),
    "int8 inputs": lambda: quantize(condensed_bert(), inputs="int8", exclude="classifier"),
    "dense": lambda: bert().eval(),
}


@pytest.mark.parametrize("class_name", ["BertFor", "AutoModelFor"])
@pytest.mark.parametrize("what", PREPARED)
def test_a_saved_model_comes_back_as_it_was(what, class_name, tmp_path):
    model, words = PREPARED[what](), {"input_ids": torch.arange(6)[None]}
    for_transformers.save_pretrained(model, tmp_path / "model")
    torch.manual_seed(1)
    model_class = getattr(transformers, f"{class_name}SequenceClassification")
    again = for_transformers.from_pretrained(model_class, tmp_path / "model")
    assert_equal(again.state_dict(), model.state_dict())
    assert torch.equal(again(**words).logits, model(**words).logits)
    assert (type(again), again.dtype, again.training) == (type(model), model.dtype, False)


def test_a_generating_model_keeps_how_it_generates(tmp_path):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    condense(model, prune_to_constant_fan_in(model, 0.5))
    model.generation_config.update(max_new_tokens=7, do_sample=False, pad_token_id=0)
    for_transformers.save_pretrained(model, tmp_path)
    again = for_transformers.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    words = torch.arange(4)[None]
    assert again.generate(words).shape == (1, 11)
    assert torch.equal(again.generate(words), model.generate(words))


def test_no_other_loader_makes_a_model_of_a_saved_one(tmp_path):
    for_transformers.save_pretrained(condensed_bert(), tmp_path)
    for model_class in (transformers.BertModel, transformers.AutoModel):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            model_class.from_pretrained(tmp_path)
    with pytest.raises(SriglError, match="the file has a condensed layer 'bert"):
        for_transformers.from_pretrained(transformers.BertModel, tmp_path)


def test_what_cannot_be_saved_or_loaded_is_an_error_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueTypeError, match=r"PreTrainedModel, got Sequential.*save_model"):
        for_transformers.save_pretrained(layers(), tmp_path / "new")
    with pytest.raises(ValueTypeError, match="path must be a path, got int"):
        for_transformers.save_pretrained(condensed_bert(), 3)
    with pytest.raises(
        ValueTypeError, match=r"model_class must be a class of transformers.*'bert'"
    ):
        for_transformers.from_pretrained("bert", tmp_path)
    mixed = condensed_bert()
    mixed.classifier.bfloat16()
    with pytest.raises(SriglError, match=r"parameters of torch\.bfloat16, torch\.float32"):
        for_transformers.save_pretrained(mixed, tmp_path / "new")
    damaged = condensed_bert()
    next(m for m in damaged.modules() if isinstance(m, CondensedLinear)).indices.fill_(7)
    with pytest.raises(SriglError, match="indices"):
        for_transformers.save_pretrained(damaged, tmp_path / "new")
    generating = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )
    generating.generation_config.max_new_tokens = -1
    with pytest.raises(ValueError, match="max_new_tokens"):
        for_transformers.save_pretrained(generating, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    bert().save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SriglError, match=r"another format \(model\.safetensors\)"):
        for_transformers.save_pretrained(condensed_bert(), tmp_path)
    with pytest.raises(SriglError, match=r"has no srigl\.safetensors.*BertModel\.from_pretrained"):
        for_transformers.from_pretrained(transformers.BertModel, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_layer_of_memory_without_connections_is_refused():
    layer = CondensedLinear(16, 16, fan_in=4, device="meta").to_empty(device="cpu")
    layer.counts.zero_()
    with pytest.raises(SriglError, match=r"has no connections yet.*reset_parameters\(\)"):
        layer(torch.ones(2, 16))
    layer.reset_parameters()
    assert layer(torch.ones(2, 16)).shape == (2, 16)


def test_the_markers_of_dense_weights_are_no_part_of_the_model(trained):
    _, model, _ = trained("condensed")
    model = copy.deepcopy(model).eval()
    names = {name for name, tensor in model.state_dict().items() if tensor.shape == (1,)}
    layers = {name.rpartition(".")[0] for name in model.state_dict() if name.endswith(".values")}
    assert names == {f"{name}.weight" for name in layers}
    assert not names & {name for name, _ in model.named_parameters()}
    words = {"input_ids": torch.arange(6)[None]}
    wanted = model(**words).logits
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(model.state_dict())
    called = torch.func.functional_call(fresh, model.state_dict(), kwargs=words)
    assert torch.equal(called.logits, wanted)
    assert torch.equal(fresh(**words).logits, wanted)
    with pytest.raises(SriglError, match="read-only"):
        fresh.bert.pooler.dense.weight = model.bert.pooler.dense.weight


class Attention(nn.Module):
    """Attention in a model that is saved as models of huggingface_hub are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]

    def save_pretrained(self, file):
        torch.save(self.state_dict(), file)


def test_attention_and_models_of_other_packages_have_markers_too(tmp_path):
    model = Attention()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    SRigL(model, sgd, mode="condensed", exclude="*.out_proj", **OPTIONS)
    model.save_pretrained(tmp_path / "state")
    state = torch.load(tmp_path / "state")
    with pytest.raises(RuntimeError, match=r"size mismatch for attention\.in_proj_weight"):
        Attention().load_state_dict(state, strict=False)
    model.load_state_dict(state)
    save_model(model, tmp_path / "file")
    again, x = load_model(tmp_path / "file", Attention()), torch.ones(2, 3, 16)
    assert torch.equal(again(x), model(x))
    assert again.state_dict().keys() == state.keys()


# ---------------------------------------------------------------- Lightning


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Return a function of the mode: a run of all steps, with a checkpoint, made once."""
    runs = {}

    def run(mode):
        if mode not in runs:
            folder = tmp_path_factory.mktemp(mode)
            runs[mode] = folder / f"step={N_BEFORE}.ckpt", *fit(folder, mode)
        return runs[mode]

    return run


def test_lightning_resumes_to_the_same_bits(fitted, mode, tmp_path):
    checkpoint, network, callback = fitted(mode)
    again, other = fit(tmp_path, mode, checkpoint)
    assert_equal(again.state_dict(), network.state_dict())
    assert_equal(masks(other.srigl), masks(callback.srigl))
    assert other.srigl.trainer.step_count == N_STEPS
    assert other.srigl.trainer.n_updates == callback.srigl.trainer.n_updates == 3


def test_lightning_clips_the_masked_gradients_in_both_modes(tmp_path):
    found = {}
    for mode in ("masked", "condensed"):
        network, callback = fit(tmp_path, mode, network=Network())
        found[mode] = masks(callback.srigl), to_masked_dense(network).state_dict()
    assert_equal(found["masked"][0], found["condensed"][0])
    torch.testing.assert_close(found["masked"][1], found["condensed"][1], rtol=1e-9, atol=1e-12)


def test_lightning_does_not_resume_without_the_state_of_srigl(fitted, mode, tmp_path):
    checkpoint, _, callback = fitted(mode)
    contents = torch.load(checkpoint)
    del contents["callbacks"][callback.state_key]
    torch.save(contents, tmp_path / "less.ckpt")
    with pytest.raises(SriglError, match="the checkpoint has no state of this SRigLCallback"):
        fit(tmp_path, mode, tmp_path / "less.ckpt")


def test_lightning_validates_the_checkpoint_with_a_new_network(fitted, mode):
    checkpoint, _, _ = fitted(mode)
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[for_lightning.SRigLCallback(mode=mode, **OPTIONS)],
        logger=False,
        enable_progress_bar=False,
    )
    fresh = Network()
    data = torch.utils.data.DataLoader(torch.zeros(4, 12, dtype=torch.float64), batch_size=4)
    trainer.validate(fresh, data, ckpt_path=checkpoint, verbose=False)
    saved = torch.load(checkpoint)["state_dict"]
    assert_equal(dict(fresh.state_dict()), dict(saved))


def test_lightning_does_not_resume_a_condensed_model_without_the_callback(fitted, tmp_path):
    checkpoint, _, _ = fitted("condensed")
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.weight"):
        fit(tmp_path, None, checkpoint)


def test_lightning_logs_the_numbers_of_srigl(tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path)
    callback = for_lightning.SRigLCallback(**OPTIONS)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=N_STEPS,
        callbacks=[callback],
        logger=logger,
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(), torch.utils.data.DataLoader(dataset(), batch_size=4))
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert [float(row["srigl/updates"]) for row in rows] == [1, 2]
    numbers = callback.srigl.log_dict()
    found = {name: float(trainer.callback_metrics[name]) for name in numbers}
    assert found == pytest.approx(numbers)
    assert numbers["srigl/updates"] == 3


def test_lightning_trains_with_a_gradient_scaler(mode):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    callback = for_lightning.SRigLCallback(mode=mode, **OPTIONS)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=N_STEPS,
        callbacks=[callback],
        plugins=[lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    x, y = dataset().tensors
    data = torch.utils.data.TensorDataset(x.float(), y)
    trainer.fit(Network().float(), torch.utils.data.DataLoader(data, batch_size=4))
    assert callback.srigl.trainer.step_count == N_STEPS - 1  # the first step overflows


class Skipping(Network):
    """It leaves out batches, as a guard against bad ones does."""

    def training_step(self, batch, number):
        return None if number in (1, 3, 4) else super().training_step(batch, number)


def test_lightning_steps_without_a_loss_are_not_counted(mode):
    callback = for_lightning.SRigLCallback(mode=mode, **OPTIONS)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Skipping(), torch.utils.data.DataLoader(dataset(), batch_size=4))
    assert callback.srigl.trainer.step_count == 2 * (10 - 3)
    assert callback.srigl.trainer.n_updates


class Manual(Network):
    automatic_optimization = False


def test_lightning_modules_that_a_callback_cannot_train_are_refused(fitted):
    with pytest.raises(SriglError, match="optimises manually"):
        for_lightning.SRigLCallback(**OPTIONS).setup(None, Manual(), "fit")
    _, _, callback = fitted("masked")
    with pytest.raises(SriglError, match="has trained another module"):
        callback.setup(None, Network(), "fit")
    with pytest.raises(SriglError, match="is attached when training starts"):
        for_lightning.SRigLCallback(**OPTIONS).state_dict()


# ---------------------------------------------------------------- accelerate


def accelerated(mode, folder, first=0):
    """Return a model and its SRigL after all steps, from a checkpoint before step `first`."""
    accelerate.state.GradientState._reset_state()  # a Trainer has left its data loader there
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=N_PARTS)
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    srigl = SRigL(model, optimizer, mode=mode, **OPTIONS)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(srigl)
    if first:
        torch.manual_seed(7)  # the checkpoint has another state
        accelerator.load_state(folder)
    x, y = dataset().tensors
    for step in range(first, N_STEPS):
        if step == N_BEFORE and not first:
            accelerator.save_state(folder)
        for part in range(N_PARTS):
            rows = (torch.arange(4) + 8 * step + 4 * part) % len(x)
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x[rows]), y[rows]))
                if accelerator.sync_gradients:
                    srigl.after_backward(scaler=accelerator.scaler)
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                    optimizer.step()
                    srigl.step()
                    optimizer.zero_grad()
    return model, srigl


def test_accelerate_resumes_to_the_same_bits(mode, tmp_path):
    model, srigl = accelerated(mode, tmp_path)
    again, other = accelerated(mode, tmp_path, first=N_BEFORE)
    assert_equal(again.state_dict(), model.state_dict())
    assert_equal(masks(other), masks(srigl))
    assert other.trainer.step_count == N_STEPS
    assert other.trainer.n_updates == srigl.trainer.n_updates == 3


# ---------------------------------------------------------------- packages that are missing


@pytest.mark.parametrize(
    ("module", "missing", "command"),
    [
        ("transformers", "transformers", "transformers accelerate"),
        ("lightning", "lightning", "lightning"),
        ("lightning", "torch", "torch"),
    ],
)
def test_a_missing_package_is_an_error_that_says_what_to_install(module, missing, command):
    program = f"""
import sys
sys.modules[{missing!r}] = None
import srigl_core.integrations.{module}
"""
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"install it: pip install {command}\n" in done.stderr
    assert "BackendUnavailableError" in done.stderr


if __name__ == "__main__":
    resumed_on_this_rank(*sys.argv[1:])
    torch.distributed.destroy_process_group()  # its threads may not outlive the interpreter
