"""Hugging Face's Trainer and Lightning train sparse with a callback, and resume exactly."""

import copy
import inspect
import re
import shutil

import numpy as np
import pytest

from srigl_core import SriglError
from srigl_core.reference import UpdateSchedule

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning.pytorch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch import nn  # noqa: E402

from srigl_core.torch import CondensedLinear, SRigL, load_model, save_model, to_masked_dense  # noqa: E402

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


class SRigLTrainerCallback(transformers.TrainerCallback):
    """Trains the model of a Trainer sparse. Make it before `train`; it adds itself."""

    def __init__(self, trainer, **options):
        self.trainer = trainer
        self.srigl = SRigL(trainer.model, trainer.create_optimizer(), **options)
        # A Trainer clips before any callback, when gradients are not masked yet; so do it here.
        self.max_norm = trainer.args.max_grad_norm
        trainer.args = copy.copy(trainer.args)
        trainer.args.max_grad_norm = 0
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **_):
        if state.global_step:
            self.srigl.load_state_dict(torch.load(self.file(args, state)))

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.srigl.after_backward(scaler=self.trainer.accelerator.scaler)
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.trainer.model.parameters(), self.max_norm)

    def on_optimizer_step(self, args, state, control, **_):
        self.srigl.step()

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            torch.save(self.srigl.state_dict(), self.file(args, state))

    def file(self, args, state):
        return f"{args.output_dir}/checkpoint-{state.global_step}/srigl.pt"


class SRigLLightningCallback(lightning.Callback):
    """Trains a LightningModule sparse. It has one optimiser, and automatic optimisation."""

    def __init__(self, **options):
        self.options, self.srigl, self.has_stepped = options, None, False

    def setup(self, trainer, pl_module, stage):
        """Attach SRigL before Lightning loads a checkpoint, which needs the condensed layers."""
        if self.srigl is None:
            pl_module.to(trainer.strategy.root_device)
            optimizers = pl_module.configure_optimizers()
            self.srigl = SRigL(pl_module, optimizers, **self.options)
            pl_module.configure_optimizers = lambda: optimizers

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.srigl.after_backward(scaler=getattr(trainer.precision_plugin, "scaler", None))
        self.has_stepped = True

    def on_train_batch_end(self, *_):
        if self.has_stepped:  # not where gradients are only accumulated
            self.srigl.step()
        self.has_stepped = False

    def state_dict(self):
        return self.srigl.state_dict()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.srigl.load_state_dict(checkpoint["callbacks"].get(self.state_key))


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
    )
    return trainer, mode and SRigLTrainerCallback(trainer, mode=mode, exclude=exclude, **OPTIONS)


class Network(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(16, 3)).double()

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

    An epoch ends at the checkpoint, since Lightning resumes at the first batch of a data loader. It
    does not keep the state of PyTorch's generator, so the network has no dropout.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, torch.randint(0, 3, (40,), generator=generator))
    checkpoints = lightning.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=N_BEFORE, save_top_k=-1
    )
    callbacks = [checkpoints]
    callback = None
    if mode is not None:
        callback = SRigLLightningCallback(mode=mode, **OPTIONS)
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
    trainer.fit(network, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume)
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


def test_a_trainer_does_not_resume_without_the_state_of_srigl(trained, mode, tmp_path):
    folder, _, _ = trained(mode)
    place = f"checkpoint-{N_BEFORE}"
    shutil.copytree(folder / place, tmp_path / place)
    (tmp_path / place / "srigl.pt").unlink()
    trainer, callback = make_trainer(tmp_path, mode)
    with pytest.raises(FileNotFoundError, match=r"srigl\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / place))
    # A callback that does not even look for it.
    trainer, callback = make_trainer(tmp_path, mode)
    callback.on_train_begin = lambda *_, **__: None
    with pytest.raises(SriglError, match=r"layer 'bert.*srigl\.load_state_dict"):
        trainer.train(resume_from_checkpoint=str(tmp_path / place))


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
    with pytest.raises(SriglError, match="state is not of an SRigL"):
        fit(tmp_path, mode, tmp_path / "less.ckpt")


def test_lightning_validates_the_checkpoint_with_a_new_network(fitted, mode):
    checkpoint, _, _ = fitted(mode)
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[SRigLLightningCallback(mode=mode, **OPTIONS)],
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


@pytest.mark.parametrize("callback", [SRigLTrainerCallback, SRigLLightningCallback])
def test_a_callback_has_at_most_40_lines(callback):
    lines = inspect.getsource(callback).splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 100 for line in lines)
    assert not re.search(r"_\w+\._|\._[a-z]", "\n".join(lines))  # nothing private
